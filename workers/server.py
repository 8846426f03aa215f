"""One worker: an engine, its routers, and who owns which request."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec

from workers.api import (
    ACCEPTS,
    LOAD_INTERVAL_S,
    MESSAGE_BYTES_MAX,
    PROTOCOL,
    ROUTER_SILENCE_S,
    SILENCE_S,
    Abort,
    Batch,
    Delta,
    Finish,
    Generate,
    KvAsk,
    KvSnapshot,
    Load,
    Refused,
    Release,
    Role,
    RouterHello,
    WorkerHello,
)
from workers.cache_mirror import CacheMirror

if TYPE_CHECKING:
    from collections.abc import Callable

    from workers.api import ToWorker
    from workers.channel import Channel
    from workers.engines.base import Engine, EngineFacts
    from workers.metrics import Metrics

log = logging.getLogger(__name__)

STALL_S: Final = 60.0
"""Busy without a step for this long is dead."""

EARLY_MAX: Final = 1000
"""Hellos kept while the engine loads; the oldest go first."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What of `WorkerHello` the engine does not know."""

    worker_id: str
    epoch: str
    role: Role
    model: str
    model_digest: str
    tokenizer_digest: str
    lease_s: float
    message_bytes_max: int = MESSAGE_BYTES_MAX


@dataclass(slots=True)
class _Router:
    name: str
    heard_at: float
    connection: int = 0
    told_at: float = 0.0
    heard: int = 0
    """`Generate`s."""
    kv_seq: int | None = None
    """The next change of the cache that it has not been told; None until it asks."""
    requests: dict[str, None] = field(default_factory=dict)
    """Its requests here, oldest first: a set's order differs from process to process."""


class Worker:
    """Between the channel and the engine. All on one event loop."""

    def __init__(
        self,
        engine: Engine,
        identity: Identity,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        *,
        router_silence_s: float = ROUTER_SILENCE_S,
    ) -> None:
        """`clock`: seconds that only grow, at the pace of the event loop's own."""
        self._router_silence_s = router_silence_s
        self._engine = engine
        self._identity = identity
        self._metrics = metrics
        self._clock = clock
        self._channel: Channel | None = None
        self._hello: WorkerHello | None = None
        self._routers: dict[bytes, _Router] = {}
        self._owners: dict[str, bytes] = {}
        self._mirror = CacheMirror()
        self._early: dict[bytes, tuple[RouterHello, float]] = {}
        """Who said hello while the engine loads, last, and when: they are answered when it has."""
        self._asked: dict[bytes, None] = {}
        """Routers that are to be told all of the cache, in turn."""
        self._asked_now = asyncio.Event()
        self._draining = False
        self._steps = 0
        self._stepped_at = clock()

    def attach(self, channel: Channel) -> None:
        """Give the worker its way out. The two need each other, so this comes second."""
        self._channel = channel

    # ------------------------------------------------------------ health

    @property
    def ready(self) -> str | None:
        """Why it is not ready; None when it is."""
        if self._draining:
            return "draining"
        return None if self._hello else "the engine is loading"

    @property
    def loading(self) -> bool:
        return self._hello is None

    @property
    def live(self) -> str | None:
        """Why it should be replaced; None when it is well."""
        stalled = self._clock() - self._stepped_at
        if self._owners and stalled > STALL_S:
            return f"busy but not stepping for {stalled:.0f} s"
        return self._engine.dead

    @property
    def load(self) -> Load:
        return msgspec.structs.replace(self._engine.load(), draining=self._draining)

    # ------------------------------------------------------------ life

    async def run(self) -> None:
        """Load the engine and serve until cancelled. Raises `EngineDead`."""
        facts = await self._engine.start()
        self._hello = self._make_hello(facts)
        log.info("ready", extra={"worker": self._identity.worker_id, "kv": facts.kv_digest})
        # Before anybody acts upon that: a rollout takes the next one away as soon as we are ready.
        early, self._early = self._early, {}
        for router, (hello, at) in early.items():
            if self._clock() - at < SILENCE_S:  # It would have said it again by now.
                self._greet(router, hello)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._engine.run(self._on_step))
            tasks.create_task(self._tick())
            tasks.create_task(self._tell_caches())

    def rest(self, draining: bool) -> None:
        """Take nothing more, or take work again; what runs goes on either way."""
        self._draining = draining
        for router in list(self._routers):  # At once: what they send meanwhile is sent in vain.
            self._send(router, self._batch(router, self.load, []))

    @property
    def left(self) -> str | None:
        """What keeps it from going; None when nothing runs and no lease is open."""
        leases = 0 if self.loading else self.load.leases_open
        if not self._owners and not leases:
            return None
        return f"requests that run: {len(self._owners)}, open leases: {leases}"

    def hand_back(self) -> None:
        """End what still runs: its routers try it elsewhere."""
        left = list(self._owners)
        self._engine.abort(left)
        deltas = [Delta(r, [], Finish.ERROR, error="the worker is shutting down") for r in left]
        self._on_step(self.load, deltas)

    def _make_hello(self, facts: EngineFacts) -> WorkerHello:
        me = self._identity
        return WorkerHello(
            protocol=PROTOCOL, worker_id=me.worker_id, epoch=me.epoch, role=me.role,
            engine=facts.engine, engine_version=facts.version, model=me.model,
            model_digest=me.model_digest, tokenizer_digest=me.tokenizer_digest,
            kv_digest=facts.kv_digest, transports=facts.transports,
            block_tokens=facts.block_tokens, block_bytes=facts.block_bytes,
            blocks_total=facts.blocks_total, max_model_len=facts.max_model_len,
            lease_s=me.lease_s, handoff_endpoint=facts.handoff_endpoint,
            tells_cache=facts.tells_cache, step_tokens=facts.step_tokens,
            constraints=facts.constraints, dp_rank=facts.dp_rank, dp_size=facts.dp_size,
            message_bytes_max=me.message_bytes_max,
            max_num_seqs=facts.max_num_seqs,
        )  # fmt: skip

    # ------------------------------------------------------------ from routers

    def on_message(self, router: bytes, message: ToWorker) -> None:
        if isinstance(message, RouterHello):
            self._greet(router, message)
            return
        known = self._routers.get(router)
        if known is None:
            # It was given up while it could not speak, and does not know: what it sends would
            # vanish until it finds the silence suspicious.
            self._send(router, Refused(f"worker {self._identity.worker_id}: say hello first"))
            return
        known.heard_at = self._clock()
        match message:
            case Generate():
                self._generate(router, known, message)
            case Abort(request_ids):
                mine = [r for r in request_ids if self._owners.get(r) == router]
                self._drop(known, mine)
            case Release(tickets):
                self._engine.release(tickets)
            case KvAsk():
                self._asked[router] = None
                self._asked_now.set()

    def _greet(self, router: bytes, hello: RouterHello) -> None:
        if self._hello is None:  # Silence means: not ready. The router asks again.
            self._early.pop(router, None)
            self._early[router] = hello, self._clock()
            if len(self._early) > EARLY_MAX:
                del self._early[next(iter(self._early))]
            return
        me = self._identity
        pairs = [
            ("protocol", hello.protocol, PROTOCOL),
            ("model digest", hello.model_digest, me.model_digest),
            ("tokenizer digest", hello.tokenizer_digest, me.tokenizer_digest),
        ]
        for what, theirs, ours in pairs:
            if theirs is not None and theirs != ours:
                reason = (
                    f"{what} differs: router {hello.router_id} has {theirs}, "
                    f"worker {me.worker_id} ({me.model}) has {ours}"
                )
                self._send(router, Refused(reason))
                return
        now = self._clock()
        for old in [key for key, known in self._routers.items() if _replaced(known, hello)]:
            self._forget(old, "it has greeted anew, over another connection")
        self._routers.setdefault(
            router, _Router(hello.router_id, now, hello.connection)
        ).heard_at = now
        self._send(router, self._hello)
        self._send(router, Batch(self.load))

    def _generate(self, router: bytes, known: _Router, generate: Generate) -> None:
        request_id = generate.request_id
        known.heard += 1
        refusal = None
        if self._draining:
            refusal = "the worker is draining"
        elif generate.phase not in ACCEPTS[self._identity.role]:
            refusal = f"a {self._identity.role} worker takes no {generate.phase} phase"
        elif request_id in self._owners:
            refusal = f"request id {request_id} is in use"
        if refusal:
            delta = Delta(request_id, [], Finish.REFUSED, error=refusal)
            self._send(router, self._batch(router, self.load, [delta]))
            return
        self._owners[request_id] = router
        known.requests[request_id] = None
        self._metrics.accepted(generate.phase)
        self._engine.submit(generate)

    def _drop(self, router: _Router, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._owners.pop(request_id, None)
            router.requests.pop(request_id, None)
        self._engine.abort(request_ids)

    # ------------------------------------------------------------ to routers

    def _on_step(self, load: Load, deltas: list[Delta]) -> None:
        if load.steps != self._steps:
            self._steps, self._stepped_at = load.steps, self._clock()
        by_router: dict[bytes, list[Delta]] = {}
        for delta in deltas:
            owner = self._owners.get(delta.request_id)
            if owner is None:
                continue
            by_router.setdefault(owner, []).append(delta)
            if delta.finish is not None:
                del self._owners[delta.request_id]
                del self._routers[owner].requests[delta.request_id]
        self._metrics.stepped(deltas)
        self._mirror.apply(self._engine.cache_changes())
        if by_router:
            load = msgspec.structs.replace(load, draining=self._draining)
            for router, batch in by_router.items():
                self._send(router, self._batch(router, load, batch))

    def _batch(self, router: bytes, load: Load, deltas: list[Delta]) -> Batch:
        """With what of the cache has changed since the last one to this router."""
        known, mirror = self._routers[router], self._mirror
        seq = known.kv_seq
        if seq is None or seq == mirror.seq:
            return Batch(load, deltas, known.heard)
        changes = mirror.since(seq)
        if changes is None:  # It is further behind than changes are kept: all of it, unasked.
            known.kv_seq = None
            self._asked[router] = None
            self._asked_now.set()
            return Batch(load, deltas, known.heard)
        known.kv_seq = mirror.seq
        return Batch(load, deltas, known.heard, seq, changes)

    async def _tell_caches(self) -> None:
        while True:
            await self._asked_now.wait()
            self._asked_now.clear()
            while self._asked:
                await self._tell_cache(next(iter(self._asked)))

    async def _tell_cache(self, router: bytes) -> None:
        """All of it, a part a turn: a large one takes longer than streams may wait."""
        del self._asked[router]
        self._mirror.apply(self._engine.cache_changes())
        seq, parts = self._mirror.seq, self._mirror.snapshot()
        known = self._routers.get(router)
        if known is None:
            return
        known.kv_seq = None  # What changes meanwhile follows the last part.
        for part in parts:
            self._send(router, part)
            await asyncio.sleep(0)
            if self._routers.get(router) is not known:
                return  # Given up, and perhaps greeted anew since.
        known.kv_seq = seq

    def _send(self, router: bytes, message: Batch | KvSnapshot | WorkerHello | Refused) -> None:
        assert self._channel is not None
        sent = self._channel.send(router, message)
        if known := self._routers.get(router):
            known.told_at = self._clock()
            if not sent:
                self._forget(router, "its connection is closed, or takes no more messages")

    def _forget(self, router: bytes, reason: str) -> None:
        known = self._routers.pop(router)
        log.warning("router gone", extra={"router": known.name, "reason": reason})
        self._drop(known, list(known.requests))

    async def _tick(self) -> None:
        while True:
            due = self._clock() + LOAD_INTERVAL_S / 2
            await asyncio.sleep(LOAD_INTERVAL_S / 2)
            now = self._clock()
            held_up_s = now - due
            if not self._owners:
                self._stepped_at = now
            for router, known in list(self._routers.items()):
                # While our own process stood still we listened to nobody.
                known.heard_at = min(now, known.heard_at + held_up_s)
                if now - known.heard_at > self._router_silence_s:
                    self._forget(router, f"silent for {now - known.heard_at:.1f} s")
                elif now - known.told_at >= LOAD_INTERVAL_S:
                    self._send(router, self._batch(router, self.load, []))


def _replaced(known: _Router, hello: RouterHello) -> bool:
    """The same router has another connection now: what it asked over this one is given up."""
    return known.name == hello.router_id and known.connection < hello.connection
