"""A simulated worker without sockets or tasks: it is told the time, and says when to ask it.

What `workers.server.Worker` does for one router, over the same engine model and cache mirror.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from workers.api import (
    LOAD_INTERVAL_S,
    PROTOCOL,
    Abort,
    Batch,
    Delta,
    Finish,
    Generate,
    KvAsk,
    Release,
    WorkerHello,
)
from workers.cache_mirror import CacheMirror
from workers.engines.sim_model import SimModel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from router.twin.fleet import WorkerPlan
    from workers.api import KvSnapshot, Load, ToRouter, ToWorker
    from workers.engines.sim_blocks import Handoffs

IDLE_INTERVAL_S: Final = 1.0
"""One with nothing to do says so less often than a real one does, which nobody can tell: its load
stays what it was, and nobody doubts it before `router.core.fleet.DOUBT_S`."""


class SimWorker:
    """`begin` and `finish` bound a step; in between `receive` may be called, and moves its end."""

    def __init__(self, plan: WorkerPlan, handoffs: Handoffs, alike_s: float) -> None:
        """`alike_s`: steps that only generate are done at once, up to so many seconds of them."""
        self.plan = plan
        self.worker_id = plan.worker_id
        handoffs.join(plan.worker_id, plan.settings.lease_s)
        self.model = SimModel(plan.settings, plan.worker_id, handoffs)
        self.heard = 0
        """`Generate`s."""
        self.busy_s = 0.0
        """In steps that computed something."""
        self.told_at = 0.0
        self.version = 0
        """Of the end of its step: moved by what comes in."""
        self.stepping = False
        self.draining = False
        """It takes nothing more."""
        self.slow = 1.0
        """What its steps' times are multiplied by for now: others of its host compute."""
        self._began_at = self._settled_at = 0.0
        self._step_s = self._lost_s = 0.0
        self._alike_s = alike_s
        self._mirror = CacheMirror()
        self._kv_seq: int | None = None
        self._tell_all = False

    @property
    def hello(self) -> WorkerHello:
        s = self.plan.settings
        return WorkerHello(
            protocol=PROTOCOL, worker_id=self.worker_id, epoch=self.worker_id,
            role=self.plan.role, engine="sim", engine_version="", model="sim",
            model_digest="", tokenizer_digest="", kv_digest=f"sim-{s.block_tokens}-{s.token_bytes}",
            transports=["memory"], block_tokens=s.block_tokens,
            block_bytes=s.block_tokens * s.token_bytes, blocks_total=s.blocks_total,
            max_model_len=s.max_model_len, lease_s=s.lease_s,
            handoff_endpoint="sim" if s.streams else "", step_tokens=s.chunk_tokens,
            max_num_seqs=s.running_max,
        )  # fmt: skip

    @property
    def cached_blocks(self) -> int:
        """In its prefix cache, as the mirror has it."""
        return len(self._mirror)

    @property
    def interval_s(self) -> float:
        """It is silent for no longer."""
        return LOAD_INTERVAL_S if self.model.busy else IDLE_INTERVAL_S

    # ------------------------------------------------------------ from the router

    def receive(self, message: ToWorker, now: float) -> Iterator[ToRouter]:
        match message:
            case Generate():
                self.heard += 1
                if self.draining:
                    yield self._refuse(message, now)
                else:
                    self.model.submit(message)
            case Abort(request_ids):
                self.model.abort(request_ids)
            case Release(tickets):
                self.model.release(tickets, now)
            case KvAsk():
                self._mirror.apply(self.model.cache_changes())
                self._tell_all = True
                yield from self.more()

    def _refuse(self, generate: Generate, now: float) -> Batch:
        refused = Delta(generate.request_id, [], Finish.REFUSED, error="the worker is draining")
        return self._batch(self.model.load(now), [refused], now)

    # ------------------------------------------------------------ steps

    @property
    def computing(self) -> bool:
        """In a step, and not merely waiting for one."""
        return self.stepping and self.model.begun is not None

    def begin(self, now: float) -> float:
        """The next step; when it ends."""
        self.stepping, self._began_at, self._settled_at, self._lost_s = True, now, now, 0.0
        self._step_s = self.model.begin(now, self._alike_s)
        return self._end_at(now)

    def interrupted(self, now: float) -> float:
        """When the step that is under way ends, now that something has come in."""
        self._settle(now)
        self._step_s = self.model.cut(now - self._began_at - self._lost_s)
        return self._end_at(now)

    def slowed(self, slow: float, now: float) -> float:
        """When the step that is under way ends, now that its time is multiplied by `slow`."""
        self._settle(now)
        self.slow = slow
        return self._end_at(now)

    def _settle(self, now: float) -> None:
        self._lost_s += (now - self._settled_at) * (1 - 1 / self.slow)
        self._settled_at = now

    def _end_at(self, now: float) -> float:
        self.version += 1
        end_at = max(now, self._began_at + self._lost_s + self._step_s)
        return end_at if self.slow == 1 else now + (end_at - now) * self.slow

    def finish(self, now: float) -> Batch | None:
        """Nothing, when there is nothing to say to the router."""
        self.stepping = False
        deltas = self.model.finish(now)
        self._mirror.apply(self.model.cache_changes())
        load = self.model.load(now)
        if load.step is not None:
            self.busy_s += now - self._began_at
        return self._batch(load, deltas, now) if deltas else None

    def report(self, now: float) -> Batch:
        """With nothing but its load, so that it is not silent."""
        return self._batch(self.model.load(now), [], now)

    def more(self) -> Iterator[KvSnapshot]:
        """What follows a batch: all of the cache, where the router is too far behind for less."""
        if self._tell_all:
            self._tell_all, self._kv_seq = False, self._mirror.seq
            yield from self._mirror.snapshot()

    def _batch(self, load: Load, deltas: list[Delta], now: float) -> Batch:
        self.told_at = now
        if self.draining:
            load = msgspec.structs.replace(load, draining=True)
        seq, mirror = self._kv_seq, self._mirror
        if seq is None or seq == mirror.seq:
            return Batch(load, deltas, self.heard)
        changes = mirror.since(seq)
        if changes is None:
            self._tell_all = True
            return Batch(load, deltas, self.heard)
        self._kv_seq = mirror.seq
        return Batch(load, deltas, self.heard, seq, changes)
