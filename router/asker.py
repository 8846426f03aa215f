"""The identity of a request, from HTTP's headers to the dispatch."""

from __future__ import annotations

import math
import re
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from router.core.access import Access, Keys, Presented, presented_keys, tenant_of
from router.core.errors import AdminKeyNeeded, KeyNotKnown, TenantNotAllowed

if TYPE_CHECKING:
    from collections.abc import Mapping

TENANT: Final = "x-tandem-tenant"
TTFT_S: Final = "x-tandem-ttft-s"
ADMIN: Final = "admin"
"""The tenant of what is asked with the admin key, unless the header names another."""
_NAME: Final = re.compile(r"[A-Za-z0-9._:@-]{1,128}")


@dataclass(frozen=True, slots=True)
class Asker:
    """A request's identity: its tenant, what it may see, and when it wants its first token."""

    tenant: str = ""
    ttft_s: float | None = None
    admin: bool = True
    """It may see all tenants' requests. Without keys everybody may."""
    salted: bool = False
    """Its cached blocks are shared within its tenant only."""


asker: ContextVar[Asker] = ContextVar("asker", default=Asker())  # noqa: B039  # It is frozen.


class HeaderBad(Exception):
    """A header of ours has a value that can't be used."""

    def __init__(self, name: str, want: str) -> None:
        super().__init__(f"{name}: want {want}")
        self.name = name


@dataclass(frozen=True, slots=True)
class AccessRules:
    """A router's settings about keys and tenants."""

    keys: Keys = field(default_factory=Keys)
    trust_tenant_header: bool = False
    """Any client may name the tenant: a gateway in front has checked who it is."""
    admin_address: bool = False
    """The admin's routes are at an address of their own, and at no other."""

    def identify(self, headers: Mapping[str, str], access: Access, *, at_admin: bool) -> Asker:
        """The asker, if it may use routes of this `access`; `at_admin`: at the admin's address.

        Raises `KeyNotKnown`, `AdminKeyNeeded`, `TenantNotAllowed` or `HeaderBad`.
        """
        proven, key = self._proven(headers)
        if access is not Access.OPEN:
            self._check(proven, access, at_admin=at_admin)
        named, ttft_s = _tenant_named(headers), _ttft_s(headers)
        keys = self.keys
        if proven is Presented.ADMIN or (at_admin and not keys.for_admin):
            return Asker(ADMIN if named is None else named, ttft_s, True, keys.for_clients)
        if not keys.for_clients:
            return Asker(named or "", ttft_s, not keys.for_admin)
        if named is not None and not self.trust_tenant_header:
            raise TenantNotAllowed
        tenant = tenant_of(key) if named is None else named
        return Asker(tenant, ttft_s, False, True)

    def _proven(self, headers: Mapping[str, str]) -> tuple[Presented, str]:
        """The first of the request's keys that is known, and what it proves."""
        for key in presented_keys(headers):
            if (proven := self.keys.judge(key)) is not Presented.NOTHING:
                return proven, key
        return Presented.NOTHING, ""

    def _check(self, proven: Presented, access: Access, *, at_admin: bool) -> None:
        keys = self.keys
        if proven is Presented.ADMIN:
            return
        if at_admin or access is Access.ADMIN:
            if not keys.for_admin and (at_admin or not keys.for_clients):
                return
            if proven is Presented.NOTHING:
                raise KeyNotKnown
            raise AdminKeyNeeded(configured=keys.for_admin)
        if keys.for_clients and proven is Presented.NOTHING:
            raise KeyNotKnown


def _tenant_named(headers: Mapping[str, str]) -> str | None:
    tenant = headers.get(TENANT)
    if tenant is not None and not _NAME.fullmatch(tenant):
        raise HeaderBad(TENANT, "1 to 128 of letters, digits, . _ : @ -")
    return tenant


def _ttft_s(headers: Mapping[str, str]) -> float | None:
    text = headers.get(TTFT_S)
    if text is None:
        return None
    try:
        ttft_s = float(text)
    except ValueError:
        ttft_s = math.nan
    if not 0 < ttft_s < math.inf:
        raise HeaderBad(TTFT_S, "seconds, above 0")
    return ttft_s
