"""Log lines that a peer can cause, so many a minute at most."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Mapping

LINES_A_MINUTE: Final = 10
MESSAGES_MAX: Final = 100
TEXT_MAX: Final = 500
"""Characters of one field: a peer's own words may be in it."""


class LimitedLog:
    """Each message (a constant) has a budget of its own. The next line says how many were left out.

    May be used by several threads: then a line more or less may be written.
    """

    def __init__(
        self,
        log: logging.Logger,
        lines_a_minute: int = LINES_A_MINUTE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log, self._most, self._clock = log, lines_a_minute, clock
        self._windows: dict[str, tuple[float, int]] = {}
        """By message: when its present minute began, and how many lines it was worth so far."""

    def warning(self, message: str, extra: Mapping[str, Any]) -> None:
        if (left_out := self._take(message)) is not None:
            self._log.warning(message, extra=_cut(extra, left_out))

    def exception(self, message: str, extra: Mapping[str, Any]) -> None:
        """With the traceback of what is being handled."""
        if (left_out := self._take(message)) is not None:
            self._log.exception(message, extra=_cut(extra, left_out))

    def _take(self, message: str) -> int | None:
        """How many lines were left out before this one; None when it is to be left out too."""
        now = self._clock()
        began, count = self._windows.get(message, (now, 0))
        left_out = 0
        if now - began >= 60.0:
            left_out = max(0, count - self._most)
            began, count = now, 0
        if message in self._windows or len(self._windows) < MESSAGES_MAX:
            self._windows[message] = began, count + 1
        return left_out if count < self._most else None


def _cut(extra: Mapping[str, Any], left_out: int) -> dict[str, Any]:
    found = {k: v[:TEXT_MAX] if isinstance(v, str) else v for k, v in extra.items()}
    return {**found, "left_out": left_out} if left_out else found
