"""The sender's control channel: leases over a ZeroMQ ROUTER, served by a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Final

import msgspec
import zmq

from kvtransfer.core.lease import Leases
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
    ToReceiver,
    ToSender,
)

log = logging.getLogger(__name__)

WAIT_MS: Final = 200
_decode = msgspec.msgpack.Decoder(ToSender).decode
_encode = msgspec.msgpack.Encoder().encode


@dataclass(frozen=True, slots=True)
class Region:
    """One engine's KV memory, as a receiver must know it to read from it."""

    kv_digest: str
    transport: str
    description: bytes
    """The transport's own."""


class LeaseServer:
    """Answers receivers whenever they ask: an engine without work would not.

    `grant` and `ended` are the engine's; the thread does the rest. Every handle granted comes
    out of `ended` exactly once.
    """

    def __init__(self, host: str, epoch: str, lease_s: float, region: Region) -> None:
        self._epoch = epoch
        self._region = region
        self._leases = Leases(lease_s)
        self._ended: list[str] = []
        self._lock = threading.Lock()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        port = self._socket.bind_to_random_port(f"tcp://{host}")
        self.endpoint = f"tcp://{host}:{port}"
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="kv-leases", daemon=True)
        self._thread.start()

    @property
    def leases_open(self) -> int:
        with self._lock:
            return len(self._leases)

    def grant(self) -> str:
        """A new handle, kept from now on for one lease."""
        handle = uuid.uuid4().hex
        with self._lock:
            self._leases.grant(handle, time.monotonic())
        return handle

    def ended(self) -> list[str]:
        """Handles released or expired since the last call: their blocks may be freed."""
        with self._lock:
            self._ended += self._leases.expire(time.monotonic())
            ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        self._closing.set()
        self._thread.join(timeout=5)
        self._context.term()

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        while not self._closing.is_set():
            if not poller.poll(WAIT_MS):
                continue
            frames = self._socket.recv_multipart()
            if len(frames) != 2:
                continue
            try:
                message = _decode(frames[1])
            except MALFORMED as error:
                log.warning("malformed control frame", extra={"error": str(error)})
                continue
            self._socket.send_multipart([frames[0], _encode(self._answer(message))])
        self._socket.close()

    def _answer(self, message: ToSender) -> ToReceiver:
        if isinstance(message, Open):
            return self._opened(message)
        if message.epoch != self._epoch:
            reason = f"sender is of epoch {self._epoch}, the ticket of {message.epoch}"
            return Gone(message.seq, message.handle, reason)
        now = time.monotonic()
        with self._lock:
            if isinstance(message, Renew):
                left = self._leases.renew(message.handle, now)
            else:
                left = self._leases.release(message.handle, now)
                if left is not None:
                    self._ended.append(message.handle)
        if left is None:
            return Gone(message.seq, message.handle, "the lease has ended")
        return Held(message.seq, message.handle, left)

    def _opened(self, message: Open) -> ToReceiver:
        region = self._region
        ours, theirs = (VERSION, region.kv_digest), (message.version, message.kv_digest)
        if ours != theirs:
            return Rejected(message.seq, f"sender has version, layout {ours}, receiver {theirs}")
        return Opened(
            message.seq, self._epoch, region.kv_digest, region.transport, region.description
        )


def release_frame(epoch: str, handle: str) -> bytes:
    """A `Release` that needs no answer."""
    return _encode(Release(0, epoch, handle))
