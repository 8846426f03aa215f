"""Which workers take a request: a pure function of the fleet's view."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from router.core.compat import can_hand_off
from router.core.errors import NoWorkers
from workers.api import Phase

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from router.core.fleet import WorkerView


@dataclass(frozen=True, slots=True)
class Prompt:
    """What placement needs to know of a request."""

    tokens: int
    output_tokens_max: int
    cached_tokens: Mapping[str, int] = field(default_factory=dict)
    """By worker id: leading tokens that its prefix cache holds; none for those left out."""

    def uncached(self, worker_id: str) -> int:
        return self.tokens - self.cached_tokens.get(worker_id, 0)


@dataclass(frozen=True, slots=True)
class Placement:
    """`prefill` is None when one worker does both."""

    prefill: str | None
    decode: str


def place(
    prompt: Prompt, workers: Sequence[WorkerView], avoid: frozenset[str] = frozenset()
) -> Placement:
    """Choose the prefill worker with the fewest tokens to compute until this prompt's last, and a
    decode worker that fits it.

    Disaggregates whenever a compatible pair exists; else one worker does both, so a fleet
    without prefill workers still serves. Workers in `avoid` (a former try failed there) are
    taken only when there is no other. Raises `NoWorkers` when nobody can generate.
    """
    for candidates in ([w for w in workers if w.id not in avoid], workers):
        if (placement := _pair(prompt, candidates)) or (placement := _single(prompt, candidates)):
            return placement
    raise NoWorkers("decode", known=len(workers))


def _pair(prompt: Prompt, workers: Sequence[WorkerView]) -> Placement | None:
    decoders = [w for w in workers if w.accepts(Phase.DECODE)]
    prefillers = [w for w in workers if w.accepts(Phase.PREFILL)]

    def tokens_until_first(w: WorkerView) -> tuple[int, str]:
        return w.prefill_tokens_queued + prompt.uncached(w.id), w.id

    for prefill in sorted(prefillers, key=tokens_until_first):
        fitting = [
            w
            for w in decoders
            if w.id != prefill.id and can_hand_off(sender=prefill.hello, receiver=w.hello)
        ]
        if fitting:
            return Placement(prefill.id, _least_filled(prompt, fitting).id)
    return None


def _single(prompt: Prompt, workers: Sequence[WorkerView]) -> Placement | None:
    able = [w for w in workers if w.accepts(Phase.BOTH)]
    if not able:
        return None

    def tokens_until_first(w: WorkerView) -> tuple[int, int, str]:
        tokens = w.prefill_tokens_queued + prompt.uncached(w.id)
        return tokens, w.streams_held, w.id

    return Placement(None, min(able, key=tokens_until_first).id)


def _least_filled(prompt: Prompt, workers: Sequence[WorkerView]) -> WorkerView:
    """Room for the whole request first, then the fewest streams: each slows the others' tokens;
    then who has the most of it already, and needs not read that."""

    def order(w: WorkerView) -> tuple[bool, int, int, int, str]:
        tokens = prompt.tokens + prompt.output_tokens_max
        blocks = -(-min(tokens, w.hello.max_model_len) // w.hello.block_tokens)
        # The id breaks ties: replays must agree.
        full, uncached = blocks > w.load.blocks_free, prompt.uncached(w.id)
        return full, w.streams_held, uncached, -w.load.blocks_free, w.id

    return min(workers, key=order)
