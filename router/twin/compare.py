"""Policies side by side: one trace, one fleet, one run for each."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from time import monotonic, perf_counter_ns
from typing import TYPE_CHECKING, Final

from router.core.limits import Limits
from router.core.placement import Disaggregate, EstimatePolicy
from router.twin.oracle import Oracle
from router.twin.policies import Asked, peers
from router.twin.report import Objective, curve, figures, quantiles
from router.twin.run import Options, Twin

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from router.core.fleet import WorkerView
    from router.core.placement import Placement, Policy, Prompt
    from router.twin.fleet import FleetPlan
    from router.twin.report import Figures
    from router.twin.traces import Trace

POLICIES: Final = {
    "round-robin": "each worker in turn",
    "power-of-two": "of two at random the one with fewer requests",
    "session-hash": "a ring of workers, by session",
    "prefix-tree": "who was sent this beginning before, with thresholds for load",
    "ours": "production's: the fewest seconds for everybody, by learnt rates",
    "ours-always": "the same, and never one worker for both where there are two",
    "ours-refusing": "the same as ours, and refusing what can't meet the TTFT objective",
    "oracle": "the same estimate, told output lengths, true rates and what engines hold",
}
_TOLD_S: Final = 2.0


@dataclass(slots=True)
class Side:
    """One policy's run."""

    figures: Figures
    ttft_s: list[float]
    itl_s: list[float]
    """Quantiles of requests, from least to most."""
    place_us: dict[str, float] = field(default_factory=dict)
    """Of placement, by the real clock; `submit_us` with all that the router does of an arrival."""
    submit_us: dict[str, float] = field(default_factory=dict)
    real_s: float = 0.0


class Timed:
    """A policy, and how long it took each time by the real clock."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.took_ns: list[int] = []

    def place(
        self, prompt: Prompt, workers: Sequence[WorkerView], avoid: frozenset[str] = frozenset()
    ) -> Placement:
        began_ns = perf_counter_ns()
        try:
            return self._policy.place(prompt, workers, avoid)
        finally:
            self.took_ns.append(perf_counter_ns() - began_ns)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What all sides have in common."""

    trace: Trace
    fleet: FleetPlan
    objective: Objective = field(default_factory=Objective)
    options: Options = field(default_factory=Options)
    seed: int = 0

    def run(self, name: str, told: Callable[[str], None] = lambda _: None) -> Side:
        """Raises KeyError when no policy is called so."""
        twin = Twin(self.trace, self.fleet, self.options_of(name))
        timed = Timed(self.policy(name, twin))
        began_s = monotonic()
        twin.run(timed, _progress(name, told))
        side = self._side(twin)
        side.real_s = monotonic() - began_s
        side.place_us = quantiles(timed.took_ns, 1e-3)
        side.submit_us = quantiles(twin.submit_ns, 1e-3)
        return side

    def options_of(self, name: str) -> Options:
        if name != "ours-refusing":
            return self.options
        limits = replace(self.options.limits or Limits(), ttft_s=self.objective.ttft_s)
        return replace(self.options, limits=limits)

    def policy(self, name: str, twin: Twin) -> Policy:
        """Raises KeyError."""
        asked = Asked(twin.trace)
        prefill_s = (twin.options.limits or Limits()).prefill_s
        if name in ("ours", "ours-refusing"):
            return EstimatePolicy(prefill_s=prefill_s)
        if name == "ours-always":
            return EstimatePolicy(Disaggregate.ALWAYS, prefill_s)
        if name == "oracle":
            return Oracle(twin, asked, prefill_s)
        return peers(asked, self.seed)[name]()

    def _side(self, twin: Twin) -> Side:
        outcomes = twin.outcomes
        begun = [n for n in range(len(outcomes)) if outcomes.ttft_s(n) >= 0]
        return Side(
            figures(twin, self.objective),
            curve([outcomes.ttft_s(n) for n in begun]),
            curve([outcomes.itl_s(n) for n in begun if outcomes.tokens[n] > 1]),
        )


def _progress(name: str, told: Callable[[str], None]) -> Callable[[Twin], None]:
    last_s = began_s = monotonic()

    def progress(twin: Twin) -> None:
        nonlocal last_s
        now_s = monotonic()
        if now_s - last_s < _TOLD_S:
            return
        last_s = now_s
        ended = len(twin.outcomes) - twin.outcomes.ended.count(0)
        told(
            f"{name}: {ended} of {len(twin.outcomes)} requests ended, {twin.now:,.0f} s of virtual "
            f"time, {twin.now / (now_s - began_s):,.0f} times faster than real time"
        )

    return progress


def to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
