"""Lets a request through to its route, or refuses it: no such route, no key, or not that one's."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import Counter
from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from router.asker import AccessRules, HeaderBad, asker
from router.core.access import Access, Route, find_route
from router.core.errors import RouterError
from router.outcome import refusal_response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

_AT_ADMIN: Final = "tandem.admin_address"
_ON_BOTH: Final = "/tandem/"


REFUSED: Final = Counter(
    "tandem_router_access_refused_total", "Requests refused by their keys", ["error"]
)


class GuardMiddleware:
    """Stands before everything else, so whatever runs for a request finds its `asker`."""

    def __init__(self, app: ASGIApp, rules: AccessRules, mounted: frozenset[str]) -> None:
        """`mounted`: the paths of the routes that this router has, out of all that there may be."""
        self._app = app
        self._rules = rules
        self._mounted = mounted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # No route is one.
            return
        if scope["type"] == "http" and (refusal := self._refusal(scope)):
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        path, at_admin = get_route_path(scope), scope.get(_AT_ADMIN, False)
        route = find_route(path)
        if route is None or not self._is_here(route, at_admin=at_admin):
            return error_response(HTTPStatus.NOT_FOUND, "no such route")
        headers = Headers(scope=scope)
        if route.access is Access.OPEN or _is_preflight(scope, headers):
            return None
        try:
            asker.set(self._rules.identify(headers, route.access, at_admin=at_admin))
        except HeaderBad as bad:
            return error_response(HTTPStatus.BAD_REQUEST, str(bad), param=bad.name)
        except RouterError as error:
            REFUSED.labels(error.code).inc()
            return refusal_response(error, path)
        return None

    def _is_here(self, route: Route, *, at_admin: bool) -> bool:
        if route.path not in self._mounted:
            return False
        if at_admin:
            return route.access is not Access.CLIENT or route.path.startswith(_ON_BOTH)
        return route.access is not Access.ADMIN or not self._rules.admin_address


def at_admin_address(app: ASGIApp) -> ASGIApp:
    """The same application as it answers at the admin's address."""

    async def marked(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, _AT_ADMIN: True}, receive, send)

    return marked


def error_response(
    status: int, message: Any, *, param: str | None = None, headers: Any = None
) -> JSONResponse:
    """An error in OpenAI's shape that has no code of ours."""
    kind = "BadRequestError" if param else HTTPStatus(status).phrase
    content = {"message": message, "type": kind, "param": param, "code": status}
    return JSONResponse({"error": content}, status, headers)


def _is_preflight(scope: Scope, headers: Headers) -> bool:
    """A browser asks what it may send, without a key; vLLM's CORS middleware answers."""
    asked = "origin" in headers and "access-control-request-method" in headers
    return scope["method"] == "OPTIONS" and asked
