"""The twin: one router's production dispatch over simulated workers, on virtual time.

Discrete events in a heap, no event loop and no threads. What happens at one time happens in the
order in which it was caused, so a run hangs on its trace, fleet, policy and seed alone.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from heapq import heappop, heappush
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final, Protocol

from router.ask import Ask, Reserve
from router.core.errors import RouterError
from router.dispatch import Dispatch
from router.twin.outcomes import REQUESTS_MAX, Outcomes, name_of, number_of
from router.twin.prompts import prompt_of
from router.twin.worker import SimWorker
from workers.api import LOAD_INTERVAL_S, Batch, Finish, KvSnapshot
from workers.engines.sim_blocks import Handoffs

if TYPE_CHECKING:
    from collections.abc import Callable

    from router.core.limits import Limits
    from router.core.placement import Policy
    from router.twin.fleet import FleetPlan, WorkerPlan
    from router.twin.traces import Request, Trace
    from workers.api import ToRouter, ToWorker

TICK_S: Final = 1.0
"""As `router.link` ticks."""
ALIKE_S: Final = LOAD_INTERVAL_S
"""A worker that only generates tells the router at least so often, and at every change."""
_ARRIVAL, _STEP, _TO_WORKER, _TO_ROUTER, _BEAT, _TICK, _JOIN, _LOOK = range(8)


class Scaler(Protocol):
    """Looks at a run every `look_s` virtual seconds, and lets workers come and go."""

    look_s: float

    def look(self, twin: Twin) -> None: ...

    def left(self, worker_id: str, now: float) -> None:
        """One that drained is gone."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a run has besides trace, fleet and policy."""

    limits: Limits | None = None
    reserve: Reserve = Reserve.AT_LAST_STEP
    relay: bool = True
    """The prefill worker says the first token, as the front asks wherever it changes nothing."""
    max_tokens: int | None = None
    """What clients ask for at most; by default as much as the trace's longest output."""
    alike_s: float = ALIKE_S
    """0: every engine step is told."""


class Twin:
    """One run: `run` it, and read `outcomes`, `workers` and `dispatch`."""

    def __init__(
        self,
        trace: Trace,
        fleet: FleetPlan,
        options: Options | None = None,
        scaler: Scaler | None = None,
    ) -> None:
        """`fleet`: who is there from the start. Raises ValueError for a trace of too many."""
        if len(trace.requests) > REQUESTS_MAX:
            raise ValueError(f"a trace has at most {REQUESTS_MAX} requests")
        self.trace, self.fleet_plan = trace, fleet
        self.options = options or Options()
        self.now = 0.0
        self.handoffs = Handoffs(only_here=True)
        self.workers = {
            w.worker_id: SimWorker(w, self.handoffs, self.options.alike_s) for w in fleet.workers
        }
        self._hosts: dict[str, list[SimWorker]] = {}
        self.outcomes = Outcomes(array("d", [r.at_s for r in trace.requests]), lambda: self.now)
        self.submit_ns = array("q")
        """By the real clock, of each `submit`: the lookup in the index, placement, what is sent."""
        self.events = 0
        self.departed: list[SimWorker] = []
        """Workers that drained and left."""
        self._scaler = scaler
        self._given_up: set[str] = set()
        self._max_tokens = self.options.max_tokens or max(
            (r.output_tokens for r in trace.requests), default=1
        )
        self._heap: list[tuple[float, int, int, str, object]] = []
        self._pushed = 0
        self._awaiting: dict[str, SimWorker] = {}
        """Those that may have a prompt to look for."""
        self._next = 0
        """The next request to come."""
        self.dispatch: Dispatch

    def run(
        self, policy: Policy | None = None, progress: Callable[[Twin], None] | None = None
    ) -> None:
        """Until every request has ended, and what was sent has arrived.

        `policy`: production's own by default. `progress` is told each virtual second.
        """
        self.dispatch = Dispatch(
            self._send, self.outcomes, lambda: self.now, reserve=self.options.reserve,
            policy=policy, limits=self.options.limits,
        )  # fmt: skip
        for worker in self.workers.values():
            self._greet(worker)
        self._push(TICK_S, _TICK, "")
        if self._scaler is not None:
            self._push(self._scaler.look_s, _LOOK, "")
        self._push_arrival()
        while self._heap:
            self.now, _, kind, worker_id, what = heappop(self._heap)
            self.events += 1
            if kind == _STEP:
                self._end_step(worker_id, what)
            elif kind == _TO_ROUTER:
                self._to_router(worker_id, what)
            elif kind == _TO_WORKER:
                self._to_worker(worker_id, what)
            elif kind == _ARRIVAL:
                self._arrive()
            elif self._over:
                continue  # Nothing periodic goes on, and the heap runs empty.
            elif kind == _BEAT:
                self._beat(worker_id)
            elif kind == _JOIN:
                self._join(what)  # type: ignore[arg-type]
            elif kind == _LOOK:
                self._look()
            else:
                self.dispatch.tick()
                self._part()
                self._push(self.now + TICK_S, _TICK, "")
                if progress is not None:
                    progress(self)

    # ------------------------------------------------------------ who comes and goes

    def start(self, plan: WorkerPlan, startup_s: float) -> None:
        """A worker whose engine has loaded after so long. Ids are single use."""
        self._push(self.now + startup_s, _JOIN, "", plan)

    def drain(self, worker_id: str) -> None:
        """As a terminating pod does it: no more work for it, and it says so; it leaves when what
        runs on it, and what it keeps for others, is over."""
        worker = self.workers.get(worker_id)
        if worker is None:
            self._given_up.add(worker_id)  # Its engine is still loading.
            return
        worker.draining = True
        self.dispatch.fleet.rest(worker_id, True)  # The router's discovery sees it terminate.
        self._report(worker, worker.report(self.now))

    def _look(self) -> None:
        assert self._scaler is not None
        self._scaler.look(self)
        self._push(self.now + self._scaler.look_s, _LOOK, "")

    def _join(self, plan: WorkerPlan) -> None:
        if plan.worker_id not in self._given_up:
            worker = SimWorker(plan, self.handoffs, self.options.alike_s)
            self.workers[plan.worker_id] = worker
            self._greet(worker)

    def _greet(self, worker: SimWorker) -> None:
        if worker.plan.host:
            self._hosts.setdefault(worker.plan.host, []).append(worker)
        self.dispatch.on_hello(worker.hello)
        self._push(self.now + worker.interval_s, _BEAT, worker.worker_id)

    def _part(self) -> None:
        """As `router.link` does it: who drains, is let go when no request of ours is on it."""
        for worker in [w for w in self.workers.values() if w.draining]:
            load = worker.model.load(self.now)
            if worker.model.busy or load.leases_open or self.dispatch.is_on(worker.worker_id):
                continue
            del self.workers[worker.worker_id]
            if worker.plan.host:
                self._hosts[worker.plan.host].remove(worker)
            self._awaiting.pop(worker.worker_id, None)
            self.departed.append(worker)
            self.handoffs.leave(worker.worker_id)
            self.dispatch.on_lost(worker.worker_id, "left")
            if self._scaler is not None:
                self._scaler.left(worker.worker_id, self.now)

    def request(self, request_id: str) -> Request:
        return self.trace.requests[number_of(request_id)]

    @property
    def _over(self) -> bool:
        return self._next == len(self.trace.requests) and not len(self.dispatch)

    # ------------------------------------------------------------ events

    def _push(self, at: float, kind: int, worker_id: str, what: object = None) -> None:
        self._pushed += 1
        heappush(self._heap, (at, self._pushed, kind, worker_id, what))

    def _push_arrival(self) -> None:
        if self._next < len(self.trace.requests):
            at_s = self.trace.requests[self._next].at_s + self.fleet_plan.front_s
            self._push(at_s, _ARRIVAL, "")

    def _arrive(self) -> None:
        number, request = self._next, self.trace.requests[self._next]
        self._next += 1
        ask = Ask(
            name_of(number),
            prompt_of(request, self.trace.block_tokens),
            self._max_tokens,
            # The engine stops by itself after so many; the router does not know.
            str(request.output_tokens).encode(),
            relay=self.options.relay,
        )
        began_ns = perf_counter_ns()
        try:
            self.dispatch.submit(ask)
        except RouterError as error:
            self.outcomes.fail(ask.request_id, error)
        self.submit_ns.append(perf_counter_ns() - began_ns)
        self._push_arrival()

    def _send(self, worker_id: str, message: ToWorker) -> None:
        self._push(self.now + self.fleet_plan.latency_s, _TO_WORKER, worker_id, message)

    def _report(self, worker: SimWorker, batch: Batch) -> None:
        self._answer(worker, batch)
        for part in worker.more():
            self._answer(worker, part)

    def _answer(self, worker: SimWorker, message: ToRouter) -> None:
        self._push(self.now + self.fleet_plan.latency_s, _TO_ROUTER, worker.worker_id, message)

    def _to_worker(self, worker_id: str, message: object) -> None:
        worker = self.workers.get(worker_id)
        if worker is None:
            return  # It has left; nothing of ours was on it.
        for answer in worker.receive(message, self.now):  # type: ignore[arg-type]
            self._answer(worker, answer)
        if worker.stepping:
            self._push(worker.interrupted(self.now), _STEP, worker.worker_id, worker.version)
        else:
            self._begin_step(worker)

    def _begin_step(self, worker: SimWorker) -> None:
        if worker.model.busy:
            self._push(worker.begin(self.now), _STEP, worker.worker_id, worker.version)
            if worker.model.awaits:
                self._awaiting[worker.worker_id] = worker
        if worker.plan.host:
            self._share(self._hosts[worker.plan.host])

    def _share(self, workers: list[SimWorker]) -> None:
        """Engines of one host slow each other while they compute."""
        computing = sum(w.computing for w in workers)
        for worker in workers:
            slow = worker.plan.beside if computing > worker.computing else 1.0
            if slow != worker.slow:
                end_at = worker.slowed(slow, self.now)
                if worker.stepping:
                    self._push(end_at, _STEP, worker.worker_id, worker.version)

    def _end_step(self, worker_id: str, version: object) -> None:
        worker = self.workers.get(worker_id)
        if worker is None or version != worker.version:
            return  # It was moved.
        batch = worker.finish(self.now)
        if batch is not None:
            self._report(worker, batch)
            if self._awaiting and any(d.finish is Finish.PREFILLED for d in batch.deltas):
                self._wake()
        self._begin_step(worker)

    def _wake(self) -> None:
        """A prompt is done: who waits for one looks, when its step is over."""
        awaiting, self._awaiting = self._awaiting, {}
        for worker in awaiting.values():
            if worker.stepping:
                self._push(worker.interrupted(self.now), _STEP, worker.worker_id, worker.version)

    def _to_router(self, worker_id: str, message: object) -> None:
        match message:
            case Batch():
                self.dispatch.on_batch(worker_id, message)
            case KvSnapshot():
                self.dispatch.on_snapshot(worker_id, message)

    def _beat(self, worker_id: str) -> None:
        """As a real one does: it says something whenever it has been silent for an interval."""
        worker = self.workers.get(worker_id)
        if worker is None:
            return
        if self.now - worker.told_at >= worker.interval_s:
            self._report(worker, worker.report(self.now))
        due = max(worker.told_at + worker.interval_s, self.now + worker.interval_s / 8)
        self._push(due, _BEAT, worker.worker_id)
