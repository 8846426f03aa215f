"""The production worker and the production router, each in a process of the simulation."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

from router.core.compat import RouterFacts
from router.core.lifecycle import Prefilling
from router.core.placement import EstimatePolicy
from router.dispatch import Dispatch
from router.link import Link, Links
from tests.simulation.clients import Clients
from tests.simulation.network import HEARTBEAT_S, SimChannel, Way, Wire, WireOwner
from tests.simulation.plan import MODEL
from tests.simulation.processes import Process
from tests.simulation.violation import Violation
from tests.simulation.watch import Watch
from workers.api import Delta, Finish, Generate, Phase, Refused, encode
from workers.drain import Drain
from workers.engines.sim import SimEngine
from workers.metrics import Metrics
from workers.server import Identity, Worker

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.simulation.network import Network
    from tests.simulation.plan import Call, Plan, WorkerPlan
    from workers.api import Load, ToWorker
    from workers.engines.base import CacheChange, EngineFacts, OnStep
    from workers.engines.sim_blocks import Handoffs

TOKENIZER = "tokenizer digest"
REFUSED = Refused.__name__.encode()
DRAIN_SLACK_S = 0.2
"""A drain looks every 50 ms whether it is over."""


class FrailEngine:
    """The simulated engine in a thread, so to say, of its own; it can hang, and fail requests."""

    def __init__(self, engine: SimEngine, process: Process, load_s: float) -> None:
        self.failing = False
        self._load_s = load_s
        self._engine = engine
        self._process = process
        self._on_step: OnStep

    async def start(self) -> EngineFacts:
        if self._load_s:
            await asyncio.sleep(self._load_s)
        return await self._engine.start()

    async def run(self, on_step: OnStep) -> None:
        self._process.enter()
        self._on_step = on_step
        await self._engine.run(on_step)

    def submit(self, generate: Generate) -> None:
        if not self.failing:
            self._engine.submit(generate)
            return
        failed = Delta(generate.request_id, [], Finish.ERROR, error="out of luck")
        asyncio.get_running_loop().call_soon(self._on_step, self.load(), [failed])

    def abort(self, request_ids: Iterable[str]) -> None:
        self._engine.abort(request_ids)

    def release(self, tickets: Iterable[bytes]) -> None:
        self._engine.release(tickets)

    def load(self) -> Load:
        return self._engine.load()

    @property
    def dead(self) -> str | None:
        return None

    def cache_changes(self) -> list[CacheChange]:
        return self._engine.cache_changes()

    def close(self) -> None:
        self._engine.close()


class Life:
    """A worker's process from its start to its end."""

    def __init__(self, plan: WorkerPlan, epoch: str, network: Network, handoffs: Handoffs) -> None:
        self.epoch = epoch
        self.process = Process(epoch)
        self.engine_process = Process(f"{epoch}/engine", self.process)
        self.over = False
        self.draining = False
        self.stopped_s = 0.0
        self._network = network
        engine = SimEngine(plan.settings, epoch, handoffs)
        self.engine = FrailEngine(engine, self.engine_process, plan.load_s)
        identity = Identity(
            plan.worker_id, epoch, plan.role, "sim", plan.model, TOKENIZER, plan.settings.lease_s
        )
        self.worker = Worker(self.engine, identity, Metrics(), network.loop.time)
        self.watch = Watch(self.worker)
        self.channel = SimChannel(network, plan.worker_id, self.process, self.watch)
        self.watch.attach(self.channel)
        self.task = network.loop.create_task(self.worker.run(), context=self.process.context)

    def stop(self) -> None:
        self.process.stop()

    def resume(self) -> None:
        if not self.over:
            self.process.resume()

    def kill(self) -> None:
        """Nothing of it runs again, and its memory is gone."""
        self.over = True
        self.process.stop()
        self.engine.close()

    async def drain(self, limit_s: float) -> None:
        """What `workers.__main__` does on SIGTERM."""
        loop = self._network.loop
        began, stopped_s = loop.time(), self.stopped_s
        await Drain(self.worker, limit_s, loop.time).finish()
        took = loop.time() - began - (self.stopped_s - stopped_s)
        if took > limit_s + DRAIN_SLACK_S:
            raise Violation(f"the drain of {self.epoch} took {took:.2f} s of {limit_s:.2f} s")
        if kept := self.watch.still_owed():
            raise Violation(f"{self.epoch} leaves, and says nothing of {kept}")
        self.channel.close()
        self.kill()


class WorkerHost:
    """A worker's address, and the processes that live there one after the other."""

    def __init__(self, plan: WorkerPlan, network: Network, handoffs: Handoffs) -> None:
        self.plan = plan
        self.life: Life | None = None
        self._network = network
        self._handoffs = handoffs
        self.lives: list[Life] = []

    @property
    def name(self) -> str:
        return self.plan.worker_id

    def start(self) -> None:
        if self.life is None:
            epoch = f"{self.name}.{len(self.lives) + 1}"
            self._network.events.note("start", epoch)
            self.life = Life(self.plan, epoch, self._network, self._handoffs)
            self.lives.append(self.life)

    def kill(self, back_s: float | None, *, silently: bool) -> None:
        if self.life is None:
            return
        self.life.kill()
        self._network.hang_up(self.name)
        for connection in list(self.life.channel.connections.values()):
            notices_s = self._network.latency_s()
            if silently:  # Until its heartbeat ends, or a new process there answers with RST.
                notices_s = self._network.uniform(HEARTBEAT_S - 1, HEARTBEAT_S)
                if back_s is not None:
                    notices_s = min(notices_s, back_s + self._network.uniform(0.0, 1.0))
            connection.cut(notices_s, 0.0)
        self._gone(back_s)

    def stop(self, for_s: float, *, heartbeats: bool) -> None:
        life = self.life
        if life is None or life.process.stopped:
            return
        life.stop()
        life.stopped_s += for_s
        self._network.later(for_s, life.resume)
        if heartbeats:
            return
        # Whoever hears nothing from it for too long closes.
        for connection in list(life.channel.connections.values()):
            if for_s > HEARTBEAT_S:
                wait_s = self._network.uniform(HEARTBEAT_S - 1, HEARTBEAT_S)
                self._network.later(wait_s, partial(connection.closed_by, Way.TO_WORKER))

    def hang(self, for_s: float) -> None:
        if self.life is not None and not self.life.engine_process.stopped:
            self.life.engine_process.stop()
            self._network.later(for_s, self.life.engine_process.resume)

    def fail(self, for_s: float) -> None:
        if self.life is not None:
            engine = self.life.engine
            engine.failing = True
            self._network.later(for_s, partial(setattr, engine, "failing", False))

    def drain(self, limit_s: float, back_s: float) -> None:
        life = self.life
        if life is None or life.draining:
            return
        life.draining = True
        drain = self._network.loop.create_task(life.drain(limit_s), context=life.process.context)

        def drained(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and task.exception() is None:
                self._gone(back_s)

        drain.add_done_callback(drained, context=self._network.nowhere)

    def _gone(self, back_s: float | None) -> None:
        self.life = None
        if back_s is not None:
            self._network.later(back_s, self.start)


class SimLink(Link, WireOwner):
    """`Link` with a wire for its socket; what it decides is the production code's."""

    def _open(self) -> None:
        self._connections += 1
        self._parts.clear()
        self.heard_at = 0.0
        links = self._links
        assert isinstance(links, SimLinks)
        self._wire = Wire(links.network, self.address, links.process, self)
        self._hello()

    def close(self) -> None:
        self._wire.close()

    def send(self, message: ToWorker) -> None:
        if not self._wire.send(encode(message)) and self.worker_id is not None:
            self.lost("takes no more messages")

    def on_frame(self, frame: bytes) -> None:
        self.heard_at = self._loop.time()
        self._take(frame)
        while self._parts:  # There is no loop to hold up: time is virtual.
            self._handle(self._parts.popleft())
        if REFUSED in frame[:12] and self.worker_id is not None:
            raise Violation(f"{self.address} refuses, and its router goes on as before")

    def on_broken(self) -> None:
        if self.worker_id is not None:
            self.lost("connection closed")


class SimLinks(Links):
    """`Links` over the simulated network."""

    def __init__(self, network: Network, process: Process, dispatch: Dispatch, model: str) -> None:
        facts = RouterFacts(process.name, "sim", TOKENIZER, model, max_model_len=1)
        super().__init__([], facts, dispatch)
        self.network = network
        self.process = process

    def _make(self, address: str) -> Link:
        return SimLink(address, self)


class RouterHost:
    """One router's process: its clients, its dispatch and its links."""

    def __init__(self, name: str, plan: Plan, network: Network, model: str = MODEL) -> None:
        """`model`: the digest of what it serves."""
        self.name = name
        self.process = Process(name)
        self.over = False
        self.counts: Counter[str] = Counter()
        self.said: set[str] = set()
        self.worked_for: set[str] = set()
        """Requests that any worker was asked to work for."""
        self.clients = Clients(plan, network.events)
        self._network = network
        reserve = dict(zip(plan.routers, plan.reserves, strict=True))[name]
        policy = EstimatePolicy(plan.disaggregate)
        self.dispatch = Dispatch(
            self._send, self.clients, network.loop.time, reserve=reserve, policy=policy,
            make_handle=partial(next, (f"{name}-handle-{n}" for n in count())),
        )  # fmt: skip
        self.clients.dispatch = self.dispatch
        self.links = SimLinks(network, self.process, self.dispatch, model)
        for worker in plan.workers:
            self.links.connect(worker.worker_id)
        self.task = network.loop.create_task(self.links.run(), context=self.process.context)

    def call(self, call: Call) -> None:
        """At its time; later if the process is stopped then."""
        self._network.loop.call_at(call.at, self.ask, call, context=self.process.context)

    def ask(self, call: Call) -> None:
        request = self.clients.ask(call, self._network.loop.time())
        after_s = call.departure.after_s
        if after_s is not None:
            self._network.loop.call_later(
                after_s, self.clients.leave, request, context=self.process.context
            )

    def stop(self, for_s: float, *, heartbeats: bool) -> None:
        if self.over or self.process.stopped:
            return
        self.process.stop()
        self._network.later(for_s, self._resume)
        if heartbeats:
            return
        for link in self.links:
            assert isinstance(link, SimLink)
            if (connection := link._wire.connection) and for_s > HEARTBEAT_S:
                wait_s = self._network.uniform(HEARTBEAT_S - 1, HEARTBEAT_S)
                self._network.later(wait_s, partial(connection.closed_by, Way.TO_ROUTER))

    def _resume(self) -> None:
        if not self.over:
            self.process.resume()

    def kill(self) -> None:
        """Half of its connections close, of the other half the workers hear nothing."""
        if self.over:
            return
        self.over = True
        self.process.stop()
        self.clients.router_died()
        for number, link in enumerate(self.links):
            assert isinstance(link, SimLink)
            if number % 2 and link._wire.connection:
                link._wire.connection.cut(0.0, self._network.uniform(HEARTBEAT_S - 1, HEARTBEAT_S))
            link.close()

    def _send(self, worker_id: str, message: ToWorker) -> None:
        self._network.events.note("send", self.name, worker_id, _brief(message))
        if isinstance(message, Generate):
            if message.request_id in self.said:
                raise Violation(f"{message.request_id} is sent twice: ids are single use")
            view = self.dispatch.fleet.get(worker_id)
            # Who decodes was chosen before the prefill, and may have begun to drain since.
            begins = message.phase is not Phase.DECODE
            if view is None or (begins and view.load.draining):
                raise Violation(f"{message.request_id} is placed on {worker_id}, which goes")
            self._count(message)
            self._pairs(message)
            self.said.add(message.request_id)
            self.worked_for.add(message.request_id.split("/")[0])
        self.links.send(worker_id, message)

    def _pairs(self, message: Generate) -> None:
        """KV is computed for those only who can read it."""
        state = self.dispatch._by_wire[message.request_id].state
        if isinstance(state, Prefilling) and message.phase is Phase.PREFILL:
            sender, receiver = (self.dispatch.fleet.get(w) for w in (state.prefill, state.decode))
            sides = [(v.hello.kv_digest, v.hello.model_digest) for v in (sender, receiver) if v]
            if len(sides) < 2 or sides[0] != sides[1]:
                raise Violation(f"{message.request_id} would go from {sender} to {receiver}")

    def _count(self, message: Generate) -> None:
        state = self.dispatch._by_wire[message.request_id].state
        early = message.phase is Phase.DECODE and isinstance(state, Prefilling)
        self.counts["reserved early"] += early
        self.counts["relay was all"] += message.relay and message.max_tokens == 1
        self.counts["went on from a relayed token"] += message.generated > 0


def _brief(message: ToWorker) -> Any:
    """Without the prompt."""
    kind = type(message).__name__
    request_id = getattr(message, "request_id", None)
    return f"{kind} {request_id or getattr(message, 'request_ids', '')}"
