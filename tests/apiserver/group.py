"""A group whose pods come and go, as EndpointSlices in a store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.apiserver.store import SLICES

if TYPE_CHECKING:
    from random import Random

    from tests.apiserver.store import Store

GROUP_LABEL = "rbg.workloads.x-k8s.io/group-name"
ROLE_LABEL = "rbg.workloads.x-k8s.io/role-name"
NAMESPACE = "default"


class Group:
    """Some slices of two roles; `change` does one of the things that a cluster does."""

    def __init__(self, store: Store, name: str = "tandem") -> None:
        self.name = name
        self.selector = f"{GROUP_LABEL}={name}"
        self._store = store
        self._pods = 0
        self._slices: dict[str, tuple[str, list[dict[str, Any]]]] = {}

    def add_slice(self, role: str) -> str:
        name = f"s-{self.name}-{role}-{len(self._store.log)}"
        self._slices[name] = role, []
        self._write(name)
        return name

    def add_pod(
        self,
        slice_name: str,
        *,
        serving: bool = True,
        ip: str | None = None,
        name: str | None = None,
    ) -> str:
        """`name`: of a pod that replaces another; else one of its own."""
        role, endpoints = self._slices[slice_name]
        self._pods += 1
        name = name or f"{self.name}-{role}-{self._pods}"
        endpoints.append(
            {
                "addresses": [ip or f"10.1.{self._pods // 250}.{self._pods % 250 + 1}"],
                "conditions": {"ready": True, "serving": serving, "terminating": False},
                "hostname": name,
                "targetRef": {"kind": "Pod", "name": name, "uid": f"{name}-uid{self._pods}"},
            }
        )
        self._write(slice_name)
        return name

    def set(self, pod: str, **conditions: bool) -> None:
        for slice_name, (_, endpoints) in self._slices.items():
            for endpoint in endpoints:
                if endpoint["hostname"] == pod:
                    endpoint["conditions"] |= conditions
                    self._write(slice_name)

    def remove(self, pod: str) -> None:
        for slice_name, (_, endpoints) in self._slices.items():
            kept = [e for e in endpoints if e["hostname"] != pod]
            if len(kept) < len(endpoints):
                endpoints[:] = kept
                self._write(slice_name)

    def delete_slice(self, name: str) -> None:
        del self._slices[name]
        self._store.delete(SLICES, NAMESPACE, name)

    def change(self, random: Random) -> None:
        pods = sorted({e["hostname"] for _, es in self._slices.values() for e in es})
        slices = sorted(self._slices)
        what = random.random()
        if not slices or what < 0.1:
            self.add_slice(random.choice(["prefill", "decode"]))
        elif not pods or what < 0.4:
            self.add_pod(random.choice(slices), serving=random.random() < 0.5)
        elif what < 0.65:
            self.set(random.choice(pods), serving=random.random() < 0.7)
        elif what < 0.75:
            self.set(random.choice(pods), terminating=True)
        elif what < 0.85:
            self.remove(random.choice(pods))
        elif what < 0.95:
            self._move(random.choice(pods), random.choice(slices))
        else:
            self.delete_slice(random.choice(slices))

    def _move(self, pod: str, to: str) -> None:
        """For a moment it is in both."""
        found = [(n, e) for n, (_, es) in self._slices.items() for e in es if e["hostname"] == pod]
        name, endpoint = found[0]
        if name == to or len(found) > 1:
            return
        self._slices[to][1].append({**endpoint, "conditions": dict(endpoint["conditions"])})
        self._write(to)
        self._slices[name][1].remove(endpoint)
        self._write(name)

    def _write(self, name: str) -> None:
        role, endpoints = self._slices[name]
        labels = {
            GROUP_LABEL: self.name,
            ROLE_LABEL: role,
            "kubernetes.io/service-name": f"s-{self.name}-{role}",
        }
        content = {
            "metadata": {"name": name, "labels": labels},
            "addressType": "IPv4",
            "endpoints": endpoints or None,
            "ports": None,
        }
        self._store.put(SLICES, NAMESPACE, content)
