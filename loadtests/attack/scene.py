"""The processes under attack: a router, workers with simulated engines, and a handoff port."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import aiohttp
import httpx
import psutil

from deploy.local.parts import Part, end

if TYPE_CHECKING:
    from collections.abc import Callable

    from loadtests.attack.registry import Tally

MODEL = "smollm2-135m"
KEY, OTHER_KEY, WRONG_KEY = "key-of-the-bystanders", "key-of-the-attacker", "key-of-nobody"
_START_S = 120.0
_ENGINE = ("--sim-prefill-tokens-per-s", "20000", "--max-num-batched-tokens", "512")
"""A step with a prompt in it takes no more than twice one without: what others wait for then is not
the engine."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How large it is."""

    model: str = MODEL
    prefill: int = 2
    decode: int = 2
    streams: int = 20
    keys: bool = True
    seed: int = 0
    """Where hypothesis begins."""
    pin: bool = True
    """Router and workers have one core together, clients and attackers the others."""


class Scene:
    """As a context manager: everything runs inside, and the first streams are whole."""

    def __init__(self, plan: Plan, say: Callable[[str], None]) -> None:
        self.plan = plan
        self._say = say
        self._stack = ExitStack()
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="attack-")))
        self.peers_file = self.folder / "peers"
        """Workers besides the group's own: an attack may write an address there."""
        self.workers: list[Part] = []
        self._bystanders: subprocess.Popen[str] | None = None

    # ------------------------------------------------------------ processes

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _start(self) -> None:
        cores = sorted(os.sched_getaffinity(0))
        self._core = cores[0] if self.plan.pin and len(cores) > 1 else None
        self.peers_file.write_text("")
        roles = ["prefill"] * self.plan.prefill + ["decode"] * self.plan.decode
        self.workers = [self._worker(role, n) for n, role in enumerate(roles)]
        self.handoff = self._part(
            "handoff", [sys.executable, "-m", "deploy.local.handoff_side"], self._core
        )
        for part in (*self.workers, self.handoff):
            part.spawn()
        for part in (*self.workers, self.handoff):
            part.await_address(self.check)
        self.router = self.make_router("router")
        self._say("attack: router and workers are starting")
        self.router.spawn()
        for part in (self.router, *self.workers):
            part.await_address(self.check)
            part.await_ready(self.check)
        self._await_workers()
        if self._core is not None:
            os.sched_setaffinity(0, cores[1:])
            self._stack.callback(os.sched_setaffinity, 0, cores)
        self._watch()
        self._say(f"attack: {self.plan.streams} streams run beside")

    def _stop(self) -> None:
        if self._bystanders is not None:
            self._bystanders.kill()
            self._bystanders.wait()
        end([self.router] if hasattr(self, "router") else [])
        end([*self.workers, *([self.handoff] if hasattr(self, "handoff") else [])])
        self._stack.close()

    def _part(self, name: str, command: list[str], core: int | None) -> Part:
        file = self.folder / f"{name}.json"
        run = [*command, "--address-file", str(file)]
        return Part(name, run, self.folder / f"{name}.log", file, core)

    def _worker(self, role: str, number: int) -> Part:
        name = f"{role}-{number}"
        command = [
            sys.executable, "-m", "tandem", "worker", "--engine", "sim", "--role", role,
            "--model", self.plan.model, "--worker-id", name, "--drain-s", "5", "--lease-s", "5",
            *_ENGINE,
        ]  # fmt: skip
        return self._part(name, command, self._core)

    def make_router(self, name: str) -> Part:
        """One over the same workers, not started yet."""
        command = [
            sys.executable, "-m", "tandem", "router", "--model", self.plan.model, "--port", "0",
            "--workers", ",".join(w.channel for w in self.workers), "--max-model-len", "8192",
            "--drain-s", "20", "--api-docs", "--admin-port", "0",
            "--discover", "file", "--discover-file", str(self.peers_file),
            *(["--api-key", KEY, OTHER_KEY] if self.plan.keys else []),
        ]  # fmt: skip
        return self._part(name, command, self._core)

    def check(self) -> None:
        """Raises `PartDied`."""
        for part in self.parts:
            part.check()

    @property
    def parts(self) -> list[Part]:
        """All processes that are attacked."""
        router = [self.router] if hasattr(self, "router") else []
        return [*router, *self.workers, self.handoff]

    @property
    def url(self) -> str:
        return self.router.http

    def headers(self, key: str = OTHER_KEY) -> dict[str, str]:
        return {"Authorization": f"Bearer {key}"} if self.plan.keys else {}

    def session(self, key: str = OTHER_KEY, *, timeout_s: float = 20.0) -> aiohttp.ClientSession:
        """An attacker's, without a limit of connections."""
        return aiohttp.ClientSession(
            self.url,
            headers=self.headers(key),
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=timeout_s),
        )

    # ------------------------------------------------------------ bystanders

    def _await_workers(self) -> None:
        """Until the router knows them all: each serves what it gets."""
        body = {"model": self.plan.model, "prompt": "ready?", "max_tokens": 2}
        until = time.monotonic() + _START_S
        answered = 0
        while answered < 8:  # On either decode worker.
            self.check()
            assert time.monotonic() < until, "no answer from the workers"
            response = httpx.post(
                f"{self.url}/v1/completions", json=body, headers=self.headers(KEY), timeout=30
            )
            answered = answered + 1 if response.status_code == 200 else 0
            if not answered:
                time.sleep(0.3)

    def _watch(self) -> None:
        command = [
            sys.executable, "-m", "loadtests.attack.bystanders", "--url", self.url,
            "--model", self.plan.model, "--streams", str(self.plan.streams),
            "--key", KEY if self.plan.keys else "",
        ]  # fmt: skip
        self._bystanders = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def others(self, since: float, until: float, *, wait: bool = True) -> dict[str, Any]:
        """The bystanders' observations; by default once the streams that began before are over."""
        assert self._bystanders is not None
        assert self._bystanders.stdin is not None
        assert self._bystanders.stdout is not None
        print(
            json.dumps({"from": since, "until": until, "wait": wait}),
            file=self._bystanders.stdin,
            flush=True,
        )
        found: dict[str, Any] = json.loads(self._bystanders.stdout.readline())
        return found

    # ------------------------------------------------------------ figures

    def memory(self) -> dict[str, int]:
        """Bytes by process; those that ended are left out."""
        found = {}
        for part in self.parts:
            try:
                found[part.name] = psutil.Process(part.pid).memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return found

    def router_cpu_s(self) -> float:
        try:
            times = psutil.Process(self.router.pid).cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return float(times.user + times.system)

    def others_cpu_s(self) -> float:
        """How long the router was kept from its core by processes that are not ours, at least."""
        stat = Path(f"/proc/{self.router.pid}/schedstat")  # The main thread's, which has the loop.
        waited_s = int(stat.read_text().split()[1]) / 1e9 if stat.exists() else 0.0
        ours_s = 0.0
        for part in (*self.workers, self.handoff):
            try:
                times = psutil.Process(part.pid).cpu_times()
            except psutil.NoSuchProcess:
                continue
            ours_s += times.user + times.system
        return waited_s - ours_s

    def log_bytes(self) -> int:
        return sum(part.log.stat().st_size for part in self.parts)


async def ask(
    session: aiohttp.ClientSession, tally: Tally, path: str, method: str = "POST", **options: Any
) -> tuple[int, bytes]:
    """One request to its end; its status is counted. 0 where there was none."""
    try:
        async with session.request(method, path, **options) as response:
            body = await response.read()
            tally.saw(response.status)
            return response.status, body
    except TimeoutError:
        tally.saw("timeout")
    except (aiohttp.ClientError, OSError):
        tally.saw("closed")
    return 0, b""
