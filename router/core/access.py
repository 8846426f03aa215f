"""The routes that a router serves, and who may use each.

A route that is not in `ROUTES` does not exist: it is not mounted, and asking for it is a 404.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class Access(Enum):
    """The key that a route of a router with keys asks for."""

    OPEN = "anybody"
    CLIENT = "a client's key or the admin key"
    ADMIN = "the admin key"


@dataclass(frozen=True, slots=True)
class Route:
    """One path with its methods; `{…}` stands for one segment, as in Starlette's paths."""

    path: str
    methods: frozenset[str]
    access: Access
    optional: bool = False
    """It is only there when a flag or a setting asks for it."""

    @property
    def pattern(self) -> re.Pattern[str]:
        parts = re.split(r"\{\w+\}", self.path)
        return re.compile("[^/]+".join(re.escape(part) for part in parts))


def _route(methods: str, path: str, access: Access, *, optional: bool = False) -> Route:
    return Route(path, frozenset(methods.split()), access, optional)


ROUTES: Final = (
    _route("GET", "/health", Access.OPEN),
    _route("GET", "/livez", Access.OPEN),
    _route("GET", "/readyz", Access.OPEN),
    _route("GET POST", "/ping", Access.OPEN),
    _route("POST", "/v1/chat/completions", Access.CLIENT),
    _route("POST", "/v1/completions", Access.CLIENT),
    _route("POST", "/v1/responses", Access.CLIENT),
    _route("GET", "/v1/responses/{response_id}", Access.CLIENT),
    _route("POST", "/v1/responses/{response_id}/cancel", Access.CLIENT),
    _route("POST", "/v1/messages", Access.CLIENT),
    _route("POST", "/v1/messages/count_tokens", Access.CLIENT),
    _route("GET", "/v1/models", Access.CLIENT),
    _route("GET", "/version", Access.CLIENT),
    _route("POST", "/tokenize", Access.CLIENT),
    _route("POST", "/detokenize", Access.CLIENT),
    # With vLLM's --enable-scale-out.
    _route("POST", "/inference/v1/generate", Access.CLIENT, optional=True),
    _route("POST", "/v1/chat/completions/render", Access.CLIENT, optional=True),
    _route("POST", "/v1/completions/render", Access.CLIENT, optional=True),
    _route("POST", "/v1/responses/render", Access.CLIENT, optional=True),
    _route("POST", "/v1/messages/render", Access.CLIENT, optional=True),
    # With --api-docs.
    _route("GET", "/openapi.json", Access.CLIENT, optional=True),
    _route("GET", "/docs", Access.CLIENT, optional=True),
    _route("GET", "/redoc", Access.CLIENT, optional=True),
    # Each tenant sees its own requests, the admin everybody's.
    _route("GET", "/tandem/requests/{name}", Access.CLIENT),
    _route("GET", "/tandem/workers", Access.ADMIN),
    _route("GET", "/metrics", Access.ADMIN),
)
_PLAIN: Final = {route.path: route for route in ROUTES if "{" not in route.path}
_PATTERNS: Final = [(route.pattern, route) for route in ROUTES if "{" in route.path]


def find_route(path: str) -> Route | None:
    """The route that a request's path is for, whatever its method."""
    if route := _PLAIN.get(path):
        return route
    return next((route for pattern, route in _PATTERNS if pattern.fullmatch(path)), None)


class Presented(Enum):
    """The best that a request's keys prove."""

    NOTHING = "nothing"
    CLIENT = "client"
    ADMIN = "admin"


class Keys:
    """The keys of a router. Only their digests are kept."""

    def __init__(self, clients: Iterable[str] = (), admin: str | None = None) -> None:
        self._clients = [digest(key) for key in clients]
        self._admin = digest(admin) if admin is not None else None

    @property
    def for_clients(self) -> bool:
        return bool(self._clients)

    @property
    def for_admin(self) -> bool:
        return self._admin is not None

    def judge(self, key: str) -> Presented:
        """The time it takes does not depend on how much of which key was right."""
        found, known = digest(key), False
        for each in self._clients:
            known |= hmac.compare_digest(each, found)
        if self._admin is not None and hmac.compare_digest(self._admin, found):
            return Presented.ADMIN
        return Presented.CLIENT if known else Presented.NOTHING


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def tenant_of(key: str) -> str:
    """A name for whoever holds the key, from which the key can't be told."""
    return f"key-{digest(key).hex()[:16]}"


def presented_keys(headers: Mapping[str, str]) -> list[str]:
    """The keys in a request's headers, in each of the ways in which clients send one."""
    keys = []
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        keys.append(bearer.strip())
    keys += [headers.get("x-api-key", ""), headers.get("api-key", "")]
    return [key for key in keys if key]


def salt_for(tenant: str, salt: str | None) -> str:
    """The cache salt of a tenant's requests: only they share cached blocks with each other.

    `salt` is the request's own, which divides the tenant's requests further. No other tenant can
    make the same salt, since its own goes through here too.
    """
    text = f"{len(tenant)}:{tenant}:{'' if salt is None else salt}"
    return f"tenant-{hashlib.sha256(text.encode()).hexdigest()[:40]}"
