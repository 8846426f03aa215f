"""Controllers as processes, an API server, and a group whose metrics the test makes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from tests.apiserver.group import NAMESPACE, Group
from tests.apiserver.server import ApiServer
from tests.apiserver.store import ADAPTERS, LEASES, Refusal

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator, Callable, Iterator

    from prometheus_client import Metric

TOP = Path(__file__).parents[2]
WAIT_S = 40.0
LEASE_S = 3
LOOK_S = 0.3


class Target:
    """One process's /metrics, over HTTP."""

    def __init__(self, values: Callable[[], dict[str, float]]) -> None:
        self.values = values
        self.port = 0
        self.well = True
        """Else it answers nothing."""
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._server: asyncio.Server

    def collect(self) -> Iterator[Metric]:
        for name, value in self.values().items():
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield family("tandem_" + name if ":" not in name else name, "It", value)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def stop(self) -> None:
        self._server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            if self.well:
                body = generate_latest(self._registry)
                writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: ")
                writer.write(f"{len(body)}\r\n\r\n".encode() + body)
                await writer.drain()
        writer.close()


class Rig:
    """A group with one router and a worker of each role, and load as it is set."""

    def __init__(self, server: ApiServer, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self.requests_per_s = 0.0
        self._came, self._counted_at = 0.0, 0.0
        self.router = Target(self._router)
        self.prefill = Target(lambda: self._worker(0.0))
        self.decode = Target(lambda: self._worker(self._come() * 200))
        self.controllers: dict[str, Controller] = {}

    def _come(self) -> float:
        now = asyncio.get_running_loop().time()
        self._came += (now - (self._counted_at or now)) * self.requests_per_s
        self._counted_at = now
        return self._came

    def _router(self) -> dict[str, float]:
        came = self._come()
        return {
            "router_arrived_total": came,
            "router_arrived_tokens_total": came * 1000,
            "router_computed_tokens_total": came * 1000,
            "router_judged_total": came,
            "router_first_in_time_total": came,
            "router_met_total": came,
            "router_queue_prompt_tokens": 0.0,
            "router_prefill_tokens_per_second": 8000.0,
        }

    def _worker(self, output_tokens: float) -> dict[str, float]:
        return {
            "worker_output_tokens_total": output_tokens,
            "worker_prefill_tokens_queued": 0.0,
            "worker_blocks_free": 900.0,
            "worker_blocks_total": 1000.0,
            "vllm:num_requests_running": self.requests_per_s / 10,
        }

    # ------------------------------------------------------------ Kubernetes

    def wanted(self, role: str) -> int:
        found = self.server.store.get(ADAPTERS, NAMESPACE, f"tandem-{role}")
        replicas: int = found["spec"]["replicas"]
        return replicas

    def reset(self) -> None:
        """Somebody else asks for one of each."""
        for role in ("prefill", "decode"):
            content = {"metadata": {"name": f"tandem-{role}"}, "spec": {"replicas": 1}}
            self.server.store.put(ADAPTERS, NAMESPACE, content)

    @property
    def holder(self) -> str:
        """The name in the Lease, without what is of one life."""
        with suppress(Refusal):
            spec = self.server.store.get(LEASES, NAMESPACE, "tandem-controller")["spec"]
            holder: str = spec["holderIdentity"]
            return holder.partition("_")[0]
        return ""

    @property
    def scaled_by(self) -> list[str]:
        """Whose writes there were, in their order."""
        return [w.token for w in self.server.written if w.method == "PATCH"]

    # ------------------------------------------------------------ processes

    async def start(self, name: str, *flags: str) -> Controller:
        controller = self.controllers[name] = Controller(name, self.folder)
        ports = {"router": self.router, "prefill": self.prefill, "decode": self.decode}
        await controller.start(
            "--group=tandem", f"--namespace={NAMESPACE}", f"--discover-api={self.server.url}",
            "--metrics-ports=" + ",".join(f"{role}={t.port}" for role, t in ports.items()),
            f"--lease-s={LEASE_S}", f"--look-s={LOOK_S}", "--up-cooldown-s=0.1",
            "--startup-s=5", *flags,
        )  # fmt: skip
        return controller

    async def until(self, true: Callable[[], bool], within_s: float = WAIT_S) -> None:
        async with asyncio.timeout(within_s):
            while not true():  # noqa: ASYNC110  # It is another's state, and not ours to tell of.
                await asyncio.sleep(0.02)


class Controller:
    """One process; its token is its name."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.token_file = folder / f"{name}.token"
        self.token_file.write_text(name)
        self._address_file = folder / f"{name}.json"
        self.log_file = folder / f"{name}.log"
        self.url = ""
        self._process: Process

    async def start(self, *flags: str) -> None:
        environ = {k: v for k, v in os.environ.items() if not k.startswith("CONTROLLER_")}
        with self.log_file.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tandem", "controller", *flags, f"--identity={self.name}",
                f"--discover-token-file={self.token_file}", "--http-port=0",
                f"--address-file={self._address_file}",
                cwd=TOP, env=environ, stdout=log, stderr=log,
            )  # fmt: skip
        async with asyncio.timeout(WAIT_S):
            while not self._address_file.exists():
                assert self._process.returncode is None, self.log_file.read_text()
                await asyncio.sleep(0.02)
        self.url = json.loads(self._address_file.read_text())["http"]

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def lives(self) -> bool:
        return self._process.returncode is None

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def ended(self) -> int:
        async with asyncio.timeout(WAIT_S):
            return await self._process.wait()

    async def get(self, path: str) -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.url, trust_env=False) as client:
            return await client.get(path)

    async def metric(self, name: str) -> float:
        """Of a whole line's beginning; 0 where there is none."""
        for line in (await self.get("/metrics")).text.splitlines():
            if line.startswith(name + " "):
                return float(line.rpartition(" ")[2])
        return 0.0

    def told(self, message: str) -> list[dict[str, Any]]:
        """Lines of its log."""
        found = [json.loads(line) for line in self.log_file.read_text().splitlines() if line]
        return [line for line in found if line["message"] == message]

    async def kill(self) -> None:
        if self.lives:
            self.send(signal.SIGKILL)
            await self.ended()


@asynccontextmanager
async def rig(folder: Path) -> AsyncIterator[Rig]:
    async with ApiServer() as server:
        here = Rig(server, folder)
        here.reset()
        group = Group(server.store)
        targets = {"router": here.router, "prefill": here.prefill, "decode": here.decode}
        for role, target in targets.items():
            await target.start()
            group.add_pod(group.add_slice(role), ip="127.0.0.1")
        try:
            yield here
        finally:
            for controller in here.controllers.values():
                await controller.kill()
            for target in targets.values():
                target.stop()
