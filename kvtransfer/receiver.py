"""Pulls prompts' KV in a thread of its own, so that no engine step is waited for."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import zmq

from kvtransfer.connection import Broken, Connection
from kvtransfer.core.pulling import Timeouts
from kvtransfer.orders import Mine, Order, Pulled
from kvtransfer.serving_thread import ServingThread
from kvtransfer.transports import device
from kvtransfer.wakeups import Wakeup

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Mine", "Order", "Pulled", "Receiver", "Timeouts"]

log = logging.getLogger(__name__)

IN_FLIGHT_BYTES_MAX: Final = 512 << 20
"""Of one sender half: one that is stopped holds what it has until it is fenced."""
IDLE_MS: Final = 100
READING_MS: Final = 1
"""Between two looks at reads that nothing wakes us for. Most are over by the first."""


_Key = tuple[str, str]
"""Of a connection: a sender's endpoint and epoch."""


class Receiver:
    """All pulls of one engine rank. Its methods are the engine's, and return at once."""

    def __init__(
        self, mine: Mine, timeouts: Timeouts, in_flight_bytes_max: int = IN_FLIGHT_BYTES_MAX
    ) -> None:
        self._mine, self._timeouts, self._room = mine, timeouts, in_flight_bytes_max
        self._context: zmq.Context[Any] = zmq.Context()
        self._connections: dict[_Key, Connection] = {}
        self._open: dict[str, Connection] = {}
        """By endpoint: the one that a sender has answered."""
        self._inbox: deque[Order | str] = deque()
        self._handles: dict[str, tuple[_Key, str]] = {}
        """By request id."""
        self._ended: deque[Pulled] = deque()
        self._news = threading.Event()
        self._wakeup = Wakeup()
        self._thread = ServingThread(
            "kv-receiver",
            self._turn,
            begin=partial(device.use, mine.memory.device),
            end=self._end,
        )
        self._thread.start()

    # ------------------------------------------------------------ the engine's

    def start(self, order: Order) -> None:
        """Begin to fetch; `ended` tells of its end, once."""
        if reason := self.dead:
            self._fail(order, reason)
            return
        self._inbox.append(order)
        self._wakeup.set()

    def cancel(self, request_id: str) -> None:
        """Nobody wants it any more. `ended` tells when its blocks are out of reach."""
        self._inbox.append(request_id)
        self._wakeup.set()

    def ended(self, wait_s: float = 0.0) -> list[Pulled]:
        """What ended since the last call. Waits so long for the first of it."""
        if wait_s:
            self._news.wait(wait_s)
        self._news.clear()
        found = []
        while self._ended:
            found.append(self._ended.popleft())
        return found

    @property
    def dead(self) -> str | None:
        """Why nothing is pulled any more; None while it is."""
        return self._thread.dead

    def close(self) -> None:
        self._thread.closing()
        self._wakeup.set()
        self._thread.join(timeout=5)
        self._wakeup.close()

    # ------------------------------------------------------------ the thread

    def _turn(self) -> None:
        self._sleep()
        self._take_inbox()
        now = time.monotonic()
        for connection in list(self._connections.values()):
            self._guarded(connection, connection.hear)
            self._supersede(connection)
            self._guarded(connection, connection.land)
        # All have landed: the room is known, and whoever waits for some sleeps for none.
        for connection in list(self._connections.values()):
            flying = sum(c.flying for c in self._connections.values())
            room = min(self._room - flying, self._room // 2 - connection.flying)
            self._guarded(connection, partial(connection.read, room, alone=not flying))
            self._guarded(connection, partial(connection.tick, now))
            self._report(connection)
            if connection.idle(now):
                self._drop(connection, "idle")

    def _end(self) -> None:
        """Fail what is being pulled, and leave."""
        reason = self._thread.dead or "closing"
        for connection in list(self._connections.values()):
            self._drop(connection, reason)
        while self._inbox:
            if isinstance(order := self._inbox.popleft(), Order):
                self._fail(order, reason)
        self._context.term()

    def _fail(self, order: Order, reason: str) -> None:
        self._ended.append(Pulled(order.request_id, reason))
        self._news.set()

    def _sleep(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wakeup.fileno(), zmq.POLLIN)
        timeout_ms = IDLE_MS
        for connection in self._connections.values():
            poller.register(connection.socket, zmq.POLLIN)
            if connection.flying:
                descriptors = connection.descriptors()
                if descriptors is None:
                    timeout_ms = READING_MS
                for descriptor in descriptors or ():
                    poller.register(descriptor, zmq.POLLIN)
        poller.poll(timeout_ms)
        self._wakeup.clear()

    def _take_inbox(self) -> None:
        while self._inbox:
            command = self._inbox.popleft()
            now = time.monotonic()
            if isinstance(command, str):
                key, handle = self._handles.get(command, (("", ""), ""))
                if connection := self._connections.get(key):
                    self._guarded(connection, partial(connection.cancel, handle, now))
                    self._report(connection)
                continue
            try:
                connection = self._connection(command)
            except Broken as broken:
                self._fail(command, str(broken))
                continue
            self._handles[command.request_id] = (connection.key, command.handle)
            self._guarded(connection, partial(connection.start, command, now))
            self._report(connection)

    def _connection(self, order: Order) -> Connection:
        known = self._connections.get((order.endpoint, order.epoch))
        if known is None:
            known = Connection(self._context, order, self._mine, self._timeouts, self._wakeup.set)
            self._connections[known.key] = known
        return known

    def _supersede(self, connection: Connection) -> None:
        """A sender that answers at an address is the one there: any other epoch's is no more.

        An order does not tell: it may be a router's that has not heard of a restart yet.
        """
        former = self._open.get(connection.endpoint)
        here = self._connections.get(connection.key) is connection
        if not connection.opened or connection is former or not here:
            return
        self._open[connection.endpoint] = connection
        if former is not None:
            self._drop(
                former, f"the sender restarted: epoch {former.epoch}, now {connection.epoch}"
            )

    def _guarded(self, connection: Connection, act: Callable[[], None]) -> None:
        if self._connections.get(connection.key) is not connection:
            return
        try:
            act()
        except Broken as broken:
            self._drop(connection, str(broken))
        except Exception as error:  # The thread's edge: no pull may hang on a bug.
            log.exception("pulling failed", extra={"endpoint": connection.endpoint})
            self._drop(connection, f"internal error: {error!r}")

    def _drop(self, connection: Connection, reason: str) -> None:
        level = logging.INFO if reason in ("idle", "closing") else logging.WARNING
        log.log(level, "sender dropped", extra={"endpoint": connection.endpoint, "reason": reason})
        del self._connections[connection.key]
        if self._open.get(connection.endpoint) is connection:
            del self._open[connection.endpoint]
        connection.drop(reason)
        self._report(connection)

    def _report(self, connection: Connection) -> None:
        if not connection.ended:
            return
        for pulled in connection.ended:
            self._handles.pop(pulled.request_id, None)
        self._ended.extend(connection.ended)
        connection.ended.clear()
        self._news.set()
