"""A group of the twin whose size changes: workers start, serve, drain and leave, as pods do."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Protocol

from controller.core.demand import Observed, Size
from router.twin.fleet import FleetPlan, WorkerPlan
from workers.api import Role

if TYPE_CHECKING:
    from collections.abc import Mapping

    from controller.core.demand import Decision
    from router.twin.run import Twin
    from workers.engines.sim_settings import SimSettings


class Law(Protocol):
    """What sizes a group: production's `Sizer`, or what it is compared with."""

    def look(self, observed: Observed) -> Decision: ...


@dataclass(slots=True)
class Pod:
    """One worker's life. It is paid for from when it is asked for until it has left."""

    worker_id: str
    role: Role
    asked_at: float
    ready_at: float
    told_at: float = inf
    """To leave."""
    gone_at: float = inf

    def paid_s(self, until: float) -> float:
        return min(self.gone_at, until) - self.asked_at


class Group:
    """Does what a law says, as the replica sets would, and observes for it as routers do."""

    def __init__(
        self,
        engines: Mapping[Role, SimSettings],
        start: Size,
        law: Law,
        startup_s: float = 90.0,
    ) -> None:
        """`start`: workers that serve from the beginning. `look_s` may be set before the run."""
        self.look_s = 15.0
        self.pods: list[Pod] = []
        self.decisions: list[Decision] = []
        self.seen: list[Observed] = []
        self._engines, self._law, self._startup_s = dict(engines), law, startup_s
        self._wanted = start
        self._made = {Role.PREFILL: 0, Role.DECODE: 0}
        self._now = 0.0
        for role, count in ((Role.PREFILL, start.prefill), (Role.DECODE, start.decode)):
            for _ in range(count):
                self._pod(role, ready_at=0.0)

    @property
    def plan(self) -> FleetPlan:
        """Who serves from the beginning."""
        return FleetPlan(tuple(self._worker(p) for p in self.pods if p.ready_at <= 0.0))

    # ------------------------------------------------------------ Scaler

    def look(self, twin: Twin) -> None:
        self._now = twin.now
        observed = self._observe(twin)
        decision = self._law.look(observed)
        self.seen.append(observed)
        self.decisions.append(decision)
        self._scale(twin, Role.PREFILL, decision.size.prefill)
        self._scale(twin, Role.DECODE, decision.size.decode)
        self._wanted = decision.size

    def left(self, worker_id: str, now: float) -> None:
        pod = next(p for p in self.pods if p.worker_id == worker_id)
        pod.gone_at = now

    # ------------------------------------------------------------ replica sets

    def _scale(self, twin: Twin, role: Role, count: int) -> None:
        kept = [p for p in self.pods if p.role is role and p.told_at == inf]
        for _ in range(count - len(kept)):
            pod = self._pod(role, ready_at=self._now + self._startup_s)
            twin.start(self._worker(pod), self._startup_s)
        # The highest ordinals go, as with a StatefulSet; they are the youngest.
        for pod in kept[count:]:
            pod.told_at = self._now
            if pod.ready_at > self._now:
                pod.gone_at = self._now
            twin.drain(pod.worker_id)

    def _pod(self, role: Role, ready_at: float) -> Pod:
        number, self._made[role] = self._made[role], self._made[role] + 1
        pod = Pod(f"{role}-{number}", role, self._now, ready_at)
        self.pods.append(pod)
        return pod

    def _worker(self, pod: Pod) -> WorkerPlan:
        return WorkerPlan(pod.worker_id, pod.role, self._engines[pod.role])

    # ------------------------------------------------------------ what routers see

    def _observe(self, twin: Twin) -> Observed:
        dispatch = twin.dispatch
        demand, queue = dispatch.door.demand, dispatch.door.queue
        views = {role: [w for w in dispatch.fleet if w.hello.role is role] for role in self._made}
        decoders = [w.load for w in views[Role.DECODE]]
        blocks = sum(load.blocks_total for load in decoders)
        free = sum(load.blocks_free for load in decoders)
        serving = {
            role: sum(not twin.workers[w.id].draining for w in views[role]) for role in self._made
        }
        queued_on_workers = sum(w.prefill_tokens_queued for w in dispatch.fleet)
        return Observed(
            at=twin.now,
            requests=demand.requests,
            prompt_tokens=demand.uncached_tokens,
            computed_tokens=demand.computed_tokens,
            output_tokens=sum(twin.outcomes.tokens),
            judged=demand.judged,
            first_in_time=demand.first_in_time,
            met=demand.met,
            queued_tokens=queue.uncached_tokens + queued_on_workers,
            prefill_tokens_per_s=dispatch.fleet.prefill_tokens_per_s,
            running=sum(load.running for load in decoders),
            kv_share=1 - free / blocks if blocks else 0.0,
            wanted=self._wanted,
            ready=Size(serving[Role.PREFILL], serving[Role.DECODE]),
        )
