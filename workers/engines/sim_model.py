"""The simulated engine's scheduler: vLLM's shape (chunks, batches, preemption) and no arithmetic.

Pure: it receives `now`. A step is `begin` (what runs, and how long it takes) and `finish` (what
came out); requests may come and go between the two.
"""

from __future__ import annotations

import heapq
import zlib
from math import inf
from typing import TYPE_CHECKING, Final

from workers.api import Delta, Finish, Generate, Load, Phase
from workers.engines.base import Removed
from workers.engines.sim_blocks import BlockPool
from workers.engines.sim_handoff import PULL_NAP_S, Awaited, Keeper, Pull, release, source_of
from workers.engines.sim_requests import Run, run_of, stored
from workers.engines.sim_steps import lasting_s, step_of, steps_within

if TYPE_CHECKING:
    from collections.abc import Iterable

    from workers.api import Step
    from workers.engines.base import CacheChange
    from workers.engines.sim_blocks import Handoffs
    from workers.engines.sim_settings import SimSettings

FIRST_TOKEN: Final = 100
"""Ids below are special tokens in most vocabularies."""


class SimModel:
    """All requests of one simulated engine."""

    def __init__(self, settings: SimSettings, epoch: str, handoffs: Handoffs) -> None:
        self.settings = settings
        self._epoch = epoch
        self._handoffs = handoffs
        self._pool = BlockPool(settings.blocks_total)
        self.requests: dict[str, Run] = {}
        self._waiting: list[tuple[int, int, str]] = []
        self._running: dict[str, Run] = {}
        self._plan: list[tuple[Run, int]] = []
        self._keeper = Keeper(epoch, handoffs)
        self._rejected: list[Delta] = []
        self._changes: list[CacheChange] = []
        self._arrivals = 0
        self._steps = 0
        self._budget = 0
        self._preempted = False
        self._alike = 1
        self._step: Step | None = None  # The last one; and the one under way, None for a nap.
        self.begun: Step | None = None

    # ------------------------------------------------------------ in

    @property
    def busy(self) -> bool:
        return bool(self.requests or self._rejected)

    def submit(self, generate: Generate) -> None:
        """Queue it; what is wrong with it comes out of the next step."""
        run = run_of(generate, self._arrivals + 1, self.settings)
        if isinstance(run, str):
            self._rejected.append(Delta(generate.request_id, [], Finish.INVALID, error=run))
            return
        self._arrivals += 1
        run.handle = self._keeper.expect(generate)
        self.requests[generate.request_id] = run
        heapq.heappush(self._waiting, (*run.order, generate.request_id))

    def abort(self, request_ids: Iterable[str]) -> None:
        gone = list(request_ids)
        self._rejected = [d for d in self._rejected if d.request_id not in gone]
        for request_id in gone:
            if run := self.requests.pop(request_id, None):
                self._running.pop(request_id, None)
                self._free(run)
                self._keeper.cancel(run.handle, "the prefill was aborted")
                if run.pull is not None:
                    run.pull.source.abandon()

    def release(self, tickets: Iterable[bytes], now: float) -> None:
        for content in tickets:
            release(content, self._handoffs, now)

    # ------------------------------------------------------------ a step

    def begin(self, now: float, alike_s: float = 0.0) -> float:
        """Choose what runs; seconds until `finish` is due.

        `alike_s`: steps that bring nothing but one token more to each sequence may be done at once,
        as many as end within so many seconds. Then whoever drives it says so (`cut`) when something
        comes in, or a prompt is done that is `awaited` here.
        """
        self._expire(now)
        self._end_pulls(now)
        self._plan_running()
        self._admit(now)
        step = self.begun = step_of(self._plan, self.settings, self._steps)
        self._alike = 1
        if self.settings.instant:
            return 0.0
        pulls = [r.pull for r in self._running.values() if r.pull is not None]
        if step is not None:
            over_s = min((p.ready_at - now for p in pulls if p.ready_at is not None), default=inf)
            if min(alike_s, over_s) > step.seconds and self._steady:
                self._alike = self._count_alike(step, min(alike_s, over_s))
            return lasting_s(step, self._alike, self.settings)
        nap_s = min((p.look_again_s(now, alike_s) for p in pulls), default=PULL_NAP_S)
        return max(0.0, nap_s) if self.requests else 0.0

    def cut(self, elapsed_s: float) -> float:
        """Something came in: no more steps at once than have begun. Seconds from `begin` on."""
        if self.begun is None:
            return elapsed_s
        if self._alike > 1:
            done = steps_within(self.begun, elapsed_s, self.settings)
            self._alike = min(self._alike, done + 1)
        return lasting_s(self.begun, self._alike, self.settings)

    def finish(self, now: float) -> list[Delta]:
        """End the step that `begin` chose. Requests aborted or preempted since bring nothing."""
        self._steps += self._alike
        self._step = self.begun
        deltas, self._rejected = self._rejected, []
        for run, chunk in self._plan:
            if self._running.get(run.generate.request_id) is not run:
                continue
            if run.next_generates:
                run.computed += self._alike
                deltas.append(self._generated(run, self._alike))
                continue
            run.computed += chunk
            if run.outputs == 0:
                self._publish(run)
            if run.computed == run.length:
                deltas.append(self._answer(run, now))
            elif run.handle and run.length - run.computed <= self.settings.chunk_tokens:
                if not run.told:
                    deltas.append(Delta(run.generate.request_id, [], last_step=True))
                run.told = True
        self._plan = []
        return deltas

    def load(self, now: float) -> Load:
        self._expire(now)
        queued = sum(r.length - r.computed for r in self.requests.values() if r.computes)
        return Load(
            self._steps, self.busy, len(self._running), len(self.requests) - len(self._running),
            queued, self._pool.free, self._pool.total, len(self._keeper), step=self._step,
        )  # fmt: skip

    # ------------------------------------------------------------ admission, growth, preemption

    def _plan_running(self) -> None:
        """As in vLLM, those that run come first."""
        self._plan = []
        self._budget = self.settings.chunk_tokens
        self._preempted = False
        for run in list(self._running.values()):
            if run.pull is not None or run.generate.request_id not in self._running:
                continue
            chunk = min(run.length - run.computed, self._budget)
            if chunk and self._grow(run, run.computed + chunk):
                self._budget -= chunk
                self._plan.append((run, chunk))

    def _admit(self, now: float) -> None:
        """As in vLLM, with what tokens are left of the step, and none where one had to go.

        So of two prompts that begin alike the later finds what the earlier left in the cache.
        """
        while self._waiting and len(self._running) < self.settings.running_max:
            if not self._budget or self._preempted:
                return
            request_id = self._waiting[0][2]
            run = self.requests.get(request_id)
            if run is not None and request_id not in self._running:
                if not self._enter(run, now):
                    return
                if run.pull is None:
                    chunk = min(run.length - run.computed, self._budget)
                    self._budget -= chunk
                    self._plan.append((run, chunk))
            heapq.heappop(self._waiting)  # Entered, or aborted meanwhile.

    @property
    def _steady(self) -> bool:
        """All that runs generates; what waits, can't be let in before something ends."""
        return not self._rejected and all(run.next_generates for run, _ in self._plan)

    @property
    def awaits(self) -> bool:
        """Prompts that are computed elsewhere."""
        return any(r.pull is not None and r.pull.ready_at is None for r in self._running.values())

    def _count_alike(self, step: Step, seconds: float) -> int:
        """Steps like this one: none ends a request but the last, and no one's blocks are needed."""
        count = min(run.output_max - run.outputs for run, _ in self._plan)
        count = min(count, steps_within(step, seconds, self.settings))
        needed = sum(
            self._blocks(run.computed + count) - len(run.shared) - run.fresh
            for run, _ in self._plan
        )
        if count <= 1 or needed > self._pool.free:
            return 1
        for run, _ in self._plan:
            self._grow(run, run.computed + count)
        return count

    def _enter(self, run: Run, now: float) -> bool:
        # As in vLLM, at least one token is always computed: there is no output without.
        size = self.settings.block_tokens
        usable = run.hashes[: (run.length - 1) // size]
        hit = self._pool.cached(usable)
        fresh = self._blocks(run.length) - hit
        if not self._pool.take(run.hashes[:hit], fresh):
            return False
        run.shared, run.fresh, run.computed = run.hashes[:hit], fresh, hit * size
        if run.cached is None:
            run.cached = run.computed
            self._begin_pull(run, now)
        self._running[run.generate.request_id] = run
        return True

    def _grow(self, run: Run, tokens: int) -> bool:
        """Room for the KV of so many tokens, taken from later requests if need be."""
        while (more := self._blocks(tokens) - len(run.shared) - run.fresh) > 0:
            if self._pool.take((), more):
                run.fresh += more
                return True
            # As in vLLM, one whose KV is still arriving is spared: its lease would be nobody's.
            arrived = [r for r in self._running.values() if r.pull is None]
            victim = max(arrived, key=lambda r: r.order)
            self._preempt(victim)
            if victim is run:
                return False
        return True

    def _preempt(self, run: Run) -> None:
        self._preempted = True
        self._plan = [(r, n) for r, n in self._plan if r is not run]
        self._free(run)
        run.computed = 0
        request_id = run.generate.request_id
        del self._running[request_id]
        heapq.heappush(self._waiting, (*run.order, request_id))

    def _free(self, run: Run) -> None:
        self._pool.give_back(run.shared, run.fresh)
        run.shared, run.fresh = [], 0

    def _publish(self, run: Run) -> None:
        """Let others find the prompt's blocks that are full now."""
        size, first = self.settings.block_tokens, len(run.shared)
        full = min(run.computed // size, len(run.hashes))
        for block in run.hashes[first:full]:
            if not self._pool.publish(block):
                break  # Its like is there already: this one and what follows stay unshared.
            run.fresh -= 1
            run.shared.append(block)
        if run.shared[first:]:
            self._note_evicted()
            self._changes.append(stored(run, first, size))

    def _note_evicted(self) -> None:
        """Before anything that is stored after it: a block may come back."""
        if gone := self._pool.evicted:
            self._changes.append(Removed(list(gone)))
            gone.clear()

    def cache_changes(self) -> list[CacheChange]:
        """Of the prefix cache since the last call, in order."""
        self._note_evicted()
        changes, self._changes = self._changes, []
        return changes

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.settings.block_tokens)

    # ------------------------------------------------------------ handoff

    def _begin_pull(self, run: Run, now: float) -> None:
        generate = run.generate
        if generate.phase is not Phase.DECODE or generate.ticket is None:
            return
        me = f"{self._epoch}/{generate.request_id}".encode()
        source = source_of(generate.ticket, self._handoffs, (run.length, run.checksum), me)
        if source is None:
            run.pull_error = "the ticket is not readable"
        else:
            run.pull = Pull(source)
            self._look(run, run.pull, now)

    def _look(self, run: Run, pull: Pull, now: float) -> None:
        """Whether its prompt is there to be read now."""
        s = self.settings
        try:
            run.pull_error = pull.source.look(now)
        except Awaited:
            pull.early = True
            return
        if run.pull_error is not None:
            run.pull = None
            return
        tokens = run.fresh * s.block_tokens
        left = min(tokens, s.chunk_tokens) if pull.early else tokens
        seconds = s.pull_latency_s + left * s.token_bytes / s.pull_bytes_per_s
        pull.seconds = 0.0 if s.instant else seconds
        pull.ready_at = now + pull.seconds

    def _end_pulls(self, now: float) -> None:
        for run in self._running.values():
            pull = run.pull
            if pull is not None and pull.ready_at is None:
                self._look(run, pull, now)
            if pull is None or pull.ready_at is None or pull.ready_at > now:
                continue
            run.pull = None
            # Only a lease that outlived the read vouches for what was read.
            run.pull_error = pull.source.let_go(now)
            if run.pull_error is None:
                size = run.fresh * self.settings.block_tokens * self.settings.token_bytes
                run.pulled = run.length - run.computed, size, pull.seconds
                run.computed = run.length - 1
                self._publish(run)

    def _keep(self, run: Run, now: float) -> bytes | None:
        """Move the request's blocks under a lease; its ticket, unless the router made one."""
        handle, prompt = run.handle, (run.length, run.checksum)
        if run.generate.ticket is not None and handle is None:
            return None  # Whoever wanted it has left.
        blocks = run.shared, run.fresh
        if handle is None and self.settings.instant:
            return self._keeper.make_ticket(run.generate.request_id, prompt, None, now)
        run.shared, run.fresh = [], 0
        if handle is not None:
            self._keeper.seal(handle, prompt, blocks, now)
            return None
        own = f"{run.generate.request_id}#{run.arrived}"
        return self._keeper.make_ticket(own, prompt, blocks, now)

    def _expire(self, now: float) -> None:
        for blocks in self._keeper.over(now):
            self._pool.give_back(*blocks)

    # ------------------------------------------------------------ out

    def _answer(self, run: Run, now: float) -> Delta:
        """The prompt is computed, or computed again."""
        if run.generate.phase is Phase.PREFILL:
            return self._prefilled(run, now)
        first = run.outputs == 0
        delta = self._generated(run, 1)
        if not first:
            return delta
        tokens, size, seconds = run.pulled
        return Delta(
            delta.request_id, delta.token_ids, delta.finish, cached_tokens=run.cached,
            kv_tokens=tokens, kv_bytes=size, kv_s=seconds, kv_failed=run.pull_error,
        )  # fmt: skip

    def _generated(self, run: Run, count: int) -> Delta:
        tokens = [self._sample(run)] * count  # Of several at once nobody reads the text.
        run.outputs += count
        run.length += count
        done = run.outputs >= run.output_max
        if done:
            self._end(run)
        return Delta(run.generate.request_id, tokens, Finish.LENGTH if done else None)

    def _prefilled(self, run: Run, now: float) -> Delta:
        request_id, relay = run.generate.request_id, run.generate.relay
        if relay and run.output_max == 1:  # Nothing is left to hand off.
            self._keeper.cancel(run.handle, "its first token was its last")
            finish, ticket = Finish.LENGTH, None
        else:
            finish, ticket = Finish.PREFILLED, self._keep(run, now)
        tokens = [self._sample(run)] if relay else []
        self._end(run)
        return Delta(request_id, tokens, finish, ticket=ticket, cached_tokens=run.cached)

    def _sample(self, run: Run) -> int:
        """A function of all tokens so far: whoever goes on from here says the same."""
        content = self.settings.vocabulary - FIRST_TOKEN
        token = FIRST_TOKEN + (run.checksum * 2_654_435_761 >> 7) % content
        run.checksum = zlib.crc32(token.to_bytes(4, "little"), run.checksum)
        return token

    def _end(self, run: Run) -> None:
        for known in (self.requests, self._running):
            del known[run.generate.request_id]
        self._free(run)
