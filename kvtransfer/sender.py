"""The sender's control channel: the book of handoffs, served by a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec
import zmq

from kvtransfer.core.geometry import refusal
from kvtransfer.core.sending import Book
from kvtransfer.curve import Gate
from kvtransfer.limited_log import LimitedLog
from kvtransfer.protocol import (
    MALFORMED,
    VERSION,
    Follow,
    Open,
    Opened,
    Rejected,
    Release,
    Renew,
    ToSender,
)
from kvtransfer.serving_thread import ServingThread
from kvtransfer.sockets import bounded
from kvtransfer.wakeups import Wakeup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtransfer.core.sending import Messages
    from kvtransfer.curve import Pair
    from kvtransfer.protocol import Layout, Manifest, Region, ToReceiver

log = logging.getLogger(__name__)

WAIT_MS: Final = 200
RECEIVE_MAX: Final = 256
QUEUE_MAX: Final = 2000
"""Messages to one receiver that may wait. It asks again for what it missed."""
HEARD_QUEUE_MAX: Final = 1000
"""Messages of one receiver that may wait to be heard."""
FRAME_BYTES_MAX: Final = 1 << 20
"""The largest frame that a receiver sends is an `Open`, with its layout's segments."""
REASON_MAX: Final = 2000
_decode = msgspec.msgpack.Decoder(ToSender).decode
_encode = msgspec.msgpack.Encoder().encode


@dataclass(frozen=True, slots=True)
class Offered:
    """One engine's KV memory, as a receiver must know it to read from it."""

    layout: Layout
    checksums: str
    regions: list[list[Region]]
    """By rank."""


class _OpenOfAnyVersion(msgspec.Struct, frozen=True, array_like=True, tag="Open"):
    """As much of another version's `Open` as this version can read."""

    seq: int
    version: int


_decode_foreign = msgspec.msgpack.Decoder(_OpenOfAnyVersion).decode


class Sender:
    """Tells receivers what is computed, and keeps leases. An engine without work would not.

    All methods are the engine's, return at once, and may be called from any one thread.
    """

    def __init__(
        self,
        host: str,
        epoch: str,
        lease_s: float,
        offered: Offered,
        port: int = 0,
        *,
        keys: Pair | None = None,
    ) -> None:
        """Bind, to a free port unless told which. With `keys`, only workers that have them get in.

        Raises zmq.ZMQError when the host is no address of ours, or the port is taken.
        """
        self._epoch, self._lease_s, self._offered = epoch, lease_s, offered
        self._book = Book(epoch, lease_s)
        self._lock = threading.Lock()
        self._outbox: deque[tuple[bytes, ToReceiver]] = deque()
        self._wakeup = Wakeup()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, QUEUE_MAX)
        self._socket.setsockopt(zmq.RCVHWM, HEARD_QUEUE_MAX)
        bounded(self._socket, FRAME_BYTES_MAX)
        self._log = LimitedLog(log)
        self.malformed_total = 0
        self._gate = Gate(self._context, keys) if keys else None
        if self._gate:
            self._gate.guard(self._socket)
        # A receiver that comes back under its own name must not be locked out by its ghost.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.bind(f"tcp://{host}:{port or '*'}")
        port = int(self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        self.endpoint = f"tcp://{host}:{port}"
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wakeup.fileno(), zmq.POLLIN)
        if self._gate:
            self._poller.register(self._gate.socket, zmq.POLLIN)
        self._thread = ServingThread("kv-sender", self._turn, end=self._close_sockets)
        self._thread.start()

    # ------------------------------------------------------------ the engine's

    @property
    def dead(self) -> str | None:
        """Why receivers get no answer any more; None while they do."""
        return self._thread.dead

    @property
    def refused_total(self) -> int:
        """Peers without the group's keys."""
        return self._gate.refused_total if self._gate else 0

    @property
    def leases_open(self) -> int:
        with self._lock:
            return len(self._book)

    @property
    def leases_expired_total(self) -> int:
        with self._lock:
            return self._book.expired_total

    def expect(self, handle: str, links: bytes) -> bool:
        """See `Book.expect`."""
        with self._lock:
            return self._book.expect(handle, links)

    def computed(
        self, handle: str, generation: int, ids: Sequence[list[int]], sums: Sequence[list[int]]
    ) -> int:
        """More columns; how many of this generation are announced now."""
        with self._lock:
            messages = self._book.computed(handle, generation, ids, sums)
            announced = self._book.announced(handle)
        self._say(messages)
        return announced

    def restart(self, handle: str, generation: int) -> None:
        with self._lock:
            self._book.restart(handle, generation)

    def seal(self, handle: str, manifest: Manifest) -> None:
        with self._lock:
            messages = self._book.seal(handle, manifest, time.monotonic())
        self._say(messages)

    def cancel(self, handle: str, reason: str) -> None:
        with self._lock:
            messages = self._book.cancel(handle, reason)
        self._say(messages)

    def ended(self) -> list[str]:
        """Handles whose blocks may be freed, since the last call."""
        with self._lock:
            messages = self._book.expire(time.monotonic())
            ended = self._book.ended()
        self._say(messages)
        return ended

    def close(self) -> None:
        self._thread.closing()
        self._wakeup.set()
        self._thread.join(timeout=5)
        self._context.term()
        self._wakeup.close()

    def _say(self, messages: Messages) -> None:
        if messages:
            self._outbox.extend(messages)
            self._wakeup.set()

    # ------------------------------------------------------------ the thread

    def _turn(self) -> None:
        self._poller.poll(WAIT_MS)
        self._wakeup.clear()
        with self._lock:
            self._outbox.extend(self._book.expire(time.monotonic()))
        while self._outbox:
            self._send(*self._outbox.popleft())
        if self._gate:
            self._gate.answer()
        for _ in range(RECEIVE_MAX):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) == 2:
                self._hear(*frames)

    def _close_sockets(self) -> None:
        self._socket.close()
        if self._gate:
            self._gate.close()

    def _hear(self, of: bytes, frame: bytes) -> None:
        try:
            message = _decode(frame)
        except MALFORMED as error:
            self.malformed_total += 1
            self._log.warning("malformed control frame", {"error": str(error)})
            if foreign := _foreign(frame):
                self._send(of, foreign)
            return
        try:
            answers = self._answer(of, message)
        except Exception:  # noqa: BLE001  # A message's edge: no receiver may silence us for all.
            self._log.exception("answering failed", {"kind": type(message).__name__})
            return
        for to, answer in answers:
            self._send(to, answer)

    def _send(self, to: bytes, message: ToReceiver) -> None:
        try:
            self._socket.send_multipart([to, _encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:  # It takes no more, or is gone: its lease ends by itself.
            self._log.warning("control frame not sent", {"error": str(error)})

    def _answer(self, of: bytes, message: Open | Follow | Renew | Release) -> Messages:
        if isinstance(message, Open):
            return [(of, self._opened(message))]
        now = time.monotonic()
        with self._lock:
            if isinstance(message, Follow):
                return self._book.follow(of, message, now)
            if isinstance(message, Renew):
                return self._book.renew(of, message, now)
            self._book.release(of, message)
        return []

    def _opened(self, message: Open) -> ToReceiver:
        offered = self._offered
        if message.version != VERSION:
            return Rejected(message.seq, _other_version(message.version))
        if reason := refusal(offered.layout, message.layout):
            return Rejected(message.seq, reason[:REASON_MAX])
        return Opened(
            message.seq,
            self._epoch,
            offered.layout,
            self._lease_s,
            offered.checksums,
            offered.regions,
        )


def _foreign(frame: bytes) -> Rejected | None:
    """Rejection of an `Open` of another protocol version; only its first fields can be parsed."""
    try:
        opened = _decode_foreign(frame)
    except MALFORMED:
        return None
    if opened.version == VERSION:
        return None
    return Rejected(opened.seq, _other_version(opened.version))


def _other_version(version: int) -> str:
    return f"sender speaks handoff version {VERSION}, receiver {version}"


def release_frame(epoch: str, handle: str) -> bytes:
    """A `Release` from outside: nobody (else) will come for it."""
    return _encode(Release(epoch, handle))
