"""Carries requests through their lifecycle: it moves messages and decides nothing.

Synchronous and free of clocks and sockets: time and the way out are given to it. The same code
runs behind HTTP and in the simulator.
"""

from __future__ import annotations

import logging
import secrets
from typing import TYPE_CHECKING

import msgspec

from router.accounts import Accounts
from router.ask import Ask, Reserve
from router.core import effects, race
from router.core import lifecycle as life
from router.core.belief import Doubts, batch_doubt
from router.core.caches import Caches, Foretold
from router.core.errors import NoCapacity, NoWorkers, Overloaded
from router.core.fleet import Fleet
from router.core.placement import EstimatePolicy
from router.door import Door
from router.handoff_watch import HandoffWatch
from router.journal import Journal
from router.live import Live, Step, generate, nobody_computed
from router.patience import Patience
from workers.api import Abort, Batch, Delta, Finish, KvAsk, KvSnapshot, Phase, Release, make_ticket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from router.core.errors import RouterError
    from router.core.limits import Limits
    from router.core.placement import Placement, Policy, Prompt
    from router.sink import Sink
    from workers.api import ToWorker, WorkerHello

log = logging.getLogger(__name__)

REQUESTS_MAX = 20_000
"""Live requests a router holds; beyond, it answers 503."""
PREFILL_SUFFIX = "/p"
HANDLE_BYTES = 16
"""Random ones of a handle: whoever knows it can follow, renew and release the KV it stands for."""
HELD_UP_S = 0.1
"""A standstill of our own that is worth counting."""
FORETOLD_S = 1.0
"""What is known of a waiting prompt's cached tokens is looked up again after so long."""


class Dispatch:
    """All live requests of one router."""

    def __init__(
        self,
        send: Callable[[str, ToWorker], None],
        sink: Sink,
        clock: Callable[[], float],
        journal: Journal | None = None,
        reserve: Reserve = Reserve.AT_LAST_STEP,
        *,
        policy: Policy | None = None,
        limits: Limits | None = None,
        make_handle: Callable[[], str] | None = None,
    ) -> None:
        """`make_handle`: names for handoffs, which only the two workers of each may learn; random
        ones by default."""
        self.fleet = Fleet()
        self.caches = Caches()
        self.doubts = Doubts()
        self.accounts = Accounts(self.fleet)
        self.handoffs = HandoffWatch(self.fleet)
        self.door = Door(self.fleet, limits)
        self.patience = Patience(self.fleet, self.door.limits)
        self._policy = policy or EstimatePolicy(prefill_s=self.door.limits.prefill_s)
        self._reserve = reserve
        self.journal = journal or Journal()
        self._send = send
        self._sink = sink
        self._clock = clock
        self._make_handle = make_handle or _secret
        self._live: dict[str, Live] = {}
        self._by_wire: dict[str, Live] = {}

    def __len__(self) -> int:
        return len(self._live)

    # ------------------------------------------------------------ from the front

    def trouble(self, tenant: str = "") -> RouterError | None:
        """Why `submit` would refuse whatever is asked, before any work."""
        if len(self._live) >= REQUESTS_MAX:
            return Overloaded(holds=f"{len(self._live)} requests")
        if not any(w.generates for w in self.fleet):
            return NoWorkers("decode", known=len(self.fleet))
        return self.door.trouble(tenant, self._clock())

    def check(self, tenant: str = "") -> None:
        """Raise it: whoever is told so has asked, and is refused."""
        if error := self.trouble(tenant):
            raise self.door.turned_away(error)

    def submit(self, ask: Ask) -> None:
        """Start a request, or queue it. Raises a RouterError; then nothing has been started."""
        self.check(ask.tenant)
        now = self._clock()
        live = Live(ask, life.Waiting(), progress_at=now)
        prompt, crowded = self._prompt(live, now), bool(self.door.queue)
        if not crowded:
            self.door.check_objective(ask, prompt, self._policy)
        live.entry = self.door.enter(ask, prompt, now)
        self._live[ask.request_id] = live
        self.journal.start(ask, now)
        self._pump(now, only_if_due=crowded)

    def is_on(self, worker_id: str) -> bool:
        """Some live request computes, decodes or has its KV there."""
        return any(life.is_on(live.state, worker_id) for live in self._tries())

    def cancel(self, request_ids: Iterable[str]) -> None:
        """The client is gone. Unknown ids are ignored."""
        self._for_each(request_ids, life.ClientGone())

    def enough(self, request_ids: Iterable[str]) -> None:
        """The front found the end of these itself. Unknown ids are ignored."""
        self._for_each(request_ids, life.Enough())

    # ------------------------------------------------------------ from the workers

    def on_hello(self, hello: WorkerHello) -> None:
        now = self._clock()
        known = self.fleet.get(hello.worker_id)
        if known and known.hello.epoch == hello.epoch:
            return
        if known:
            self.on_lost(hello.worker_id, "restarted")
        self.fleet.join(hello, now)
        self.handoffs.changed()
        if self.caches.join(hello, now):
            self._send(hello.worker_id, KvAsk())

    def on_snapshot(self, worker_id: str, news: KvSnapshot) -> None:
        """A part of what a worker's prefix cache holds."""
        if self.caches.snapshot(worker_id, news, self._clock()):
            self._send(worker_id, KvAsk())

    def doubt(self, worker_id: str, message: Batch | KvSnapshot) -> str | None:
        """Why this worker can't have said that. Ask before `on_batch` and `on_snapshot`: they act.

        A batch must be believed as a whole: half of one that was acted upon would be half a stream.
        """
        reason = self.caches.doubt(worker_id, message)
        if reason is not None or isinstance(message, KvSnapshot):
            return reason
        known = self._by_wire
        left = {
            d.request_id: live.tokens_left
            for d in message.deltas
            if (live := known.get(d.request_id)) is not None
        }
        return batch_doubt(message, left)

    def on_lost(self, worker_id: str, reason: str) -> None:
        """A worker is gone, and with it whatever it held."""
        view = self.fleet.remove(worker_id)
        if view is None:
            return
        self.caches.leave(worker_id)
        self.handoffs.changed()
        now = self._clock()
        left = view.departing and not self.is_on(worker_id)
        what = {"worker": worker_id, "reason": reason}
        log.info("worker left", extra=what) if left else log.warning("worker lost", extra=what)
        for live in list(self._tries()):
            self._advance(live, life.Lost(worker_id, reason), now)

    def on_batch(self, worker_id: str, batch: Batch) -> None:
        """One engine step of one worker."""
        now = self._clock()
        self.fleet.report(worker_id, batch.load, batch.heard, now)
        if batch.kv and self.caches.events(worker_id, batch.kv_seq, batch.kv, now):
            self._send(worker_id, KvAsk())
        step = Step()
        if batch.deltas:
            self.fleet.brought(worker_id, now)
        for delta in batch.deltas:
            live = self._by_wire.get(delta.request_id)
            if live is None:
                if delta.ticket is not None:
                    for effect in life.stray(worker_id, delta.ticket):
                        self._release(effect)
                continue
            live.progress_at = now
            self._on_delta(live, worker_id, delta, step)
        if step.deltas:
            self._sink.deliver(step.deltas, step.prompt_extras)
        self._pump(now, only_if_due=True)

    def held_up(self, seconds: float) -> None:
        """Our own process stood still for so long: what workers said meanwhile is still unread."""
        if seconds < HELD_UP_S:
            return
        now = self._clock()
        self.fleet.excuse(seconds, now)
        for live in self._tries():
            live.progress_at = min(now, live.progress_at + seconds)

    def tick(self) -> None:
        """Give up dead workers and stuck requests. Call it about once a second."""
        now = self._clock()
        self.fleet.listen(now)
        for worker_id, reason in self.fleet.dead(now):
            self.on_lost(worker_id, reason)
        self.fleet.reconsider(now)
        self.handoffs.known.retry(now)
        for worker_id in self.caches.overdue(now):
            self._send(worker_id, KvAsk())
        for live in list(self._tries()):
            self._lose_patience(live, now)
        self._pump(now)

    def _tries(self) -> Iterator[Live]:
        """All that run or wait: one a request, or two."""
        for live in self._live.values():
            yield live
            if live.rival is not None:
                yield live.rival

    # ------------------------------------------------------------ patience

    def _lose_patience(self, live: Live, now: float) -> None:
        """Ask another worker too, or no longer this one."""

        def place(rival: Live) -> Placement:
            prompt, avoid = self._prompt(rival, now), frozenset({slow or ""})
            return self._policy.place(prompt, list(self.fleet), avoid)

        slow = self.patience.slow(live, now)
        if stuck := self.patience.stuck(live, now):
            self._advance(live, stuck, now)
        # Nobody's turn is taken for a second try: who waits has not been served at all.
        elif slow and not self.door.queue and (rival := self.patience.second(live, slow, place)):
            self._begin(rival, now)

    def _race(self, live: Live, rival: Live, event: life.Event, now: float) -> None:
        """An event of one of two tries."""
        before = live.state
        raced = race.advance(before, rival.state, event)
        live.state, rival.state = raced.state, raced.rival
        if raced.left is not race.Left.BOTH:
            won, over = (live, rival) if raced.left is race.Left.THIS else (rival, live)
            self._end_race(won, over, event)
        if type(live.state) is not type(before):
            self.accounts.settle(live)
        for who, asked in ((live, raced.effects), (rival, raced.rival_effects)):
            for effect in asked:
                self._carry_out(who, effect, now)
        if raced.left is race.Left.THIS and isinstance(live.state, life.Ended):
            self._forget(live, live.state.outcome, now)

    def _end_race(self, won: Live, over: Live, event: life.Event) -> None:
        request_id = won.ask.request_id
        how = "second" if self._live[request_id] is over else "first"
        gone = isinstance(event, life.ClientGone | life.Enough)
        self.patience.hedges.ended["called_off" if gone else how] += 1
        won.rival = over.rival = None
        self.accounts.settle(over)
        self._forget_wires(over)
        self._live[request_id] = won
        if won.placement is not None:
            self.journal.won(request_id, won.placement, won.predicted_tokens)

    # ------------------------------------------------------------ the queue

    def _pump(self, now: float, *, only_if_due: bool = False) -> None:
        """Let in whoever there is room for, in their turn."""
        if not self.door.queue or self.door.busy or (only_if_due and not self.door.due(now)):
            return
        for entry, error in self.door.expired(now):
            self._refuse(self._live[entry.request_id], error, now)
        for request_id in self.door.turns(now):
            self._advance(self._live[request_id], life.Turn(), now)

    def _refuse(self, live: Live, error: RouterError, now: float) -> None:
        if live.entry is not None:
            self.door.refuse(live.entry, error, now)
        self._advance(live, life.Refused(error), now)

    def _prompt(self, live: Live, now: float) -> Prompt:
        if live.prompt is None or now - live.prompt_at > FORETOLD_S:
            ask = live.ask
            cached = self.caches.cached_tokens(*ask.identity)
            live.prompt, live.prompt_at = self.accounts.prompt(ask, cached), now
        return live.prompt

    # ------------------------------------------------------------ transitions

    def _on_delta(self, live: Live, worker_id: str, delta: Delta, step: Step) -> None:
        now = live.progress_at
        prefill = delta.request_id.endswith(PREFILL_SUFFIX)
        if delta.last_step:
            if self._reserve is Reserve.AT_LAST_STEP and not live.ask.only_one:
                self._advance(live, life.LastStep(), now)
            return
        match delta.finish:
            case Finish.ERROR | Finish.REFUSED | Finish.ABORT:
                reason = delta.error or f"it ended with {delta.finish}"
                refused = delta.finish is Finish.REFUSED
                self._advance(live, life.Failed(worker_id, reason, True, refused), now)
            case Finish.INVALID:
                reason = delta.error or ""
                self._advance(live, life.Failed(worker_id, reason, elsewhere=False), now)
            case finish if prefill:
                if finish is None or not isinstance(live.state, life.Prefilling):
                    return  # The decode worker was heard first, and said it all.
                live.prompt_extras = delta.extras
                live.cached_tokens = delta.cached_tokens
                self._judge(live, worker_id, delta)
                if delta.token_ids:
                    done = finish is Finish.PREFILLED
                    told = msgspec.structs.replace(
                        delta, finish=None if done else finish, extras=None
                    )
                    self._gather(live, worker_id, told, step)
                if finish is Finish.PREFILLED:
                    relayed = delta.token_ids[0] if delta.token_ids else None
                    self._advance(live, life.PrefillDone(delta.ticket, relayed), now)
                else:
                    self._advance(live, life.PrefillWasAll(), now)
            case _:
                self._on_tokens(live, worker_id, delta, step)

    def _on_tokens(self, live: Live, worker_id: str, delta: Delta, step: Step) -> None:
        now, ended = live.progress_at, delta.finish is not None
        said = delta.token_ids
        new = life.unsaid(live.state, said)
        if new is None:
            reason = f"{worker_id} did not go on from the first token"
            self._advance(live, life.Failed(worker_id, reason, elsewhere=True), now)
            return
        if new is not said:
            delta = msgspec.structs.replace(delta, token_ids=new)
        self._gather(live, worker_id, delta, step)
        self._advance(live, life.Tokens(len(said), ended), now)
        if live.ask.contents and not life.can_begin_anew(live.state):
            live.ask = self.door.emptied(live.ask)

    def _gather(self, live: Live, worker_id: str, delta: Delta, step: Step) -> None:
        request_id = live.ask.request_id
        if delta.cached_tokens is not None:
            self._judge(live, worker_id, delta)
            cached_tokens = nobody_computed(live.cached_tokens, delta)
            delta = msgspec.structs.replace(delta, cached_tokens=cached_tokens)
            if not live.output_tokens:  # A relayed token's worker and the decoding one both tell.
                self.door.demand.computed_tokens += len(live.ask.prompt_token_ids) - cached_tokens
            self.journal.pulled(request_id, delta)
            self.handoffs.came(live, worker_id, delta)
        if live.prompt_extras is not None:
            step.prompt_extras[request_id] = live.prompt_extras
            live.prompt_extras = None
        self.accounts.said(live, worker_id, delta)
        live.output_tokens += len(delta.token_ids)
        self.journal.tokens(request_id, len(delta.token_ids), live.progress_at)
        if delta.request_id != request_id:  # The wire's id has the try in it.
            delta = msgspec.structs.replace(delta, request_id=request_id)
        step.deltas.append(delta)

    def _judge(self, live: Live, worker_id: str, delta: Delta) -> None:
        """What the index said of this prompt, beside what the one who computed it says."""
        if worker_id != live.computes_on or delta.cached_tokens is None:
            return
        live.computes_on = ""  # Once.
        ask, now = live.ask, live.progress_at
        foretold = Foretold(live.predicted_tokens, *ask.identity)
        if self.caches.judge(worker_id, foretold, delta.cached_tokens, now):
            log.warning("prefix index not believed", extra={"worker": worker_id})
            self._send(worker_id, KvAsk())

    def _for_each(self, request_ids: Iterable[str], event: life.Event) -> None:
        now = self._clock()
        for request_id in request_ids:
            if live := self._live.get(request_id):
                self._advance(live, event, now)

    def _advance(self, live: Live, event: life.Event, now: float) -> None:
        if isinstance(live.state, life.Ended):
            return  # It was called off in the same breath.
        if live.rival is not None:
            self._race(live, live.rival, event, now)
            return
        before = live.state
        live.state, asked = life.advance(before, event)
        if type(live.state) is not type(before):
            self.accounts.settle(live)
        for effect in asked:
            self._carry_out(live, effect, now)
        if isinstance(live.state, life.Ended):
            self._forget(live, live.state.outcome, now)

    def _carry_out(self, live: Live, effect: effects.Effect, now: float) -> None:
        match effect:
            case effects.Deliver():
                pass  # Gathered by `_on_delta`: the sink is told once a batch.
            case effects.Place():
                if effect.after is not None:
                    live.ask, live.prompt = live.ask.after(effect.after), None
                self._place(live, effect, now)
            case effects.Enqueue():
                assert live.entry is not None, "it came by the queue"
                self._forget_wires(live)  # What a former try still says is nobody's now.
                self.door.enter_again(live.entry, now)
            case effects.SendPrefill(worker, ticket):
                self._generate(live, worker, Phase.PREFILL, ticket)
            case effects.SendDecode(worker, ticket):
                self._generate(live, worker, Phase.DECODE, ticket)
            case effects.SendBoth(worker):
                self._generate(live, worker, Phase.BOTH, None)
            case effects.AbortOn(worker):
                self._send(worker, Abort([live.wire_id, live.wire_id + PREFILL_SUFFIX]))
            case effects.ReleaseKV():
                self._release(effect)
            case effects.FailClient(error):
                self.journal.failed(live.ask.request_id, error)
                self._sink.fail(live.ask.request_id, error)

    def _place(self, live: Live, effect: effects.Place, now: float) -> None:
        ask, prompt = live.ask, self._prompt(live, now)
        avoid = frozenset({effect.avoid} if effect.avoid else ())
        try:
            placement = self._policy.place(prompt, self.door.free_for(ask.request_id), avoid)
        except NoCapacity:
            self._advance(live, life.NoRoom(), now)
            return
        except NoWorkers as error:
            self._advance(live, life.NotPlaced(error), now)
            return
        assert live.entry is not None, "it came by the queue"
        waited_s = now - live.entry.arrived_at
        late = self.door.late(ask, placement, waited_s)
        if late and effect.avoid is None and not live.output_tokens:
            self._refuse(live, late, now)
            return
        self.door.queue.grant(ask.request_id, now)
        self.patience.hedges.placed()
        live.placement = placement
        self._begin(live, now)

    def _begin(self, live: Live, now: float) -> None:
        ask, prompt, placement = live.ask, live.prompt, live.placement
        assert prompt is not None
        assert placement is not None
        live.computes_on = placement.prefill or placement.decode
        live.predicted_tokens = prompt.cached_tokens.get(live.computes_on, 0)
        live.kv_tokens_expected = prompt.tokens + prompt.output_tokens
        live.kv_tokens = live.kv_tokens_counted = 0
        live.progress_at = now
        self.journal.placed(ask.request_id, placement, live.predicted_tokens, now)
        self._advance(live, self._placed(live, placement), now)

    def _placed(self, live: Live, placement: Placement) -> life.Placed:
        assert isinstance(live.state, life.Placing)
        self._forget_wires(live)
        live.begin_try(live.state.tries.number)
        prefill = self.fleet.get(placement.prefill) if placement.prefill else None
        if prefill is None:
            return life.Placed(None, placement.decode)
        ticket = make_ticket(prefill.hello, self._make_handle())
        at_once = self._reserve is Reserve.AT_DISPATCH and not live.ask.only_one
        reserve = at_once and ticket is not None
        return life.Placed(prefill.id, placement.decode, ticket, reserve)

    def _generate(self, live: Live, worker: str, phase: Phase, ticket: bytes | None) -> None:
        wire_id = live.wire_id + (PREFILL_SUFFIX if phase is Phase.PREFILL else "")
        self._by_wire[wire_id] = live
        if view := self.fleet.get(worker):
            view.sent += 1
        self._send(worker, generate(live, wire_id, phase, ticket))

    def _forget_wires(self, live: Live) -> None:
        self._by_wire.pop(live.wire_id, None)
        self._by_wire.pop(live.wire_id + PREFILL_SUFFIX, None)

    def _release(self, effect: effects.Effect) -> None:
        assert isinstance(effect, effects.ReleaseKV)
        self._send(effect.worker, Release([effect.ticket]))

    def _forget(self, live: Live, outcome: life.Outcome, now: float) -> None:
        if self._live.pop(live.ask.request_id, None) is not None:
            self._forget_wires(live)
            self.door.queue.remove(live.ask.request_id, now)
            if outcome is life.Outcome.FINISHED:
                self.accounts.finished(live.output_tokens)
            self.door.judge(live.ask, self.journal.end(live.ask.request_id, outcome, now))


def _secret() -> str:
    return secrets.token_hex(HANDLE_BYTES)
