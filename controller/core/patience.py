"""How long a reflector waits, for what, and between what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds."""

    gap_s: float = 1.0
    """Least time between the beginnings of two requests."""
    backoff_max_s: float = 30.0
    retry_after_max_s: float = 60.0
    """A server that asks for more is asked again all the same."""
    steady_s: float = 10.0
    """A watch that lasted so long was no failure, whatever ended it."""
    answer_s: float = 15.0
    """How long a server may take to answer, and for one page of a list."""
    snapshot_s: float = 30.0
    """How long the snapshot at the beginning of a watch may take."""
    silence_s: float = 75.0
    """A watch without a word for so long is half open: bookmarks come once a minute."""
    watch_min_s: float = 240.0
    watch_max_s: float = 480.0
    """Between these a watch is asked to last: routers should not come back all at once."""
    resync_s: float = 600.0
    """A snapshot older than that is taken anew when its watch ends: nothing missed is for ever."""

    @property
    def stale_max_s(self) -> float:
        """When the server has answered well for so long, the set is its own.

        By then a half-open watch has been noticed, the longest pause is over, and a snapshot has
        arrived.
        """
        return self.silence_s + self.backoff_max_s + self.answer_s


class Backoff:
    """When the next request may be sent: a gap always, a pause after failures."""

    def __init__(self, patience: Patience, uniform: Callable[[float, float], float]) -> None:
        self.next_at = 0.0
        self._patience = patience
        self._uniform = uniform
        self._failed_in_a_row = 0

    def sent(self, now: float) -> None:
        self.next_at = now + self._patience.gap_s

    def ended(self, now: float) -> None:
        """An exchange is over. A restarted server's clients should not all come at one moment."""
        self._wait_until(now + self._uniform(0.0, self._patience.gap_s))

    def failed(self, now: float) -> None:
        pause_s = self._patience.gap_s * 2.0 ** min(self._failed_in_a_row, 16)
        pause_s = min(pause_s, self._patience.backoff_max_s)
        self._failed_in_a_row += 1
        self._wait_until(now + self._uniform(pause_s / 2, pause_s))

    def told(self, retry_after_s: float, now: float) -> None:
        """The server named a time: no sooner, and not at the same moment as the others."""
        patience_s = min(retry_after_s, self._patience.retry_after_max_s)
        self._wait_until(now + patience_s + self._uniform(0.0, self._patience.gap_s))

    def answers(self) -> None:
        """The server gave a reasoned refusal: short pauses again, and yet no hot loop."""
        self._failed_in_a_row = min(self._failed_in_a_row, 1)

    def steady(self) -> None:
        self._failed_in_a_row = 0

    def _wait_until(self, at: float) -> None:
        self.next_at = max(self.next_at, at)
