"""One look at a group: what its processes' metrics say, summed to what sizing is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from controller.core.counters import Totals
from controller.core.demand import Observed, Size

if TYPE_CHECKING:
    from collections.abc import Sequence

Samples = dict[str, float]
"""A process's metrics by name, summed over labels."""

ROUTER_COUNTERS: Final = {
    "requests": "tandem_router_arrived_total",
    "prompt_tokens": "tandem_router_arrived_tokens_total",
    "computed_tokens": "tandem_router_computed_tokens_total",
    "judged": "tandem_router_judged_total",
    "first_in_time": "tandem_router_first_in_time_total",
    "met": "tandem_router_met_total",
}
QUEUED: Final = "tandem_router_queue_prompt_tokens"
PACE: Final = "tandem_router_prefill_tokens_per_second"
OUTPUT: Final = "tandem_worker_output_tokens_total"
PROMPTS: Final = "tandem_worker_prefill_tokens_queued"
FREE: Final = "tandem_worker_blocks_free"
BLOCKS: Final = "tandem_worker_blocks_total"
RUNNING: Final = "vllm:num_requests_running"
BORN: Final = "process_start_time_seconds"

OF_ROUTERS: Final = frozenset({*ROUTER_COUNTERS.values(), QUEUED, PACE})
OF_WORKERS: Final = frozenset({OUTPUT, PROMPTS, FREE, BLOCKS, RUNNING})
READ: Final = OF_ROUTERS | OF_WORKERS | {BORN}


@dataclass(frozen=True, slots=True)
class Group:
    """What those say that serve."""

    routers: Sequence[Samples]
    prefill: Sequence[Samples]
    decode: Sequence[Samples]


class Sums:
    """Of one group; counters over all looks."""

    def __init__(self) -> None:
        self._totals = Totals()

    def forget(self, who: str) -> None:
        """A process is gone."""
        self._totals.forget(who)

    def count(self, who: str, samples: Samples) -> None:
        """What a process said, in a look that need not be whole."""
        names = {*ROUTER_COUNTERS.values(), OUTPUT}
        counters = {name: value for name, value in samples.items() if name in names}
        self._totals.add(who, counters, samples.get(BORN))

    def observed(self, group: Group, wanted: Size, at: float) -> Observed:
        """All that serve. `wanted`: replicas as last asked for."""
        decode, workers = group.decode, [*group.prefill, *group.decode]
        free, blocks = (sum(s[name] for s in decode) for name in (FREE, BLOCKS))
        paces = [s[PACE] for s in group.routers if s[PACE] > 0]
        counters = {field: self._totals[name] for field, name in ROUTER_COUNTERS.items()}
        waiting = sum(s[QUEUED] for s in group.routers)
        return Observed(
            at=at,
            **counters,
            output_tokens=self._totals[OUTPUT],
            queued_tokens=waiting + sum(s[PROMPTS] for s in workers),
            prefill_tokens_per_s=sum(paces) / len(paces) if paces else 0.0,
            running=sum(s[RUNNING] for s in decode),
            kv_share=1 - free / blocks if blocks else 0.0,
            wanted=wanted,
            ready=Size(len(group.prefill), len(decode)),
        )
