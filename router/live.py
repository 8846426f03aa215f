"""What the dispatch holds of each live request, and of each step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from router.ask import Ask
    from router.core import lifecycle as life
    from workers.api import Delta


@dataclass(slots=True)
class Live:
    ask: Ask
    state: life.State
    progress_at: float
    wire_id: str = ""
    """Of this attempt's decode phase; its prefill phase has `PREFILL_SUFFIX` behind it."""
    prompt_extras: bytes | None = None
    cached_tokens: int | None = None
    """Of the prefill worker: what its cache saved this request."""
    computes_on: str = ""
    """The worker that computes the prompt, and so many tokens of it its cache was to save."""
    predicted_tokens: int = 0
    output_tokens: int = 0
    """That the client has."""
    counted_on: tuple[str, ...] = ()
    """Workers whose accounts have it."""
    kv_tokens_expected: int = 0
    """That the decode worker keeps of it at its end, and now; the latter is 0 until it answers."""
    kv_tokens: int = 0
    kv_tokens_counted: int = 0
    """Up to which the promise of blocks has been made good."""


@dataclass(slots=True)
class Step:
    """What one batch brings to the sink, gathered so that it is told once."""

    deltas: list[Delta] = field(default_factory=list)
    prompt_extras: dict[str, bytes] = field(default_factory=dict)
