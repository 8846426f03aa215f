"""Which workers take a request: a pure function of the fleet's view."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from math import inf
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from router.core import estimate
from router.core.columns import ColumnsKept
from router.core.compat import can_hand_off
from router.core.errors import NoCapacity, NoWorkers
from router.core.estimate import GRAIN_S, Estimate, mixed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from router.core.columns import Columns, Floats, Integers
    from router.core.fleet import WorkerView

KEPT: Final = 4
"""Workers for each half of which all pairs are compared; of more, the cheapest of each family."""


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
        self._columns = ColumnsKept()

    def place(
        self, prompt: Prompt, workers: Sequence[WorkerView], avoid: frozenset[str] = frozenset()
    ) -> Placement:
        for able in ([w for w in workers if w.id not in avoid] if avoid else (), workers):
            if any(w.generates for w in able):
                return self._choose(prompt, able, workers)
        raise NoWorkers("decode", known=len(workers))

    def _choose(
        self, prompt: Prompt, able: Sequence[WorkerView], workers: Sequence[WorkerView]
    ) -> Placement:
        """`workers`: all that are asked about, from call to call mostly the same."""
        computing, roomy = [w for w in able if w.computes], _with_room(prompt, able)
        idle = [w for w in computing if w.queue_s <= self._prefill_s]
        looked_at = len(idle) + len(roomy)
        alone = [w for w in roomy if w.queue_s <= self._prefill_s]
        senders, receivers = idle, roomy
        if max(len(idle), len(roomy)) > KEPT:
            few = _Cheapest(prompt, self._columns.of(workers))
            senders, receivers, alone = few.senders(idle), few.receivers(roomy), few.alone(alone)
        options = _pairs(prompt, senders, receivers)
        if not self._always:
            options += _singles(prompt, alone)
        elif not options and idle == computing:  # There is no pair at all.
            options = _singles(prompt, receivers)
        if not options:
            raise NoCapacity(tokens=prompt.tokens)
        made, prefill, decode = min(options, key=lambda option: _order(prompt, option))
        return Placement(prefill.id if prefill else None, decode.id, made, looked_at)


def _with_room(prompt: Prompt, workers: Sequence[WorkerView]) -> list[WorkerView]:
    """Workers that generate, with blocks for all of it and a free sequence. Raises `NoCapacity`.

    What is too large for each of them even when empty goes to any: it says so to the client.
    """
    able, most = [w for w in workers if w.generates], prompt.tokens + prompt.output_tokens
    roomy = [
        w
        for w in able
        if w.sequences_left > 0 and (w.tokens_left >= most or w.tokens_left >= prompt.kv_tokens(w))
    ]
    if roomy:
        return roomy
    if any(w.tokens_total >= prompt.kv_tokens(w) for w in able):
        raise NoCapacity(tokens=prompt.kv_tokens(able[0]))
    return able


def _pairs(
    prompt: Prompt, senders: Sequence[WorkerView], receivers: Sequence[WorkerView]
) -> list[_Option]:
    if not senders:
        return []
    generating = [(d, estimate.decode(prompt, d)) for d in receivers]
    return [
        (estimate.apart(prompt, (p, computing), receiver), p, receiver[0])
        for p in senders
        for computing in (estimate.prefill(prompt, p),)
        for receiver in generating
        if p is not receiver[0]
        and p.id not in receiver[0].unreadable
        and can_hand_off(sender=p.hello, receiver=receiver[0].hello)
    ]


def _singles(prompt: Prompt, workers: Sequence[WorkerView]) -> list[_Option]:
    return [
        (estimate.together(estimate.prefill(prompt, w), estimate.decode(prompt, w)), None, w)
        for w in workers
    ]


class _Cheapest:
    """`KEPT` of each family, of hundreds: the two halves hang together by the transfer alone, so
    the best few of each suffice."""

    def __init__(self, prompt: Prompt, columns: Columns) -> None:
        self._prompt, self._columns = prompt, columns
        self._cached = columns.cached_tokens(prompt.cached_tokens)
        self._sending_s = estimate.senders_s(prompt, columns, self._cached)
        self._receiving_s = estimate.receivers_s(prompt, columns)

    def senders(self, workers: list[WorkerView]) -> list[WorkerView]:
        return self._of(workers, self._sending_s)

    def receivers(self, workers: list[WorkerView]) -> list[WorkerView]:
        """As if nothing of the transfer were hidden: who has it cached is worth looking at."""
        columns = self._columns
        unread_s = (self._prompt.tokens - self._cached) * columns.pull_token_s
        return self._of(workers, self._receiving_s + columns.step_s + unread_s)

    def alone(self, workers: list[WorkerView]) -> list[WorkerView]:
        return self._of(workers, self._sending_s + self._receiving_s)

    def _of(self, workers: list[WorkerView], cost_s: Floats) -> list[WorkerView]:
        found: list[WorkerView] = []
        slots = self._columns.slots(workers)
        families = self._columns.family[slots]
        while len(slots):
            one = families == families[0]
            some, slots, families = slots[one], slots[~one], families[~one]
            if len(some) > KEPT:
                some = some[np.argpartition(self._keys(some, cost_s), KEPT)[:KEPT]]
            found += [self._columns.workers[slot] for slot in some]
        return found

    def _keys(self, slots: Integers, cost_s: Floats) -> Integers:
        """They sort as costs do, in `GRAIN_S`, and equals in an order of the request's own."""
        grains = np.minimum(np.rint(cost_s[slots] / GRAIN_S), 2.0**30).astype(np.int64)
        keys: Integers = grains << 32 | mixed(self._prompt.tie, self._columns.tie[slots])
        return keys


def _order(prompt: Prompt, option: _Option) -> tuple[int, int]:
    """Replays agree, and equal requests do not all go to one worker."""
    made, prefill, decode = option
    tie = prompt.tie if prefill is None else mixed(prompt.tie, prefill.tie)
    return round(made.total_s / GRAIN_S), mixed(tie, decode.tie)
