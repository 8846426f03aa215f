"""The worker's end of the token channel: one ROUTER socket for every router."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

import zmq

from kvtransfer.sockets import bounded
from workers.api import (
    MALFORMED,
    MESSAGE_BYTES_MAX,
    ROUTER_SILENCE_S,
    Batch,
    decode_to_worker,
    encode,
)
from workers.gate import Gate
from workers.logs import LimitedLog
from workers.loop_hold import TURN_S
from workers.newcomers import Newcomers
from workers.parts import parts

if TYPE_CHECKING:
    from workers.api import ToRouter, ToWorker
    from workers.keys import WorkerKeys

log = logging.getLogger(__name__)

QUEUE_MAX: Final = 10_000
"""Messages to one router that may wait; one that takes no more is gone. At one a step of 3 ms it is
as long as a silent router's requests are kept."""
HEARD_QUEUE_MAX: Final = 1000
"""Messages of one router that may wait to be heard; the others wait at the router."""


class Listener(Protocol):
    """Told of what routers send."""

    def on_message(self, router: bytes, message: ToWorker) -> None: ...


class Channel:
    """Frames in and out; who may say what is the listener's business."""

    def __init__(
        self,
        host: str,
        port: int,
        listener: Listener,
        keys: WorkerKeys | None = None,
        *,
        message_bytes_max: int = MESSAGE_BYTES_MAX,
        silence_s: float = ROUTER_SILENCE_S,
    ) -> None:
        """Bind; with `keys`, only known routers get in. `silence_s`: a connection over which
        nothing comes, not even ZeroMQ's answers to its heartbeats, is closed.

        Raises zmq.ZMQError when the address is taken.
        """
        self._listener = listener
        self._log = LimitedLog(log)
        self._message_bytes_max = message_bytes_max
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 200)
        # Without it, messages to a router beyond the high-water mark vanish silently.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.SNDHWM, QUEUE_MAX)
        self._socket.setsockopt(zmq.RCVHWM, HEARD_QUEUE_MAX)
        bounded(self._socket, message_bytes_max)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, 1000)
        # A stopped router answers no heartbeats, and goes on when it is resumed.
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, round(silence_s * 1000))
        self.gate = Gate(self._context, keys) if keys else None
        self._waiting: deque[list[bytes]] = deque()
        self.newcomers = Newcomers(self._socket, message_bytes_max, self._hear_all)
        try:
            if self.gate:
                self.gate.guard(self._socket)
            self._socket.bind(f"tcp://{host}:{port or '*'}")
        except zmq.ZMQError:
            self.newcomers.close()
            self._socket.close(linger=0)
            if self.gate:
                self.gate.close()
            raise
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.malformed_total = 0
        self.failed_total = 0
        """Messages that we could not act upon, which is a bug of ours."""
        self._loop.add_reader(self._descriptor, self._receive)

    def send(self, router: bytes, message: ToRouter) -> bool:
        """False when the router is gone or takes no more."""
        frames = [encode(message)]
        if len(frames[0]) > self._message_bytes_max:  # The router would end the connection of it.
            frames = self._in_parts(message)
        sent = True
        try:
            for frame in frames:
                self._socket.send_multipart([router, frame], zmq.NOBLOCK)
        except zmq.ZMQError:
            sent = False
        # The descriptor tells of edges only, and sending may have consumed one, in vain or not.
        if int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._loop.call_soon(self._receive)
        return sent

    def _in_parts(self, message: ToRouter) -> list[bytes]:
        self._log.warning("message too large", {"kind": type(message).__name__})
        return list(parts(message, self._message_bytes_max)) if isinstance(message, Batch) else []

    def close(self) -> None:
        self.newcomers.close()
        self._loop.remove_reader(self._descriptor)
        self._socket.close()
        if self.gate:
            self.gate.close()
        self._context.term()

    @property
    def _descriptor(self) -> int:
        return int(self._socket.getsockopt(zmq.FD))

    def _receive(self) -> None:
        if self._socket.closed:
            return
        until = time.monotonic() + TURN_S
        while time.monotonic() < until:
            try:
                frames = self._next()
            except zmq.Again:
                return
            self._take(frames)
        self._loop.call_soon(self._receive)

    def _next(self) -> list[bytes]:
        """Raises zmq.Again."""
        return self._waiting.popleft() if self._waiting else self._from_socket()

    def _from_socket(self) -> list[bytes]:
        frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
        self.newcomers.heard(frames[-1])
        return [frame.bytes for frame in frames]

    def _hear_all(self) -> None:
        """Take all that waits off the socket, so that who has spoken is taken for no stranger.

        What that is, is bounded by what may wait of each router. It is acted upon in turns.
        """
        with contextlib.suppress(zmq.Again):
            while True:
                self._waiting.append(self._from_socket())
        if self._waiting:
            self._loop.call_soon(self._receive)

    def _take(self, frames: list[bytes]) -> None:
        try:
            message = decode_to_worker(frames[-1])
        except MALFORMED as error:
            self.malformed_total += 1
            self._log.warning("malformed message", {"error": str(error)})
            return
        try:
            self._listener.on_message(frames[0], message)
        except Exception:  # noqa: BLE001  # A message's edge: what follows it must be heard.
            self.failed_total += 1
            self._log.exception("a message was not taken", {"kind": type(message).__name__})
