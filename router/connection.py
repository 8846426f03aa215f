"""One client's HTTP connection, with a bound on everything that it may have us wait for or keep."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import httptools
from prometheus_client import Counter
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from router.heap import HeapSweep

if TYPE_CHECKING:
    import asyncio

LINGER_S: Final = 2.0
"""A client that still sends what was refused is listened to for so long: a connection that is
closed on unread bytes is reset, and then the client may never see why."""
PIPELINE_MAX: Final = 16
"""Requests that a client may send ahead of their answers."""
CHUNKS_FREE: Final = 4_096
CHUNK_BYTES_MIN: Final = 16
"""A body of more chunks than that has at least so many bytes in each, on the mean: what is read at
once can hold 40,000 of one byte, and each takes a microsecond."""
REFUSED_MAX: Final = 256
"""Connections beyond the bound that are told so; further ones are just reset."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Each is a setting of the router's, by the same name; docs/settings.md says what for."""

    connections_max: int = 4_096
    header_bytes_max: int = 32_768
    headers_max: int = 100
    header_s: float = 10
    body_bytes_max: int = 4 * 1024 * 1024
    bodies_bytes_max: int = 256 * 1024 * 1024
    body_s: float = 30
    idle_s: float = 75
    unread_s: float = 30


@dataclass(frozen=True, slots=True)
class _Refusal:
    status: int
    code: str
    message: str
    setting: str = ""
    retry_s: int = 0


_ended = Counter("tandem_router_connections_ended_total", "Ended by a limit", ["setting"])


@dataclass(slots=True)
class Bounds:
    """A server's limits, and what its connections share."""

    limits: ConnectionLimits
    body_bytes: int = 0
    """Bytes of the bodies of all requests that are not answered yet."""
    sweep: HeapSweep = field(default_factory=HeapSweep)


class BoundedConnection(HttpToolsProtocol):
    """uvicorn's protocol, which has no bound on headers, bodies, connections or slowness.

    Until a request's headers are complete the connection counts as idle: when there are too many
    connections, the one that has been idle longest makes room for the next.
    """

    def __init__(self, *given: Any, bounds: Bounds, **named: Any) -> None:
        super().__init__(*given, **named)
        self._bounds, self._limits = bounds, bounds.limits
        self.timeout_keep_alive = self._limits.idle_s  # type: ignore[assignment]
        self.idle_since = monotonic()
        self._refused = self._in_head = False
        self._has_asked = False
        """Whether there is somebody to answer: a silent connection gets no HTTP."""
        self._answered: Any = None
        """The request that is being answered, or was last."""
        self._head_bytes = self._body_bytes = self._held_bytes = self._chunks = 0
        self._reading: asyncio.TimerHandle | None = None
        """Runs out when a head, or then a body, is not complete in time."""
        self._writing: asyncio.TimerHandle | None = None
        """Runs out when the client does not read."""

    # ------------------------------------------------------------ the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()
        if len(self.connections) > self._limits.connections_max:
            self._make_room()

    def _make_room(self) -> None:
        others: Any = self.connections - {self}
        idle = min((c for c in others if not c.busy), key=lambda c: c.idle_since, default=None)
        _ended.labels("connections_max").inc()
        if idle is not None:
            idle.transport.abort()
            return
        most = self._limits.connections_max
        if len(self.connections) > most + REFUSED_MAX:
            self.transport.abort()
            return
        self._refuse(_Refusal(
            503, "too_many_connections", f"{most} connections are open already", retry_s=1
        ), unasked=True)  # fmt: skip

    @property
    def busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._unset_keepalive_if_required()
        in_head = self._in_head
        if not self._feed(data):
            return
        if in_head and self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > self._limits.header_bytes_max:
                self._refuse_head("header_bytes_max")
                return
        if not self.busy and self._reading is None:
            self._await_head()

    def _feed(self, data: bytes) -> bool:
        """Have it parsed. False if a refusal came of it."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # Nothing is upgraded to here. What comes after such a request can't be read.
            self.cycle.keep_alive = False
        except httptools.HttpParserError:
            if not self._refused:
                self._refuse(_Refusal(400, "bad_http", "this is no HTTP request"))
        return not self._refused

    def eof_received(self) -> None:
        """A client that has said all is taken for gone, as one that closed looks the same.

        Closing waits until all is written, which may be never: it will not be read.
        """
        if self.busy or self.transport.get_write_buffer_size():
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_reading_timer()
        self._let_bodies_go()
        if self._writing is not None:
            self._writing.cancel()
        self._unset_keepalive_if_required()
        self._tell_gone()
        super().connection_lost(exc)

    def _tell_gone(self) -> None:
        """Tell the request that is being answered: uvicorn would tell the last one sent."""
        self.pipeline.clear()
        if self._answered is not None:
            self._answered.disconnected = True
            self._answered.message_event.set()

    # ------------------------------------------------------------ a request comes in

    def on_message_begin(self) -> None:
        if self._refused:
            # It ends the parsing: thousands more may lie in what was read at once.
            raise httptools.HttpParserError("refused")
        super().on_message_begin()
        self._has_asked = self._in_head = True
        self._head_bytes = self._body_bytes = self._chunks = 0

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_reading_timer()
        if self._refused:
            return
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._limits.header_bytes_max:
            self._refuse_head("header_bytes_max")
        elif len(self.headers) > self._limits.headers_max:
            self._refuse_head("headers_max")
        elif self._announced() > self._limits.body_bytes_max:
            self._refuse_body()
        elif len(self.pipeline) >= PIPELINE_MAX:
            self._refused = True
            self.transport.abort()
        else:
            super().on_headers_complete()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        """Its body is awaited from now on; one sent ahead was not read while it had to wait."""
        self._answered = cycle
        if cycle.more_body and self._reading is None:
            self._reading = self.loop.call_later(self._limits.body_s, self._body_is_late)
        super()._start_asgi_task(cycle, app)

    def _announced(self) -> int:
        for name, value in self.headers:
            if name == b"content-length" and value.isdigit():
                return int(value[:19])
        return 0

    def on_body(self, body: bytes) -> None:
        if self._refused:
            return
        self._body_bytes += len(body)
        self._chunks += 1
        self._held_bytes += len(body)
        self._bounds.body_bytes += len(body)
        if self._body_bytes > self._limits.body_bytes_max:
            self._refuse_body()
        elif self._chunks > max(CHUNKS_FREE, self._body_bytes // CHUNK_BYTES_MIN):
            self._refuse(_Refusal(400, "bad_http", "the body's chunks are too small"))
        elif self._bounds.body_bytes > self._limits.bodies_bytes_max:
            most = self._limits.bodies_bytes_max
            self._refuse(_Refusal(
                503, "too_many_bodies", f"requests with {most} bytes are under way already",
                "bodies_bytes_max", retry_s=1,
            ))  # fmt: skip
        else:
            super().on_body(body)

    def _let_bodies_go(self) -> None:
        self._bounds.body_bytes -= self._held_bytes
        self._bounds.sweep.freed(self._held_bytes)
        self._held_bytes = 0

    def on_message_complete(self) -> None:
        if self._refused:
            return
        self._stop_reading_timer()
        super().on_message_complete()

    def _await_head(self) -> None:
        self._reading = self.loop.call_later(self._limits.header_s, self._head_is_late)

    def _stop_reading_timer(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _head_is_late(self) -> None:
        seconds = self._limits.header_s
        self._refuse(_Refusal(
            408, "request_timeout", f"the headers were not complete in {seconds:g} s", "header_s"
        ))  # fmt: skip

    def _body_is_late(self) -> None:
        seconds = self._limits.body_s
        self._refuse(_Refusal(
            408, "request_timeout", f"the body was not complete in {seconds:g} s", "body_s"
        ))  # fmt: skip

    # ------------------------------------------------------------ an answer goes out

    def on_response_complete(self) -> None:
        self.idle_since = monotonic()
        if not self.pipeline:
            self._let_bodies_go()
        super().on_response_complete()
        if self.transport.is_closing():
            self._await_reader()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        if self._writing is not None and not self.transport.is_closing():
            self._writing.cancel()
            self._writing = None
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self._await_reader()

    def _await_reader(self) -> None:
        if self._writing is None:
            self._writing = self.loop.call_later(self._limits.unread_s, self._reader_is_late)

    def _reader_is_late(self) -> None:
        _ended.labels("unread_s").inc()
        self.transport.abort()

    def _close(self) -> None:
        """Closing waits until all is written: with an end, if the client does not read."""
        if not self.transport.is_closing():
            self.transport.close()
            self._await_reader()

    # ------------------------------------------------------------ refusals

    def _refuse_head(self, setting: str) -> None:
        what = "many" if setting == "headers_max" else "large"
        most = getattr(self._limits, setting)
        self._refuse(_Refusal(
            431, "headers_too_large", f"the headers are too {what}: at most {most}", setting
        ))  # fmt: skip

    def _refuse_body(self) -> None:
        most = self._limits.body_bytes_max
        self._refuse(_Refusal(
            413, "body_too_large", f"the body has more than {most} bytes", "body_bytes_max"
        ))  # fmt: skip

    def _refuse(self, refusal: _Refusal, *, unasked: bool = False) -> None:
        """Answer where nothing else is being answered, read on for a moment, and close."""
        self._refused = True
        self._stop_reading_timer()
        self._unset_keepalive_if_required()
        if refusal.setting:
            _ended.labels(refusal.setting).inc()
        answered = self._answered
        begun = answered is not None and answered.response_started != answered.response_complete
        begun = begun or bool(self.pipeline)
        self._tell_gone()
        self._let_bodies_go()
        self.flow.resume_reading()
        if begun or not (unasked or self._has_asked):
            self.transport.abort()
            return
        self.transport.write(_answer(refusal))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_S, self._abort)

    def _abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()


def bounded(limits: ConnectionLimits) -> Any:
    """A server's connections, for uvicorn's `http`."""
    return partial(BoundedConnection, bounds=Bounds(limits))


def _answer(refusal: _Refusal) -> bytes:
    named = f" (--{refusal.setting.replace('_', '-')})" if refusal.setting else ""
    error = {"message": refusal.message + named, "type": refusal.code, "param": None}
    content = json.dumps({"error": {**error, "code": refusal.code}}).encode()
    retry = b"retry-after: %d\r\n" % refusal.retry_s if refusal.retry_s else b""
    return b"%scontent-type: application/json\r\ncontent-length: %d\r\n%s%s%s" % (
        STATUS_LINE[refusal.status], len(content), retry, b"connection: close\r\n\r\n", content
    )  # fmt: skip
