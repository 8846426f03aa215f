"""A request's bounds that need its headers or its body, before the application parses either."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from router.core.request_limits import OverLimit, check_json_size, check_request_id
from router.preparing import Places, place

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from router.core.request_limits import RequestLimits


class BodyLimits:
    """Reads each body whole, which the connection has bounded, and looks at it as bytes."""

    def __init__(self, app: ASGIApp, limits: RequestLimits) -> None:
        self._app, self._limits = app, limits
        self._places = Places()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            check_request_id(Headers(scope=scope).get("x-request-id"), "X-Request-Id")
            if scope["method"] not in ("POST", "PUT", "PATCH"):
                await self._app(scope, receive, send)
                return
            receive = await self._checked(receive)
        except OverLimit as over:
            error = {
                "message": str(over), "type": "BadRequestError", "param": over.field, "code": 400
            }  # fmt: skip
            await JSONResponse({"error": error}, 400)(scope, receive, send)
            return
        mine = await self._places.take()
        place.set(mine)
        try:
            await self._app(scope, receive, send)
        finally:
            mine.leave()

    async def _checked(self, receive: Receive) -> Receive:
        """The same messages again, with the body in one of them. Raises `OverLimit`."""
        parts: list[bytes] = []
        last: Message = {"type": "http.request", "more_body": True}
        while last["type"] == "http.request" and last.get("more_body", False):
            last = await receive()
            parts.append(last.get("body", b""))
        if last["type"] == "http.request":
            last = {"type": "http.request", "body": b"".join(parts), "more_body": False}
            check_json_size(last["body"], self._limits)
        messages = [last]

        async def again() -> Message:
            return messages.pop() if messages else await receive()

        return again
