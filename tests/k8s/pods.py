"""What kubelet, the endpoints controller and RBG do with pods, over processes of ours."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import httpx

from deploy.local.parts import Part

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.apiserver.group import Group
    from tests.k8s.netns import Network

PROBE_S = 0.2
LOOK_S = 0.02
START_S = 90.0
KILL_S = 2.0
"""What kubelet leaves a process after SIGTERM when its hook has taken all of the grace."""


@dataclass(frozen=True, slots=True)
class Template:
    """Of a role's pods, as a manifest has it."""

    role: str
    command: tuple[str, ...]
    """After `tandem`."""
    http_port: int
    grace_s: float
    """terminationGracePeriodSeconds."""
    pre_stop: str | None
    """Path of an httpGet hook."""
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Pod:
    name: str
    template: Template
    ip: str
    part: Part
    out_of_service: bool = False
    """By RBG's readiness gate."""
    ready: bool = False
    """As the last probe found it."""
    terminating: bool = False
    stops: list[Stop] = field(default_factory=list)
    """Of its containers, one after the other."""

    @property
    def serving(self) -> bool:
        return self.ready and not self.out_of_service

    @property
    def http(self) -> str:
        return f"http://{self.ip}:{self.template.http_port}"

    @property
    def log(self) -> str:
        return self.part.log.read_text(errors="replace")


@dataclass(frozen=True, slots=True)
class Stop:
    """How a container ended. Seconds from the hook's begin on."""

    hook: str
    """The answer to the preStop hook, or why there was none."""
    hook_s: float
    seconds: float
    status: int
    killed: bool


class Node:
    """Runs pods; each has a namespace, and an endpoint in its role's slice if `group` has one."""

    def __init__(self, network: Network, group: Group, folder: Path) -> None:
        self.pods: dict[str, Pod] = {}
        self._network = network
        self._group = group
        self._folder = folder
        self._slices: dict[str, str] = {}
        self._probes: dict[str, asyncio.Task[None]] = {}
        self._client = httpx.AsyncClient(timeout=1.0, trust_env=False)

    def of(self, role: str) -> list[Pod]:
        return [p for p in self.pods.values() if p.template.role == role]

    # ------------------------------------------------------------ a pod's life

    async def create(self, template: Template, index: int) -> Pod:
        """Until it is ready."""
        role = template.role
        name = f"{self._group.name}-{role}-{index}"
        ip = self._network.add_pod(name)
        pod = Pod(name, template, ip, self._part(name, template, index, ip))
        self.pods[name] = pod
        if role not in self._slices:
            self._slices[role] = self._group.add_slice(role)
        pod.part.spawn()
        self._group.add_pod(self._slices[role], serving=False, ip=ip, name=name)
        self._probes[name] = asyncio.create_task(self._probe(pod))
        await self._until_ready(pod)
        return pod

    async def delete(self, pod: Pod) -> Stop:
        """As a scale-down does: endpoint terminating, hook, SIGTERM, SIGKILL, endpoint gone."""
        pod.terminating = True
        self._group.set(pod.name, terminating=True)
        stop = await self._stop_container(pod)
        self._forget(pod)
        self._group.remove(pod.name)
        return stop

    async def update(self, pod: Pod, template: Template, window_s: float) -> Stop:
        """In place: out of service for a while, another container, same pod and address."""
        self._gate(pod, out_of_service=True)
        await asyncio.sleep(window_s)
        stop = await self._stop_container(pod)
        self._see(pod, ready=False)
        pod.template = template
        index = int(pod.name.rsplit("-", 1)[1])
        pod.part = self._part(pod.name, template, index, pod.ip)
        pod.part.spawn()
        self._gate(pod, out_of_service=False)
        await self._until_ready(pod)
        return stop

    async def _stop_container(self, pod: Pod) -> Stop:
        loop, process = asyncio.get_running_loop(), pod.part.process
        assert process is not None
        began, hook = loop.time(), "none"
        if pod.template.pre_stop:
            try:
                answer = await self._client.get(
                    f"{pod.http}{pod.template.pre_stop}", timeout=pod.template.grace_s
                )
                hook = f"{answer.status_code} {answer.text}"
            except httpx.HTTPError as error:
                hook = repr(error)
        hook_s = loop.time() - began
        os.kill(process.pid, signal.SIGTERM)
        until = loop.time() + max(KILL_S, pod.template.grace_s - hook_s)
        while process.poll() is None and loop.time() < until:  # noqa: ASYNC110  # No child watcher.
            await asyncio.sleep(LOOK_S)
        killed = process.poll() is None
        if killed:
            pod.part.kill()
        stop = Stop(hook, hook_s, loop.time() - began, process.returncode, killed)
        pod.stops.append(stop)
        return stop

    def _part(self, name: str, template: Template, index: int, ip: str) -> Part:
        env = {
            **template.env,
            "RBG_GROUP_NAME": self._group.name,
            "RBG_ROLE_NAME": template.role,
            "RBG_ROLE_INDEX": str(index),
            "RBG_ROLE_INSTANCE_NAME": name,
        }
        command = [part.replace("$(POD_IP)", ip) for part in template.command]
        command = [part.replace("$(POD_NAME)", name) for part in command]
        run = [*self._network.enter(name), "env", *(f"{k}={v}" for k, v in env.items())]
        return Part(
            name, [*run, sys.executable, "-m", "tandem", *command], self._folder / f"{name}.log"
        )

    async def _until_ready(self, pod: Pod) -> None:
        async with asyncio.timeout(START_S):
            while not pod.serving:  # Its probe says when.
                pod.part.check()
                await asyncio.sleep(LOOK_S)

    # ------------------------------------------------------------ its endpoint

    async def _probe(self, pod: Pod) -> None:
        while True:
            try:
                answer = await self._client.get(f"{pod.http}/readyz")
                ready = answer.status_code == 200
            except httpx.HTTPError:
                ready = False
            self._see(pod, ready=ready)
            await asyncio.sleep(PROBE_S)

    def _see(self, pod: Pod, *, ready: bool) -> None:
        before, pod.ready = pod.serving, ready
        self._tell(pod, before)

    def _gate(self, pod: Pod, *, out_of_service: bool) -> None:
        before, pod.out_of_service = pod.serving, out_of_service
        self._tell(pod, before)

    def _tell(self, pod: Pod, before: bool) -> None:
        if pod.serving != before:
            self._group.set(pod.name, serving=pod.serving)

    # ------------------------------------------------------------ ends

    def _forget(self, pod: Pod) -> None:
        del self.pods[pod.name]
        self._probes.pop(pod.name).cancel()
        self._network.remove_pod(pod.name)

    async def close(self) -> None:
        """All at once, and by force."""
        for probe in self._probes.values():
            probe.cancel()
        for pod in self.pods.values():
            if pod.part.process and pod.part.process.poll() is None:
                pod.part.kill()
        await self._client.aclose()


def with_flags(template: Template, *flags: str) -> Template:
    """Another version of it: another image, as far as a process of ours can have one."""
    return replace(template, command=(*template.command, *flags))
