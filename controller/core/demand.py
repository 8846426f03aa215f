"""What the group is asked for and what it has, at a moment: all that sizing knows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Size:
    """Workers of each role."""

    prefill: int
    decode: int


@dataclass(frozen=True, slots=True)
class Observed:
    """Sums over the group's routers and workers. Counters only grow: a restart is for whoever
    observes to hide.
    """

    at: float
    """Seconds, monotonic."""
    requests: float
    """Counter: requests that arrived, refused ones too."""
    prompt_tokens: float
    """Counter: their prompt tokens that no cache had, as foretold on arrival."""
    computed_tokens: float
    """Counter: prompt tokens that workers computed, of requests that have their first token."""
    output_tokens: float
    """Counter: tokens generated."""
    judged: float
    """Counter: requests that ended, refused ones too, of which it is known whether they met the
    objectives."""
    first_in_time: float
    """Counter: of `judged`, those whose first token came within its objective."""
    met: float
    """Counter: those that met both: in time at first, and no slower than they should after."""
    queued_tokens: float
    """Uncached prompt tokens that wait in routers and workers."""
    prefill_tokens_per_s: float
    """What one prefill worker computes while it is busy: the mean of what routers have learnt from
    workers' steps (`router.core.rates`). 0: not known, and what is known lasts."""
    running: float
    """Requests that are being decoded."""
    kv_share: float
    """Of the decode workers' KV blocks, those in use; 0 to 1."""
    wanted: Size
    """Replicas as last asked for, by whomever."""
    ready: Size
    """Workers that serve."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What to ask for, and why: `tandem controller explain` shows it as it is."""

    at: float
    size: Size
    reason: str
    """One sentence: which rule decided, with its figures."""
    facts: dict[str, float]
    """Every figure that went into it, by name."""
