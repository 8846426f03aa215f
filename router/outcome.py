"""The status of a response, and the error at its end, by what became of the request.

vLLM begins a stream's response before anything has been generated, and so says 200 to what is then
refused. Here it begins with the first output, and an error before that is a status code. A later
one is the stream's last event, in the shape that the endpoint's clients know, with our code.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

import msgspec
from starlette._utils import get_route_path
from starlette.responses import JSONResponse

from router.core.errors import RouterError

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_json = msgspec.json.Encoder().encode
_MESSAGES: Final = "/v1/messages"
_RESPONSES: Final = "/v1/responses"


class Outcome:
    """The engine's result for one HTTP request, so far."""

    __slots__ = ("begun", "error")

    def __init__(self) -> None:
        self.begun = False
        """It has generated something."""
        self.error: Exception | None = None
        """It has failed of this."""


outcome: ContextVar[Outcome | None] = ContextVar("outcome", default=None)


def cause_of(error: Exception) -> Exception:
    """The `RouterError` that vLLM's layers were told of in an exception of their own, if any."""
    found = getattr(error, "error", None)
    return found if isinstance(found, RouterError) else error


def refusal_response(error: RouterError, path: str) -> JSONResponse:
    """A `RouterError` as a response: its status, its code, and when to try again."""
    headers = {}
    if error.retryable:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    content = {"message": str(error), "type": error.code, "param": None, "code": error.code}
    return JSONResponse(_shaped(content, path), error.status, headers)


def _shaped(content: dict[str, Any], path: str) -> dict[str, Any]:
    if path.startswith(_MESSAGES):
        kept = {"type": content["type"], "message": content["message"]}
        return {"type": "error", "error": kept}
    return {"error": content}


class OutcomeMiddleware:
    """Holds each response until its request has an outcome."""

    def __init__(self, app: ASGIApp, explain: Callable[[Exception], tuple[int, Any]]) -> None:
        """`explain`: status and OpenAI's error object for what is no `RouterError`."""
        self._app = app
        self._explain = explain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(scope, receive, send, self._explain)
        outcome.set(answer.outcome)
        try:
            await self._app(scope, receive, answer.send)
        except Exception:
            # vLLM's layers may fail of the error itself, when they try to make an event of it.
            if answer.outcome.error is None:
                raise
            await answer.fail()


class _Answer:
    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        explain: Callable[[Exception], tuple[int, Any]],
    ) -> None:
        self.outcome = Outcome()
        self._scope, self._receive, self._send = scope, receive, send
        self._explain = explain
        self._path = get_route_path(scope)
        self._held: list[Message] | None = []
        """Messages that the client has not been sent yet; None once everything is sent on."""
        self._events = 0
        self._over = False

    async def send(self, message: Message) -> None:
        if self.outcome.error is not None:
            await self.fail()
        elif self._held is None:
            self._events += 1
            self._over = not message.get("more_body", False)
            await self._send(message)
        else:
            self._held.append(message)
            if self._may_begin(message):
                await self._begin(self._held)

    async def _begin(self, held: list[Message]) -> None:
        self._held = None
        self._events = len(held) - 1
        self._over = not held[-1].get("more_body", False)
        for message in held:
            await self._send(message)

    def _may_begin(self, message: Message) -> bool:
        if message["type"] != "http.response.body":
            return False
        # A comment keeps the connection open (--sse-keep-alive-interval): it can't wait.
        comment = message.get("body", b"")[:1] == b":"
        return self.outcome.begun or comment or not message.get("more_body", False)

    async def fail(self) -> None:
        """Say what went wrong, once; nothing that comes after it is sent."""
        if self._over:
            return
        self._over = True
        error = self.outcome.error
        assert error is not None
        cause = cause_of(error)
        if self._held is not None:
            await self._refuse(cause)
            return
        body = _last_events(self._content(cause), self._path, self._events)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _refuse(self, cause: Exception) -> None:
        if isinstance(cause, RouterError):
            response = refusal_response(cause, self._path)
        else:
            status, content = self._explain(cause)
            response = JSONResponse(_shaped(content, self._path), status)
        await response(self._scope, self._receive, self._send)

    def _content(self, cause: Exception) -> dict[str, Any]:
        if isinstance(cause, RouterError):
            return {"message": str(cause), "type": cause.code, "param": None, "code": cause.code}
        content: dict[str, Any] = self._explain(cause)[1]
        return content


def _last_events(content: dict[str, Any], path: str, number: int) -> bytes:
    """A stream's end; `number`: events before it, which `/v1/responses` counts from 0."""
    if path.startswith(_MESSAGES):
        return b"event: error\ndata: " + _json(_shaped(content, path)) + b"\n\n"
    if path.startswith(_RESPONSES):
        event = {
            "type": "error",
            "code": str(content["code"]),
            "message": content["message"],
            "param": content["param"],
            "sequence_number": number,
        }
        return b"event: error\ndata: " + _json(event) + b"\n\n"
    return b"data: " + _json({"error": content}) + b"\n\ndata: [DONE]\n\n"
