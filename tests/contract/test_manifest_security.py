"""Every pod keeps the rules of the Pod Security Standards' profile `restricted`, and a few of ours.

The rules are written out here (from Kubernetes' documentation), for no cluster is asked.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.manifests import K8S, KUBECTL, Object, Pod, build, pods, with_components

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(KUBECTL is None, reason="no kubectl on PATH")

VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim",
    "projected", "secret",
}  # fmt: skip
SECCOMP = ("RuntimeDefault", "Localhost")
SYSCTLS: set[str] = set()
"""None is wanted here, whatever the profile allows."""


def violations(spec: Object) -> Iterator[str]:
    """What the profile would refuse a pod for."""
    of_pod = spec.get("securityContext", {})
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            yield field
    if spec.get("hostUsers") is True:
        yield "hostUsers"
    for volume in spec.get("volumes", []):
        if extra := volume.keys() - {"name"} - VOLUMES:
            yield f"volume {extra}"
    for sysctl in of_pod.get("sysctls", []):
        if sysctl["name"] not in SYSCTLS:
            yield f"sysctl {sysctl['name']}"
    kinds = ("initContainers", "containers", "ephemeralContainers")
    for container in (c for kind in kinds for c in spec.get(kind, [])):
        yield from _of_container(container, of_pod)


def _of_container(container: Object, of_pod: Object) -> Iterator[str]:
    own = container.get("securityContext", {})
    effective = {**of_pod, **own}
    if own.get("privileged"):
        yield "privileged"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation"
    if effective.get("runAsNonRoot") is not True:
        yield "runAsNonRoot"
    if 0 in (own.get("runAsUser"), of_pod.get("runAsUser")):
        yield "runAsUser"
    if effective.get("seccompProfile", {}).get("type") not in SECCOMP:
        yield "seccompProfile"
    capabilities = own.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", []):
        yield "capabilities.drop"
    if set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield "capabilities.add"
    if own.get("procMount", "Default") != "Default":
        yield "procMount"
    if effective.get("appArmorProfile", {}).get("type", "RuntimeDefault") not in SECCOMP:
        yield "appArmorProfile"
    if effective.get("seLinuxOptions") or effective.get("windowsOptions"):
        yield "seLinuxOptions or windowsOptions"
    if any(p.get("hostPort") for p in container.get("ports", [])):
        yield "hostPort"
    for handler in _handlers(container):
        if handler.get("host"):  # A probe must not be sent elsewhere.
            yield "host"


def _handlers(container: Object) -> Iterator[Object]:
    asked = [container.get(f"{p}Probe", {}) for p in ("startup", "readiness", "liveness")]
    for hook in [*asked, *container.get("lifecycle", {}).values()]:
        yield from (hook[k] for k in ("httpGet", "tcpSocket") if k in hook)


def every_pod(scratch: Path) -> list[Pod]:
    folders = [*(K8S / "overlays").iterdir(), with_components("overlays/gpu", ["sizing"], scratch)]
    return [pod for folder in folders for pod in pods(build(folder))]


def test_every_pod_keeps_the_restricted_profile(tmp_path: Path) -> None:
    found = every_pod(tmp_path)
    assert {p.role for p in found} == {"router", "prefill", "decode", "controller"}
    assert [(p.owner, v) for p in found for v in violations(p.spec)] == []
    job = yaml.safe_load((K8S / "fetch-model.yaml").read_text(encoding="utf-8"))
    assert list(violations(job["spec"]["template"]["spec"])) == []


def test_the_namespace_enforces_the_profile() -> None:
    for overlay in (K8S / "overlays").iterdir():
        (space,) = [o for o in build(overlay) if o["kind"] == "Namespace"]
        assert space["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_only_what_the_image_names_may_be_written(tmp_path: Path) -> None:
    for pod in every_pod(tmp_path):
        volumes = {v["name"]: v for v in pod.spec["volumes"]}
        for container in [pod.container, *pod.spec.get("initContainers", [])]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            writable = {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")}
            assert writable <= {"/cache", "/tmp", "/dev/shm"}
            assert all("emptyDir" in volumes[m["name"]] for m in container["volumeMounts"]
                       if not m.get("readOnly"))  # fmt: skip
        if pod.role in ("prefill", "decode"):
            assert "/dev/shm" in {m["mountPath"] for m in pod.container["volumeMounts"]}


def test_every_pods_memory_is_bounded_and_covers_its_shared_memory(tmp_path: Path) -> None:
    for pod in every_pod(tmp_path):
        limit = _bytes(pod.container["resources"]["limits"]["memory"])
        shared = [v["emptyDir"]["sizeLimit"] for v in pod.spec["volumes"]
                  if v.get("emptyDir", {}).get("medium") == "Memory"]  # fmt: skip
        assert sum(map(_bytes, shared)) < limit / 2
        assert pod.container["resources"]["requests"]["cpu"]


def _bytes(quantity: str) -> int:
    return int(quantity[:-2]) * 1024 ** ("KiMiGiTi".index(quantity[-2:]) // 2 + 1)


def test_no_side_has_the_others_secret_key_and_none_is_for_everybody(tmp_path: Path) -> None:
    secrets: dict[str, set[str]] = {}
    for pod in every_pod(tmp_path):
        for volume in pod.spec["volumes"]:
            if secret := volume.get("secret"):
                secrets.setdefault(secret["secretName"], set()).add(pod.role)
                assert secret["defaultMode"] == 0o440
                assert pod.spec["securityContext"]["fsGroup"] == 10001
    assert secrets == {
        "tandem-router-keys": {"router"},
        "tandem-worker-keys": {"prefill", "decode"},
    }


CHANGES: dict[str, Callable[[Any, Any], object]] = {
    "hostNetwork": lambda s, c: s.update(hostNetwork=True),
    "hostPID": lambda s, c: s.update(hostPID=True),
    "volume {'hostPath'}": lambda s, c: s["volumes"].append({"name": "x", "hostPath": {}}),
    "sysctl net.core.somaxconn": lambda s, c: s["securityContext"].update(
        sysctls=[{"name": "net.core.somaxconn", "value": "1"}]
    ),
    "privileged": lambda s, c: c["securityContext"].update(privileged=True),
    "allowPrivilegeEscalation": lambda s, c: c["securityContext"].pop("allowPrivilegeEscalation"),
    "runAsNonRoot": lambda s, c: s["securityContext"].pop("runAsNonRoot"),
    "runAsUser": lambda s, c: c["securityContext"].update(runAsUser=0),
    "seccompProfile": lambda s, c: s["securityContext"].pop("seccompProfile"),
    "capabilities.drop": lambda s, c: c["securityContext"].pop("capabilities"),
    "capabilities.add": lambda s, c: c["securityContext"]["capabilities"].update(add=["IPC_LOCK"]),
    "procMount": lambda s, c: c["securityContext"].update(procMount="Unmasked"),
    "hostPort": lambda s, c: c["ports"][0].update(hostPort=7000),
    "host": lambda s, c: c["livenessProbe"]["httpGet"].update(host="10.0.0.1"),
}


@pytest.mark.parametrize("rule", CHANGES)
def test_each_rule_refuses_the_pod_that_breaks_it(rule: str) -> None:
    pod = next(p for p in pods(build(K8S / "overlays/gpu")) if p.role == "prefill")
    spec = copy.deepcopy(pod.spec)
    CHANGES[rule](spec, spec["containers"][0])
    assert list(violations(spec)) == [rule]
