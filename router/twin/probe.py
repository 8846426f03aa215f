"""A router by hand, for measuring: it asks workers over the token channel, and notes the times.

CURVE is not spoken: measure a worker before it is locked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Final, Self

import zmq

from workers.api import (
    MALFORMED,
    MESSAGE_BYTES_MAX,
    PROTOCOL,
    Batch,
    Delta,
    Finish,
    Heartbeat,
    Refused,
    RouterHello,
    WorkerHello,
    decode_to_router,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from workers.api import Generate, ToRouter, ToWorker

HELLO_S: Final = 30.0
ANSWER_S: Final = 120.0
_BEAT_S: Final = 1.0


class ProbeFailed(Exception):
    """The worker did not answer, or not as it should; the message says what."""


@dataclass(slots=True)
class Call:
    """One request, and what came of it. Times are by `perf_counter`."""

    request_id: str
    sent_at: float
    deltas: list[tuple[float, Delta]] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return bool(self.deltas) and self.deltas[-1][1].finish is not None

    @property
    def first_at(self) -> float:
        """Its first token's, or its end's."""
        return next(at for at, d in self.deltas if d.token_ids or d.finish is not None)


class Line:
    """To one worker."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self.address = address
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
        self.socket.connect(address)
        self.batches: list[tuple[float, Batch]] = []
        self.hello: WorkerHello

    def say(self, message: ToWorker) -> None:
        self.socket.send(encode(message))


class Probe:
    """Lines to workers, as a context manager."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.lines = [Line(self._context, address) for address in addresses]
        self._calls: dict[str, Call] = {}
        self._poller = zmq.Poller()
        self._beaten_at = 0.0
        self._numbers = 0
        for line in self.lines:
            self._poller.register(line.socket, zmq.POLLIN)

    def __enter__(self) -> Self:
        """Raises `ProbeFailed`."""
        try:
            for line in self.lines:
                self._greet(line)
        except ProbeFailed:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for line in self.lines:
            line.socket.close()
        self._context.term()

    def _greet(self, line: Line) -> None:
        until = monotonic() + HELLO_S
        while monotonic() < until:
            line.say(RouterHello(PROTOCOL, "calibrate", None, None))
            if line.socket.poll(1000):
                match _read(line, line.socket.recv()):
                    case WorkerHello() as hello:
                        line.hello = hello
                        return
                    case Refused(reason):
                        raise ProbeFailed(f"{line.address} refuses us: {reason}")
        raise ProbeFailed(f"{line.address}: no worker answered in {HELLO_S:.0f} s")

    def name(self) -> str:
        """For a request; never used before."""
        self._numbers += 1
        return f"calibrate-{id(self):x}-{self._numbers}"

    def ask(self, line: Line, generate: Generate) -> Call:
        call = self._calls[generate.request_id] = Call(generate.request_id, perf_counter())
        line.say(generate)
        return call

    def wait(
        self, calls: Iterable[Call], told: Callable[[Call, Delta], None] = lambda *_: None
    ) -> None:
        """Until all of these are over. `told` hears of each delta. Raises `ProbeFailed`."""
        waiting, until = list(calls), monotonic() + ANSWER_S
        while not all(call.over for call in waiting):
            if monotonic() > until:
                raise ProbeFailed(f"no end of a request in {ANSWER_S:.0f} s")
            self.listen(0.2, told)

    def forget(self, calls: Iterable[Call]) -> None:
        """Whatever still comes of these is not looked at."""
        for call in calls:
            self._calls.pop(call.request_id, None)

    def listen(self, seconds: float, told: Callable[[Call, Delta], None] = lambda *_: None) -> None:
        """To what comes within so long, and to all that is there then."""
        self._beat()
        for socket, _ in self._poller.poll(int(seconds * 1000)):
            line = next(each for each in self.lines if each.socket is socket)
            while line.socket.poll(0):
                self._take(line, line.socket.recv(), told)

    def _take(self, line: Line, frame: bytes, told: Callable[[Call, Delta], None]) -> None:
        at, message = perf_counter(), _read(line, frame)
        if isinstance(message, Refused):
            raise ProbeFailed(f"{line.address} has given us up: {message.reason}")
        if not isinstance(message, Batch):
            return
        if message.deltas:
            line.batches.append((at, message))
        for delta in message.deltas:
            call = self._calls.get(delta.request_id)
            if call is None:
                continue
            call.deltas.append((at, delta))
            if delta.finish in (Finish.ERROR, Finish.REFUSED, Finish.INVALID, Finish.ABORT):
                raise ProbeFailed(f"{line.address}: {delta.finish}: {delta.error}")
            told(call, delta)
            if delta.finish is not None:
                del self._calls[delta.request_id]

    def _beat(self) -> None:
        if monotonic() - self._beaten_at >= _BEAT_S:
            self._beaten_at = monotonic()
            for line in self.lines:
                line.say(Heartbeat())


def _read(line: Line, frame: bytes) -> ToRouter:
    try:
        message: ToRouter = decode_to_router(frame)
    except MALFORMED as error:
        raise ProbeFailed(f"{line.address} speaks otherwise: {error}") from error
    return message
