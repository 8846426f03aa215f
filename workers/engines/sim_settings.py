"""How fast a simulated engine is, and how large."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SimSettings:
    """How fast, how large. The defaults are the 135M model on one core."""

    prefill_tokens_per_s: float = 1000.0
    step_s: float = 0.02
    """Of a step without prefill, whatever its batch."""
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
