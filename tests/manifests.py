"""What `deploy/k8s` builds to, its pods as nodes would get them, and the schemas of its kinds."""

from __future__ import annotations

import copy
import functools
import gzip
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import jsonschema
import yaml

Object: TypeAlias = dict[str, Any]

K8S = Path(__file__).parents[1] / "deploy/k8s"
SCHEMAS = Path(__file__).parent / "data/k8s/schemas"
KUBECTL = shutil.which("kubectl")
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The one in C takes a tenth of the time."""
FIELDS = {
    "status.podIP": "10.1.2.3",
    "metadata.name": "tandem-prefill-7",
    "metadata.namespace": "tandem",
}
"""What the downward API would say."""
INJECTED = {
    "RBG_LWP_GROUP_SIZE": "2",
    "RBG_LWP_WORKER_INDEX": "1",
    "RBG_LWP_LEADER_ADDRESS": "tandem-prefill-7-0.s-tandem-prefill",
}
"""What RBG sets in the containers of leader-worker roles."""

CRD = {
    "RoleBasedGroup": "rolebasedgroups.v1alpha2",
    "CoordinatedPolicy": "coordinatedpolicies.v1alpha2",
    "PodCliqueSet": "podcliquesets.v1alpha1",
    "ServiceMonitor": "servicemonitors.v1",
    "PodMonitor": "podmonitors.v1",
    "ScaledObject": "scaledobjects.v1alpha1",
}
VERSIONS = {
    "RoleBasedGroup": "workloads.x-k8s.io/v1alpha2",
    "CoordinatedPolicy": "workloads.x-k8s.io/v1alpha2",
    "PodCliqueSet": "grove.io/v1alpha1",
    "ServiceMonitor": "monitoring.coreos.com/v1",
    "PodMonitor": "monitoring.coreos.com/v1",
    "ScaledObject": "keda.sh/v1alpha1",
}


@dataclass(frozen=True)
class Pod:
    """One kind of pod: what a template makes, and how many of them."""

    owner: str
    labels: dict[str, str]
    spec: Object
    count: int

    @property
    def role(self) -> str:
        return self.labels["tandem/role"]

    @property
    def container(self) -> Object:
        (container,) = self.spec["containers"]
        return dict(container)

    @property
    def ports(self) -> dict[str, int]:
        return {p["name"]: p["containerPort"] for p in self.container.get("ports", [])}

    def environment(self) -> dict[str, str]:
        """Of its container, with made-up values where only a node knows them."""
        found = dict(INJECTED)
        for entry in self.container.get("env", []):
            source = entry.get("valueFrom", {})
            if field := source.get("fieldRef", {}).get("fieldPath"):
                label = re.fullmatch(r"metadata\.labels\['(.+)'\]", field)
                found[entry["name"]] = self.labels[label[1]] if label else FIELDS[field]
            else:
                found[entry["name"]] = entry.get("value", "secret")
        return found

    def args(self) -> list[str]:
        """Of its container, variables put in as Kubernetes does: unknown ones stay."""
        env = self.environment()
        return [
            re.sub(r"\$\((\w+)\)", lambda m: env.get(m[1], m[0]), a) for a in self.container["args"]
        ]

    def flag(self, name: str) -> str:
        """Its value; of a flag that is given twice the last one."""
        return [a.partition("=")[2] for a in self.args() if a.startswith(f"{name}=")][-1]


@functools.cache
def _built(folder: Path) -> str:
    assert KUBECTL
    done = subprocess.run(
        [KUBECTL, "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(folder: Path) -> list[Object]:
    """What would be applied."""
    return [o for o in yaml.load_all(_built(folder), Loader=LOADER) if o]


def with_components(base: str, names: list[str], scratch: Path) -> Path:
    """A folder as somebody who uses ours would have one: an overlay, and components."""

    def here(place: str) -> str:
        return os.path.relpath(K8S / place, scratch)

    content = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "tandem",
        "resources": [here(base)],
        "components": [here(f"components/{n}") for n in names],
    }
    (scratch / "kustomization.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return scratch


# ------------------------------------------------------------ pods


def pods(objects: list[Object]) -> list[Pod]:
    """Of every template in them."""
    return [pod for o in objects for pod in _pods_of(o)]


def _pods_of(o: Object) -> list[Pod]:
    match o["kind"]:
        case "RoleBasedGroup":
            return [pod for role in o["spec"]["roles"] for pod in _pods_of_role(role)]
        case "Deployment":
            return [_pod(o["metadata"]["name"], o["spec"]["template"], o["spec"]["replicas"])]
        case "PodCliqueSet":
            return [
                Pod(c["name"], c["labels"], c["spec"]["podSpec"], c["spec"]["replicas"])
                for c in o["spec"]["template"]["cliques"]
            ]
    return []


def _pods_of_role(role: Object) -> list[Pod]:
    if "standalonePattern" in role:
        return [_pod(role["name"], role["standalonePattern"]["template"], role["replicas"])]
    pattern = role["leaderWorkerPattern"]
    leader = merged(pattern["template"], pattern["leaderTemplatePatch"])
    follower = merged(pattern["template"], pattern["workerTemplatePatch"])
    return [
        _pod(role["name"], leader, role["replicas"]),
        _pod(role["name"], follower, role["replicas"] * (pattern["size"] - 1)),
    ]


def _pod(owner: str, template: Object, count: int) -> Pod:
    return Pod(owner, template["metadata"]["labels"], template["spec"], count)


def merged(template: Object, patch: Object) -> Object:
    """A strategic merge as far as it is used here: maps by key, containers by name."""
    out = copy.deepcopy(template)
    for key, value in patch.items():
        if isinstance(value, dict):
            out[key] = merged(out.get(key, {}), value)
        elif key == "containers":
            by_name = {c["name"]: c for c in out[key]}
            for container in value:
                name = container["name"]
                by_name[name] = merged(by_name.get(name, {}), container)
            out[key] = list(by_name.values())
        else:
            out[key] = value
    return out


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """As Kubernetes reads a label selector, of which `In` is all that is used here."""
    if any(labels.get(k) != v for k, v in selector.get("matchLabels", {}).items()):
        return False
    for need in selector.get("matchExpressions", []):
        assert need["operator"] == "In"
        if labels.get(need["key"]) not in need["values"]:
            return False
    return True


# ------------------------------------------------------------ schemas


@functools.cache
def schema(name: str) -> Object:
    """One of tests/data/k8s/schemas."""
    content: Object = json.loads(gzip.decompress((SCHEMAS / f"{name}.json.gz").read_bytes()))
    return content


@functools.cache
def _core(kind: str) -> jsonschema.Draft7Validator:
    definitions = schema("core-1.36")["definitions"]
    (full,) = [n for n in definitions if n.rpartition(".")[2] == kind]
    return jsonschema.Draft7Validator({"$ref": f"#/definitions/{full}", "definitions": definitions})


@functools.cache
def _custom(kind: str) -> jsonschema.Draft7Validator:
    return jsonschema.Draft7Validator(closed(schema(CRD[kind])))


def closed(node: Any) -> Any:
    """The schema that takes no field it does not name: an API server would drop it silently."""
    if isinstance(node, list):
        return [closed(n) for n in node]
    if not isinstance(node, dict):
        return node
    out = {k: closed(v) for k, v in node.items()}
    if isinstance(node.get("properties"), dict) and "type" in node:
        out["properties"] = {k: closed(v) for k, v in node["properties"].items()}
        if not node.get("x-kubernetes-preserve-unknown-fields"):
            out.setdefault("additionalProperties", False)
    return out


def misfits(o: Object) -> list[str]:
    """Where an object is not as its kind's schema has it; metadata and pods by the core's."""
    kind = o["kind"]
    if kind not in CRD:
        return _told(_core(kind), o)
    wrong = _told(_custom(kind), o) + _told(_core("ObjectMeta"), o["metadata"])
    if o["apiVersion"] != VERSIONS[kind]:
        wrong.append(f"apiVersion: {o['apiVersion']}")
    for pod in _pods_of(o):
        wrong += _told(_core("PodSpec"), pod.spec)
    return wrong


def _told(validator: jsonschema.Draft7Validator, what: Object) -> list[str]:
    return [f"{e.json_path}: {e.message[:300]}" for e in validator.iter_errors(what)]
