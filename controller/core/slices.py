"""EndpointSlices as the API server sends them, read and merged into endpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

INITIAL_EVENTS_END: Final = "k8s.io/initial-events-end"
"""The annotation of the bookmark that ends a watch's snapshot."""
_FAMILIES: Final = ("IPv4", "IPv6")
"""Address types that can be connected to, the preferred one first."""


class Meta(msgspec.Struct, rename="camel"):
    """An object's metadata, as far as it is read here."""

    name: str = ""
    resource_version: str = ""
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class Conditions(msgspec.Struct):
    """Of one endpoint. Absent means unknown."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class Target(msgspec.Struct):
    """The pod behind an endpoint."""

    uid: str = ""
    name: str = ""


class SliceEndpoint(msgspec.Struct, rename="camel"):
    """One entry of a slice."""

    addresses: list[str]
    conditions: Conditions = msgspec.field(default_factory=Conditions)
    hostname: str | None = None
    target_ref: Target | None = None


class Slice(msgspec.Struct, rename="camel"):
    """One EndpointSlice."""

    metadata: Meta
    address_type: str = ""
    endpoints: list[SliceEndpoint] | None = None


class ListMeta(msgspec.Struct, rename={"resource_version": "resourceVersion", "more": "continue"}):
    """Of a page: `more` asks for the next one and is empty on the last."""

    resource_version: str = ""
    more: str = ""


class SliceList(msgspec.Struct):
    """One page of a list."""

    metadata: ListMeta
    items: list[Slice] | None = None


class Cause(msgspec.Struct):
    """One reason of a Status."""

    reason: str = ""


class Details(msgspec.Struct):
    """What a Status says besides."""

    causes: list[Cause] | None = None


class Status(msgspec.Struct):
    """What the API server says instead of an answer, as a body or as an ERROR event's object."""

    code: int = 0
    reason: str = ""
    message: str = ""
    details: Details | None = None

    @property
    def expired(self) -> bool:
        """Our version is none that the server can go on from: too old, or of another life."""
        causes = (self.details.causes if self.details else None) or []
        return self.code == 410 or any(c.reason == "ResourceVersionTooLarge" for c in causes)


class Event(msgspec.Struct):
    """One line of a watch; what its object is, `type` says."""

    type: str
    object: msgspec.Raw


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One pod of one service, whatever number of slices it is in."""

    uid: str
    """The pod's; of an endpoint without one, its name."""
    name: str
    role: str
    address: str
    """An IP address."""
    serving: bool
    terminating: bool


def merge(slices: Iterable[Slice], role_label: str) -> list[Endpoint]:
    """The endpoints of all slices, each pod once, by name.

    An endpoint moves between slices and is in both for a moment, and a pod with two families is in
    two for good. The slice written last is believed, except that no pod ever stops terminating;
    the address is of the preferred family.
    """
    found: dict[str, Endpoint] = {}
    families: dict[str, str] = {}
    for part in sorted(slices, key=_written):
        role = (part.metadata.labels or {}).get(role_label)
        if role is None or part.address_type not in _FAMILIES:
            continue
        for raw in part.endpoints or ():
            if not raw.addresses:
                continue
            endpoint = _endpoint(raw, role)
            if before := found.get(endpoint.uid):
                preferred = min(part.address_type, families[endpoint.uid], key=_FAMILIES.index)
                endpoint = Endpoint(
                    endpoint.uid,
                    endpoint.name,
                    role,
                    endpoint.address if preferred == part.address_type else before.address,
                    endpoint.serving,
                    endpoint.terminating or before.terminating,
                )
                families[endpoint.uid] = preferred
            else:
                families[endpoint.uid] = part.address_type
            found[endpoint.uid] = endpoint
    return sorted(found.values(), key=lambda e: (e.name, e.uid))


def _written(part: Slice) -> tuple[int, str]:
    # Versions are numbers that rise, by Kubernetes' own word since 1.35 and in fact ever since.
    version = part.metadata.resource_version
    return int(version) if version.isdigit() else 0, part.metadata.name


def _endpoint(raw: SliceEndpoint, role: str) -> Endpoint:
    conditions, target = raw.conditions, raw.target_ref or Target()
    # `ready` is always true where not-ready addresses are published: it only fills in.
    serving = conditions.ready if conditions.serving is None else conditions.serving
    name = raw.hostname or target.name or raw.addresses[0]
    return Endpoint(
        target.uid or name,
        name,
        role,
        raw.addresses[0],
        serving is not False,
        conditions.terminating is True,
    )
