"""How fast a simulated engine is, and how large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class SimSettings:
    """The defaults are the 135M model on one core, without what its contexts cost.

    A step takes `step_s`, and for each prompt token 1/`prefill_tokens_per_s`, for each pair of a
    prompt token and one up to it `pair_s`, for each sequence that generates `stream_s`, and for
    each token before one of those `context_token_s`.
    """

    prefill_tokens_per_s: float = 1000.0
    step_s: float = 0.02
    pair_s: float = 0.0
    stream_s: float = 0.0
    context_token_s: float = 0.0
    batch_s: tuple[float, ...] = ()
    """What a step that only generates takes besides, for one sequence, two, and so on; the last
    for more. Kernels are chosen by a batch's size: two sequences can take longer than three."""
    noise: float = 0.0
    """Standard deviation of a step's time, as a share of it."""
    blocks_total: int = 2048
    block_tokens: int = 16
    token_bytes: int = 23_040
    """KV of one token."""
    pull_bytes_per_s: float = 5e9
    pull_latency_s: float = 0.002
    max_model_len: int = 8192
    """Tokens, prompt and output together."""
    chunk_tokens: int = 2048
    """Most tokens computed in one step."""
    running_max: int = 256
    vocabulary: int = 32_000
    lease_s: float = 30.0
    instant: bool = False
    """Nothing takes time and no lease keeps anything: to measure what surrounds an engine."""
    streams: bool = False
    """Prompts are kept under handles that routers make up, for engines of the same process."""


def besides_s(batch_s: Sequence[float], sequences: int) -> float:
    """What a step that only generates takes besides, by `SimSettings.batch_s`."""
    return batch_s[min(sequences, len(batch_s)) - 1] if batch_s else 0.0
