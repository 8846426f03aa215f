"""What a placement costs, in seconds: the request's own, and those that it takes from others.

docs/placement.md derives the formulas. All rates are the worker's own, as learnt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:
    from router.core.columns import Columns, Floats, Integers
    from router.core.fleet import WorkerView
    from router.core.placement import Prompt

_Number = TypeVar("_Number", float, "Floats")
_Integer = TypeVar("_Integer", int, "Integers")

GRAIN_S: Final = 0.001
"""Estimates closer than this are equal: none is that good."""


class Prefill(NamedTuple):
    """A worker as the one that computes the prompt."""

    done_s: float
    """Until its last token is computed."""
    own_s: float
    """Of that, what these tokens add to the steps that compute them."""
    stream_s: float
    """Seconds that this keeps the worker's streams waiting, summed over the streams."""


class Decode(NamedTuple):
    """A worker as the one that generates."""

    step_s: float
    """One token more, for each stream there, this one included."""
    own_s: float
    """All tokens that are expected."""
    stream_s: float
    """By how much these steps are longer for the streams that were there, summed over them."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds. `total_s` is what placement makes as small as it can."""

    ttft_s: float
    decode_s: float
    """From the first token to the last."""
    damage_s: float
    """That other streams wait longer, summed over them."""

    @property
    def total_s(self) -> float:
        return self.ttft_s + self.decode_s + self.damage_s


def prefill(prompt: Prompt, w: WorkerView) -> Prefill:
    """The queue's tokens, and then the prompt's that are not cached here, in chunks."""
    cached = prompt.cached_tokens.get(w.id, 0)
    tokens = max(1, prompt.tokens - cached)  # Without one computed there is no output.
    _, token_s, pair_s, _, _ = w.rates.step.rates
    own_s = tokens * token_s + _pairs(tokens, cached) * pair_s
    # What is queued and what comes now share a step where they fit one.
    steps = -(-(w.prefill_tokens_queued + tokens) // w.rates.chunk_tokens)
    done_s = steps * w.step_s + w.prefill_tokens_queued * token_s + own_s
    return Prefill(done_s, own_s, own_s * w.streams_held)


def decode(prompt: Prompt, w: WorkerView) -> Decode:
    """All of the output beside the streams that are there: as these end, others come."""
    outputs = prompt.output_tokens
    _, _, _, stream_s, context_s = w.rates.step.rates
    more_s = stream_s + context_s * (prompt.tokens + outputs / 2)
    step_s = w.step_s + more_s
    return Decode(step_s, outputs * step_s, outputs * more_s * w.streams_held)


def pull_s(prompt: Prompt, sender: WorkerView, receiver: WorkerView, own_s: float) -> float:
    """What of the transfer is not hidden under the prefill, which takes `own_s`.

    A sender that announces its chunks is read while it computes: all but the last chunk's bytes,
    unless the network is slower than the prefill.
    """
    all_s = read_s(prompt, receiver)
    tokens = prompt.uncached(receiver.id)
    if not sender.hello.handoff_endpoint or tokens <= sender.rates.chunk_tokens:
        return all_s
    latency_s = receiver.rates.pull.rates[0]
    last_s = (all_s - latency_s) * sender.rates.chunk_tokens / tokens
    return max(latency_s + last_s, all_s - own_s)


def read_s(prompt: Prompt, receiver: WorkerView) -> float:
    """All that it has not cached, hidden or not."""
    return receiver.rates.pull.rates[0] + prompt.uncached(receiver.id) * receiver.pull_token_s


def apart(prompt: Prompt, p: tuple[WorkerView, Prefill], d: tuple[WorkerView, Decode]) -> Estimate:
    """One worker computes the prompt, another generates: its first step comes after the pull."""
    (sender, computing), (receiver, generating) = p, d
    pulling_s = pull_s(prompt, sender, receiver, computing.own_s)
    return Estimate(
        computing.done_s + pulling_s + generating.step_s,
        generating.own_s - generating.step_s,
        computing.stream_s + generating.stream_s,
    )


def together(computing: Prefill, generating: Decode) -> Estimate:
    """One worker does both: the first token comes with the prompt's last step."""
    return Estimate(
        computing.done_s,
        generating.own_s - generating.step_s,
        computing.stream_s + generating.stream_s,
    )


def _pairs(tokens: _Number, cached: _Number) -> _Number:
    """Of one of `tokens` and one that it attends to: those cached, those before it, and itself."""
    return tokens * (cached + (tokens + 1) / 2)


def senders_s(prompt: Prompt, columns: Columns, cached: Floats) -> Floats:
    """`prefill`'s seconds in all, own and others', of each worker: for hundreds at once."""
    c = columns
    tokens = np.maximum(1.0, prompt.tokens - cached)
    own_s = (tokens * c.token_s + _pairs(tokens, cached) * c.pair_s) * (1.0 + c.streams_held)
    steps = np.ceil((c.queued + tokens) / c.chunk_tokens)
    return np.asarray(steps * c.step_s + c.queued * c.token_s + own_s)


def receivers_s(prompt: Prompt, columns: Columns) -> Floats:
    """`decode`'s seconds, all but its own first token's, of each worker."""
    c, outputs = columns, prompt.output_tokens
    more_s = c.stream_s + c.context_s * (prompt.tokens + outputs / 2)
    own_s = (outputs - 1) * (c.step_s + more_s)
    return np.asarray(own_s + outputs * more_s * c.streams_held)


def mixed(one: int, other: _Integer) -> _Integer:
    """Knuth's multiplicative hash of both: equals in an order of each request's own."""
    return (other ^ one) * 0x9E3779B1 & 0xFFFFFFFF
