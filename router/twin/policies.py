"""What other routers do, as placement policies with their usual defaults.

Read in vllm-project/router (`src/policies/`, which came from sglang's `sgl-router`), 2026-11. With
prefill workers there they pick one of each pool, each pool by a policy of its own, and always
disaggregate; else one worker does both. They never make a request wait: engines queue.
"""

from __future__ import annotations

import random
from bisect import bisect
from typing import TYPE_CHECKING, Final, Protocol
from zlib import crc32

from xxhash import xxh3_64_intdigest

from router.core.compat import can_hand_off
from router.core.errors import NoWorkers
from router.core.placement import Placement
from router.twin.outcomes import name_of
from workers.api import Role

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from router.core.fleet import WorkerView
    from router.core.placement import Prompt
    from router.twin.traces import Request, Trace

VIRTUAL_NODES: Final = 160
"""`VIRTUAL_NODES_PER_WORKER` of its consistent hash."""
CACHE_THRESHOLD: Final = 0.3
BALANCE_ABS_THRESHOLD: Final = 64
BALANCE_REL_THRESHOLD: Final = 1.5
"""The command line's defaults, of vllm-router and of sglang's gateway."""


class Asked:
    """Which request a prompt is of: what other routers read off its text and headers."""

    def __init__(self, trace: Trace) -> None:
        self.block_tokens = trace.block_tokens
        self._by_tie = {crc32(name_of(n).encode()): r for n, r in enumerate(trace.requests)}

    def __call__(self, prompt: Prompt) -> Request:
        return self._by_tie[prompt.tie]


class Pick(Protocol):
    """One worker of a pool, which is never empty."""

    def __call__(self, prompt: Prompt, workers: Sequence[WorkerView]) -> WorkerView: ...


class Pools:
    """The policy of a router that has one `Pick` for prefill workers and one for the others."""

    def __init__(self, make: Callable[[str], Pick]) -> None:
        """`make` is told the pool's name."""
        self._prefill, self._decode = make("prefill"), make("decode")

    def place(
        self, prompt: Prompt, workers: Sequence[WorkerView], avoid: frozenset[str] = frozenset()
    ) -> Placement:
        for able in ([w for w in workers if w.id not in avoid] if avoid else (), workers):
            decoders = [w for w in able if w.generates]
            if not decoders:
                continue
            prefillers = [w for w in able if w.computes and w.hello.role is Role.PREFILL]
            if not prefillers:
                return Placement(None, self._decode(prompt, decoders).id, candidates=len(able))
            prefill = self._prefill(prompt, prefillers)
            fitting = [w for w in decoders if can_hand_off(sender=prefill.hello, receiver=w.hello)]
            decode = self._decode(prompt, fitting or decoders)
            return Placement(prefill.id if fitting else None, decode.id, candidates=len(able))
        raise NoWorkers("decode", known=len(workers))


def in_flight(w: WorkerView) -> int:
    """Requests there that have not ended: what these routers count as its load."""
    return max(w.load.running + w.load.waiting + len(w.unheard), len(w.promised))


class RoundRobin:
    """`round_robin.rs`."""

    def __init__(self) -> None:
        self._next = -1

    def __call__(self, prompt: Prompt, workers: Sequence[WorkerView]) -> WorkerView:
        self._next += 1
        return workers[self._next % len(workers)]


class PowerOfTwo:
    """`power_of_two.rs`: of two at random the one with fewer requests (Mitzenmacher, "The power of
    two choices in randomized load balancing", 2001)."""

    def __init__(self, seed: str) -> None:
        self._rng = random.Random(seed)

    def __call__(self, prompt: Prompt, workers: Sequence[WorkerView]) -> WorkerView:
        if len(workers) == 1:
            return workers[0]
        one, other = self._rng.sample(workers, 2)
        return one if in_flight(one) <= in_flight(other) else other


class SessionHash:
    """`consistent_hash.rs`: a ring with virtual nodes, by session."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._ids: list[str] = []
        self._ring: list[tuple[int, str]] = []

    def __call__(self, prompt: Prompt, workers: Sequence[WorkerView]) -> WorkerView:
        ids = [w.id for w in workers]
        if ids != self._ids:
            self._ids = ids
            self._ring = sorted(
                (xxh3_64_intdigest(f"{each}:{n}".encode()), each)
                for each in ids
                for n in range(VIRTUAL_NODES)
            )
        key = xxh3_64_intdigest(str(self._asked(prompt).session).encode())
        _, found = self._ring[bisect(self._ring, (key, "")) % len(self._ring)]
        return next(w for w in workers if w.id == found)


class PrefixTree:
    """`cache_aware.rs`: who was sent the longest beginning of this before, if that is more than
    `CACHE_THRESHOLD` of it; else who was sent the least in all. When the loads are apart by both
    thresholds, the least loaded. The tree is what was sent, and knows of no eviction; it forgets by
    itself only beyond `max_tree_size` (2^26 characters), which no run here reaches."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._sent: dict[int, dict[str, None]] = {}
        """By a beginning's hash: workers, the last one last."""
        self._tokens: dict[str, int] = {}

    def __call__(self, prompt: Prompt, workers: Sequence[WorkerView]) -> WorkerView:
        request = self._asked(prompt)
        chosen = self._choose(request, workers)
        self._insert(request, chosen.id)
        return chosen

    def _choose(self, request: Request, workers: Sequence[WorkerView]) -> WorkerView:
        loads = [in_flight(w) for w in workers]
        least, most = min(loads), max(loads)
        if most - least > BALANCE_ABS_THRESHOLD and most > least * BALANCE_REL_THRESHOLD:
            return workers[loads.index(least)]
        here = {w.id: w for w in workers}
        matched, holder, link = 0, None, 0
        for block in request.blocks:
            link = hash((link, block))
            holders = [each for each in self._sent.get(link, ()) if each in here]
            if not holders:
                break
            matched, holder = matched + self._asked.block_tokens, holders[-1]
        if holder is not None:
            share = min(matched, request.input_tokens) / request.input_tokens
            if share > CACHE_THRESHOLD:
                return here[holder]
        return min(workers, key=lambda w: self._tokens.get(w.id, 0))

    def _insert(self, request: Request, worker_id: str) -> None:
        link = 0
        for block in request.blocks:
            link = hash((link, block))
            holders = self._sent.setdefault(link, {})
            if holders.pop(worker_id, 0) == 0:
                tokens = self._tokens.get(worker_id, 0)
                self._tokens[worker_id] = tokens + self._asked.block_tokens
            holders[worker_id] = None


def peers(asked: Asked, seed: int) -> dict[str, Callable[[], Pools]]:
    """By name, each with what it is made by."""
    return {
        "round-robin": lambda: Pools(lambda _: RoundRobin()),
        "power-of-two": lambda: Pools(lambda pool: PowerOfTwo(f"{seed}/{pool}")),
        "session-hash": lambda: Pools(lambda _: SessionHash(asked)),
        "prefix-tree": lambda: Pools(lambda _: PrefixTree(asked)),
    }
