"""A receiver's connection to one sender: its control socket, its memory, and the pulls from it."""

from __future__ import annotations

import logging
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import msgspec
import zmq

from kvtransfer.checksums import Mode
from kvtransfer.connecting import Connecting
from kvtransfer.core.geometry import Unlike
from kvtransfer.core.pulling import (
    AskFollow,
    AskRenew,
    Effects,
    End,
    FencePeer,
    Pull,
    TellRelease,
    Timeouts,
)
from kvtransfer.curve import present
from kvtransfer.limited_log import LimitedLog
from kvtransfer.orders import Mine, Order, Pulled
from kvtransfer.protocol import (
    FRAME_BYTES_MAX,
    MALFORMED,
    VERSION,
    Blocks,
    Follow,
    Gone,
    Held,
    Open,
    Opened,
    Rejected,
    Release,
    Renew,
    Sealed,
    ToReceiver,
)
from kvtransfer.sockets import bounded, is_address
from kvtransfer.transports.api import Progress, TransferError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtransfer.connecting import Reach
    from kvtransfer.transports.api import Peer

log = logging.getLogger(__name__)

READ_BYTES_MAX: Final = 64 << 20
"""Of one read: later ones start as earlier ones end."""
RECEIVE_MAX: Final = 256
IDLE_S_MAX: Final = 300.0
"""A connection without pulls is given up then; the next pull from there makes another."""
_decode = msgspec.msgpack.Decoder(ToReceiver).decode
_encode = msgspec.msgpack.Encoder().encode


@dataclass(slots=True)
class _Flight:
    number: int
    strides: range
    size: int
    parts: list[tuple[Peer, Any]]


@dataclass(slots=True)
class _Running:
    order: Order
    pull: Pull
    flights: list[_Flight] = field(default_factory=list)
    moved: int = 0
    busy_since: float = 0.0
    read_s: float = 0.0
    hidden_s: float = 0.0
    sealed_at: float | None = None


class Broken(Exception):
    """The sender as a whole can't be used; its pulls fail together, after the fence."""


class Connection:
    """Belongs to the receiver's thread. `Broken` out of any method means: drop it.

    Out of the constructor, that there is nothing to drop.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        order: Order,
        mine: Mine,
        timeouts: Timeouts,
        wake: Callable[[], None],
    ) -> None:
        """`wake`: called from another thread, when `hear` has something to see."""
        self.endpoint, self.epoch = order.endpoint, order.epoch
        if not is_address(order.endpoint):
            raise Broken(f"no address of a sender: {order.endpoint!r}")
        self._mine, self._timeouts, self._wake = mine, timeouts, wake
        self._log = LimitedLog(log)
        self._socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 200)
        bounded(self._socket, FRAME_BYTES_MAX)
        present(self._socket, mine.keys)
        # A name of our own: after a broken line the sender knows us again, and what we follow.
        self._socket.setsockopt(zmq.ROUTING_ID, secrets.token_hex(8).encode())
        try:
            self._socket.connect(order.endpoint)
        except zmq.ZMQError as error:
            self._socket.close()
            raise Broken(f"no address of a sender: {order.endpoint!r}: {error}") from None
        self._seq = 0
        self._questions: dict[int, tuple[str, float]] = {}
        """Asked and not answered: whose (handle), when."""
        self._by_handle: dict[str, _Running] = {}
        self._opened: Opened | None = None
        self._connecting: Connecting | None = None
        self._reach: Reach | None = None
        self._idle_since = time.monotonic()
        self.ended: list[Pulled] = []
        self._socket.send(_encode(Open(self._next(), VERSION, mine.layout, mine.rank)))

    def __len__(self) -> int:
        return len(self._by_handle)

    @property
    def key(self) -> tuple[str, str]:
        return self.endpoint, self.epoch

    @property
    def opened(self) -> bool:
        """A sender of our epoch has answered."""
        return self._opened is not None

    @property
    def socket(self) -> zmq.Socket[bytes]:
        return self._socket

    @property
    def flying(self) -> int:
        """Bytes of reads in flight."""
        return sum(f.size for r in self._by_handle.values() for f in r.flights)

    def descriptors(self) -> list[int] | None:
        """What wakes a reader while reads are in flight; None when only the clock does."""
        return self._reach.descriptors() if self._reach else []

    # ------------------------------------------------------------ pulls

    def start(self, order: Order, now: float) -> None:
        if order.handle in self._by_handle:
            self.ended.append(Pulled(order.request_id, "its handle is being pulled already"))
            return
        # A sender that has answered is not waited for, but the connection to its memory is.
        asked_at = now if self._opened is None else None
        running = _Running(order, Pull(self._timeouts, asked_at))
        self._by_handle[order.handle] = running
        if self._reach is not None:
            self._carry_out(running, running.pull.opened(self._reach.wanted(order), now), now)

    def cancel(self, handle: str, now: float) -> None:
        if running := self._by_handle.get(handle):
            self._carry_out(running, running.pull.cancel(now), now)

    # ------------------------------------------------------------ the sender speaks

    def hear(self) -> None:
        """Take what has come."""
        self._reached()
        for _ in range(RECEIVE_MAX):
            try:
                message = _decode(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            except MALFORMED as error:  # As good as lost: what it said is asked for again.
                self._log.warning("malformed control frame", {"error": str(error)})
                continue
            now = time.monotonic()
            match message:
                case Opened():
                    self._open(message)
                case Rejected(reason=reason):
                    raise Broken(reason)
                case Held(seq=seq):
                    handle, asked_at = self._questions.pop(seq, ("", 0.0))
                    if running := self._by_handle.get(handle):
                        self._carry_out(running, running.pull.held(asked_at, now), now)
                case _:
                    self._tell(message, now)

    def _tell(self, message: Blocks | Sealed | Gone, now: float) -> None:
        running = self._by_handle.get(message.handle)
        if running is None:
            return
        match message:
            case Blocks():
                effects = running.pull.blocks(message, now)
            case Sealed():
                running.sealed_at = running.sealed_at or now
                effects = running.pull.seal(message, now)
            case Gone(seq=seq, reason=reason):
                self._questions.pop(seq, None)
                effects = running.pull.gone(reason, now)
        self._carry_out(running, effects, now)

    def _open(self, message: Opened) -> None:
        if self._opened is not None:
            return
        if message.epoch != self.epoch:
            raise Broken(f"sender is of epoch {message.epoch}, the handle of {self.epoch}")
        self._opened = message
        self._connecting = Connecting(self._mine, message, self._wake)
        for running in self._by_handle.values():
            running.pull.answered()

    def _reached(self) -> None:
        """Whether the connection to its memory stands by now."""
        if self._connecting is None:
            return
        try:
            reach = self._connecting.result()
        except (TransferError, Unlike) as error:
            raise Broken(f"can't connect: {error}") from error
        if reach is None:
            return
        self._reach, self._connecting = reach, None
        log.info(
            "sender connected",
            extra={"endpoint": self.endpoint, "transport": reach.transport},
        )
        now = time.monotonic()
        for running in list(self._by_handle.values()):
            effects = running.pull.opened(reach.wanted(running.order), now)
            self._carry_out(running, effects, now)

    # ------------------------------------------------------------ reading

    def land(self) -> None:
        """See how reads in flight stand."""
        for running in list(self._by_handle.values()):
            self._land(running)

    def read(self, room: int, *, alone: bool) -> None:
        """Start reads into `room` bytes. `alone`: nothing is in flight, of no connection."""
        reach = self._reach
        if reach is None:
            return
        if alone:  # A bound below one stride would be no bound but a standstill.
            room = max(room, reach.stride_bytes)
        for running in list(self._by_handle.values()):
            while room >= reach.stride_bytes and (size := self._start_read(running, reach, room)):
                room -= size

    def _start_read(self, running: _Running, reach: Reach, room: int) -> int:
        now = time.monotonic()
        most = max(1, min(room, READ_BYTES_MAX) // reach.stride_bytes)
        found = running.pull.next_read(most, now)
        if found is None:
            return 0
        number, strides = found
        parts: list[tuple[Peer, Any]] = []
        if not running.flights:
            running.busy_since = now
        flight = _Flight(number, strides, 0, parts)
        running.flights.append(flight)
        try:
            for route, peer in reach.peers:
                local, remote = route.units(
                    strides, running.order.local_blocks, running.pull.remote
                )
                flight.size += len(local) * route.unit_bytes
                parts.append((peer, peer.read(local, remote)))
        except (TransferError, IndexError) as error:
            raise Broken(f"can't read: {error}") from error
        return max(1, flight.size)

    def _land(self, running: _Running) -> None:
        for flight in list(running.flights):
            while flight.parts:
                peer, handle = flight.parts[-1]
                progress = peer.poll(handle)
                if progress is Progress.PENDING:
                    break
                if progress is Progress.FAILED:
                    raise Broken("the transport reports the read as failed")
                flight.parts.pop()
            if flight.parts:
                continue
            running.flights.remove(flight)
            running.moved += flight.size
            now = time.monotonic()
            if not running.flights:
                self._count(running, now)
            sums = self._sums(running, flight)
            now = time.monotonic()
            self._carry_out(running, running.pull.read_done(flight.number, now, sums), now)

    def _sums(self, running: _Running, flight: _Flight) -> list[int]:
        assert self._reach is not None
        if self._reach.alike is None or not running.pull.sums:
            return []
        at = flight.strides
        columns = running.order.local_blocks[at.start : at.stop]
        mode, seed = Mode(self._reach.opened.checksums), running.order.handle.encode()
        return self._mine.checksums.of(columns, seed, at.start, mode)

    def _count(self, running: _Running, now: float) -> None:
        began = running.busy_since
        running.read_s += now - began
        hidden_until = now if running.sealed_at is None else running.sealed_at
        running.hidden_s += max(0.0, min(now, hidden_until) - began)

    # ------------------------------------------------------------ time and trouble

    def idle(self, now: float) -> bool:
        """Of no use for so long that its sender may be gone for good."""
        return not self._by_handle and now > self._idle_since + IDLE_S_MAX

    def tick(self, now: float) -> None:
        for running in list(self._by_handle.values()):
            self._carry_out(running, running.pull.tick(now), now)

    def drop(self, reason: str) -> None:
        """Give the sender up. Fence first: only then are the blocks out of its reach."""
        if self._connecting is not None:
            self._connecting.abandon()
        if self._reach is not None:
            self._reach.fence()
        now = time.monotonic()
        for running in list(self._by_handle.values()):
            if running.flights:
                running.flights.clear()
                self._count(running, now)
            self._carry_out(running, running.pull.fenced(reason), now)
        self._socket.close()

    # ------------------------------------------------------------ effects

    def _next(self) -> int:
        self._seq += 1
        return self._seq

    def _carry_out(self, running: _Running, effects: Effects, now: float) -> None:
        order, mine = running.order, self._mine
        for effect in effects:
            match effect:
                case AskFollow():
                    seq = self._ask(order.handle, now)
                    self._send(Follow(seq, order.epoch, order.handle, mine.rank, mine.layout.ranks))
                case AskRenew():
                    self._send(Renew(self._ask(order.handle, now), order.epoch, order.handle))
                case TellRelease():
                    self._send(Release(order.epoch, order.handle, mine.rank))
                case FencePeer(reason):
                    raise Broken(reason)
                case End(error):
                    self._end(running, error)

    def _ask(self, handle: str, now: float) -> int:
        seq = self._next()
        self._questions[seq] = (handle, now)
        return seq

    def _send(self, message: Follow | Renew | Release) -> None:
        try:
            self._socket.send(_encode(message), zmq.NOBLOCK)
        except zmq.Again:
            self._log.warning("control frame not sent", {"endpoint": self.endpoint})

    def _end(self, running: _Running, error: str | None) -> None:
        order, pull = running.order, running.pull
        transport = self._reach.transport if self._reach else ""
        del self._by_handle[order.handle]
        self._idle_since = time.monotonic()
        for seq in [s for s, (handle, _) in self._questions.items() if handle == order.handle]:
            del self._questions[seq]
        if pull.mismatched:
            log.error("KV refused", extra={"request": order.request_id, "reason": error})
        # In a failed pull the sender may have sealed all the same: its token is the client's.
        token = pull.sealed.manifest.first_token if pull.sealed else None
        self.ended.append(
            Pulled(
                order.request_id, error, pull.mismatched, transport,
                running.moved, running.read_s, running.hidden_s, token,
            )
        )  # fmt: skip
