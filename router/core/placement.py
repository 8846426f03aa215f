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

    from router.core.columns import Bools, Columns, Floats, Integers
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
        self._columns = ColumnsKept()

    def place(
        self, prompt: Prompt, workers: Sequence[WorkerView], avoid: frozenset[str] = frozenset()
    ) -> Placement:
        columns = self._columns.of(workers)
        every = np.ones(len(columns.workers), np.bool_)
        others = np.array([w.id not in avoid for w in workers], np.bool_) if avoid else every
        for able in (others, every):
            if (able & columns.generates).any():
                return self._choose(prompt, columns, able)
        raise NoWorkers("decode", known=len(workers))

    def _choose(self, prompt: Prompt, columns: Columns, able: Bools) -> Placement:
        idle = columns.queue_s <= self._prefill_s
        roomy, computes = _with_room(prompt, columns, able), able & columns.computes
        senders = computes & idle
        cached = columns.cached_tokens(prompt.cached_tokens)
        sending_s = estimate.senders_s(prompt, columns, cached)
        receiving_s = estimate.receivers_s(prompt, columns)
        # As if nothing of the transfer were hidden: who has it cached is worth looking at.
        unread_s = (prompt.tokens - cached) * columns.pull_token_s
        reading_s = receiving_s + columns.step_s + unread_s
        options = _pairs(prompt, columns, (senders, sending_s), (roomy, reading_s))
        if not self._always:
            options += _single(prompt, columns, roomy & idle, sending_s + receiving_s)
        elif not options and (senders == computes).all():  # There is no pair at all.
            options = _single(prompt, columns, roomy, sending_s + receiving_s)
        if not options:
            raise NoCapacity(tokens=prompt.tokens)
        made, prefill, decode = min(options, key=lambda option: _order(prompt, option))
        looked_at = int(senders.sum() + roomy.sum())
        return Placement(prefill.id if prefill else None, decode.id, made, looked_at)


def _with_room(prompt: Prompt, columns: Columns, able: Bools) -> Bools:
    """Who generates and has KV blocks for all of it. Raises `NoCapacity`.

    What is too large for each of them even when empty goes to any: it says so to the client.
    """
    generates: Bools = able & columns.generates
    most = np.minimum(float(prompt.tokens + prompt.output_tokens), columns.max_model_len)
    roomy: Bools = generates & (columns.tokens_left >= most)
    if roomy.any():
        return roomy
    if (generates & (columns.tokens_total >= most)).any():
        raise NoCapacity(tokens=int(most[generates].min()))
    return generates


_Half = tuple["Bools", "Floats"]
"""Who may, and what it costs of each."""


def _pairs(prompt: Prompt, columns: Columns, senders: _Half, receivers: _Half) -> list[_Option]:
    """The two halves hang together by the transfer alone, so the best few of each suffice."""
    if not senders[0].any():
        return []
    sending = _cheapest(prompt, columns, *senders)
    receiving = _cheapest(prompt, columns, *receivers)
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


def _single(prompt: Prompt, columns: Columns, able: Bools, cost_s: Floats) -> list[_Option]:
    """The best of those that do it all; none where none may."""
    slots = np.flatnonzero(able)
    if not len(slots):
        return []
    w = columns.workers[slots[_keys(prompt, columns, slots, cost_s).argmin()]]
    made = estimate.together(estimate.prefill(prompt, w), estimate.decode(prompt, w))
    return [(made, None, w)]


def _cheapest(
    prompt: Prompt, columns: Columns, able: Bools, cost_s: Floats
) -> list[list[WorkerView]]:
    """`KEPT` of each family."""
    found, slots = [], np.flatnonzero(able)
    families = columns.family[slots]
    while len(slots):
        one = families == families[0]
        some, slots, families = slots[one], slots[~one], families[~one]
        keys = _keys(prompt, columns, some, cost_s)
        if len(some) > KEPT:
            least = np.argpartition(keys, KEPT)[:KEPT]
            some, keys = some[least], keys[least]
        found.append([columns.workers[slot] for slot in some[keys.argsort()]])
    return found


def _keys(prompt: Prompt, columns: Columns, slots: Integers, cost_s: Floats) -> Integers:
    """They sort as costs do, in `GRAIN_S`, and equals in an order of the request's own."""
    grains = np.minimum(np.rint(cost_s[slots] / GRAIN_S), 2.0**30).astype(np.int64)
    keys: Integers = grains << 32 | mixed(prompt.tie, columns.tie[slots])
    return keys


def _order(prompt: Prompt, option: _Option) -> tuple[int, int]:
    """Replays agree, and equal requests do not all go to one worker."""
    made, prefill, decode = option
    tie = prompt.tie if prefill is None else mixed(prompt.tie, prefill.tie)
    return round(made.total_s / GRAIN_S), mixed(tie, decode.tie)
