"""What a simulated step computes, and how long that takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from workers.api import Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.engines.sim_settings import SimSettings


class Running(Protocol):
    """A request in a step, as far as its time goes."""

    computed: int
    outputs: int


def step_of(plan: Sequence[tuple[Running, int]], settings: SimSettings) -> Step | None:
    """Of requests, each with the tokens that the step computes of it; None for none."""
    if not plan:
        return None
    prefill = [(r, n) for r, n in plan if n > 1 or not r.outputs]
    decode = [r for r, n in plan if n == 1 and r.outputs]
    tokens = sum(n for _, n in prefill)
    seconds = settings.step_s + tokens / settings.prefill_tokens_per_s
    return Step(
        0.0 if settings.instant else seconds,
        prefill_tokens=tokens,
        prefill_context=sum(r.computed for r, _ in prefill),
        decodes=len(decode),
        context_tokens=sum(r.computed for r in decode),
    )
