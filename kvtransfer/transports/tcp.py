"""Reads over plain sockets: nothing to install, payload straight between the two KV memories."""

from __future__ import annotations

import ipaddress
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np

from kvtransfer.protocol import MALFORMED
from kvtransfer.transports import place
from kvtransfer.transports.api import Abilities, Memory, Progress, TransferError
from kvtransfer.transports.tcp_sender import TcpOffer
from kvtransfer.transports.tcp_wire import (
    REPLY,
    UNITS_MAX,
    VERSION,
    WELCOME,
    TcpDescription,
    WireError,
    pack_hello,
    pack_reply,
    pack_request,
    parse_welcome,
)
from kvtransfer.transports.unit_views import Views, advance, check_range

if TYPE_CHECKING:
    from kvtransfer.transports.api import Units

NAME: Final = "tcp"
CONNECT_TIMEOUT_S: Final = 3.0
REQUEST_BYTES: Final = 4 << 20
"""A read is asked for in requests of about this size, so that streams share it evenly."""
AHEAD_BYTES: Final = 16 << 20
"""Asked for and not yet here, a stream: what a sender may still send of a read that was let go."""
POLL_BYTES: Final = 4 << 20
"""What one poll takes from a stream, at most about: a poll must not become a wait."""
WAKE_BYTES: Final = 1 << 20
"""Whoever waits for a descriptor is not woken for less, while more than that is due."""
PIECES_MAX: Final = 256
"""For one `recvmsg`: more than come at once are only looked at in vain."""


class TcpTransport:
    """Sockets between the two processes; `streams` of them for each peer."""

    name = NAME
    abilities = Abilities(one_sided=False, cuda=False, needs="a network between the two")

    def __init__(self, host: str = "127.0.0.1", streams: int = 1) -> None:
        """`host` is where an offer listens, as its peers can reach it."""
        if not 1 <= streams <= 16:
            raise ValueError(f"1 to 16 streams a peer, not {streams}")
        self._host = host
        self._streams = streams

    def missing(self, memory: Memory) -> str | None:
        if memory.device == "cpu":
            return None
        return f"tcp moves cpu memory only, and this is on {memory.device}"

    def offer(self, memory: Memory) -> TcpOffer:
        if reason := self.missing(memory):
            raise TransferError(reason)
        return TcpOffer(memory, self._host)

    def reaches(self, description: bytes) -> bool:
        try:
            theirs = _decode(description)
        except TransferError:
            return False
        here = place.here()
        same = bool(here.net_ns) and (here.boot, here.net_ns) == (theirs.boot, theirs.net_ns)
        return same or not _is_loopback(theirs.host)

    def connect(self, memory: Memory, description: bytes, unit_bytes: int) -> TcpPeer:
        if reason := self.missing(memory):
            raise TransferError(reason)
        views = Views(memory, unit_bytes)
        theirs = _decode(description)
        sockets: list[socket.socket] = []
        try:
            units = _connect(theirs, unit_bytes, self._streams, sockets)
        except (OSError, TransferError) as error:
            for each in sockets:
                each.close()
            where = f"{theirs.host}:{theirs.port}"
            raise TransferError(f"tcp can't connect to {where}: {error}") from error
        return TcpPeer(views, units, sockets)


@dataclass(eq=False, slots=True)
class _Read:
    local: Units
    remote: Units
    next: int = 0
    """The first pair that was not asked for yet."""
    left: int = 0
    """Pairs that are not here yet."""
    progress: Progress = Progress.PENDING


@dataclass(eq=False, slots=True)
class _Reply:
    """One that is to come: the header's place, then the units'."""

    read: _Read
    units: int
    expected: bytes
    header: bytearray
    pieces: list[memoryview]
    index: int = 0


@dataclass(eq=False, slots=True)
class _Stream:
    socket: socket.socket
    replies: deque[_Reply] = field(default_factory=deque)
    due: int = 0
    """Bytes of replies that are not here yet."""
    wakes_at: int = 1
    """Bytes, before its descriptor becomes readable."""
    unsent: memoryview = field(default_factory=lambda: memoryview(b""))
    """Of requests, where the socket's buffer was full."""


class TcpPeer:
    """Receives only inside `poll`, and into nothing but the units asked for."""

    def __init__(self, views: Views, units: int, sockets: list[socket.socket]) -> None:
        self._views = views
        self._units = units
        self._streams = [_Stream(s) for s in sockets]
        self._waiting: deque[_Read] = deque()
        """Reads with pairs that were not asked for yet, each in its turn."""
        self._requests = 0
        self._pairs = max(1, min(UNITS_MAX, REQUEST_BYTES // views.unit_bytes))
        """Of one request."""
        self._gone: str | None = None

    def read(self, local: Units, remote: Units) -> _Read:
        if len(local) != len(remote):
            raise TransferError(f"{len(local)} local units for {len(remote)} remote ones")
        self._views.check(local, "the receiver")
        check_range(remote, self._units, "the sender")
        self._look_for_the_end()
        if self._gone is not None:
            raise TransferError(self._gone)
        read = _Read(local.astype(np.int32), remote.astype(np.int32), left=len(local))
        if not read.left:
            read.progress = Progress.DONE
            return read
        self._waiting.append(read)
        self._move()
        return read

    def poll(self, handle: _Read) -> Progress:
        if handle.progress is Progress.PENDING:
            self._move()
        return handle.progress

    def descriptors(self) -> list[int]:
        return [s.socket.fileno() for s in self._streams]

    def fence(self) -> None:
        self._end("the peer is fenced")

    def _move(self) -> None:
        try:
            for stream in self._streams:
                if stream.replies:
                    self._receive(stream)
            self._ask()
        except (OSError, WireError) as error:
            self._end(f"the sender is gone: {error}")

    def _ask(self) -> None:
        """Requests for what is waiting, as far ahead as is allowed."""
        while self._waiting:
            stream = min(self._streams, key=lambda s: s.due)
            if stream.due >= AHEAD_BYTES or stream.unsent:
                break
            read = self._waiting.popleft()
            until = min(read.next + self._pairs, len(read.local))
            pairs = slice(read.next, until)
            read.next = until
            if until < len(read.local):
                self._waiting.append(read)
            self._request(stream, read, pairs)
        for stream in self._streams:
            _flush(stream)
            _wake_at(stream, WAKE_BYTES if stream.due >= WAKE_BYTES else 1)

    def _request(self, stream: _Stream, read: _Read, pairs: slice) -> None:
        self._requests = (self._requests + 1) & 0xFFFFFFFF
        units = pairs.stop - pairs.start
        size = units * self._views.unit_bytes
        header = bytearray(REPLY.size)
        pieces = [memoryview(header), *self._views.of(read.local[pairs])]
        expected = pack_reply(self._requests, size)
        stream.replies.append(_Reply(read, units, expected, header, pieces))
        stream.due += REPLY.size + size
        stream.unsent = memoryview(pack_request(self._requests, read.remote[pairs]))
        _flush(stream)

    def _receive(self, stream: _Stream) -> None:
        """What has come, into its units."""
        budget = POLL_BYTES
        while stream.replies and budget > 0:
            reply = stream.replies[0]
            begun = reply.index
            try:
                window = reply.pieces[begun : begun + PIECES_MAX]
                got = stream.socket.recvmsg_into(window)[0]
            except BlockingIOError:
                return
            if not got:
                raise ConnectionResetError("it closed the connection")
            budget -= got
            stream.due -= got
            reply.index = advance(reply.pieces, begun, got)
            if begun == 0 < reply.index and reply.header != reply.expected:
                raise WireError("its reply is not the one that is due")
            if reply.index == len(reply.pieces):
                stream.replies.popleft()
                reply.read.left -= reply.units
                if not reply.read.left:
                    reply.read.progress = Progress.DONE

    def _look_for_the_end(self) -> None:
        """A sender that is gone has closed its side, though nobody has asked it anything."""
        try:
            for stream in self._streams:
                if not stream.replies and _has_closed(stream.socket):
                    raise ConnectionResetError("it closed the connection")
        except OSError as error:
            self._end(f"the sender is gone: {error}")

    def _end(self, reason: str) -> None:
        """Close first: then nothing can land. Only then say that reads have failed."""
        if self._gone is not None:
            return
        self._gone = reason
        streams, self._streams = self._streams, []
        for stream in streams:
            stream.socket.close()
        pending = {r.read for s in streams for r in s.replies} | set(self._waiting)
        for read in pending:
            read.progress = Progress.FAILED
        self._waiting.clear()


def _flush(stream: _Stream) -> None:
    if not stream.unsent:
        return
    try:
        stream.unsent = stream.unsent[stream.socket.send(stream.unsent) :]
    except BlockingIOError:
        return


def _wake_at(stream: _Stream, size: int) -> None:
    if size != stream.wakes_at:
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)
        stream.wakes_at = size


def _has_closed(connection: socket.socket) -> bool:
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False


def _connect(
    theirs: TcpDescription, unit_bytes: int, streams: int, sockets: list[socket.socket]
) -> int:
    """Fill `sockets`; how many units the sender has."""
    until = time.monotonic() + CONNECT_TIMEOUT_S
    for _ in range(streams):
        each = socket.create_connection((theirs.host, theirs.port), timeout=_left(until))
        sockets.append(each)
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Buffers are the kernel's to size: fixed ones of 4 MiB gained nothing, and where the
        # system's bound is low they would be the brake.
        each.sendall(pack_hello(theirs.token, unit_bytes))
    units = 0
    for each in sockets:
        units, reason_bytes = parse_welcome(_exactly(each, WELCOME.size, until))
        if units < 0:
            reason = _exactly(each, reason_bytes, until).decode(errors="replace")
            raise TransferError(f"refused: {reason}")
        each.setblocking(False)
    return units


def _exactly(each: socket.socket, size: int, until: float) -> bytes:
    got = b""
    while len(got) < size:
        each.settimeout(_left(until))
        if not (some := each.recv(size - len(got))):
            raise WireError("the sender closed the connection")
        got += some
    return got


def _left(until: float) -> float:
    return max(0.01, until - time.monotonic())


def _decode(description: bytes) -> TcpDescription:
    try:
        theirs = msgspec.msgpack.decode(description, type=TcpDescription)
    except MALFORMED as error:
        raise TransferError(f"not a description of tcp: {error}") from None
    if theirs.version != VERSION:
        raise TransferError(f"sender speaks tcp {theirs.version}, receiver {VERSION}")
    return theirs


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
