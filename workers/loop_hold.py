"""How long an event loop is held up: what one turn may take, and what was measured."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

TURN_S: Final = 0.005
"""Messages are taken for so long before the loop does something else, however many wait."""
SAMPLE_S: Final = 0.05
RECENT_S: Final = 60.0
HOLD_BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class LoopHold:
    """Asks to be woken, again and again, and measures how late that happens."""

    def __init__(self, observe: Callable[[float], None]) -> None:
        """`observe` is told of each sample, in seconds."""
        self._observe = observe
        self._longest = [0.0, 0.0]
        """In this window of `RECENT_S`, and in the one before."""
        self._window_at = 0.0

    @property
    def longest_s(self) -> float:
        """Over the last one or two minutes."""
        return max(self._longest)

    def sample(self, late_s: float, now: float) -> None:
        """Count one wake-up that was so much late."""
        if now - self._window_at >= RECENT_S:
            self._longest = [0.0, self._longest[0]]
            self._window_at = now
        self._longest[0] = max(self._longest[0], late_s)
        self._observe(late_s)

    async def run(self) -> None:
        """Measure until cancelled."""
        clock = asyncio.get_running_loop().time
        while True:
            due = clock() + SAMPLE_S
            await asyncio.sleep(SAMPLE_S)
            now = clock()
            self.sample(max(0.0, now - due), now)
