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
from kvtransfer.wakeups import Wakeup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtransfer.core.sending import Messages
    from kvtransfer.protocol import Layout, Manifest, Region, ToReceiver

log = logging.getLogger(__name__)

WAIT_MS: Final = 200
RECEIVE_MAX: Final = 256
QUEUE_MAX: Final = 10_000
"""Messages to one receiver that may wait. It asks again for what it missed."""
_decode = msgspec.msgpack.Decoder(ToSender).decode
_encode = msgspec.msgpack.Encoder().encode


@dataclass(frozen=True, slots=True)
class Offered:
    """One engine's KV memory, as a receiver must know it to read from it."""

    layout: Layout
    checksums: str
    regions: list[list[Region]]
    """By rank."""


class Sender:
    """Tells receivers what is computed, and keeps leases. An engine without work would not.

    All methods are the engine's, return at once, and may be called from any one thread.
    """

    def __init__(
        self, host: str, epoch: str, lease_s: float, offered: Offered, port: int = 0
    ) -> None:
        """Bind, to a free port unless told which.

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
        # A receiver that comes back under its own name must not be locked out by its ghost.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.bind(f"tcp://{host}:{port or '*'}")
        port = int(self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        self.endpoint = f"tcp://{host}:{port}"
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="kv-sender", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ the engine's

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
        self._closing.set()
        self._wakeup.set()
        self._thread.join(timeout=5)
        self._context.term()
        self._wakeup.close()

    def _say(self, messages: Messages) -> None:
        if messages:
            self._outbox.extend(messages)
            self._wakeup.set()

    # ------------------------------------------------------------ the thread

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wakeup.fileno(), zmq.POLLIN)
        while not self._closing.is_set():
            poller.poll(WAIT_MS)
            self._wakeup.clear()
            with self._lock:
                self._outbox.extend(self._book.expire(time.monotonic()))
            while self._outbox:
                self._send(*self._outbox.popleft())
            self._hear()
        self._socket.close()

    def _hear(self) -> None:
        for _ in range(RECEIVE_MAX):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != 2:
                continue
            try:
                message = _decode(frames[1])
            except MALFORMED as error:
                log.warning("malformed control frame", extra={"error": str(error)})
                if foreign := _foreign(frames[1]):
                    self._send(frames[0], foreign)
                continue
            try:
                answers = self._answer(frames[0], message)
            except Exception:  # The thread's edge: one receiver must not silence us for all.
                log.exception("answering failed", extra={"frame": repr(message)[:1000]})
                continue
            for to, answer in answers:
                self._send(to, answer)

    def _send(self, to: bytes, message: ToReceiver) -> None:
        try:
            self._socket.send_multipart([to, _encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:  # It takes no more, or is gone: its lease ends by itself.
            log.warning("control frame not sent", extra={"error": str(error)})

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
            return Rejected(message.seq, reason)
        return Opened(
            message.seq,
            self._epoch,
            offered.layout,
            self._lease_s,
            offered.checksums,
            offered.regions,
        )


def _foreign(frame: bytes) -> Rejected | None:
    """To an `Open` of another version, of whose other fields nothing is known."""
    try:
        match msgspec.msgpack.decode(frame):
            case ["Open", int(seq), int(version), *_] if version != VERSION:
                return Rejected(seq, _other_version(version))
    except MALFORMED:
        pass
    return None


def _other_version(version: int) -> str:
    return f"sender speaks handoff version {VERSION}, receiver {version}"


def release_frame(epoch: str, handle: str) -> bytes:
    """A `Release` from outside: nobody (else) will come for it."""
    return _encode(Release(epoch, handle))
