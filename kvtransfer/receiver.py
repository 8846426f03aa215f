"""Pulls prompts' KV from senders: never waits, and reports a block good only when it is."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import zmq

from kvtransfer.protocol import (
    MALFORMED,
    VERSION,
    Gone,
    Held,
    Open,
    Opened,
    Rejected,
    Release,
    Renew,
    Ticket,
    ToReceiver,
)
from kvtransfer.transports.api import Memory, Progress, TransferError
from kvtransfer.transports.ucx import NAME, UcxDescription, UcxPeer, UcxTransport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtransfer.transports.api import Units

log = logging.getLogger(__name__)

_decode = msgspec.msgpack.Decoder(ToReceiver).decode
_encode = msgspec.msgpack.Encoder().encode


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds. `answer` bounds each control round trip, `read` one prompt's whole read."""

    answer_s: float = 5.0
    read_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Pulled:
    """How one pull ended. With `error`, none of its blocks may be used, and none is in flight."""

    request_id: str
    blocks: int
    seconds: float
    error: str | None


class _Phase(Enum):
    OPENING = "opening"
    RENEWING = "renewing"
    READING = "reading"
    RELEASING = "releasing"


@dataclass(slots=True)
class _Pull:
    request_id: str
    ticket: Ticket
    local: list[int]
    remote: list[int]
    started_at: float
    phase: _Phase
    deadline: float
    seq: int = 0
    handle: Any = None
    renew_at: float = 0.0


@dataclass(slots=True)
class _Sender:
    """One sender's control socket, and once it has answered, its memory."""

    socket: zmq.Socket[bytes]
    epoch: str
    peer: UcxPeer | None = None
    blocks: int = 0
    """In each of its layers."""
    open_seq: int = 0
    pulls: dict[str, _Pull] = field(default_factory=dict)


class Receiver:
    """All pulls of one engine. Call `poll` at every step; it takes microseconds when idle."""

    def __init__(self, memory: Memory, kv_digest: str, timeouts: Timeouts) -> None:
        self._memory = memory
        self._kv_digest = kv_digest
        self._timeouts = timeouts
        self._context = zmq.Context()
        self._senders: dict[str, _Sender] = {}
        self._seq = 0
        self._ended: list[Pulled] = []

    def __len__(self) -> int:
        return sum(len(s.pulls) for s in self._senders.values())

    def start(
        self, request_id: str, ticket: Ticket, local: Sequence[int], remote: Sequence[int]
    ) -> None:
        """Begin to read the sender's blocks `remote` into ours; none means release only."""
        now = time.monotonic()
        endpoint = ticket.endpoints[0]
        sender = self._senders.get(endpoint)
        if sender is not None and sender.epoch != ticket.epoch:
            self._drop(endpoint, "the sender restarted")
            sender = None
        if sender is None:
            sender = self._senders[endpoint] = self._open(endpoint, ticket.epoch)
        pull = _Pull(
            request_id, ticket, list(local), list(remote), now, _Phase.OPENING,
            now + self._timeouts.answer_s,
        )  # fmt: skip
        sender.pulls[request_id] = pull
        if not pull.local:
            self._ask(sender, pull, _Phase.RELEASING)
        elif sender.peer is not None:
            self._ask(sender, pull, _Phase.RENEWING)

    def poll(self) -> list[Pulled]:
        """Move everything on; what has ended since the last call."""
        for endpoint, sender in list(self._senders.items()):
            try:
                self._hear(sender)
                self._move(sender)
            except _Broken as broken:
                self._drop(endpoint, str(broken))
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        for endpoint in list(self._senders):
            self._drop(endpoint, "closing")
        self._context.term()

    # ------------------------------------------------------------ talking

    def _open(self, endpoint: str, epoch: str) -> _Sender:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 200)
        socket.connect(endpoint)
        self._seq += 1
        socket.send(_encode(Open(self._seq, VERSION, self._kv_digest)))
        return _Sender(socket, epoch, open_seq=self._seq)

    def _ask(self, sender: _Sender, pull: _Pull, phase: _Phase) -> None:
        self._seq += 1
        pull.phase, pull.seq = phase, self._seq
        pull.deadline = time.monotonic() + self._timeouts.answer_s
        kind = Release if phase is _Phase.RELEASING else Renew
        sender.socket.send(_encode(kind(pull.seq, pull.ticket.epoch, pull.ticket.handle)))

    def _hear(self, sender: _Sender) -> None:
        while True:
            try:
                message = _decode(sender.socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            except MALFORMED as error:
                raise _Broken(f"the sender's answer is not readable: {error}") from None
            if isinstance(message, Opened):
                self._opened(sender, message)
            elif isinstance(message, Rejected):
                raise _Broken(message.reason)
            else:
                self._answered(sender, message)

    def _opened(self, sender: _Sender, message: Opened) -> None:
        if message.epoch != sender.epoch:
            raise _Broken(f"sender is of epoch {message.epoch}, the ticket of {sender.epoch}")
        if message.transport != NAME:
            raise _Broken(f"sender offers {message.transport}, this receiver {NAME}")
        if sender.peer is None:
            try:
                unit_bytes = self._memory.segments[0].block_bytes
                sender.peer = UcxTransport().connect(self._memory, message.region, unit_bytes)
                theirs = msgspec.msgpack.decode(message.region, type=UcxDescription)
                sender.blocks = theirs.segments[0].blocks
            except TransferError as error:
                raise _Broken(f"can't connect: {error}") from error
            for pull in sender.pulls.values():
                if pull.phase is _Phase.OPENING:
                    self._ask(sender, pull, _Phase.RENEWING)

    def _answered(self, sender: _Sender, message: Held | Gone) -> None:
        # Late answers to a former question have another number and are nobody's.
        pull = next((p for p in sender.pulls.values() if p.seq == message.seq), None)
        if pull is None:
            return
        if isinstance(message, Gone):
            if pull.phase is _Phase.READING:
                raise _Broken(message.reason)  # Its read must be fenced before anything else.
            self._end(sender, pull, message.reason)
        elif pull.phase is _Phase.RENEWING:
            self._read(sender, pull, message.remaining_s)
        elif pull.phase is _Phase.RELEASING:
            # The lease outlived the read: what was read is what the ticket promised.
            self._end(sender, pull, None)

    # ------------------------------------------------------------ reading

    def _read(self, sender: _Sender, pull: _Pull, lease_s: float) -> None:
        assert sender.peer is not None
        now = time.monotonic()
        try:
            pull.handle = sender.peer.read(
                self._units(pull.local, self._memory.segments[0].blocks),
                self._units(pull.remote, sender.blocks),
            )
        except TransferError as error:
            raise _Broken(f"can't read: {error}") from error
        pull.phase = _Phase.READING
        pull.deadline = now + self._timeouts.read_s
        pull.renew_at = now + lease_s / 3

    def _units(self, blocks: list[int], of: int) -> Units:
        """Of these blocks in all layers; a block is one unit."""
        layers = np.arange(len(self._memory.segments), dtype=np.int32) * of
        return (layers[:, None] + np.asarray(blocks, dtype=np.int32)[None, :]).reshape(-1)

    def _move(self, sender: _Sender) -> None:
        now = time.monotonic()
        for pull in list(sender.pulls.values()):
            if pull.phase is _Phase.READING:
                assert sender.peer is not None
                progress = sender.peer.poll(pull.handle)
                if progress is Progress.DONE:
                    self._ask(sender, pull, _Phase.RELEASING)
                    continue
                if progress is Progress.FAILED:
                    raise _Broken("the transport reports the read as failed")
                if now > pull.renew_at:
                    self._renew_while_reading(sender, pull, now)
            if now > pull.deadline:
                raise _Broken(f"no answer while {pull.phase.value}")

    def _renew_while_reading(self, sender: _Sender, pull: _Pull, now: float) -> None:
        self._seq += 1
        pull.seq = self._seq
        pull.renew_at = now + self._timeouts.answer_s
        sender.socket.send(_encode(Renew(pull.seq, pull.ticket.epoch, pull.ticket.handle)))

    # ------------------------------------------------------------ ending

    def _drop(self, endpoint: str, reason: str) -> None:
        """Give the sender up. Fence first: only then are the blocks out of its reach."""
        sender = self._senders.pop(endpoint)
        for pull in sender.pulls.values():
            pull.handle = None  # A handle keeps its agent alive, and so the read.
        if sender.peer is not None:
            sender.peer.fence()
        for pull in list(sender.pulls.values()):
            sender.socket.send(
                _encode(Release(0, pull.ticket.epoch, pull.ticket.handle)), zmq.NOBLOCK
            )
            self._end(sender, pull, reason)
        sender.socket.close()

    def _end(self, sender: _Sender, pull: _Pull, error: str | None) -> None:
        del sender.pulls[pull.request_id]
        seconds = time.monotonic() - pull.started_at
        self._ended.append(Pulled(pull.request_id, len(pull.local), seconds, error))


class _Broken(Exception):
    """The sender as a whole can't be used; its pulls fail together, after the fence."""
