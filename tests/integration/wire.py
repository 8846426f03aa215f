"""One worker's token channel from the test's side: the test is the router."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Any, Self

import zmq

from workers.api import (
    PROTOCOL,
    SILENCE_S,
    Abort,
    Batch,
    Delta,
    Generate,
    Heartbeat,
    Phase,
    Refused,
    Release,
    RouterHello,
    WorkerHello,
    decode_to_router,
    encode,
)

if TYPE_CHECKING:
    from workers.api import ToRouter, ToWorker

BEAT_S = 1.0
FORGOTTEN_S = SILENCE_S / 2
"""Silent for this long, say hello again: the worker may have forgotten us."""


class Wire:
    """As a context manager: known to the worker inside. Synchronous; it beats while it waits."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.connect(address)
        self._said_at = 0.0
        self._deltas: dict[str, list[Delta]] = {}
        self.hello: WorkerHello

    def __enter__(self) -> Self:
        self._send(Heartbeat())
        while True:
            message = self._receive(time.monotonic() + 10)
            assert not isinstance(message, Refused), message.reason
            if isinstance(message, WorkerHello):
                self.hello = message
                return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()
        self._context.term()

    def generate(self, phase: Phase, prompt: list[int], **fields: Any) -> str:
        """Ask; `fields` are `Generate`'s. The request's id."""
        request_id = uuid.uuid4().hex
        self._send(Generate(request_id, phase, prompt, **fields))
        return request_id

    def deltas(self, request_id: str, seconds: float = 60.0) -> list[Delta]:
        """All deltas of a request, once it has ended."""
        until = time.monotonic() + seconds
        while True:
            got = self._deltas.get(request_id, [])
            if got and got[-1].finish is not None:
                return got
            message = self._receive(until)
            for delta in message.deltas if isinstance(message, Batch) else []:
                self._deltas.setdefault(delta.request_id, []).append(delta)

    def abort(self, request_id: str) -> None:
        self._send(Abort([request_id]))

    def release(self, ticket: bytes) -> None:
        self._send(Release([ticket]))

    def _send(self, message: ToWorker) -> None:
        now = time.monotonic()
        if now > self._said_at + FORGOTTEN_S:
            self._socket.send(encode(RouterHello(PROTOCOL, "test", None, None)))
        self._said_at = now
        self._socket.send(encode(message))

    def _receive(self, until: float) -> ToRouter:
        while not self._socket.poll(200):
            now = time.monotonic()
            assert now < until, "the worker does not answer"
            if now > self._said_at + BEAT_S:
                self._send(Heartbeat())
        return decode_to_router(self._socket.recv())
