"""Which workers take a request: a pure function of the fleet's view."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from heapq import nsmallest
from math import inf
from operator import itemgetter
from typing import TYPE_CHECKING, Final, Protocol

from router.core import estimate
from router.core.compat import can_hand_off
from router.core.errors import NoCapacity, NoWorkers
from router.core.estimate import GRAIN_S, Estimate, costed, mixed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from router.core.estimate import Costed
    from router.core.fleet import WorkerView

KEPT: Final = 4
"""Cheapest workers of a family for each half, of which all pairs are then compared."""


class Disaggregate(StrEnum):
    """When the prompt is computed on another worker than the one that generates."""

    BY_ESTIMATE = "by_estimate"
    """Where that costs fewer seconds in all."""
    ALWAYS = "always"
    """Wherever there are two workers for it."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What placement needs to know of a request."""

    tokens: int
    output_tokens_max: int
    cached_tokens: Mapping[str, int] = field(default_factory=dict)
    """By worker id: leading tokens that its prefix cache holds; none for those left out."""
    output_tokens_expected: int | None = None
    """What such a request may be expected to generate; None: all that it may."""
    tie: int = 0
    """Of the request: equal workers are taken in another order by each."""

    @property
    def output_tokens(self) -> int:
        """Expected, and no more than it may."""
        expected = self.output_tokens_expected
        return self.output_tokens_max if expected is None else min(expected, self.output_tokens_max)

    def uncached(self, worker_id: str) -> int:
        return self.tokens - self.cached_tokens.get(worker_id, 0)

    def kv_tokens(self, worker: WorkerView) -> int:
        """That the worker keeps at its end, as far as is expected."""
        return min(self.tokens + self.output_tokens, worker.hello.max_model_len)


@dataclass(frozen=True, slots=True)
class Placement:
    """`prefill` is None when one worker does both."""

    prefill: str | None
    decode: str
    estimate: Estimate | None = None
    """None of a policy that makes none."""
    candidates: int = 0
    """Workers that were looked at for either half."""


class Policy(Protocol):
    """Chooses workers: ours, or what the twin compares it with."""

    def place(
        self, prompt: Prompt, workers: Sequence[WorkerView], avoid: frozenset[str] = frozenset()
    ) -> Placement:
        """Workers in `avoid` (a former try failed there) are taken only when there is no other.

        Raises `NoWorkers` when nobody can generate, `NoCapacity` when nobody has room now.
        """


_Option = tuple[Estimate, "WorkerView | None", "WorkerView"]


def place(
    prompt: Prompt, workers: Sequence[WorkerView], avoid: frozenset[str] = frozenset()
) -> Placement:
    """As `EstimatePolicy` does by default."""
    return EstimatePolicy().place(prompt, workers, avoid)


class EstimatePolicy:
    """The fewest seconds in all: the request's own, and those that others lose by it."""

    def __init__(
        self, disaggregate: Disaggregate = Disaggregate.BY_ESTIMATE, prefill_s: float = inf
    ) -> None:
        """`prefill_s`: a worker with more seconds of prompts queued takes none."""
        self._always = disaggregate is Disaggregate.ALWAYS
        self._prefill_s = prefill_s

    def place(
        self, prompt: Prompt, workers: Sequence[WorkerView], avoid: frozenset[str] = frozenset()
    ) -> Placement:
        for candidates in ([w for w in workers if w.id not in avoid] if avoid else (), workers):
            if any(w.generates for w in candidates):
                return self._choose(prompt, candidates)
        raise NoWorkers("decode", known=len(workers))

    def _choose(self, prompt: Prompt, workers: Sequence[WorkerView]) -> Placement:
        roomy, most_s = _with_room(prompt, workers), self._prefill_s
        receivers = estimate.receivers(prompt, roomy)
        able = [w for w in workers if w.computes]
        senders = estimate.senders(prompt, [w for w in able if w.queue_s <= most_s])
        options = _pairs(prompt, senders, receivers)
        if not self._always:
            options += _singles(prompt, [r for r in receivers if r[1].queue_s <= most_s])
        elif not options and len(senders) == len(able):  # None is busy: there is no pair at all.
            options = _singles(prompt, receivers)
        if not options:
            raise NoCapacity(tokens=prompt.tokens)
        made, prefill, decode = min(options, key=lambda option: _order(prompt, option))
        looked_at = len(senders) + len(receivers)
        return Placement(prefill.id if prefill else None, decode.id, made, looked_at)


def _with_room(prompt: Prompt, workers: Sequence[WorkerView]) -> list[WorkerView]:
    """Who generates and has KV blocks for all of it. Raises `NoCapacity`.

    What is too large for each of them even when empty goes to any: it says so to the client.
    """
    able = [w for w in workers if w.generates]
    most = prompt.tokens + prompt.output_tokens
    roomy = [w for w in able if w.tokens_left >= most or w.tokens_left >= prompt.kv_tokens(w)]
    if roomy:
        return roomy
    if any(w.tokens_total >= prompt.kv_tokens(w) for w in able):
        raise NoCapacity(tokens=prompt.kv_tokens(able[0]))
    return able


def _pairs(
    prompt: Prompt, senders: list[Costed], receivers: list[tuple[float, WorkerView]]
) -> list[_Option]:
    """The two halves hang together by the transfer alone, so the best few of each suffice."""
    if not senders:
        return []
    total, cached = prompt.tokens, prompt.cached_tokens
    # As if nothing of the transfer were hidden: who has it cached is worth looking at.
    reading = [
        costed(prompt, w, s + w.step_s + (total - cached.get(w.id, 0)) * w.pull_token_s)
        for s, w in receivers
    ]
    sending, receiving = _cheapest(senders), _cheapest(reading)
    generating = {w.id: estimate.decode(prompt, w) for some in receiving for w in some}
    return [
        (estimate.apart(prompt, (p, computing), (d, generating[d.id])), p, d)
        for some in sending
        for p in some
        for computing in (estimate.prefill(prompt, p),)
        for others in receiving
        if can_hand_off(sender=p.hello, receiver=others[0].hello)
        for d in others
        if p is not d
    ]


def _singles(prompt: Prompt, receivers: list[tuple[float, WorkerView]]) -> list[_Option]:
    """Of each worker, but for those whose decoding alone costs more than another's all."""
    options: list[_Option] = []
    best_s = inf
    for cost_s, w in sorted(receivers, key=itemgetter(0)):
        if cost_s > best_s + GRAIN_S:
            break
        if cost_s + w.queue_s <= best_s + GRAIN_S:
            made = estimate.together(estimate.prefill(prompt, w), estimate.decode(prompt, w))
            best_s = min(best_s, made.total_s)
            options.append((made, None, w))
    return options


def _cheapest(workers: list[Costed]) -> list[list[WorkerView]]:
    """`KEPT` of each family."""
    families: dict[str, list[Costed]] = {}
    for each in workers:
        families.setdefault(each[3].family, []).append(each)
    return [[each[3] for each in nsmallest(KEPT, some)] for some in families.values()]


def _order(prompt: Prompt, option: _Option) -> tuple[int, int]:
    """Replays agree, and equal requests do not all go to one worker."""
    made, prefill, decode = option
    tie = prompt.tie if prefill is None else mixed(prompt.tie, prefill.tie)
    return round(made.total_s / GRAIN_S), mixed(tie, decode.tie)
