"""When a first token is overdue, and how often a request may then be tried twice at once."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from router.core.limits import Limits

PATIENCE_FACTOR: Final = 3.0
"""A first token is overdue after so many times what was estimated, and `Limits.hedge_after_s`."""
STUCK_FACTOR: Final = 10.0
STUCK_FLOOR_S: Final = 60.0
"""A try without a first token is given up after so many times the estimate and so many seconds."""
STREAM_STUCK_S: Final = 600.0
"""A stream without progress is given up after so long: one that was preempted may wait for others
to end, and nobody else can go on with it."""
BURST: Final = 10.0
"""Hedges that may begin at once, however few requests came before."""


def stuck_s(estimated_s: float, *, streams: bool) -> float:
    """How long a worker may bring nothing to a request. `streams`: its client has tokens."""
    return STREAM_STUCK_S if streams else STUCK_FLOOR_S + STUCK_FACTOR * estimated_s


class Hedges:
    """A budget: one hedge for so many requests, and a few at once.

    A lost worker or two are hidden by it. An outage, in which every request is overdue, it does not
    turn into a storm: whatever happens there is but a small share of requests more.
    """

    def __init__(self, limits: Limits) -> None:
        self._ratio, self._after_s = limits.hedge_ratio, limits.hedge_after_s
        self._left = BURST if self._ratio else 0.0
        self.ended: Counter[str] = Counter()
        """By what became of them: the `first` try went on, or the `second`, or the client left
        (`called_off`). Those that were `over_budget` did not begin."""

    def overdue_s(self, estimated_s: float) -> float:
        """How long to wait for a first token before another worker is asked too."""
        return self._after_s + PATIENCE_FACTOR * estimated_s

    def placed(self) -> None:
        """A request has begun: it pays its share."""
        self._left = min(BURST, self._left + self._ratio)

    @property
    def may_begin(self) -> bool:
        return self._left >= 1.0

    def begun(self) -> None:
        self._left -= 1.0

    def refused(self) -> bool:
        """One did not begin: true, since it is counted."""
        self.ended["over_budget"] += 1
        return True
