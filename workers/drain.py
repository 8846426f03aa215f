"""Taking a worker out of service: nothing new, what runs ends, and then it may go."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from workers.server import Worker

log = logging.getLogger(__name__)

KEPT_S: Final = 300.0
"""A drain that nobody has asked for again, or ended by a signal, for so long after its time is
taken back: who asked has gone away, and a worker must not be useless for ever."""
_LOOK_S: Final = 0.05


class Drain:
    """One at a time, whoever asks for it: a pod's preStop hook, an operator, or a signal."""

    def __init__(self, worker: Worker, limit_s: float, clock: Callable[[], float]) -> None:
        """`clock`: as the worker's."""
        self._worker = worker
        self._limit_s = limit_s
        self._clock = clock
        self._until: float | None = None
        """When the present one's time is over; None: none was asked for."""
        self._asked_at = 0.0
        self._last = False
        """The process ends after it."""

    async def ask(self) -> str | None:
        """Begin, or join what has begun. What is left when its time is over; None: nothing is.

        Asked again after that, it waits as long once more.
        """
        now = self._asked_at = self._clock()
        if self._until is None or now >= self._until:
            self._until = now + self._limit_s
            log.info("draining", extra={"seconds": self._limit_s})
            self._worker.rest(True)
        return await self._wait(self._until)

    async def finish(self) -> None:
        """Join or begin the last one. What still runs after its time is handed back."""
        self._last = True
        if self._until is None:
            await self.ask()
        else:  # Its time may be over: who asked then has waited as long as there was.
            await self._wait(self._until)
        self._worker.hand_back()

    def take_back(self) -> bool:
        """Let the worker take work again. False when it is too late."""
        if self._last:
            return False
        if self._until is not None:
            self._until = None
            log.info("drain taken back")
            self._worker.rest(False)
        return True

    def call_off(self) -> None:
        """The process ends at once: nobody need wait."""
        self._until = None

    async def forget_unused(self) -> None:
        """Take back what nobody came for. Until cancelled."""
        while True:
            await asyncio.sleep(1.0)
            unused_s = self._clock() - self._asked_at - self._limit_s
            if self._until is not None and unused_s > KEPT_S and self.take_back():
                log.warning("nobody ended a drained worker", extra={"unused_s": round(unused_s)})

    async def _wait(self, until: float) -> str | None:
        # Polled: leases end in another process, which tells of it only by its steps.
        while (left := self._worker.left) and self._clock() < until:
            await asyncio.sleep(_LOOK_S)
            if self._until != until:
                return "the drain was called off"
        return left
