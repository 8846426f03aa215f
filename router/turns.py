"""Messages from many links, one at a time from each, and never for long at once."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Protocol

from workers.loop_hold import TURN_S

if TYPE_CHECKING:
    from collections.abc import Callable


class Source(Protocol):
    """A link with messages that wait."""

    def take_next(self) -> bool:
        """Handle one message, or a part of a large one; False when there is none."""


class Turns:
    """Sources are asked in rotation for `TURN_S`; then the loop does what else there is to do.

    So the flood of one worker delays the others by one message, and whatever it costs to handle
    what workers say, HTTP and timers have their share of the loop.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ready: dict[Source, None] = {}
        self._asked = False
        """A turn is on the loop's list."""

    def wake(self, source: Source) -> None:
        """There may be something to take from it."""
        self._ready[source] = None
        self._ask()

    def forget(self, source: Source) -> None:
        """It is closed."""
        self._ready.pop(source, None)

    def _ask(self) -> None:
        if not self._asked:
            self._asked = True
            asyncio.get_running_loop().call_soon(self._take)

    def _take(self) -> None:
        self._asked = False
        until = self._clock() + TURN_S
        while self._ready:
            source = next(iter(self._ready))
            del self._ready[source]
            if source.take_next():
                self._ready[source] = None  # Behind all others.
            if self._clock() >= until:
                break
        if self._ready:
            self._ask()
