"""What an API server keeps: objects, versions, a log of changes, and how far back it goes."""

from __future__ import annotations

import base64
import json
from bisect import bisect_right
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

Object = dict[str, Any]


class Resource(NamedTuple):
    group: str
    plural: str
    kind: str
    empty: Object
    """What a bookmark of it has beside its metadata."""
    version: str = "v1"
    subresources: tuple[str, ...] = ()

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}"


SLICES = Resource(
    "discovery.k8s.io",
    "endpointslices",
    "EndpointSlice",
    {"addressType": "", "endpoints": None, "ports": None},
)
LEASES = Resource("coordination.k8s.io", "leases", "Lease", {"spec": {}})
ADAPTERS = Resource(
    "workloads.x-k8s.io",
    "rolebasedgroupscalingadapters",
    "RoleBasedGroupScalingAdapter",
    {"spec": {}},
    "v1alpha2",
    ("scale", "status"),
)


class Refusal(Exception):
    """A Status with a code of its own."""

    def __init__(self, code: int, reason: str, message: str, details: Object | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.body = status(code, reason, message, details)


def status(code: int, reason: str, message: str, details: Object | None = None) -> Object:
    body: Object = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    body |= {"message": message, "reason": reason}
    if details:
        body["details"] = details
    return body | {"code": code}


def forbidden(verb: str, resource: Resource, namespace: str, name: str, sub: str = "") -> Refusal:
    """As the recorded one says it; a named object's has the name besides."""
    named = f' "{name}"' if name else ""
    called = f"{resource.plural}.{resource.group}{named}"
    plural = f"{resource.plural}/{sub}" if sub else resource.plural
    message = (
        f'{called} is forbidden: User "nobody" cannot {verb} resource "{plural}" in API group '
        f'"{resource.group}" in the namespace "{namespace}"'
    )
    details = {"name": name} if name else {}
    return Refusal(
        403, "Forbidden", message, details | {"group": resource.group, "kind": resource.plural}
    )


def scale_of(adapter: Object) -> Object:
    """The scale subresource of a scaling adapter."""
    meta, status_ = adapter["metadata"], adapter.get("status", {})
    names = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {name: meta[name] for name in names if name in meta},
        "spec": {"replicas": adapter["spec"]["replicas"]},
        "status": {
            "replicas": status_.get("replicas", 0),
            "selector": status_.get("selector", ""),
        },
    }


def merged(before: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    after = dict(before) if isinstance(before, dict) else {}
    for key, value in patch.items():
        if value is None:
            after.pop(key, None)
        else:
            after[key] = merged(after.get(key), value)
    return after


def expired(version: int, oldest: int) -> Refusal:
    return Refusal(410, "Expired", f"too old resource version: {version} ({oldest})")


def selects(selector: str, labels: dict[str, str]) -> bool:
    """Equality, inequality and existence, as `a=b,c!=d,e,!f`."""
    for term in filter(None, selector.split(",")):
        if "!=" in term:
            name, _, value = term.partition("!=")
            good = labels.get(name) != value
        elif "=" in term:
            name, _, value = term.replace("==", "=").partition("=")
            good = labels.get(name) == value
        else:
            good = (term.removeprefix("!") in labels) != term.startswith("!")
        if not good:
            return False
    return True


@dataclass(frozen=True)
class Logged:
    version: int
    resource: Resource
    before: Object | None
    after: Object | None
    """None: deleted, and then `before` has the version of the deletion."""


class Store:
    def __init__(self, version: int = 1000) -> None:
        self.version = version
        self.compacted = 0
        """Watches and pages can't begin before this version."""
        self.log: list[Logged] = []
        self.listeners: list[Callable[[], None]] = []
        self._objects: dict[tuple[str, str, str], Object] = {}
        self._pages: dict[int, list[Object]] = {}

    # ------------------------------------------------------------ writing

    def create(self, resource: Resource, namespace: str, content: Object) -> Object:
        name = content["metadata"]["name"]
        if (resource.plural, namespace, name) in self._objects:
            raise self._refusal(409, "AlreadyExists", resource, name, "already exists")
        return self.put(resource, namespace, content)

    def replace(self, resource: Resource, namespace: str, content: Object) -> Object:
        """409 unless the version, if given, is the current one."""
        name = content["metadata"]["name"]
        known = self.get(resource, namespace, name)
        given = content["metadata"].get("resourceVersion")
        if given and given != known["metadata"]["resourceVersion"]:
            message = (
                f'Operation cannot be fulfilled on {resource.plural}.{resource.group} "{name}": '
                "the object has been modified; please apply your changes to the latest version "
                "and try again"
            )
            details = {"name": name, "group": resource.group, "kind": resource.plural}
            raise Refusal(409, "Conflict", message, details)
        return self.put(resource, namespace, content)

    def patch(self, resource: Resource, namespace: str, name: str, change: Object) -> Object:
        """A merge patch; one that names a stale version is refused, as other writes are."""
        after = merged(deepcopy(self.get(resource, namespace, name)), change)
        return self.replace(resource, namespace, after)

    def put(self, resource: Resource, namespace: str, content: Object) -> Object:
        """Create or replace, whatever is there."""
        after = deepcopy(content)
        meta = after["metadata"]
        key = resource.plural, namespace, meta["name"]
        self.version += 1
        meta["namespace"], meta["resourceVersion"] = namespace, str(self.version)
        before = self._objects.get(key)
        self._objects[key] = after
        self._log(resource, before, after)
        return after

    def delete(self, resource: Resource, namespace: str, name: str) -> None:
        before = deepcopy(self.get(resource, namespace, name))
        del self._objects[resource.plural, namespace, name]
        self.version += 1
        before["metadata"]["resourceVersion"] = str(self.version)
        self._log(resource, before, None)

    def _log(self, resource: Resource, before: Object | None, after: Object | None) -> None:
        self.log.append(Logged(self.version, resource, before, after))
        for listener in self.listeners:
            listener()

    def compact(self) -> None:
        """Forget the past, as a restarted server's cache has, or etcd every five minutes."""
        self.compacted = self.version
        self._pages.clear()

    # ------------------------------------------------------------ reading

    def get(self, resource: Resource, namespace: str, name: str) -> Object:
        try:
            return self._objects[resource.plural, namespace, name]
        except KeyError:
            raise self._refusal(404, "NotFound", resource, name, "not found") from None

    def selected(self, resource: Resource, namespace: str, selector: str) -> list[Object]:
        """By name."""
        return [
            found
            for (plural, where, _), found in sorted(self._objects.items())
            if (plural, where) == (resource.plural, namespace)
            and selects(selector, found["metadata"].get("labels", {}))
        ]

    def page(self, resource: Resource, namespace: str, query: dict[str, str]) -> Object:
        """A list, or `limit` of it; a `continue` token names the version that it is of."""
        selector, start, version = query.get("labelSelector", ""), 0, self.version
        if token := query.get("continue"):
            version, start = json.loads(base64.urlsafe_b64decode(token))
            if version not in self._pages:
                raise Refusal(
                    410, "Expired", "The provided continue parameter is too old to display"
                )
            found = self._pages[version]
        else:
            found = self.selected(resource, namespace, selector)
        end = start + int(query.get("limit") or len(found) or 1)
        meta: Object = {"resourceVersion": str(version)}
        if end < len(found):
            self._pages[version] = found
            token = base64.urlsafe_b64encode(json.dumps([version, end]).encode()).decode()
            meta |= {"continue": token, "remainingItemCount": len(found) - end}
        # In a list, items do not say what they are.
        items = [{k: v for k, v in o.items() if k not in ("kind", "apiVersion")} for o in found]
        return {
            "kind": f"{resource.kind}List",
            "apiVersion": resource.api_version,
            "metadata": meta,
            "items": items[start:end],
        }

    def _refusal(self, code: int, reason: str, resource: Resource, name: str, what: str) -> Refusal:
        details = {"name": name, "group": resource.group, "kind": resource.plural}
        message = f'{resource.plural}.{resource.group} "{name}" {what}'
        return Refusal(code, reason, message, details)


class Watcher:
    """One watch of a store: lines of JSON, as they are due."""

    def __init__(
        self, store: Store, resource: Resource, namespace: str, query: dict[str, str]
    ) -> None:
        """Raises a `Refusal` with 410 for a version that is forgotten."""
        self._store, self._resource, self._namespace = store, resource, namespace
        self._selector = query.get("labelSelector", "")
        self._first: list[bytes] = []
        version = int(query.get("resourceVersion") or 0)
        if version:
            if version < store.compacted:
                raise expired(version, store.compacted)
            self._at = bisect_right(store.log, version, key=lambda entry: entry.version)
            return
        self._at = len(store.log)
        found = store.selected(resource, namespace, self._selector)
        self._first = [self._line("ADDED", content) for content in found]
        if query.get("sendInitialEvents") == "true":
            self._first.append(self.bookmark({"k8s.io/initial-events-end": "true"}))

    def lines(self) -> list[bytes]:
        """All that happened since the last call."""
        lines, self._first = self._first, []
        log = self._store.log
        while self._at < len(log):
            entry = log[self._at]
            self._at += 1
            if entry.resource is self._resource and (told := self._told(entry)):
                lines.append(told)
        return lines

    def bookmark(self, annotations: dict[str, str] | None = None) -> bytes:
        meta: Object = {"resourceVersion": str(self._store.version)}
        if annotations:
            meta["annotations"] = annotations
        return self._line("BOOKMARK", {"metadata": meta} | self._resource.empty)

    def _told(self, entry: Logged) -> bytes | None:
        was, now = self._matches(entry.before), self._matches(entry.after)
        if now:
            assert entry.after is not None
            return self._line("MODIFIED" if was else "ADDED", entry.after)
        if was:
            assert entry.before is not None
            gone = deepcopy(entry.before)
            gone["metadata"]["resourceVersion"] = str(entry.version)
            return self._line("DELETED", gone)
        return None

    def _matches(self, content: Object | None) -> bool:
        return (
            content is not None
            and content["metadata"]["namespace"] == self._namespace
            and selects(self._selector, content["metadata"].get("labels", {}))
        )

    def _line(self, kind: str, content: Object) -> bytes:
        about = {"kind": self._resource.kind, "apiVersion": self._resource.api_version}
        return line(kind, about | content)


def line(kind: str, content: Object) -> bytes:
    """One event of a watch."""
    return json.dumps({"type": kind, "object": content}, separators=(",", ":")).encode() + b"\n"
