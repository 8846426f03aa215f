"""The router's view of its workers: what they said, and what it has placed on them since."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from operator import attrgetter
from typing import TYPE_CHECKING
from zlib import crc32

from router.core.rates import Rates
from workers.api import ACCEPTS, SILENCE_S, Load, Phase, Role

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workers.api import WorkerHello

STALL_S = 60.0
"""A busy worker whose step counter stands still for this long is dead. Longer than any single
step: a GPU's chunk takes a second at most, a CPU's 8,192-token chunk some ten."""

DOUBT_S = 1.5
"""A worker that was silent for so long, three times what it may be, gets no new requests while
another can take them: it may be about to be found dead."""
SPARE_SHARE = 8
"""One sequence in so many may be sent beyond what a worker runs at once: it waits there, so that
the place of one that ends is taken in the next step, and not a message to and fro later."""
UNMEASURED_S = 10.0
"""What a worker has shown is believed for so long without a step of its own."""
_MEASURED_AT = attrgetter("measured_at")


@dataclass(slots=True, eq=False)
class WorkerView:
    """One worker as the router knows it.

    What placement asks of every worker for every request is worked out when it changes (`_weigh`),
    and not when it is asked.
    """

    hello: WorkerHello
    load: Load
    heard_at: float
    stepped_at: float
    """When `load.steps` last moved, or the worker was last idle."""
    rates: Rates = field(default_factory=Rates)
    measured_at: float = field(init=False)
    """When a step of its own last taught us something, or we took it for another."""
    sent: int = 0
    """`Generate`s that this router has sent here."""
    unheard: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By request that is to be computed here and that `load` does not know of yet: which of `sent`
    it is, and its uncached prompt tokens."""
    promised: dict[str, int] = field(default_factory=dict)
    """By request of this router that decodes here or will: KV blocks that it is yet to take."""
    id: str = field(init=False)
    family: int = field(init=False)
    """Of layout, model and transports: those of one family can hand off to the same workers."""
    tie: int = field(init=False)
    """Of the id: in what order equals are taken, which differs from request to request."""
    computes: bool = field(init=False, default=False)
    """Takes prompts now, for others to go on from; `generates`: goes on, or does it all."""
    generates: bool = field(init=False, default=False)
    streams_held: int = field(init=False, default=0)
    """Sequences that decode here or are about to, other routers' included."""
    prefill_tokens_queued: int = field(init=False, default=0)
    """What the worker says, other routers' included, and what it had not heard of then."""
    tokens_left: int = field(init=False, default=0)
    """Room in KV blocks that are free by its own word, less what is promised."""
    tokens_total: int = field(init=False)
    sequences_left: float = field(init=False, default=inf)
    """How many more it may be given; endless for one that does not say how many it runs."""
    step_s: float = field(init=False, default=0.0)
    """A step without prompt tokens, with the streams that it has."""
    queue_s: float = field(init=False, default=0.0)
    """Until all that is queued is computed."""
    pull_token_s: float = field(init=False, default=0.0)
    """To read one token's KV from another."""
    weighed: int = field(init=False, default=0)
    """How often all this was worked out: it has changed when this has."""
    resting: bool = field(init=False, default=False)
    """We were told that it is out of service: it gets new requests only if nobody else can."""
    leaving: bool = field(init=False, default=False)
    """We were told that it is gone: it gets none, whatever it says itself."""
    silent: bool = field(init=False, default=False)
    """It has said nothing for `DOUBT_S`."""
    overdue_at: float = field(init=False, default=-inf)
    """When a first token that it owes was last found overdue, while it brought nothing at all."""
    brought_at: float = field(init=False, default=-inf)
    """When it last brought something to any request."""
    last_resort: bool = field(init=False, default=False)
    """Nobody who is in service generates."""
    unreadable: frozenset[str] = frozenset()
    """Workers whose KV it has failed to read again and again (`router.core.handoffs`)."""
    _unheard_tokens: int = 0
    _promised_blocks: int = 0

    def __post_init__(self) -> None:
        hello = self.hello
        self.measured_at = self.heard_at
        self.id, self.tie = hello.worker_id, crc32(hello.worker_id.encode())
        said = "\0".join([hello.kv_digest, hello.model_digest, *hello.transports])
        self.family = crc32(said.encode())
        self.tokens_total = hello.blocks_total * hello.block_tokens
        self._weigh()

    # ------------------------------------------------------------ what changes it

    def report(self, load: Load, heard: int, now: float) -> None:
        """What the worker said, with how many of our `Generate`s it accounts for."""
        if load.steps != self.load.steps or not load.busy:
            self.stepped_at = now
        if load.step is not None and load.steps != self.load.steps:
            self.rates.stepped(load.step, prefill_left=load.prefill_tokens_queued > 0)
            self.measured_at = now
        self.load = load
        self.heard_at = now
        self.silent = False
        if self.unheard:
            for request_id in [r for r, (number, _) in self.unheard.items() if number <= heard]:
                self._unheard_tokens -= self.unheard.pop(request_id)[1]
        self._weigh()

    def taken_for(self, other: WorkerView, now: float) -> None:
        """It may be as quick as that one, until it shows otherwise."""
        self.rates = Rates([other.rates])
        self.measured_at = now
        self._weigh()

    def place(self, request_id: str, prompt_tokens: int) -> None:
        """The next `Generate` sent here is this one; the worker computes so much of it."""
        self._unheard_tokens += prompt_tokens - self.unheard.pop(request_id, (0, 0))[1]
        self.unheard[request_id] = self.sent + 1, prompt_tokens
        self._weigh()

    def answered(self, request_id: str) -> None:
        """It is computed, or gone."""
        if found := self.unheard.pop(request_id, None):
            self._unheard_tokens -= found[1]
            self._weigh()

    def promise(self, request_id: str, blocks: int) -> None:
        """This request is yet to take so many KV blocks: none, and it still decodes here."""
        self._promised_blocks += blocks - self.promised.get(request_id, 0)
        self.promised[request_id] = blocks
        self._weigh()

    def leave(self, request_id: str) -> None:
        """It is no more on this worker."""
        unheard, blocks = self.unheard.pop(request_id, None), self.promised.pop(request_id, None)
        if unheard is not None or blocks is not None:
            self._unheard_tokens -= unheard[1] if unheard else 0
            self._promised_blocks -= blocks or 0
            self._weigh()

    def rest(self, resting: bool, leaving: bool) -> None:
        """Give it no new requests, or give it some again."""
        self.resting, self.leaving = resting, leaving
        self._weigh()

    def doubt(self, now: float) -> None:
        """It owes somebody a first token."""
        self.overdue_at = now
        self._weigh()

    def brought(self, now: float) -> None:
        """It has answered a request, whichever."""
        self.brought_at = now
        if self.overdue_at != -inf:
            self.overdue_at = -inf
            self._weigh()

    def listen(self, now: float) -> None:
        """Whether it has fallen silent; whether it may be tried again."""
        silent = now - self.heard_at > DOUBT_S
        tried_again = self.overdue_at < now - UNMEASURED_S
        if silent is not self.silent or (tried_again and self.overdue_at != -inf):
            self.silent = silent
            self.overdue_at = -inf if tried_again else self.overdue_at
            self._weigh()

    @property
    def doubted(self) -> bool:
        """It gets new requests only if nobody else can."""
        return self.silent or self.overdue_at != -inf

    def resort(self, last: bool) -> None:
        """Whether it is all that there is."""
        if last is not self.last_resort:
            self.last_resort = last
            self._weigh()

    @property
    def departing(self) -> bool:
        """It said so itself, or we were told: that it goes is no surprise."""
        return self.load.draining or self.resting

    def _weigh(self) -> None:
        self.weighed += 1
        hello, load, rates = self.hello, self.load, self.rates
        spared = self.resting or self.doubted
        rests = self.leaving or (spared and not self.last_resort)
        accepts = () if load.draining or rests else ACCEPTS[hello.role]
        self.computes, self.generates = Phase.PREFILL in accepts, Phase.DECODE in accepts
        base, token_s, _, stream_s, context_s = rates.step.rates
        streams = 0
        if hello.role is not Role.PREFILL:
            streams = max(load.running + load.waiting, len(self.promised))
        self.streams_held = streams
        if runs := hello.max_num_seqs:
            self.sequences_left = runs + max(1, runs // SPARE_SHARE) - streams
        self.tokens_left = (load.blocks_free - self._promised_blocks) * hello.block_tokens
        self.pull_token_s = rates.pull.rates[1] * hello.block_bytes / hello.block_tokens
        self.step_s = base + streams * (stream_s + context_s * rates.context_tokens)
        queued = self.prefill_tokens_queued = load.prefill_tokens_queued + self._unheard_tokens
        self.queue_s = -(-queued // rates.chunk_tokens) * self.step_s + queued * token_s


class Fleet:
    """All workers that said hello and have not been lost."""

    def __init__(self) -> None:
        self._views: dict[str, WorkerView] = {}
        self._reconsidered_at: dict[Role, float] = {}

    def __iter__(self) -> Iterator[WorkerView]:
        return iter(self._views.values())

    def __len__(self) -> int:
        return len(self._views)

    def get(self, worker_id: str) -> WorkerView | None:
        return self._views.get(worker_id)

    def join(self, hello: WorkerHello, now: float) -> None:
        """A worker is ready. One that joins again under a new epoch starts from nothing."""
        load = Load(0, False, 0, 0, 0, hello.blocks_total, hello.blocks_total, 0)
        rates = Rates([w.rates for w in self if w.hello.role is hello.role])
        self._views[hello.worker_id] = WorkerView(hello, load, now, now, rates)
        self._resort()

    def report(self, worker_id: str, load: Load, heard: int, now: float) -> None:
        """A worker's load arrived. Of an unknown worker it is ignored: it was lost meanwhile."""
        if view := self._views.get(worker_id):
            before = view.load.draining, view.doubted
            view.report(load, heard, now)
            if before != (load.draining, view.doubted):
                self._resort()

    def brought(self, worker_id: str, now: float) -> None:
        """A worker brought something to a request. An unknown one is ignored."""
        if view := self._views.get(worker_id):
            doubted = view.doubted
            view.brought(now)
            if doubted:
                self._resort()

    def doubt(self, worker_id: str, now: float) -> None:
        """A worker owes a first token for too long. An unknown one is ignored."""
        if view := self._views.get(worker_id):
            view.doubt(now)
            self._resort()

    def listen(self, now: float) -> None:
        """Find who has fallen silent, and who may be tried again."""
        for view in self:
            view.listen(now)
        self._resort()

    def rest(self, worker_id: str, resting: bool, *, leaving: bool = False) -> None:
        """Give a worker no new requests, or some again. An unknown one is ignored.

        One that rests and does not leave is asked all the same while nobody else generates: who
        told us may err or be late, and what the worker says itself is the proof.
        """
        if view := self._views.get(worker_id):
            view.rest(resting, leaving)
            self._resort()

    def remove(self, worker_id: str) -> WorkerView | None:
        """What was known of it; None of an unknown one."""
        view = self._views.pop(worker_id, None)
        self._resort()
        return view

    def reconsider(self, now: float) -> None:
        """Let who was found slow, and has had nothing to do since, be tried again.

        While others suffice it would never show that it has recovered: that its first steps were
        slow, or its machine was busy. So it is taken for whichever of its role worked last: one
        worker of a role in `UNMEASURED_S`, so that a slow half of a fleet costs about one request
        in that time, however large it is.
        """
        for role in Role:
            if now - self._reconsidered_at.get(role, 0.0) < UNMEASURED_S:
                continue
            some = [v for v in self if v.hello.role is role and (v.computes or v.generates)]
            idle = min((v for v in some if not v.load.busy), key=_MEASURED_AT, default=None)
            if idle is None or now - idle.measured_at < UNMEASURED_S:
                continue
            busy = max(some, key=_MEASURED_AT)
            if busy.rates.step.samples and now - busy.measured_at < UNMEASURED_S:
                self._reconsidered_at[role] = now
                idle.taken_for(busy, now)

    @property
    def prefill_tokens_per_s(self) -> float:
        """Of a busy prefill worker, the mean of what was learnt; 0 before any has computed."""
        paces = [w.rates.prefill_tokens_per_s for w in self if w.hello.role is Role.PREFILL]
        known = [pace for pace in paces if pace]
        return sum(known) / len(known) if known else 0.0

    def _resort(self) -> None:
        generating = any(
            Phase.DECODE in ACCEPTS[view.hello.role] and not (view.departing or view.doubted)
            for view in self
        )
        for view in self:
            view.resort(not generating)

    def excuse(self, seconds: float, now: float) -> None:
        """For so long nobody listened: that is no silence of theirs, and no stalling."""
        for view in self:
            view.heard_at = min(now, view.heard_at + seconds)
            view.stepped_at = min(now, view.stepped_at + seconds)

    def dead(self, now: float) -> list[tuple[str, str]]:
        """Workers to give up, each with the reason: silent, or busy without stepping."""
        found = []
        for view in self:
            if now - view.heard_at > SILENCE_S:
                found.append((view.id, f"silent for {now - view.heard_at:.1f} s"))
            elif view.load.busy and now - view.stepped_at > STALL_S:
                found.append((view.id, f"busy but not stepping for {now - view.stepped_at:.0f} s"))
        return found
