"""Work for a request before it is dispatched: in turns with the loop's own, or off the loop."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from contextvars import ContextVar
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from router.core.errors import GrammarTooSlow, PreparingFull

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor

    from router.core.errors import RouterError

SLICE_S: Final = 0.005
"""Submitting requests may take the loop so long before whatever else is due gets its turn."""


class SubmissionTurns:
    """Has requests of one loop be submitted a few at a time.

    One request can be 128 sequences, and all their tasks become ready at once: in one go they
    would hold up every stream's tokens.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._since = 0.0

    async def take(self) -> None:
        """Return when there is time for one more sequence; what follows should take about 1 ms."""
        async with self._lock:
            if monotonic() - self._since > SLICE_S:
                await asyncio.sleep(0)
                self._since = monotonic()


AT_ONCE: Final = 4
HELD_S: Final = 0.05
"""A place is given on after so long: who waits for a thread, or an image's server, needs none."""


class Places:
    """So few requests at once are parsed, checked and rendered; the others wait in their order.

    Each of those steps takes a few milliseconds of the loop. With hundreds of requests at it, one
    round of the loop would take a second, and every stream's tokens would wait for it.
    """

    def __init__(self, at_once: int = AT_ONCE, held_s: float = HELD_S) -> None:
        self._free = asyncio.Semaphore(at_once)
        self._held_s = held_s

    async def take(self) -> Place:
        """Return when it is this request's turn; the place is to be given back by `leave`."""
        await self._free.acquire()
        place = Place(self._free)
        place.timer = asyncio.get_running_loop().call_later(self._held_s, place.leave)
        return place


class Place:
    """One request's."""

    def __init__(self, free: asyncio.Semaphore) -> None:
        self._free: asyncio.Semaphore | None = free
        self.timer: asyncio.TimerHandle | None = None

    def leave(self) -> None:
        """Give it to the next request; once, however often it is called."""
        if self._free is not None:
            self._free.release()
            self._free = None
        if self.timer is not None:
            self.timer.cancel()


place: ContextVar[Place | None] = ContextVar("place", default=None)
"""The running request's, until it is submitted."""


def leave_place() -> None:
    """Call this when a request has been submitted: what follows is its stream."""
    if (mine := place.get()) is not None:
        mine.leave()


STUCK_MAX: Final = 4
"""Threads that may be at work on what nobody waits for any more."""


class GrammarCheck:
    """One thread at a time checks grammars, and is left alone with one that takes too long.

    The checks are native code that holds no lock of Python's, and that nothing can stop.
    """

    def __init__(self, seconds: float, most: int) -> None:
        """`most`: so many may wait."""
        self._seconds, self._most = seconds, most
        self._lock = asyncio.Lock()
        self._waiting = self._stuck = 0

    async def run(self, function: Callable[[], Any]) -> Any:
        """Raises `GrammarTooSlow`, `PreparingFull`, and what `function` raises."""
        if self._waiting >= self._most:
            raise PreparingFull(waiting=self._waiting)
        self._waiting += 1
        try:
            async with self._lock:
                if self._stuck >= STUCK_MAX:
                    raise PreparingFull(waiting=self._waiting)
                return await self._run(function)
        finally:
            self._waiting -= 1

    async def _run(self, function: Callable[[], Any]) -> Any:
        done: Future[Any] = Future()
        answer = asyncio.wrap_future(done)
        # A pool's threads would be waited for when the process ends.
        threading.Thread(target=_call, args=(function, done), daemon=True).start()
        try:
            async with asyncio.timeout(self._seconds):
                return await asyncio.shield(answer)
        except TimeoutError:
            raise GrammarTooSlow(seconds=self._seconds) from None
        finally:
            if not answer.done():
                self._stuck += 1
                answer.add_done_callback(self._freed)

    def _freed(self, answer: asyncio.Future[Any]) -> None:
        self._stuck -= 1
        answer.exception()  # It is nobody's by now.


def _call(function: Callable[[], Any], done: Future[Any]) -> None:
    try:
        done.set_result(function())
    except Exception as error:  # noqa: BLE001  # It is raised where it is waited for.
        done.set_exception(error)


class BoundedPool:
    """An executor's threads, with a bound on what waits for them."""

    def __init__(
        self, executor: Executor, most: int, refuse: Callable[[RouterError], Exception]
    ) -> None:
        """Everything that the executor is given is counted, whoever gives it."""
        self._executor, self._most, self._refuse = executor, most, refuse
        self._submit = executor.submit
        self._pending = 0
        executor.submit = self.submit  # type: ignore[method-assign]  # Its users hold the object.

    def submit(self, function: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        """Raises what `refuse` makes of `PreparingFull`."""
        if self._pending >= self._most:
            raise self._refuse(PreparingFull(waiting=self._pending))
        future: Future[Any] = self._submit(function, *given, **named)
        self._pending += 1
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: self._done_soon(loop))
        return future

    def _done_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        """A thread calls this: the count is the loop's alone."""
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._done)

    def _done(self) -> None:
        self._pending -= 1
