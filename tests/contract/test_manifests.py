"""What `deploy/k8s` promises, held against the schemas and against our own code."""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import yaml

from controller.settings import ControllerSettings
from router.settings import RouterSettings
from tests.manifests import (
    K8S,
    KUBECTL,
    Object,
    Pod,
    build,
    misfits,
    pods,
    selects,
    with_components,
)
from workers.flags import read_settings
from workers.settings import WorkerSettings

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic_settings import BaseSettings

pytestmark = pytest.mark.skipif(KUBECTL is None, reason="no kubectl on PATH")

TOP = K8S.parents[1]
OVERLAYS = sorted(p.name for p in (K8S / "overlays").iterdir())
COMPONENTS = [["monitors"], ["monitors", "sizing"], ["monitors", "keda"], ["monitors", "hpa"]]
EPHEMERAL = (32768, 60999)
"""Linux' own range, where the handoff's ports are."""
MASTER_PORT = 29501
MARGIN_S = 15
SETTINGS: dict[str, type[BaseSettings]] = {
    "router": RouterSettings, "worker": WorkerSettings, "controller": ControllerSettings,
}  # fmt: skip
VLLMS_OWN = {
    "--served-model-name", "--tensor-parallel-size", "--distributed-executor-backend",
    "--nnodes", "--node-rank", "--master-addr", "--master-port",
}  # fmt: skip
"""tests/contract/test_manifest_flags.py asks vLLM itself."""


@pytest.fixture(scope="module", params=[*OVERLAYS, *("+".join(c) for c in COMPONENTS), "+gang"])
def group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    """Every overlay, and what our components make of one."""
    if request.param in OVERLAYS:
        return build(K8S / "overlays" / request.param)
    names = request.param.strip("+").split("+")
    return build(with_components("overlays/gpu", names, tmp_path_factory.mktemp("group")))


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [o for o in objects if o["kind"] in kinds]


def named(objects: list[Object], kind: str) -> dict[str, Object]:
    return {o["metadata"]["name"]: o for o in of_kind(objects, kind)}


def serving(objects: list[Object]) -> list[Pod]:
    """Pods that listen: all but those that follow a leader."""
    return [p for p in pods(objects) if p.ports]


# ------------------------------------------------------------ as Kubernetes sees them


def test_there_is_a_group_for_every_platform() -> None:
    assert {"cpu", "gpu", "gpu-rdma", "grove"} <= set(OVERLAYS)


def test_every_object_fits_its_schema(group: list[Object]) -> None:
    assert {o["metadata"]["name"]: m for o in group if (m := misfits(o))} == {}


def test_all_is_in_one_namespace_and_named_once(group: list[Object]) -> None:
    spaces = {o["metadata"].get("namespace") for o in group if o["kind"] != "Namespace"}
    assert spaces == {"tandem"}
    assert set(Counter((o["kind"], o["metadata"]["name"]) for o in group).values()) == {1}


def test_every_file_is_built_into_something() -> None:
    used = set()
    for file in K8S.rglob("kustomization.yaml"):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        paths = [p["path"] for p in content.get("patches", []) if "path" in p]
        for place in [*content.get("resources", []), *content.get("components", []), *paths]:
            target = (file.parent / place).resolve()
            assert target.exists(), f"{file}: {place}"
            used.add(target)
    other = {f for f in K8S.rglob("*.yaml") if f.name != "kustomization.yaml"} - used
    # For another's chart, and for one time.
    assert {f.name for f in other} == {"adapter-values.yaml", "fetch-model.yaml"}


def test_what_a_pod_names_is_there(group: list[Object]) -> None:
    accounts, claims = named(group, "ServiceAccount"), named(group, "PersistentVolumeClaim")
    for pod in pods(group):
        assert pod.spec["serviceAccountName"] in accounts
        volumes = {v["name"]: v for v in pod.spec["volumes"]}
        for volume in volumes.values():
            if claim := volume.get("persistentVolumeClaim"):
                assert claim["claimName"] in claims
        for container in [pod.container, *pod.spec.get("initContainers", [])]:
            assert {m["name"] for m in container["volumeMounts"]} <= set(volumes)
        names = [e["name"] for e in pod.container["env"]]
        assert len(names) == len(set(names))  # Grove refuses it, Kubernetes takes the last.


def test_every_image_is_one_version(group: list[Object]) -> None:
    images = {c["image"] for p in pods(group) for c in
              [p.container, *p.spec.get("initContainers", [])]}  # fmt: skip
    found = {re.fullmatch(r"registry\.example/tandem:(\d+\.\d+\.\d+)-(cpu|gpu)", i) for i in images}
    assert {m[1] for m in found if m} == {"0.1.0"}
    assert None not in found
    workers = {p.container["image"].rpartition("-")[2] for p in pods(group)
               if p.role in ("prefill", "decode")}  # fmt: skip
    gpu = any("nvidia.com/gpu" in p.container["resources"]["limits"] for p in pods(group))
    assert workers == {"gpu" if gpu else "cpu"}


def test_the_job_that_fetches_a_model_fits_and_fills_what_pods_read() -> None:
    job = yaml.safe_load((K8S / "fetch-model.yaml").read_text(encoding="utf-8"))
    assert misfits(job) == []
    group = build(K8S / "overlays/gpu")
    (claim,) = named(group, "PersistentVolumeClaim")
    spec = job["spec"]["template"]["spec"]
    assert {"name": "models", "persistentVolumeClaim": {"claimName": claim}} in spec["volumes"]
    folder = spec["containers"][0]["args"][-1]
    assert {p.flag("--model") for p in pods(group)} == {folder}


# ------------------------------------------------------------ as our own code sees them


def test_routers_judge_by_what_the_controller_aims_at(group: list[Object]) -> None:
    of = {p.role: p for p in pods(group)}
    if "controller" in of:
        for flag_ in ("--ttft-objective-s", "--itl-objective-s"):
            assert of["router"].flag(flag_) == of["controller"].flag(flag_)


def test_every_flag_and_variable_is_one_of_its_process(group: list[Object]) -> None:
    checked = 0
    for pod in pods(group):
        command, *flags = pod.args()
        if (kind := SETTINGS.get(command)) is None:
            assert "command" in pod.container
            continue
        with mock.patch.dict(os.environ, pod.environment(), clear=True):
            settings, rest = read_settings(kind, flags, prog=f"tandem {command}", description="")
        assert {r.partition("=")[0] for r in rest} <= VLLMS_OWN
        assert "$(" not in "".join(pod.args())
        if isinstance(settings, WorkerSettings):
            assert settings.role == pod.role
            assert {"tokens": settings.port, "http": settings.http_port} == pod.ports
            assert settings.host == "10.1.2.3"
            assert settings.curve_routers_file
        if isinstance(settings, RouterSettings):
            assert {"http": settings.port, "admin": settings.admin_port} == pod.ports
            assert settings.host == "0.0.0.0"
            assert settings.curve_workers_file
        checked += command != "controller"
    assert checked == 3


def test_the_router_looks_for_workers_where_they_are(group: list[Object]) -> None:
    """Its selector and its role label match what RBG, or else our headless services, carry."""
    (router,) = [p for p in pods(group) if p.role == "router"]
    ports = dict(pair.split("=") for pair in router.flag("--discover-ports").split(","))
    assert ports == {p.role: str(p.ports["tokens"]) for p in serving(group) if "tokens" in p.ports}
    key, _, value = router.flag("--discover-selector").partition("=")
    if rbg := of_kind(group, "RoleBasedGroup"):
        assert (key, value) == ("rbg.workloads.x-k8s.io/group-name", rbg[0]["metadata"]["name"])
        assert ports.keys() <= {r["name"] for r in rbg[0]["spec"]["roles"]}
        leaders = {r["name"] for r in rbg[0]["spec"]["roles"] if "leaderWorkerPattern" in r}
        told = [a for a in router.args() if a.startswith("--discover-leaders=")]
        assert told == (["--discover-leaders=" + ",".join(
            r for r in ports if r in leaders)] if leaders else [])  # fmt: skip
        return
    label = router.flag("--discover-role-label")
    found = {}
    for service in of_kind(group, "Service"):
        labels = service["metadata"].get("labels", {})
        if labels.get(key) == value and labels.get(label) in ports:
            assert service["spec"]["clusterIP"] == "None"
            assert service["spec"]["publishNotReadyAddresses"] is True
            found[labels[label]] = {
                p.role for p in pods(group) if selects({"matchLabels": service["spec"]["selector"]},
                                                       p.labels)}  # fmt: skip
    assert found == {role: {role} for role in ports}


def test_no_command_names_a_replica(group: list[Object]) -> None:
    assert not re.search(r"(router|prefill|decode)-\d", yaml.safe_dump(group))


def test_no_role_waits_for_another(group: list[Object]) -> None:
    for o in group:
        assert not {"dependencies", "startsAfter"} & set(_keys(o))
    for pod in pods(group):
        for init in pod.spec.get("initContainers", []):
            assert init["args"][:2] == ["models", "prepare"]


def _keys(node: Any) -> list[str]:
    if isinstance(node, dict):
        return [*node, *(k for v in node.values() for k in _keys(v))]
    return [k for n in node for k in _keys(n)] if isinstance(node, list) else []


def test_a_pod_is_given_the_time_that_its_drain_takes(group: list[Object]) -> None:
    for pod in serving(group):
        grace = pod.spec["terminationGracePeriodSeconds"]
        if pod.role in ("prefill", "decode"):
            assert pod.container["lifecycle"] == {
                "preStop": {"httpGet": {"path": "/drain", "port": "http"}}
            }
            assert grace >= float(pod.flag("--drain-s")) + MARGIN_S
            # A hung engine's drain would last for all of it.
            assert pod.container["livenessProbe"]["terminationGracePeriodSeconds"] < MARGIN_S
        elif pod.role == "router":
            drain = float(pod.flag("--notice-s")) + float(pod.flag("--drain-s"))
            assert grace >= drain + MARGIN_S


def test_routers_have_seen_a_worker_leave_before_it_is_updated_in_place() -> None:
    for o in of_kind(build(K8S / "overlays/gpu"), "RoleBasedGroup"):
        for role in o["spec"]["roles"]:
            update = role["rolloutStrategy"]["rollingUpdate"]
            assert update["type"] == "InPlaceIfPossible"
            debounce = RouterSettings.model_fields["discover_debounce_s"].default
            assert update["inPlaceUpdateStrategy"]["gracePeriodSeconds"] >= 5 * debounce


def test_probes_ask_what_the_process_answers(group: list[Object]) -> None:
    worker, controller = (
        (TOP / f"{name}/http.py").read_text(encoding="utf-8") for name in ("workers", "controller")
    )
    front = (TOP / "router/front.py").read_text(encoding="utf-8")
    served = {
        "worker": {*re.findall(r'Route\("(/\w+)"', worker)},
        "router": {*re.findall(r'add_route\("(/\w+)"', front), "/health"},
        "controller": {*re.findall(r'Route\("(/\w+)"', controller)},
    }
    for pod in serving(group):
        container = pod.container
        asked = [container[f"{p}Probe"]["httpGet"] for p in ("startup", "readiness", "liveness")]
        if hook := container.get("lifecycle", {}).get("preStop", {}).get("httpGet"):
            asked.append(hook)
        assert {a["path"] for a in asked} <= served[pod.args()[0]]
        assert {a["port"] for a in asked} <= pod.ports.keys()
        assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"


# ------------------------------------------------------------ rights


def rules(group: list[Object], name: str) -> dict[tuple[str, str], dict[str, Any]]:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for rule in named(group, "Role")[name]["rules"]:
        for api in rule["apiGroups"]:
            for resource in rule["resources"]:
                for verb in rule["verbs"]:
                    found.setdefault((api, resource), {})[verb] = rule.get("resourceNames")
    return found


def test_the_router_may_ask_what_its_reflector_asks_and_no_more(group: list[Object]) -> None:
    source = (TOP / "controller/reflector.py").read_text(encoding="utf-8")
    paths = re.findall(r'f"/apis/([a-z0-9.]+)/v1/namespaces/\{[a-z.]+\}/([a-z]+)"', source)
    assert rules(group, "tandem-router") == {path: {"list": None, "watch": None} for path in paths}
    assert paths == [("discovery.k8s.io", "endpointslices")]


def test_the_controller_may_lead_and_scale_its_roles_and_no_more(tmp_path: Path) -> None:
    group = build(with_components("overlays/gpu", ["sizing"], tmp_path))
    (name,) = named(group, "RoleBasedGroup")
    (controller,) = {p.flag("--group") for p in pods(group) if p.role == "controller"}
    assert controller == name
    adapters, lease = [f"{name}-prefill", f"{name}-decode"], [f"{name}-controller"]
    scaled = {"get": adapters, "patch": adapters}
    assert rules(group, "tandem-controller") == {
        ("discovery.k8s.io", "endpointslices"): {"list": None, "watch": None},
        ("coordination.k8s.io", "leases"): {"create": None, "get": lease, "update": lease},
        ("workloads.x-k8s.io", "rolebasedgroupscalingadapters/scale"): scaled,
    }  # fmt: skip


def test_rights_go_to_who_uses_them_and_tokens_to_who_has_rights(group: list[Object]) -> None:
    assert of_kind(group, "ClusterRole", "ClusterRoleBinding") == []
    holders = set()
    for binding in of_kind(group, "RoleBinding"):
        assert binding["roleRef"]["name"] in named(group, "Role")
        (subject,) = binding["subjects"]
        assert (subject["name"], subject["namespace"]) == (binding["roleRef"]["name"], "tandem")
        holders.add(subject["name"])
    for pod in pods(group):
        has_token = pod.spec["automountServiceAccountToken"]
        assert has_token == (pod.spec["serviceAccountName"] in holders)
        assert pod.spec["enableServiceLinks"] is False
    assert holders == named(group, "Role").keys()
    for account in of_kind(group, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


# ------------------------------------------------------------ who selects whom


def test_whatever_selects_pods_selects_those_that_it_means(group: list[Object]) -> None:
    every = pods(group)
    for service in of_kind(group, "Service"):
        chosen = [
            p for p in every if selects({"matchLabels": service["spec"]["selector"]}, p.labels)
        ]
        assert {p.role for p in chosen} == {service["metadata"]["labels"]["tandem/role"]}
        for port in service["spec"].get("ports", []):
            assert any(port["targetPort"] in p.ports for p in chosen)
    for kind in ("NetworkPolicy", "PodDisruptionBudget"):
        for o in of_kind(group, kind):
            selector = o["spec"].get("podSelector") or o["spec"]["selector"]
            assert [p for p in every if selects(selector, p.labels)], o["metadata"]["name"]
    for pod in every:
        covering = [n for n in of_kind(group, "NetworkPolicy")
                    if selects(n["spec"]["podSelector"], pod.labels)]  # fmt: skip
        assert len(covering) == 1
        assert covering[0]["spec"]["policyTypes"] == ["Ingress", "Egress"]
    for o in of_kind(group, "Deployment"):
        assert selects(o["spec"]["selector"], o["spec"]["template"]["metadata"]["labels"])


def test_a_budget_leaves_something_to_evict_and_something_to_serve(group: list[Object]) -> None:
    for budget in of_kind(group, "PodDisruptionBudget"):
        least = budget["spec"]["minAvailable"]
        chosen = [p for p in pods(group) if selects(budget["spec"]["selector"], p.labels)]
        total = sum(p.count for p in chosen)
        # A percentage, or maxUnavailable, is reckoned by a scale that RBG's pods' owner lacks.
        assert isinstance(least, int)
        assert 0 < least < total
        if len(chosen) > 1:  # Leaders and followers: no two instances at once.
            assert least == total - 1


def test_scrapes_find_their_ports(group: list[Object]) -> None:
    for monitor in of_kind(group, "PodMonitor"):
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        chosen = [p for p in serving(group) if selects(monitor["spec"]["selector"], p.labels)]
        roles = {p.role for p in chosen}
        assert roles in ({"router"}, {"prefill", "decode"})
        assert endpoint["port"] == ("admin" if roles == {"router"} else "http")
        assert all(endpoint["port"] in p.ports for p in chosen)
    assert of_kind(group, "ServiceMonitor") == [], "clients' services have no port for it"


# ------------------------------------------------------------ who may speak to whom

Ports = frozenset[tuple[int, int]]


def allowed(group: list[Object], source: str, target: str) -> Ports:
    """Ranges of TCP ports that both sides' policies let through, roles by their labels.

    A source `namespace:LABEL=VALUE` is anybody in such a namespace.
    """
    coming, leaving = set[tuple[int, int]](), set[tuple[int, int]]()
    for policy in of_kind(group, "NetworkPolicy"):
        chosen = policy["spec"]["podSelector"]
        if selects(chosen, _labels(target)):
            for rule in policy["spec"]["ingress"]:
                if any(_is(peer, source) for peer in rule["from"]):
                    coming |= _ranges(rule)
        if selects(chosen, _labels(source)):
            for rule in policy["spec"]["egress"]:
                if any(_is(peer, target) for peer in rule.get("to", [])):
                    leaving |= _ranges(rule)
    return frozenset(coming if source.startswith("namespace:") else coming & leaving)


def _labels(role: str) -> dict[str, str]:
    return {"tandem/group": "tandem", "tandem/role": role}


def _is(peer: Object, who: str) -> bool:
    assert peer.keys() in ({"podSelector"}, {"namespaceSelector"})
    if "podSelector" in peer:
        return selects(peer["podSelector"], _labels(who))
    key, _, value = who.removeprefix("namespace:").partition("=")
    return selects(peer["namespaceSelector"], {key: value})


def _ranges(rule: Object) -> set[tuple[int, int]]:
    assert rule["ports"], "no rule is for every port"
    return {(p["port"], p.get("endPort", p["port"])) for p in rule["ports"]
            if p.get("protocol", "TCP") == "TCP"}  # fmt: skip


def test_each_speaks_to_those_that_it_has_business_with(group: list[Object]) -> None:
    port = {(p.role, name): (n, n) for p in serving(group) for name, n in p.ports.items()}
    handoff: set[tuple[int, int]] = {EPHEMERAL}
    if any("command" in p.container for p in pods(group)):
        handoff.add((MASTER_PORT, MASTER_PORT))
        assert all(p.flag("--master-port") == str(MASTER_PORT) for p in pods(group)
                   if p.role in ("prefill", "decode"))  # fmt: skip
    workers = ("prefill", "decode")
    clients, prometheus = (
        "namespace:tandem/clients=true",
        "namespace:kubernetes.io/metadata.name=monitoring",
    )
    wanted: dict[tuple[str, str], set[tuple[int, int]]] = {
        (clients, "router"): {port["router", "http"]},
        (prometheus, "router"): {port["router", "admin"]},
        **{("router", w): {port[w, "tokens"]} for w in workers},
        **{(prometheus, w): {port[w, "http"]} for w in workers},
        **{(a, b): handoff for a in workers for b in workers},
    }
    roles = ["router", *workers]
    if ("controller", "http") in port:
        roles.append("controller")
        wanted[prometheus, "controller"] = {port["controller", "http"]}
        wanted["controller", "router"] = {port["router", "admin"]}
        wanted |= {("controller", w): {port[w, "http"]} for w in workers}
    found = {
        (a, b): set(ports)
        for a in [*roles, clients, prometheus, "namespace:some=other", "stranger"]
        for b in roles
        if (ports := allowed(group, a, b))
    }
    assert found == wanted


def test_only_who_asks_the_api_server_reaches_it(group: list[Object]) -> None:
    for policy in of_kind(group, "NetworkPolicy"):
        anywhere = [r for r in policy["spec"]["egress"] if "to" not in r]
        asks = {p.role for p in pods(group) if p.spec["automountServiceAccountToken"]}
        mine = {p.role for p in pods(group) if selects(policy["spec"]["podSelector"], p.labels)}
        assert [_ranges(r) for r in anywhere] == (
            [{(443, 443), (6443, 6443)}] if mine <= asks else []
        )


# ------------------------------------------------------------ RBG, Grove, autoscalers


def test_a_coordinated_policy_bears_its_groups_name_and_reckons_in_percent(
    group: list[Object],
) -> None:
    groups = named(group, "RoleBasedGroup")
    for policy in of_kind(group, "CoordinatedPolicy"):
        roles = {r["name"] for r in groups[policy["metadata"]["name"]]["spec"]["roles"]}
        for rule in policy["spec"]["policies"]:
            assert set(rule["roles"]) <= roles
            # RBG v0.8 fails on a number, or takes it for none.
            for part in ("scaling", "rollingUpdate"):
                assert re.fullmatch(r"\d+%", rule["strategy"].get(part, {}).get("maxSkew", "1%"))
    assert len(groups) == len(of_kind(group, "CoordinatedPolicy"))


def test_prefill_and_decode_can_be_scaled_and_the_router_is_not(group: list[Object]) -> None:
    adapters = set()
    for o in of_kind(group, "RoleBasedGroup"):
        for role in o["spec"]["roles"]:
            assert ("standalonePattern" in role) != ("leaderWorkerPattern" in role)
            if role.get("scalingAdapter", {}).get("enable"):
                adapters.add(f"{o['metadata']['name']}-{role['name']}")
        assert adapters == {"tandem-prefill", "tandem-decode"}
    scalers = of_kind(group, "HorizontalPodAutoscaler", "ScaledObject")
    for scaler in scalers:
        assert scaler["spec"]["scaleTargetRef"] == {
            "apiVersion": "workloads.x-k8s.io/v1alpha2",
            "kind": "RoleBasedGroupScalingAdapter",
            "name": scaler["metadata"]["name"],
        }
    assert {s["metadata"]["name"] for s in scalers} in (set(), adapters)
    kinds = {s["kind"] for s in scalers} | set(named(group, "Deployment")) & {"tandem-controller"}
    assert len(kinds) <= 1, "two that size one role"


def test_autoscalers_ask_for_metrics_that_there_are() -> None:
    page = (TOP / "docs/metrics.md").read_text(encoding="utf-8")
    asked: set[str] = set()
    for file in ("keda/scaled-objects.yaml", "hpa/adapter-values.yaml"):
        text = (K8S / "components" / file).read_text(encoding="utf-8")
        asked |= set(re.findall(r"(?:tandem_(?:router|worker)_|vllm:)\w+", text))
    assert len(asked) == 3
    assert [m for m in asked if f"`{m}`" not in page] == []
    served = yaml.safe_load((K8S / "components/hpa/adapter-values.yaml").read_text())
    names = {r["name"]["as"] for r in served["rules"]["external"]}
    scalers = yaml.safe_load_all((K8S / "components/hpa/autoscalers.yaml").read_text())
    assert {m["external"]["metric"]["name"] for s in scalers for m in s["spec"]["metrics"]} == names


def test_gangs_are_for_the_scheduler_that_knows_them(group: list[Object]) -> None:
    for o in of_kind(group, "RoleBasedGroup"):
        gang = (
            o["metadata"].get("annotations", {}).get("rbg.workloads.x-k8s.io/group-gang-scheduling")
        )
        wanted = "scheduler-plugins-scheduler" if gang == "true" else None
        assert {p.spec.get("schedulerName") for p in pods([o])} == {wanted}


def test_a_gang_is_not_made_in_batches(group: list[Object]) -> None:
    """A batch waits until it is scheduled, and a gang is scheduled when all of it is there."""
    (policies,) = [o["spec"]["policies"] for o in of_kind(group, "CoordinatedPolicy")] or [[]]
    batches = any("scaling" in rule["strategy"] for rule in policies)
    gang = any("annotations" in o["metadata"] for o in of_kind(group, "RoleBasedGroup"))
    assert batches == (bool(policies) and not gang)


@pytest.mark.parametrize("other", ["grove", "deployments"])
def test_pods_are_the_same_whoever_makes_them(other: str) -> None:
    def plain(pod: Pod) -> Object:
        spec = {k: v for k, v in pod.spec.items() if k != "topologySpreadConstraints"}
        left_out = {"resources", "image"}
        container = {k: v for k, v in pod.container.items() if k not in left_out}
        container["args"] = [
            a for a in container["args"] if not a.startswith(("--discover-", "--kv-transports"))
        ]
        container["env"] = [
            e for e in container["env"] if not e["name"].startswith(("VLLM_CPU", "OMP"))
        ]
        volumes = [{k: {} if k == "emptyDir" else v for k, v in u.items()} for u in spec["volumes"]]
        return {**spec, "containers": [container], "volumes": volumes}

    ours = {p.role: plain(p) for p in pods(build(K8S / "overlays/gpu"))}
    theirs = {p.role: plain(p) for p in pods(build(K8S / "overlays" / other))}
    assert theirs == ours


def test_grove_is_asked_for_nothing_that_it_refuses() -> None:
    for o in of_kind(build(K8S / "overlays/grove"), "PodCliqueSet"):
        for clique in o["spec"]["template"]["cliques"]:
            spec = clique["spec"]
            assert 0 < spec["minAvailable"] <= spec["replicas"]
            assert not {"topologySpreadConstraints", "nodeName", "restartPolicy"} & set(
                spec["podSpec"]
            )


# ------------------------------------------------------------ the page


def test_the_pages_folder_and_patch_build(tmp_path: Path) -> None:
    page = (TOP / "docs/kubernetes.md").read_text(encoding="utf-8")
    folder = re.search(r"<<'EOF'\n(.*?)\nEOF", page, re.DOTALL)
    patches = re.search(r"^```\n(patches:.*?)```", page, re.DOTALL | re.MULTILINE)
    assert folder
    assert patches
    text = folder[1].replace("../deploy/k8s", os.path.relpath(K8S, tmp_path)) + "\n" + patches[1]
    (tmp_path / "kustomization.yaml").write_text(text, encoding="utf-8")
    found = pods(build(tmp_path))
    assert {p.flag("--max-model-len") for p in found} == {"32768"}
    assert {p.container["image"] for p in found} == {"REGISTRY/tandem:0.1.0-cpu"}


def test_one_file_of_vllm_s_flags_reaches_all_roles(tmp_path: Path) -> None:
    page = (TOP / "docs/kubernetes.md").read_text(encoding="utf-8")
    example = re.search(
        r"^```yaml\n(components:.*?vllm-config.*?)```", page, re.DOTALL | re.MULTILINE
    )
    assert example
    text = example[1].replace("../deploy/k8s", os.path.relpath(K8S, tmp_path))
    base = f"resources: [{os.path.relpath(K8S / 'overlays/gpu', tmp_path)}]\nnamespace: tandem\n"
    (tmp_path / "kustomization.yaml").write_text(base + text, encoding="utf-8")
    objects = build(tmp_path)
    (file,) = named(objects, "ConfigMap")["tandem-vllm"]["data"].items()
    assert file[0] == "vllm.yaml"
    assert yaml.safe_load(file[1])["reasoning-parser"] == "qwen3"
    group = [p for p in pods(objects) if p.role in ("router", "prefill", "decode")]
    assert {p.role for p in group} == {"router", "prefill", "decode"}
    for pod in group:
        at = pod.args().index("--config")
        folder = os.path.dirname(pod.args()[at + 1])
        [mounted] = [m for m in pod.container["volumeMounts"] if m["mountPath"] == folder]
        [volume] = [v for v in pod.spec["volumes"] if v["name"] == mounted["name"]]
        assert volume["configMap"]["name"] == "tandem-vllm"
        assert os.path.basename(pod.args()[at + 1]) == "vllm.yaml"


def test_every_overlay_and_component_is_on_the_page() -> None:
    page = (TOP / "docs/kubernetes.md").read_text(encoding="utf-8")
    names = [p.name for place in ("overlays", "components") for p in (K8S / place).iterdir()]
    assert len(names) > 10
    assert [n for n in names if f"`{n}`" not in page] == []
