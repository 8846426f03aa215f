"""What all workers' prefix caches hold, and how far what they say comes true."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from router.core.belief import events_doubt, view_doubt
from router.core.blocks import links
from router.core.cache_view import CacheView
from router.core.prefix_index import PrefixIndex
from workers.api import KvSnapshot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.api import Batch, Item, KvEvent, WorkerHello

ASK_INTERVAL_S: Final = 5.0
"""At least, between two questions for all that one cache holds."""
JUDGED: Final = 64
"""Requests of a worker by which its index is judged."""
JUDGED_MIN: Final = 16
ERROR_SHARE_MAX: Final = 0.2
"""Of the prompt tokens of those: more, and the worker's index is not believed. Caches change
between a placement and a prefill, so a little error is no fault."""

HELD_MAX: Final = 16_000_000
"""Blocks over all workers, each counted where it is: 2.1 GB at 133 bytes (`CacheView`). A worker
whose news pass it is left out whole, until all that it may have fits again."""


@dataclass(frozen=True, slots=True)
class Foretold:
    """What the index said of a prompt when it was placed."""

    tokens: int
    token_ids: Sequence[int]
    salt: str | None = None
    lora: str | None = None
    items: tuple[Item, ...] = ()


@dataclass(slots=True)
class _Cache:
    view: CacheView
    blocks_total: int
    asked_at: float
    left_out: bool = False
    """There was no room for it."""
    judged: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=JUDGED))
    """Tokens that were predicted wrongly, and the prompt's."""


class Caches:
    """One view a worker, one index a block size. Whoever is told `True` sends `KvAsk`."""

    def __init__(self, held_max: int = HELD_MAX) -> None:
        self._held_max = held_max
        self._caches: dict[str, _Cache] = {}
        self._indexes: dict[int, PrefixIndex] = {}
        self.asked_again_total = 0
        self.disbelieved_total = 0
        self.left_out_total = 0
        self.predicted_tokens_total = 0
        self.actual_tokens_total = 0
        self.error_tokens_total = 0

    @property
    def blocks(self) -> int:
        """Distinct ones, over all indexes."""
        return sum(len(index) for index in self._indexes.values())

    @property
    def held(self) -> int:
        """Each counted in every cache that has it."""
        return sum(index.held for index in self._indexes.values())

    @property
    def overflowed_total(self) -> int:
        return sum(index.overflowed_total for index in self._indexes.values())

    @property
    def in_step(self) -> int:
        """Workers whose cache is known."""
        return sum(c.view.in_step for c in self._caches.values())

    def view(self, worker_id: str) -> CacheView | None:
        cache = self._caches.get(worker_id)
        return cache.view if cache else None

    def join(self, hello: WorkerHello, now: float) -> bool:
        self.leave(hello.worker_id)
        if not hello.tells_cache:
            return False
        index = self._indexes.setdefault(hello.block_tokens, PrefixIndex())
        view = CacheView(hello.worker_id, hello.block_tokens, index)
        self._caches[hello.worker_id] = _Cache(view, hello.blocks_total, asked_at=now)
        return True

    def leave(self, worker_id: str) -> None:
        if cache := self._caches.pop(worker_id, None):
            cache.view.forget()

    def events(self, worker_id: str, seq: int, events: Sequence[KvEvent], now: float) -> bool:
        cache = self._caches.get(worker_id)
        if cache is None or cache.left_out:
            return False
        return self._taken(cache, cache.view.events(seq, events), now)

    def snapshot(self, worker_id: str, news: KvSnapshot, now: float) -> bool:
        cache = self._caches.get(worker_id)
        if cache is None or cache.left_out:
            return False
        return self._taken(cache, cache.view.snapshot(news), now)

    def overdue(self, now: float) -> list[str]:
        """Workers to be asked now: still out of step long after they were asked last."""
        late = [
            c
            for c in self._caches.values()
            if not c.view.in_step and now - c.asked_at >= ASK_INTERVAL_S
        ]
        return [c.view.worker_id for c in late if self._fits(c) and self._again(c, now)]

    def cached_tokens(
        self,
        token_ids: Sequence[int],
        salt: str | None,
        lora: str | None,
        items: Sequence[Item] = (),
    ) -> dict[str, int]:
        """By worker, of the prompt's beginning; those without any are left out."""
        found: dict[str, int] = {}
        for block_tokens, index in self._indexes.items():
            if len(index):
                blocks = index.cached(links(token_ids, block_tokens, salt, lora, items))
                found |= {worker: count * block_tokens for worker, count in blocks.items()}
        return found

    def judge(self, worker_id: str, foretold: Foretold, actual: int, now: float) -> bool:
        """What was foretold of a prompt, and what came true.

        Of equal prompts that come at once, all but the first hit what none had when they were
        placed. That the worker has told of since: the index was early there, and not wrong.
        """
        self.predicted_tokens_total += foretold.tokens
        self.actual_tokens_total += actual
        self.error_tokens_total += abs(foretold.tokens - actual)
        cache = self._caches.get(worker_id)
        if cache is None or not cache.view.in_step:
            return False
        known = foretold.tokens
        if known < actual:
            of = foretold
            told = self.cached_tokens(of.token_ids, of.salt, of.lora, of.items)
            known = min(actual, max(known, told.get(worker_id, 0)))
        cache.judged.append((abs(known - actual), len(foretold.token_ids)))
        wrong, asked = map(sum, zip(*cache.judged, strict=True))
        if len(cache.judged) < JUDGED_MIN or wrong <= asked * ERROR_SHARE_MAX:
            return False
        self.disbelieved_total += 1
        cache.judged.clear()
        cache.view.forget()
        return self._again(cache, now)

    def doubt(self, worker_id: str, message: Batch | KvSnapshot) -> str | None:
        """Why what this worker says of its cache can't be true; None when it may be."""
        events = message.events if isinstance(message, KvSnapshot) else message.kv
        cache = self._caches.get(worker_id)
        if cache is None or not events:
            return None
        anew = isinstance(message, KvSnapshot) and message.part == 0
        held = 0 if anew else len(cache.view)
        return events_doubt(events) or view_doubt(held, events, cache.blocks_total)

    def _taken(self, cache: _Cache, in_order: bool, now: float) -> bool:
        if self.held > self._held_max:
            cache.view.forget()
            cache.left_out = True
            self.left_out_total += 1
            return False
        return not in_order and self._again(cache, now)

    def _fits(self, cache: _Cache) -> bool:
        """One that was left out may come back; else nothing is known against it."""
        if cache.left_out:
            cache.left_out = self.held + cache.blocks_total > self._held_max
        return not cache.left_out

    def _again(self, cache: _Cache, now: float) -> bool:
        """Whether to ask now; else `overdue` says when."""
        if now - cache.asked_at < ASK_INTERVAL_S:
            return False
        cache.asked_at = now
        self.asked_again_total += 1
        return True
