"""One run: everything that a plan asks for, under the laws that hold while it runs."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

from tests.simulation.events import Events
from tests.simulation.hosts import RouterHost, SimLink, WorkerHost
from tests.simulation.network import HEARTBEAT_S, Network, Way
from tests.simulation.plan import Kind
from tests.simulation.violation import Violation
from workers.api import ROUTER_SILENCE_S, SILENCE_S
from workers.engines.sim_blocks import Handoffs

if TYPE_CHECKING:
    import random

    from tests.simulation.plan import Fault, Plan
    from tests.simulation.processes import ProcessLoop
    from tests.simulation.watch import Owed

AUDIT_S = 0.5
MENDS_S = 8.0
"""After a fault is over it may show for so long: silence is noticed after 5 s, a redial and a hello
take up to 2 s."""
ABORT_S = 1.0
"""What a client's going takes to reach a worker."""
FAULT_TO_ROUTER = (Kind.ROUTER_STOP, Kind.ROUTER_FREEZE, Kind.ROUTER_DIES)
NOTICED_S = SILENCE_S + 1.5
"""Silence is looked for once a second."""
FORGOTTEN_S = ROUTER_SILENCE_S + 1.5
"""Within this, a worker has noticed that a router's machine is gone."""


class Trouble:
    """When whom a fault may have touched."""

    def __init__(self) -> None:
        self._windows: list[tuple[str, float, float]] = []

    def add(self, who: str, begin: float, end: float) -> None:
        self._windows.append((who, begin, end + MENDS_S))

    def touched(self, who: set[str] | None, begin: float, end: float) -> bool:
        """Any of these (None: anybody) between the two times."""
        return any(
            (who is None or name in who) and start <= end and begin <= until
            for name, start, until in self._windows
        )


class Cluster:
    def __init__(self, plan: Plan, rng: random.Random) -> None:
        self.loop: ProcessLoop = asyncio.get_running_loop()  # type: ignore[assignment]
        self.plan = plan
        self.events = Events(self.loop.time)
        self.network = Network(rng, self.events, plan.latency_s)
        self.trouble = Trouble()
        self.losses = Trouble()
        """Faults that may cost a request its tries or its stream. That a router is stopped or held
        up is none: whatever it is sent meanwhile waits."""
        self.broken: list[BaseException] = []
        self.counts: Counter[str] = Counter()
        self.handoffs = Handoffs(only_here=True)
        self.workers = {
            w.worker_id: WorkerHost(w, self.network, self.handoffs) for w in plan.workers
        }
        self.routers = {name: RouterHost(name, plan, self.network) for name in plan.routers}
        self.loop.set_exception_handler(self._on_exception)

    @property
    def live_routers(self) -> list[RouterHost]:
        return [r for r in self.routers.values() if not r.over]

    @property
    def live_workers(self) -> list[WorkerHost]:
        return [w for w in self.workers.values() if w.life is not None]

    # ------------------------------------------------------------ running

    def begin(self) -> None:
        for worker in self.workers.values():
            worker.start()
        for call in self.plan.calls:
            self.routers[call.router].call(call)
        for fault in self.plan.faults:
            self.network.later(fault.at, partial(self._strike, fault))

    async def until(self, when: float) -> None:
        """Let it run, looking at it now and then."""
        while (left := when - self.loop.time()) > 0:
            await asyncio.sleep(min(AUDIT_S, left))
            self.audit()

    def audit(self) -> None:
        """What holds at every moment. Raises `Violation`."""
        if self.broken:
            raise self.broken[0]
        for host in self.workers.values():
            life = host.life
            if life is None:
                continue
            if life.task.done():
                raise _cause(life.epoch, life.task)
            self._audit_worker(host)
        for router in self.live_routers:
            if router.task.done():
                raise _cause(router.name, router.task)
            self._audit_router(router)

    def _audit_worker(self, host: WorkerHost) -> None:
        assert host.life is not None
        worker = host.life.worker
        load = worker.load
        if not 0 <= load.blocks_free <= load.blocks_total or min(load.running, load.waiting) < 0:
            raise Violation(f"{host.name} has impossible accounts: {load}")
        if load.waiting and load.blocks_free * host.plan.settings.block_tokens < 128:
            self.counts["memory full"] += 1
        now = self.loop.time()
        for owed in host.life.watch.still_owed():
            self._audit_owed(host, owed, now)
        awake = not host.life.process.stopped and not host.life.engine_process.stopped
        in_trouble = self.trouble.touched({host.name}, now, now)
        silent = awake and load.busy and host.life.watch.all_silent(FORGOTTEN_S)
        if silent and not in_trouble:
            raise Violation(f"{host.name} works for routers that are long silent")
        if worker.live and not in_trouble:
            raise Violation(f"{host.name} is well and says it is not: {worker.live}")

    def _audit_owed(self, host: WorkerHost, owed: Owed, now: float) -> None:
        """Nobody works for a client that is gone."""
        router = self.routers[owed.asked_by.split("-")[0]]
        request = router.clients.requests[owed.asked_by]
        if request.ended is None or now < request.ended_at + ABORT_S:
            return
        if not self.trouble.touched({host.name, router.name}, request.ended_at, now):
            raise Violation(f"{host.name} still works for {request}")

    def _audit_router(self, router: RouterHost) -> None:
        waiting = {r.id for r in router.clients.requests.values() if r.ended is None}
        if len(router.dispatch) != len(waiting):
            raise Violation(f"{router.name} holds {len(router.dispatch)}, of {len(waiting)} open")
        now = self.loop.time()
        for link in router.links:
            assert isinstance(link, SimLink)
            if link.worker_id is None or self.trouble.touched({router.name}, now, now):
                continue
            if now - link.heard_at > NOTICED_S:
                raise Violation(f"{router.name} still counts on {link.address}, long silent")
        for view in router.dispatch.fleet:
            if extra := {key.split("/")[0] for key in (*view.promised, *view.unheard)} - waiting:
                raise Violation(f"{router.name} counts ended requests on {view.id}: {extra}")

    def _on_exception(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.broken.append(context.get("exception") or Violation(context["message"]))

    def release(self) -> None:
        """At the very end: let the killed run, so that their cancelled tasks may end."""
        self.loop.set_exception_handler(lambda *_: None)
        for router in self.routers.values():
            router.process.resume()
        for worker in self.workers.values():
            for life in worker.lives:
                life.process.resume()
                life.engine_process.resume()

    # ------------------------------------------------------------ faults

    def _strike(self, fault: Fault) -> None:
        now, network = self.loop.time(), self.network
        self.events.note("fault", fault.kind, fault.who, fault.for_s)
        self.counts[fault.kind] += 1
        ends = float("inf") if fault.stays_away else now + fault.for_s + fault.limit_s
        if fault.kind in FAULT_TO_ROUTER:
            router = self.routers[fault.who]
            if fault.kind is Kind.ROUTER_DIES:
                ends = max(ends, now + FORGOTTEN_S)
                self.losses.add(fault.who, now, ends)
            self.trouble.add(fault.who, now, ends)
            if fault.kind is Kind.ROUTER_DIES:
                router.kill()
            else:
                router.stop(fault.for_s, heartbeats=fault.kind is Kind.ROUTER_FREEZE)
            return
        self.trouble.add(fault.who, now, ends)
        self.losses.add(fault.who, now, ends)
        host = self.workers[fault.who]
        back_s = None if fault.stays_away else fault.for_s
        match fault.kind:
            case Kind.CRASH | Kind.VANISH:
                host.kill(back_s, silently=fault.kind is Kind.VANISH)
            case Kind.STOP | Kind.FREEZE:
                host.stop(fault.for_s, heartbeats=fault.kind is Kind.FREEZE)
            case Kind.HANG:
                host.hang(fault.for_s)
            case Kind.FAIL:
                host.fail(fault.for_s)
            case Kind.DRAIN:
                host.drain(fault.limit_s, fault.for_s)
            case _ if host.life is not None:
                for connection in list(host.life.channel.connections.values()):
                    if fault.kind is Kind.CUT:
                        connection.cut(network.uniform(0, 0.1), network.uniform(0, HEARTBEAT_S))
                    else:
                        stalled = fault.kind is Kind.STALL_TO_ROUTER
                        connection.stall(Way.TO_ROUTER if stalled else Way.TO_WORKER, fault.for_s)


def _cause(name: str, task: asyncio.Task[None]) -> BaseException:
    error = task.exception()
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error or Violation(f"{name} ended by itself")
