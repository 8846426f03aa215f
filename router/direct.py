"""A response's body written from wherever its next part becomes known, without a task's turn.

Else a streamed token wakes its request's task, which passes three generators and a framework until
it comes to the same `send`. What that does is a write to a buffer, unless the client is slow: then
it waits, and so does what follows.
"""

from __future__ import annotations

import asyncio
import logging
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from starlette.applications import Starlette
    from starlette.types import ASGIApp, Receive, Scope, Send

log = logging.getLogger(__name__)

_send: ContextVar[Send | None] = ContextVar("send", default=None)


async def _broken() -> None:
    """What a body waits for to which nothing can be sent any more."""


class SendMiddleware:
    """Innermost: whatever runs for a request finds its response's `send`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        _send.set(send)
        await self._app(scope, receive, send)


def allow(app: Starlette) -> None:
    """Have `Body.of_this_request` find one, where no middleware has a task of its own between."""
    if not any(
        not isinstance(m.cls, type) or issubclass(m.cls, BaseHTTPMiddleware)
        for m in app.user_middleware
    ):
        app.user_middleware.append(Middleware(SendMiddleware))


class Body:
    """The parts of one response's body, after its first has been sent."""

    @staticmethod
    def of_this_request(on_ready: Callable[[], None]) -> Body | None:
        """`on_ready`: it is not `waiting` any more."""
        send = _send.get()
        return None if send is None else Body(send, on_ready)

    def __init__(self, send: Send, on_ready: Callable[[], None]) -> None:
        self._send, self._on_ready = send, on_ready
        self._sending: Coroutine[Any, Any, None] | None = None

    @property
    def waiting(self) -> bool:
        """For a slow client; nothing may be written now."""
        return self._sending is not None

    def write(self, part: bytes) -> None:
        assert self._sending is None
        sending: Any = self._send({"type": "http.response.body", "body": part, "more_body": True})
        self._go_on(sending)

    def close(self) -> None:
        """What waits is not sent."""
        sending, self._sending = self._sending, None
        if sending is not None:
            sending.close()

    def _go_on(self, sending: Coroutine[Any, Any, None]) -> None:
        """As a task would run it: until it is done, or waits for a future."""
        waited = self._sending is not None
        try:
            future = sending.send(None)
        except StopIteration:
            self._sending = None
            if waited:
                self._on_ready()
            return
        except (OSError, RuntimeError) as error:  # Its own task finds that the client has gone.
            log.info("a client's stream broke", extra={"reason": repr(error)})
            self._sending = _broken()
            return
        self._sending = sending
        if future is None:
            asyncio.get_running_loop().call_soon(self._resume, sending)
        else:
            future._asyncio_future_blocking = False  # It is we who wait for it, and no task.
            future.add_done_callback(lambda _: self._resume(sending))

    def _resume(self, sending: Coroutine[Any, Any, None]) -> None:
        if self._sending is sending:  # Else it was closed.
            self._go_on(sending)
