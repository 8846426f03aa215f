"""Each side's processes: engines, what routes to them, and how all of it was configured."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

import httpx
import numpy as np
import psutil

from deploy.local.group import LocalGroup
from deploy.local.parts import Part, PartDied, end, free_port
from deploy.local.peers.fleet import Fleet, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

START_S: Final = 120.0
PEERS: Final = Path(".peers/bin/python")
_DETAILS: Final = "--enable-prompt-tokens-details"
"""So that the usage says how much of the prompt was cached."""
_LEASE_S: Final = 1
"""Simulated workers in processes of their own hear nothing of each other's reads, so a lease lasts
all its time: with the usual 30 s the prefill workers' blocks would run out."""


class NotStarted(Exception):
    """Why a side is not there."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What all sides have in common."""

    model: str
    folder: Path
    fleet: Fleet
    peers: Path = PEERS
    """The Python of the environment that has the others' packages."""
    ttft_objective_s: float | None = None
    """What our router refuses by, where it refuses."""

    @property
    def run_peer(self) -> list[str]:
        """Its Python, which must not find our packages."""
        return ["env", "-u", "PYTHONPATH", str(self.peers.absolute())]

    @property
    def names(self) -> dict[str, str]:
        return {
            str(self.folder): "MODEL",
            str(self.peers.parent.absolute()): ".peers/bin",
            sys.executable: "python",
        }


@dataclass(frozen=True, slots=True)
class Side:
    """All of it runs, and a first request was answered."""

    url: str
    router: Part
    parts: Sequence[Part]
    """The router too."""
    config: Sequence[str]
    """One line a kind of process."""

    def cpu_s(self) -> float:
        """Of all processes and their children, since their start. Raises `PartDied`."""
        self.check()
        return sum(_cpu_s(part.pid) for part in self.parts)

    def router_cpu_s(self) -> float:
        return _cpu_s(self.router.pid)

    def check(self) -> None:
        """Raises `PartDied`."""
        for part in self.parts:
            part.check()


def _cpu_s(pid: int) -> float:
    process = psutil.Process(pid)
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        times = one.cpu_times()
        total += times.user + times.system
    return total


# ---------------------------------------------------------------- ours


@contextmanager
def tandem(plan: Plan) -> Iterator[Side]:
    """Our router and workers."""
    fleet = plan.fleet
    objective = plan.ttft_objective_s
    refusing = [] if objective is None else ["--ttft-objective-s", f"{objective:g}"]
    group = LocalGroup(
        plan.model,
        prefill=fleet.prefill,
        decode=fleet.decode,
        flags=["--engine", "sim", "--lease-s", str(_LEASE_S), *fleet.sim_flags()],
        router_flags=[_DETAILS, *refusing],
    )
    for worker in group.workers:
        worker.core = None  # No side's processes are pinned.
    with group:
        assert group.router is not None
        parts = [group.router, *group.workers]
        _await_answer(group.url, plan.model, group.check)
        yield Side(group.url, group.router, parts, _config(plan, [*parts[:2], parts[-1]]))


# ---------------------------------------------------------------- HTTP routers


@contextmanager
def vllm_router(plan: Plan) -> Iterator[Side]:
    """vllm-router in its P/D mode, policies as in its own help, over vLLM's HTTP server."""

    def command(prefill: Sequence[Part], decode: Sequence[Part], port: int) -> list[str]:
        return [*_vllm_router(plan, prefill, decode, port), "--prefill-policy", "cache_aware"]

    _require(plan, "vllm_router.launch_router")
    with _http_router(plan, "vllm-router", command) as side:
        yield side


@contextmanager
def vllm_router_kv(plan: Plan) -> Iterator[Side]:
    """The same with its `kv_aware` prefill policy, which hears the fronts' KV events."""

    def command(prefill: Sequence[Part], decode: Sequence[Part], port: int) -> list[str]:
        heard = (("--pd-kv-events", f"{front.http}={front.channel}") for front in prefill)
        return [
            "env", f"VLLM_ROUTER_TOKENIZER={plan.folder}",
            *_vllm_router(plan, prefill, decode, port), "--prefill-policy", "kv_aware",
            *(word for words in heard for word in words),
        ]  # fmt: skip

    _require(plan, "vllm_router.launch_router")
    with _http_router(plan, "vllm-router", command, events=True) as side:
        yield side


def _vllm_router(
    plan: Plan, prefill: Sequence[Part], decode: Sequence[Part], port: int
) -> list[str]:
    return [
        *plan.run_peer, "-m", "vllm_router.launch_router",
        "--host", "127.0.0.1", "--port", str(port), "--vllm-pd-disaggregation",
        *(word for front in prefill for word in ("--prefill", front.http)),
        *(word for front in decode for word in ("--decode", front.http)),
        "--decode-policy", "power_of_two" if len(decode) > 1 else "round_robin",
        "--prometheus-port", str(free_port()), "--log-level", "warning",
    ]  # fmt: skip


@contextmanager
def sglang_router(plan: Plan) -> Iterator[Side]:
    """sglang-router over the same fronts, all of them mixed: to split prefill and decode of vLLM it
    needs vLLM's gRPC server, and over HTTP SGLang's own bootstrap."""

    def command(prefill: Sequence[Part], decode: Sequence[Part], port: int) -> list[str]:
        return [
            *plan.run_peer, "-m", "sglang_router.launch_router",
            "--host", "127.0.0.1", "--port", str(port),
            "--worker-urls", *(front.http for front in (*prefill, *decode)),
            "--policy", "cache_aware",
            "--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port()),
            "--log-level", "warn",
        ]  # fmt: skip

    _require(plan, "sglang_router.launch_router")
    with _http_router(plan, "sglang-router", command) as side:
        yield side


@contextmanager
def _http_router(
    plan: Plan,
    name: str,
    command: Callable[[Sequence[Part], Sequence[Part], int], list[str]],
    *,
    events: bool = False,
) -> Iterator[Side]:
    """`events`: the fronts publish vLLM's KV events, at their `channel`."""
    with TemporaryDirectory(prefix="peers-") as folder, _ended() as parts:
        fleet = plan.fleet
        fronts = []
        for n in range(fleet.prefill + fleet.decode):
            where = f"tcp://127.0.0.1:{free_port()}" if events else ""
            front = make_front(plan, f"front-{n}", Path(folder))
            front.command += ["--kv-events", where] if events else []
            fronts.append((front, where))
        for front, _ in fronts:
            front.spawn()
            parts.append(front)

        def check() -> None:
            for part in parts:
                part.check()

        for front, where in fronts:
            front.await_address(check)
            front.channel = where
            front.await_ready(check)
        prefill, decode = parts[: fleet.prefill], parts[fleet.prefill :]
        port = free_port()
        router = Part(
            name,
            command(prefill, decode, port),
            Path(folder) / f"{name}.log",
        )
        router.http = f"http://127.0.0.1:{port}"
        router.spawn()
        parts.insert(0, router)
        _await_answer(router.http, plan.model, check)
        yield Side(router.http, router, parts, _config(plan, [router, fronts[0][0]]))


def make_front(plan: Plan, name: str, folder: Path) -> Part:
    """vLLM's server over one simulated engine, not started yet."""
    address_file = folder / f"{name}.json"
    command = [
        sys.executable, "-m", "deploy.local.peers.front", "--model", str(plan.folder),
        "--served-model-name", plan.model, "--address-file", str(address_file), _DETAILS,
        *plan.fleet.vllm_flags(), "--", *plan.fleet.sim_flags(),
    ]  # fmt: skip
    return Part(name, command, folder / f"{name}.log", address_file, ready_path="/health")


# ---------------------------------------------------------------- Dynamo


_DYNAMO_LISTENS: Final = ("TCP_RPC", "TCP_RESPONSE_STREAM", "EVENT_PLANE", "SYSTEM")


@contextmanager
def dynamo(plan: Plan) -> Iterator[Side]:
    """Dynamo's frontend with its KV router, over its own mocker."""
    _require(plan, "dynamo.mocker.main")
    fleet = plan.fleet
    with TemporaryDirectory(prefix="peers-") as folder, _ended() as parts:
        profile = Path(folder) / "profile.npz"
        np.savez(profile, **fleet.mocker_profile())
        hosts = [f"DYN_{what}_HOST=127.0.0.1" for what in _DYNAMO_LISTENS]
        run = ["env", f"DYN_FILE_KV={folder}/kv", "DYN_LOG=warn", *hosts, *plan.run_peer, "-m"]
        planes = ["--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq"]
        roles = ["prefill"] * fleet.prefill + ["decode"] * fleet.decode
        for n, role in enumerate(roles):
            command = [
                *run, "dynamo.mocker", "--model-path", str(plan.folder), "--model-name", plan.model,
                "--disaggregation-mode", role, *planes, *fleet.mocker_flags(str(profile)),
            ]  # fmt: skip
            parts.append(Part(f"{role}-{n}", command, Path(folder) / f"{n}.log"))
        port = free_port()
        command = [
            *run, "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port), *planes,
            "--router-mode", "kv", "--kv-cache-block-size", str(fleet.block_tokens),
        ]  # fmt: skip
        frontend = Part("frontend", command, Path(folder) / "frontend.log")
        frontend.http = f"http://127.0.0.1:{port}"
        parts.insert(0, frontend)

        def check() -> None:
            for part in parts:
                part.check()

        for part in parts:
            part.spawn()

        def acquainted() -> bool:
            try:
                health = httpx.get(f"{frontend.http}/health", timeout=2).json()
            except httpx.TransportError:
                return False
            serving = [i for i in health["instances"] if i["endpoint"] == "generate"]
            return len(serving) == len(roles)

        frontend.wait_for(acquainted, check)
        _await_answer(frontend.http, plan.model, check)
        yield Side(frontend.http, frontend, parts, _config(plan, [*parts[:2], parts[-1]]))


# ---------------------------------------------------------------- all


@contextmanager
def _ended() -> Iterator[list[Part]]:
    parts: list[Part] = []
    try:
        yield parts
    finally:
        end(parts)


def _config(plan: Plan, parts: Sequence[Part]) -> list[str]:
    return [
        f"{part.name}: {shown(part.command, {**plan.names, str(part.log.parent): 'DIR'})}"
        for part in parts
    ]


def _require(plan: Plan, module: str) -> None:
    """Raises `NotStarted` where the others' environment has no such module."""
    if not plan.peers.exists():
        raise NotStarted(f"there is no {plan.peers}; `make bench-peers` makes it")
    ran = subprocess.run(
        [*plan.run_peer, "-c", f"import {module}"],
        check=False, capture_output=True, text=True, timeout=START_S,
    )  # fmt: skip
    if ran.returncode:
        raise NotStarted((ran.stderr.strip().splitlines() or ["it can't be imported"])[-1])


def _await_answer(url: str, model: str, check: Callable[[], None]) -> None:
    """Until one request is answered. Raises `NotStarted`, `PartDied`."""
    body = {"model": model, "prompt": "ready?", "max_tokens": 2, "ignore_eos": True}
    until = time.monotonic() + START_S
    said = "nothing"
    while time.monotonic() < until:
        check()
        try:
            response = httpx.post(f"{url}/v1/completions", json=body, timeout=10)
            if response.status_code == 200:
                return
            said = f"{response.status_code}: {response.text[:200]}"
        except httpx.TransportError as error:
            said = type(error).__name__
        time.sleep(0.5)
    raise NotStarted(f"no answer after {START_S:.0f} s; the last was {said}")


SIDES: Final = {
    "tandem": tandem,
    "vllm-router": vllm_router,
    "vllm-router kv": vllm_router_kv,
    "sglang-router": sglang_router,
    "dynamo": dynamo,
}
FAILURES: Final = (NotStarted, PartDied, OSError, subprocess.TimeoutExpired)
