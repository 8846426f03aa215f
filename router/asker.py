"""Whose a request is and by when it wants its first token, from HTTP's headers to the dispatch."""

from __future__ import annotations

import hashlib
import math
import re
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

TENANT: Final = "x-tandem-tenant"
TTFT_S: Final = "x-tandem-ttft-s"
_NAME: Final = re.compile(r"[A-Za-z0-9._:@-]{1,128}")


@dataclass(frozen=True, slots=True)
class Asker:
    tenant: str = ""
    """As the header says; else a hash of the API key, so that no key is kept; else nobody's."""
    ttft_s: float | None = None


asker: ContextVar[Asker] = ContextVar("asker", default=Asker())  # noqa: B039  # It is frozen.


class HeaderBad(Exception):
    """A header of ours has a value that can't be used."""

    def __init__(self, name: str, want: str) -> None:
        super().__init__(f"{name}: want {want}")
        self.name = name


def read_asker(headers: Headers) -> Asker:
    """Raises `HeaderBad`."""
    tenant, ttft_s = headers.get(TENANT), None
    if tenant is not None and not _NAME.fullmatch(tenant):
        raise HeaderBad(TENANT, "1 to 128 of letters, digits, . _ : @ -")
    if (text := headers.get(TTFT_S)) is not None:
        try:
            ttft_s = float(text)
        except ValueError:
            ttft_s = math.nan
        if not 0 < ttft_s < math.inf:
            raise HeaderBad(TTFT_S, "seconds, above 0")
    key = headers.get("authorization") or headers.get("x-api-key")
    if tenant is None:
        tenant = f"key-{hashlib.sha256(key.encode()).hexdigest()[:16]}" if key else ""
    return Asker(tenant, ttft_s)


class AskerMiddleware:
    """Reads them once a request; whatever runs for it finds them in `asker`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                asker.set(read_asker(Headers(scope=scope)))
            except HeaderBad as bad:
                error = {
                    "message": str(bad), "type": "BadRequestError", "param": bad.name, "code": 400
                }  # fmt: skip
                await JSONResponse({"error": error}, 400)(scope, receive, send)
                return
        await self._app(scope, receive, send)
