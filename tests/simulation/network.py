"""The network of the simulated tier: connections that keep order, are late, and break as a whole.

It stands where the sockets are and nowhere else: `SimChannel` for `workers.channel.Channel`, and
under `router.link.Link` for its ZeroMQ socket. What travels is what would: encoded messages.
"""

from __future__ import annotations

import asyncio
import contextvars
import zlib
from collections import deque
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from workers.api import MALFORMED, ROUTER_SILENCE_S, decode_to_worker, encode
from workers.channel import QUEUE_MAX

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from tests.simulation.events import Events
    from tests.simulation.processes import Process
    from workers.api import ToRouter
    from workers.channel import Listener

HEARTBEAT_S: Final = ROUTER_SILENCE_S + 1.0
"""An end that hears nothing for so long closes: ZeroMQ's heartbeat, at an interval of 1 s."""
REDIAL_S: Final = 0.5


class Way(StrEnum):
    TO_WORKER = "to worker"
    TO_ROUTER = "to router"

    @property
    def back(self) -> Way:
        return Way.TO_ROUTER if self is Way.TO_WORKER else Way.TO_WORKER


class Network:
    """All hosts and connections; the seed's latencies come from `rng`."""

    def __init__(self, rng: random.Random, events: Events, latency_s: float) -> None:
        self.loop = asyncio.get_running_loop()
        self.events = events
        self.queued_max = 0
        self._rng = rng
        self._latency_s = latency_s
        self._listening: dict[str, SimChannel] = {}
        self._dialed = 0
        self.nowhere = contextvars.Context()

    def latency_s(self) -> float:
        return self._latency_s * self._rng.uniform(0.5, 2.0)

    def uniform(self, low: float, high: float) -> float:
        return self._rng.uniform(low, high)

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Outside of every process: the network goes on while processes are stopped."""
        self.loop.call_later(seconds, call, context=self.nowhere)

    def listen(self, address: str, channel: SimChannel) -> None:
        assert address not in self._listening, f"{address} is taken"
        self._listening[address] = channel

    def hang_up(self, address: str) -> None:
        self._listening.pop(address, None)

    def listener(self, address: str) -> SimChannel | None:
        return self._listening.get(address)

    def identity(self) -> bytes:
        self._dialed += 1
        return b"%d" % self._dialed


class SimChannel:
    """A worker's listening end: `Channel` without its socket."""

    def __init__(
        self, network: Network, address: str, process: Process, listener: Listener
    ) -> None:
        self.address = address
        self.connections: dict[bytes, Connection] = {}
        self._network = network
        self._process = process
        self._listener = listener
        network.listen(address, self)

    @property
    def now(self) -> float:
        return self._network.loop.time()

    def send(self, router: bytes, message: ToRouter) -> bool:
        connection = self.connections.get(router)
        return connection is not None and connection.carry(Way.TO_ROUTER, encode(message))

    def close(self) -> None:
        """Take no more; what was said is still said."""
        self._network.hang_up(self.address)
        for connection in list(self.connections.values()):
            connection.closed_by(Way.TO_ROUTER)

    def take(self, connection: Connection, frame: bytes) -> None:
        """Deliver what the network brought, once the process runs."""
        self._network.loop.call_soon(self._hear, connection, frame, context=self._process.context)

    def _hear(self, connection: Connection, frame: bytes) -> None:
        connection.queued[Way.TO_WORKER] -= 1
        try:
            message = decode_to_worker(frame)
        except MALFORMED as error:
            raise AssertionError(f"a router sent what a worker can't read: {error}") from error
        self._listener.on_message(connection.identity, message)


class Wire:
    """A router's end: dials until somebody listens, again when the connection breaks.

    What is said while there is no connection waits for the next, as in ZeroMQ.
    """

    def __init__(self, network: Network, address: str, process: Process, owner: WireOwner) -> None:
        self.address = address
        self.process = process
        self.connection: Connection | None = None
        self._network = network
        self._owner = owner
        self._waiting: deque[bytes] = deque()
        self._closed = False
        network.later(network.latency_s(), self._dial)

    def send(self, frame: bytes) -> bool:
        """False when it takes no more."""
        if self.connection is not None:
            return self.connection.carry(Way.TO_WORKER, frame)
        self._waiting.append(frame)
        return len(self._waiting) <= QUEUE_MAX

    def close(self) -> None:
        self._closed = True
        if self.connection is not None:
            self.connection.closed_by(Way.TO_WORKER)

    def take(self, connection: Connection, frame: bytes) -> None:
        self._network.loop.call_soon(self._hear, connection, frame, context=self.process.context)

    def broken(self) -> None:
        """The network has noticed: the process hears of it once it runs."""
        self.connection = None
        if not self._closed:
            self._network.later(REDIAL_S, self._dial)
            self._network.loop.call_soon(self._tell, context=self.process.context)

    def _tell(self) -> None:
        if not self._closed:
            self._owner.on_broken()

    def _dial(self) -> None:
        if self._closed or self.connection is not None:
            return
        channel = self._network.listener(self.address)
        if channel is None:
            self._network.later(REDIAL_S, self._dial)
            return
        self.connection = Connection(self._network, self, channel)
        while self._waiting:
            self.connection.carry(Way.TO_WORKER, self._waiting.popleft())

    def _hear(self, connection: Connection, frame: bytes) -> None:
        connection.queued[Way.TO_ROUTER] -= 1
        if not self._closed:
            self._owner.on_frame(frame)


class WireOwner:
    """What a wire tells its link."""

    def on_frame(self, frame: bytes) -> None:
        raise NotImplementedError

    def on_broken(self) -> None:
        raise NotImplementedError


class Connection:
    """One connection: in order both ways; when it breaks, what is under way is lost both ways."""

    def __init__(self, network: Network, wire: Wire, channel: SimChannel) -> None:
        self.identity = network.identity()
        self.queued = dict.fromkeys(Way, 0)
        self._network = network
        self._wire = wire
        self._channel = channel
        self._whole = True
        self._under_way: dict[Way, deque[bytes]] = {way: deque() for way in Way}
        self._due = dict.fromkeys(Way, 0.0)
        channel.connections[self.identity] = self

    @property
    def name(self) -> str:
        return f"{self._wire.process.name}-{self._channel.address}#{self.identity.decode()}"

    @property
    def router(self) -> str:
        return self._wire.process.name

    def carry(self, way: Way, frame: bytes) -> bool:
        """Take a frame on; False when the queue is full. Nobody is told of what gets lost."""
        if self.queued[way] >= QUEUE_MAX:
            return False
        self.queued[way] += 1
        self._network.queued_max = max(self._network.queued_max, self.queued[way])
        self._network.events.note("sent", self.name, way, zlib.crc32(frame))
        if self._whole:
            self._under_way[way].append(frame)
            self._arrange(way, self._network.latency_s())
        return True

    def stall(self, way: Way, seconds: float) -> None:
        """Hold back what is said from now on; the end that hears nothing closes in the end."""
        now = self._network.loop.time()
        self._due[way] = max(self._due[way], now + seconds)
        if seconds > HEARTBEAT_S:
            self._network.later(
                self._network.uniform(HEARTBEAT_S - 1, HEARTBEAT_S),
                lambda: self.closed_by(way.back),
            )

    def cut(self, router_notices_s: float, worker_notices_s: float) -> None:
        """Break it; each end learns of it when it does."""
        self._lose()
        self._network.later(router_notices_s, self._router_notices)
        self._network.later(worker_notices_s, self._worker_notices)

    def closed_by(self, sends: Way) -> None:
        """One end closes, the one that sends that way: what it said is still delivered."""
        if not self._whole:
            return
        self._whole = False
        self._under_way[sends.back].clear()
        if sends is Way.TO_WORKER:
            self._wire.broken()
        else:
            self._channel.connections.pop(self.identity, None)
        self._due[sends] = max(
            self._due[sends], self._network.loop.time() + self._network.latency_s()
        )
        notices = self._worker_notices if sends is Way.TO_WORKER else self._router_notices
        self._network.loop.call_at(self._due[sends] + 1e-6, notices, context=self._network.nowhere)

    def _lose(self) -> None:
        self._whole = False
        for frames in self._under_way.values():
            frames.clear()

    def _router_notices(self) -> None:
        if self._wire.connection is self:
            self._network.events.note("broken", self.name, "router")
            self._wire.broken()

    def _worker_notices(self) -> None:
        if self._channel.connections.pop(self.identity, None) is not None:
            self._network.events.note("broken", self.name, "worker")

    def _arrange(self, way: Way, latency_s: float) -> None:
        due = max(self._due[way], self._network.loop.time() + latency_s)
        self._due[way] = due
        self._network.loop.call_at(due, self._arrive, way, context=self._network.nowhere)

    def _arrive(self, way: Way) -> None:
        # Whichever timer it is, the oldest frame comes first; a broken connection has none.
        if self._under_way[way]:
            frame = self._under_way[way].popleft()
            end = self._channel if way is Way.TO_WORKER else self._wire
            end.take(self, frame)
