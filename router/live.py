"""What the dispatch holds of each live request, and of each step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from router.core import lifecycle as life
from workers.api import Generate, Phase

if TYPE_CHECKING:
    from router.ask import Ask
    from router.core.admission import Entry
    from router.core.placement import Placement, Prompt
    from workers.api import Delta


@dataclass(slots=True, eq=False)
class Live:
    """One try at a request; while another runs beside it, that is its `rival`."""

    ask: Ask
    state: life.State
    progress_at: float
    rival: Live | None = None
    placement: Placement | None = None
    """Where it was placed last."""
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
    entry: Entry | None = None
    """Its place in the queue; kept for another try."""
    prompt: Prompt | None = None
    """As placement was last told, and when that was put together."""
    prompt_at: float = 0.0
    over_budget: bool = False
    """It was overdue when no second try could begin; counted once."""
    counted_on: tuple[str, ...] = ()
    """Workers whose accounts have it."""
    kv_tokens_expected: int = 0
    """That the decode worker keeps of it at its end, and now; the latter is 0 until it answers."""
    kv_tokens: int = 0
    kv_tokens_counted: int = 0
    """Up to which the promise of blocks has been made good."""

    def begin_try(self, number: int) -> None:
        """Give it ids of its own: a late answer to a former try must not be taken for this one's.

        What a former try's prefill said is of no more use.
        """
        request_id = self.ask.request_id
        self.wire_id = request_id if number == 1 else f"{request_id}/{number}"
        self.prompt_extras = self.cached_tokens = None

    @property
    def estimated_s(self) -> float:
        """Seconds from placement to the first token; 0 when nothing is known."""
        made = self.placement.estimate if self.placement else None
        return made.ttft_s if made else 0.0

    @property
    def tokens_left(self) -> int:
        """The most that a worker may still say, a relayed first token that is repeated included."""
        return max(0, self.ask.max_tokens - (self.output_tokens - self.ask.generated)) + 1


@dataclass(slots=True)
class Step:
    """What one batch brings to the sink, gathered so that it is told once."""

    deltas: list[Delta] = field(default_factory=list)
    prompt_extras: dict[str, bytes] = field(default_factory=dict)


def generate(live: Live, wire_id: str, phase: Phase, ticket: bytes | None) -> Generate:
    """What a worker is asked for this phase of it."""
    ask = live.ask
    return Generate(
        request_id=wire_id,
        phase=phase,
        prompt_token_ids=ask.prompt_token_ids,
        max_tokens=ask.max_tokens,
        params=ask.params,
        ticket=ticket,
        relay=ask.relay and phase is not Phase.BOTH and _may_be_relayed(live.state),
        generated=ask.generated,
        cache_salt=ask.cache_salt,
        lora_name=ask.lora_name,
        priority=ask.priority,
        items=ask.items,
        contents=ask.contents,
    )


def _may_be_relayed(state: life.State) -> bool:
    """Only a sender whose handle is known to both sides can hand the first token on.

    Both are told the same: a decode worker that is asked after the prefill, what came of it.
    """
    match state:
        case life.Prefilling():
            return state.ticket is not None
        case life.Decoding():
            return state.relayed is not None
    return False


def nobody_computed(prefill: int | None, delta: Delta) -> int:
    """Prompt tokens that nobody computed. `prefill`: of the prefill worker, None without one.

    With a pull, the decode worker's own cache saved bytes and no computing.
    """
    own = delta.cached_tokens or 0
    if prefill is None:
        return own
    # A pull that failed: both computed the prompt, each after the prefix that its cache held.
    return prefill if delta.kv_failed is None else min(prefill, own)
