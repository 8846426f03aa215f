"""The work of a step of vLLM's scheduler, for the rates that routers learn."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


def step_work(scheduled: SchedulerOutput) -> list[int]:
    """A step's work: `workers.api.Step` without the seconds."""
    cached = scheduled.scheduled_cached_reqs
    begun = {r.req_id: (r.num_computed_tokens, 0) for r in scheduled.scheduled_new_reqs}
    ahead = zip(cached.num_computed_tokens, cached.num_output_tokens, strict=True)
    begun |= dict(zip(cached.req_ids, ahead, strict=True))
    prefill_tokens = prefill_pairs = decodes = context_tokens = 0
    for request_id, tokens in scheduled.num_scheduled_tokens.items():
        context, outputs = begun[request_id]
        if tokens == 1 and outputs:
            decodes += 1
            context_tokens += context
        else:
            prefill_tokens += tokens
            prefill_pairs += tokens * context + tokens * (tokens + 1) // 2
    return [prefill_tokens, prefill_pairs, decodes, context_tokens]
