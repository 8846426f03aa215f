"""How often a request may be begun before its first token."""

from __future__ import annotations

from dataclasses import dataclass

TRIES_MAX = 3
REFUSALS_MAX = 8
"""Of workers that take nothing on, and say so at once: beyond these, each counts as a try."""


@dataclass(frozen=True, slots=True)
class Tries:
    """This one and those before it. A worker that refused, since it drains, has tried nothing."""

    number: int = 1
    refused: int = 0
    """Of those before this one, not counted."""

    def next(self, *, refused: bool) -> Tries | None:
        """None when this was the last."""
        uncounted = self.refused + (refused and self.refused < REFUSALS_MAX)
        if self.number - uncounted >= TRIES_MAX:
            return None
        return Tries(self.number + 1, uncounted)


FIRST = Tries()
