"""The worker's end of the token channel: one ROUTER socket for every router."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Final, Protocol

import zmq

from workers.api import MALFORMED, ROUTER_SILENCE_S, decode_to_worker, encode
from workers.gate import Gate
from workers.loop_hold import TURN_S

if TYPE_CHECKING:
    from workers.api import ToRouter, ToWorker
    from workers.keys import WorkerKeys

log = logging.getLogger(__name__)

QUEUE_MAX: Final = 10_000
"""Messages to one router that may wait; one that takes no more is gone. At one a step of 3 ms it is
as long as a silent router's requests are kept."""


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
        silence_s: float = ROUTER_SILENCE_S,
    ) -> None:
        """Bind; with `keys`, only known routers get in. `silence_s`: a connection over which
        nothing comes, not even ZeroMQ's answers to its heartbeats, is closed.

        Raises zmq.ZMQError when the address is taken.
        """
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 200)
        # Without it, messages to a router beyond the high-water mark vanish silently.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.SNDHWM, QUEUE_MAX)
        self._socket.setsockopt(zmq.RCVHWM, QUEUE_MAX)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, 1000)
        # A stopped router answers no heartbeats, and goes on when it is resumed.
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, round(silence_s * 1000))
        self.gate = Gate(self._context, keys) if keys else None
        try:
            if self.gate:
                self.gate.guard(self._socket)
            self._socket.bind(f"tcp://{host}:{port or '*'}")
        except zmq.ZMQError:
            self._socket.close(linger=0)
            if self.gate:
                self.gate.close()
            raise
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.malformed_total = 0
        self._loop.add_reader(self._descriptor, self._receive)

    def send(self, router: bytes, message: ToRouter) -> bool:
        """False when the router is gone or takes no more."""
        sent = True
        try:
            self._socket.send_multipart([router, encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError:
            sent = False
        # The descriptor tells of edges only, and sending may have consumed one, in vain or not.
        if int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._loop.call_soon(self._receive)
        return sent

    def close(self) -> None:
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
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = decode_to_worker(frames[-1])
            except MALFORMED as error:
                self.malformed_total += 1
                log.warning("malformed message", extra={"error": str(error)})
                continue
            self._listener.on_message(frames[0], message)
        self._loop.call_soon(self._receive)
