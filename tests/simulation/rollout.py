"""A fleet that is taken from one version to the next, a worker at a time, while clients ask."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING

from router.ask import Ask, Reserve
from router.core.errors import RouterError
from router.core.placement import Disaggregate
from tests.simulation.events import Events
from tests.simulation.hosts import RouterHost, WorkerHost
from tests.simulation.network import REDIAL_S, Network
from tests.simulation.plan import MODEL, Call, Departure, Plan, WorkerPlan
from tests.simulation.processes import ProcessLoop
from tests.simulation.violation import Violation
from workers.api import Role
from workers.engines.sim_blocks import Handoffs
from workers.engines.sim_settings import SimSettings

if TYPE_CHECKING:
    from collections.abc import Callable

DRAIN_S = 60.0
"""Longer than any stream here."""
PROBE_S = 0.05


class Change(StrEnum):
    """What the new version is. In each case the two can't read each other's KV."""

    KV = "another KV layout"
    BLOCKS = "another block size"
    MODEL = "another model, which another router serves"


@dataclass(frozen=True, slots=True)
class Rollout:
    seed: int
    plan: Plan
    change: Change
    in_place: bool
    """The same address and name, else others."""
    order: tuple[str, ...]
    """Of the old workers."""
    told_s: tuple[float, float]
    """Within which routers learn what discovery says; above a second now and then."""
    flap_at: float | None
    """When, for a while, every endpoint seems to be out of service."""

    def describe(self) -> str:
        how = "in place" if self.in_place else "replaced"
        how += "" if self.flap_at is None else f", all out of service at {self.flap_at:.1f} s"
        return f"{self.change}, {how}: {', '.join(self.order)}; {self.plan.describe()}"


def make_rollout(seed: int) -> Rollout:
    rng = random.Random(f"{seed}/rollout")
    settings = SimSettings(
        lease_s=8.0,
        block_tokens=16,
        step_s=rng.uniform(0.01, 0.03),
        prefill_tokens_per_s=rng.uniform(2000, 8000),
        chunk_tokens=rng.choice((64, 512)),
        max_model_len=512,
        streams=rng.random() < 0.7,
        pull_bytes_per_s=rng.choice((2e7, 5e9)),
    )
    kinds = [(Role.PREFILL, "p", (2, 3)), (Role.DECODE, "d", (2, 3)), (Role.MIXED, "m", (0, 1))]
    workers = tuple(
        WorkerPlan(f"{letter}{n}", role, settings)
        for role, letter, counts in kinds
        for n in range(rng.choice(counts))
    )
    change = rng.choice(list(Change))
    order = [w.worker_id for w in workers]
    rng.choice((random.Random(seed).shuffle, list.sort, partial(list.sort, reverse=True)))(order)
    routers = ("ra", "rb") if change is Change.MODEL else rng.choice((("ra",), ("ra", "rb")))
    span_s = 3.0 + 4.0 * len(workers)
    plan = Plan(
        seed,
        rng.choice((0.0002, 0.002, 0.02)),
        workers,
        routers,
        tuple(_calls(rng, span_s)),
        (),
        tuple(rng.choice(list(Reserve)) for _ in routers),
        rng.choice(list(Disaggregate)),
    )
    late_s = rng.choice((0.05, 0.05, 1.5))
    flaps = random.Random(f"{seed}/flap")
    flap_at = flaps.uniform(1.0, span_s) if flaps.random() < 0.3 else None
    return Rollout(seed, plan, change, rng.random() < 0.5, tuple(order), (0.0, late_s), flap_at)


def _calls(rng: random.Random, span_s: float) -> list[Call]:
    """Which router takes one is found out when it is asked."""
    calls: list[Call] = []
    at = 0.5
    while at < span_s:
        at += rng.expovariate(12.0)
        prompt = [rng.randrange(100, 32_000) for _ in range(rng.randint(5, 250))]
        outputs = 1 + int(rng.expovariate(1 / 40))
        ask = Ask(f"?-{len(calls)}", prompt, min(outputs, 200), relay=rng.random() < 0.8)
        calls.append(Call(at, "", ask, Departure()))
    return calls


class Site:
    """The fleet, and what a cluster does with it."""

    def __init__(self, rollout: Rollout) -> None:
        self.rollout, plan = rollout, rollout.plan
        self.loop: ProcessLoop = asyncio.get_running_loop()  # type: ignore[assignment]
        self.events = Events(self.loop.time)
        self._rng = random.Random(f"{rollout.seed}/site")
        self.network = Network(self._rng, self.events, plan.latency_s)
        self.broken: list[BaseException] = []
        self._all: list[WorkerHost] = []
        self._heard_at = dict.fromkeys(rollout.plan.routers, 0.0)
        """By router: when the last that discovery told it arrives."""
        self.counts: Counter[str] = Counter()
        self._handoffs = Handoffs(only_here=True)
        self.hosts = {w.worker_id: self._host(w) for w in plan.workers}
        self.routers = [
            RouterHost(name, plan, self.network, self._model(name)) for name in plan.routers
        ]
        self.leaving: set[str] = set()
        """Routers that balancers no longer ask."""
        self.loop.set_exception_handler(self._on_exception)

    def _model(self, router: str) -> str:
        return "new" if self.rollout.change is Change.MODEL and router == "rb" else MODEL

    def _host(self, plan: WorkerPlan) -> WorkerHost:
        self._all.append(WorkerHost(plan, self.network, self._handoffs))
        return self._all[-1]

    def _on_exception(self, _: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        error = context.get("exception")
        self.broken.append(
            error if isinstance(error, BaseException) else Violation(str(context["message"]))
        )

    async def run(self) -> None:
        for host in self.hosts.values():
            host.start()
        for call in self.rollout.plan.calls:
            self.loop.call_at(call.at, self._ask, call)
        if self.rollout.flap_at is not None:
            self.loop.call_at(self.rollout.flap_at, self._flap, "rest")
            self.loop.call_at(self.rollout.flap_at + 3.0, self._flap, "connect")
        await asyncio.sleep(2.0)
        for name in self.rollout.order:
            if self.rollout.change is Change.MODEL:
                await self._router_of_the_new(name)
            await self._renew(name)
        await asyncio.sleep(max(0.0, self.rollout.plan.calls[-1].at - self.loop.time()))
        await self._until(lambda: not any(len(r.dispatch) for r in self.routers), "the end of all")

    # ------------------------------------------------------------ clients

    def _ask(self, call: Call) -> None:
        """Any router in service, as a balancer does."""
        ready = [r for r in self.routers if r.name not in self.leaving and _is_ready(r)]
        if not ready:
            raise Violation("no router is ready")
        router = self._rng.choice(ready)
        ask = replace(call.ask, request_id=call.ask.request_id.replace("?", router.name))
        router.ask(replace(call, router=router.name, ask=ask))

    async def _router_of_the_new(self, name: str) -> None:
        """The old router leaves when the new one serves, and before the last worker that it has.

        What only a new router can serve is rolled out so; docs/draining.md says it.
        """
        old, new = self.routers
        left = [h.plan for n, h in self.hosts.items() if n != name and h.plan.model == MODEL]
        last = not any(w.role is not Role.PREFILL for w in left)
        if last:
            await self._until(lambda: _is_ready(new), "the new router")
        if _is_ready(new) and old.name not in self.leaving:
            self.leaving.add(old.name)
            await self._until(lambda: not len(old.dispatch), f"the end of {old.name}'s streams")

    # ------------------------------------------------------------ the cluster

    async def _renew(self, name: str) -> None:
        """One worker: out of service, drained, gone, and another of the new version."""
        host = self.hosts.pop(name)
        self._say("rest", name)
        await asyncio.sleep(self._rng.choice((0.0, 0.3, 2.0)))
        new = self._of_the_new(host.plan)
        assert host.life is not None
        await host.life.drain(DRAIN_S)
        host.life = None
        if self.rollout.in_place:
            host.plan = new
        else:
            self._say("disconnect", name)
            host = self._host(new)
        self.hosts[new.worker_id] = host
        await asyncio.sleep(self._rng.uniform(0.2, 1.0))
        host.start()
        await self._until(lambda: _is_up(host), f"{new.worker_id} to be ready")
        await asyncio.sleep(self._rng.uniform(0.01, 0.1))
        told_at = self._say("connect", new.worker_id)
        # The next one's turn comes when this one is ready; routers may learn of it later.
        await asyncio.sleep(max(0.0, told_at - self.loop.time()) if self._rng.random() < 0.8 else 0)

    def _of_the_new(self, old: WorkerPlan) -> WorkerPlan:
        settings, model = old.settings, old.model
        match self.rollout.change:
            case Change.KV:
                settings = replace(settings, token_bytes=settings.token_bytes // 2)
            case Change.BLOCKS:
                settings = replace(settings, block_tokens=32, blocks_total=1024)
            case Change.MODEL:
                model = "new"
        name = old.worker_id if self.rollout.in_place else f"{old.worker_id}-new"
        # Longer than a router takes to dial again.
        return WorkerPlan(name, old.role, settings, model, REDIAL_S + self._rng.uniform(0.1, 2.0))

    def _flap(self, what: str) -> None:
        for name in self.hosts:
            self._say(what, name)

    def _say(self, what: str, address: str) -> float:
        """Discovery's word reaches each router when it does, in order; when the last has it."""
        last = self.loop.time()
        for router in self.routers:
            at = self.loop.time() + self._rng.uniform(*self.rollout.told_s)
            at = max(at, self._heard_at[router.name] + 1e-6)
            self._heard_at[router.name] = at
            change: Callable[[str], None] = getattr(router.links, what)
            self.loop.call_at(at, change, address, context=router.process.context)
            last = max(last, at)
        return last

    async def _until(self, true: Callable[[], bool], what: str) -> None:
        until = self.loop.time() + 120.0
        while not true():
            self.audit()
            if self.loop.time() > until:
                raise Violation(f"still waiting for {what}")
            await asyncio.sleep(PROBE_S)

    def audit(self) -> None:
        if self.broken:
            raise self.broken[0]

    def release(self) -> None:
        """At the very end: let the killed run, so that their cancelled tasks may end."""
        for life in [life for host in self._all for life in host.lives]:
            life.process.resume()
            life.engine_process.resume()

    # ------------------------------------------------------------ laws

    async def conclude(self) -> None:
        """Everybody was served, by the old and then by the new; nobody counts on the old."""
        self.audit()
        await asyncio.sleep(2 * PROBE_S + self.rollout.told_s[1] + 2.0)
        lives = {h.name: h.life.epoch for h in self.hosts.values() if h.life}
        for router in self.routers:
            for request in router.clients.requests.values():
                self.counts[str(request.ended)] += 1
                if request.ended != "finished":
                    raise Violation(f"{request.id} {request.ended}: {request.error!r}")
            for record in router.dispatch.journal._records.values():
                self.counts["tried again"] += record.attempts > 1
                self.counts["handed off"] += bool(record.kv_tokens)
                self.counts["pull failed"] += record.kv_failed is not None
            known = {v.id: v.hello.epoch for v in router.dispatch.fleet}
            serves = self.rollout.change is not Change.MODEL or router.name == "rb"
            if known != (lives if serves else {}):
                raise Violation(f"there are {lives}, {router.name} knows {known}")
        self._all_is_handed_off_among_the_new()

    def _all_is_handed_off_among_the_new(self) -> None:
        router = self.routers[-1]
        views = list(router.dispatch.fleet)
        kinds = {v.family for v in views}
        if len(kinds) != 1 or not any(v.computes for v in views):
            raise Violation(f"of one version are not {views}")


def _is_up(host: WorkerHost) -> bool:
    return host.life is not None and host.life.worker.ready is None


def _is_ready(router: RouterHost) -> bool:
    try:
        router.dispatch.check()
    except RouterError:
        return False
    return True


class RolloutFailed(AssertionError):
    """A law was broken under this seed."""


def run_rollout(seed: int) -> Counter[str]:
    """What happened how often. Raises `RolloutFailed`."""
    rollout, sites = make_rollout(seed), []

    async def all_of_it() -> None:
        sites.append(site := Site(rollout))
        await site.run()
        await site.conclude()

    loop = ProcessLoop()
    try:
        loop.run_until_complete(all_of_it())
    except Exception as error:  # Whatever it is, the seed belongs to it.
        last = "\n  ".join(sites[0].events.tail(40)) if sites else ""
        raise RolloutFailed(f"{error!r}\n{rollout.describe()}\nlast events:\n  {last}") from error
    finally:
        _end(loop, sites)
    return sites[0].counts


def _end(loop: ProcessLoop, sites: list[Site]) -> None:
    """Let every task end, those of killed processes too."""
    loop.set_exception_handler(lambda *_: None)
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    for site in sites:
        site.release()
    if tasks:
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    loop.close()
