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
    from router.core.fleet import WorkerView
    from router.twin.report import Objective
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
        objective: Objective,
        startup_s: float = 90.0,
    ) -> None:
        """`start`: workers that serve from the beginning. `look_s` may be set before the run."""
        self.look_s = 15.0
        self.pods: list[Pod] = []
        self.decisions: list[Decision] = []
        self.seen: list[Observed] = []
        self.objective = objective
        self._engines, self._law, self._startup_s = dict(engines), law, startup_s
        self._wanted = start
        self._made = {Role.PREFILL: 0, Role.DECODE: 0}
        self._computed = self._judged = self._in_time = self._met = 0
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
        self._count(twin)
        dispatch = twin.dispatch
        views = {role: [w for w in dispatch.fleet if w.hello.role is role] for role in self._made}
        queue = dispatch.door.queue
        waiting = queue.tokens - len(queue) * dispatch.accounts.output_tokens_mean
        decoders = [w.load for w in views[Role.DECODE]]
        blocks = sum(load.blocks_total for load in decoders)
        free = sum(load.blocks_free for load in decoders)
        serving = {
            role: sum(not twin.workers[w.id].draining for w in views[role]) for role in self._made
        }
        return Observed(
            at=twin.now,
            requests=twin.arrived,
            prompt_tokens=twin.uncached_tokens,
            computed_tokens=self._computed,
            output_tokens=twin.outcomes.tokens_total,
            judged=self._judged,
            first_in_time=self._in_time,
            met=self._met,
            queued_tokens=max(0.0, waiting) + sum(w.prefill_tokens_queued for w in dispatch.fleet),
            prefill_tokens_per_s=_pace(views[Role.PREFILL]),
            running=sum(load.running for load in decoders),
            kv_share=1 - free / blocks if blocks else 0.0,
            wanted=self._wanted,
            ready=Size(serving[Role.PREFILL], serving[Role.DECODE]),
        )

    def _count(self, twin: Twin) -> None:
        outcomes, requests = twin.outcomes, twin.trace.requests
        for number in outcomes.begun:
            self._computed += requests[number].input_tokens - outcomes.cached_tokens[number]
        for number in outcomes.over:
            finished = outcomes.ended[number] == 1
            in_time = finished and outcomes.ttft_s(number) <= self.objective.ttft_s
            self._judged += 1
            self._in_time += in_time
            self._met += in_time and outcomes.itl_s(number) <= self.objective.itl_s
        outcomes.begun.clear()
        outcomes.over.clear()


def _pace(views: list[WorkerView]) -> float:
    """Prompt tokens a second in full steps: the mean of those whose steps are known."""
    known = [w.rates for w in views if w.rates.step.samples]
    if not known:
        return 0.0
    paces = [1 / (r.step.rates[0] / r.chunk_tokens + r.step.rates[1]) for r in known]
    return sum(paces) / len(paces)
