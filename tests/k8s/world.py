"""A group as it is deployed: templates of its roles, its pods, its API server, its clients."""

from __future__ import annotations

import asyncio
from math import inf
from typing import TYPE_CHECKING, Any

import httpx

from tests.apiserver.group import NAMESPACE, Group
from tests.apiserver.server import ApiServer
from tests.apiserver.store import ADAPTERS, LEASES
from tests.k8s.clients import Load, Service
from tests.k8s.pods import Node, Template

if TYPE_CHECKING:
    from pathlib import Path

    from tests.k8s.netns import Network
    from tests.k8s.pods import Pod, Stop

MODEL = "smollm2-135m"
CHANNEL_PORT, PROBE_PORT, OPENAI_PORT, CONTROLLER_PORT = 7000, 7001, 8000, 7002
DRAIN_S, LEASE_S, GRACE_S = 10.0, 1.0, 15.0
NOTICE_S = 1.5
WINDOW_S = 1.5
"""RBG's gracePeriodSeconds of an in-place update."""
WAIT_S = 40.0
"""Longer than two workers that seemed slow once are left alone."""


def worker(role: str) -> Template:
    """Quick enough that a test sees many requests, and slow enough that it meets them running."""
    return Template(
        role,
        (
            *("worker", "--engine", "sim", "--host", "$(POD_IP)", "--worker-id", "$(POD_NAME)"),
            *(
                "--sim-step-ms",
                "15",
                "--sim-prefill-tokens-per-s",
                "4000",
                "--sim-stream-us",
                "200",
            ),
        ),
        PROBE_PORT,
        GRACE_S,
        "/drain",
        {
            "WORKER_ROLE": role,
            "WORKER_MODEL": MODEL,
            "WORKER_PORT": str(CHANNEL_PORT),
            "WORKER_HTTP_PORT": str(PROBE_PORT),
            "WORKER_DRAIN_S": str(DRAIN_S),
            "WORKER_LEASE_S": str(LEASE_S),
        },
    )


def router(selector: str, api: str) -> Template:
    ports = ",".join(f"{role}={CHANNEL_PORT}" for role in ("prefill", "decode"))
    return Template(
        "router",
        ("router", "--host", "$(POD_IP)", "--max-model-len", "2048", "--disaggregate", "always"),
        OPENAI_PORT,
        GRACE_S,
        None,
        {
            "ROUTER_MODEL": MODEL,
            "ROUTER_PORT": str(OPENAI_PORT),
            "ROUTER_NOTICE_S": str(NOTICE_S),
            "ROUTER_DRAIN_S": str(DRAIN_S),
            "ROUTER_DISCOVER": "kubernetes",
            "ROUTER_DISCOVER_SELECTOR": selector,
            "ROUTER_DISCOVER_PORTS": ports,
            "ROUTER_DISCOVER_NAMESPACE": NAMESPACE,
            "ROUTER_DISCOVER_API": api,
        },
    )


def controller(api: str, *flags: str) -> Template:
    """Quick to look, and sure at once."""
    ports = f"router={OPENAI_PORT},prefill={PROBE_PORT},decode={PROBE_PORT}"
    return Template(
        "controller",
        ("controller", "--http-host", "$(POD_IP)", "--identity", "$(POD_NAME)", *flags),
        CONTROLLER_PORT,
        GRACE_S,
        None,
        {
            "CONTROLLER_GROUP": "tandem",
            "CONTROLLER_NAMESPACE": NAMESPACE,
            "CONTROLLER_DISCOVER_API": api,
            "CONTROLLER_METRICS_PORTS": ports,
            "CONTROLLER_HTTP_PORT": str(CONTROLLER_PORT),
            "CONTROLLER_LOOK_S": "0.5",
            "CONTROLLER_LEASE_S": "3",
        },
    )


class World:
    """Lives on one event loop, which runs while a test does."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.api = ApiServer(host=network.host)
        self.group = Group(self.api.store)
        self.node = Node(network, self.group, folder)
        self.service = Service(self.node)
        self.client = httpx.AsyncClient(timeout=10.0, trust_env=False)
        self.second_router: asyncio.Task[Pod]
        self._tasks: list[asyncio.Task[Any]] = []

    async def start(self) -> None:
        """Two workers of each role and a router, in no order; a second router comes when it does.

        It takes as long to start as all the others together, and most tests do without.
        """
        await self.api.start()
        front = router(self.group.selector, self.api.url)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.node.create(front, 0))
            for role in ("prefill", "decode"):
                for index in range(2):
                    tasks.create_task(self.node.create(worker(role), index))
        self.second_router = asyncio.create_task(self.node.create(front, 1))
        self._tasks = [self.second_router, asyncio.create_task(self.service.run())]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self.node.close()
        await self.api.stop()
        await self.client.aclose()

    def load(self) -> Load:
        return Load(MODEL, self.service)

    def pod(self, role: str, index: int) -> Pod:
        return self.node.pods[f"{self.group.name}-{role}-{index}"]

    async def scale(self, role: str, replicas: int) -> list[Stop]:
        """The highest ordinals go, all at once."""
        have = {int(p.name.rsplit("-", 1)[1]): p for p in self.node.of(role)}
        template = have[0].template
        gone = [have[n] for n in sorted(have) if n >= replicas]
        stops = await asyncio.gather(*(self.node.delete(pod) for pod in gone))
        new = [n for n in range(replicas) if n not in have]
        await asyncio.gather(*(self.node.create(template, n) for n in new))
        return stops

    def ask(self, role: str, replicas: int) -> None:
        """As an operator does, through the role's scaling adapter."""
        content = {"metadata": {"name": f"{self.group.name}-{role}"}}
        self.api.store.put(ADAPTERS, NAMESPACE, {**content, "spec": {"replicas": replicas}})

    def asked(self, role: str) -> int:
        """What the adapter says now."""
        found = self.api.store.get(ADAPTERS, NAMESPACE, f"{self.group.name}-{role}")
        replicas: int = found["spec"]["replicas"]
        return replicas

    @property
    def leader(self) -> str:
        """Who holds the controllers' Lease; nobody: ''."""
        found = self.api.store.get(LEASES, NAMESPACE, f"{self.group.name}-controller")
        holder: str = found["spec"]["holderIdentity"]
        return holder.partition("_")[0]

    async def knows(self) -> None:
        """Until every serving router counts on all workers that serve, and on no others."""
        async with asyncio.timeout(WAIT_S):
            for pod in [p for p in self.node.of("router") if p.serving]:
                while await self._known(pod) != {p.name for p in self.workers()}:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)

    async def hellos(self) -> list[dict[str, Any]]:
        """Of the workers that the first router counts on."""
        workers = (await self.client.get(f"{self.pod('router', 0).http}/tandem/workers")).json()
        return [w["hello"] for w in workers["workers"]]

    async def uses(self, load: Load, *names: str) -> None:
        """Until all of these have served something that begins from now on."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while set(names) - set(used := await load.used(self.client, began, inf)):
            assert loop.time() < began + WAIT_S, f"not all of {names} are used: {used}"
            await asyncio.sleep(0.2)

    async def _known(self, pod: Pod) -> set[str]:
        workers = (await self.client.get(f"{pod.http}/tandem/workers")).json()["workers"]
        return {w["hello"]["worker_id"] for w in workers if not w["load"]["draining"]}

    def workers(self) -> list[Pod]:
        """That are in service."""
        pods = [p for role in ("prefill", "decode") for p in self.node.of(role)]
        return [p for p in pods if p.serving and not p.terminating]
