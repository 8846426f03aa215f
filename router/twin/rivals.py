"""What production's sizing is compared with: thresholds as KEDA and the HPA have them, a fleet of
one size, and a schedule by somebody who knows the trace."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from math import ceil, inf
from typing import TYPE_CHECKING, Final

from controller.core.demand import Decision, Size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from controller.core.demand import Observed

POLL_S: Final = 30.0
"""KEDA's `pollingInterval` by default."""
STABLE_S: Final = 300.0
"""The HPA's `scaleDown.stabilizationWindowSeconds` by default; KEDA scales through an HPA, and its
own `cooldownPeriod`, the same, is for going to zero."""
TOLERANCE: Final = 0.1
"""The HPA's: a metric so close to its target changes nothing."""
UP_PODS: Final = 4
"""The HPA's: as many in 15 s, or as many as there are."""


class Fixed:
    """Always the same."""

    def __init__(self, size: Size) -> None:
        self._size = size

    def look(self, observed: Observed) -> Decision:
        return Decision(observed.at, self._size, "it never changes", {})


@dataclass(frozen=True, slots=True)
class Target:
    """What one worker of each role is to have of `total`'s figures."""

    name: str
    total: Callable[[Observed, Observed], tuple[float, float]]
    """For prefill and decode, from two observations."""
    prefill: float
    decode: float
    poll_s: float = POLL_S
    stable_s: float = STABLE_S


class Threshold:
    """replicas = ceil(total / target) for each role, as the HPA does it."""

    def __init__(self, target: Target, most: Size) -> None:
        self._target, self._most = target, most
        self._before: Observed | None = None
        self._said: deque[tuple[float, Size]] = deque()

    def look(self, observed: Observed) -> Decision:
        before, wanted = self._before, observed.wanted
        if before is not None and observed.at - before.at < self._target.poll_s - 1e-6:
            return Decision(observed.at, wanted, "between two polls", {})
        self._before = observed
        if before is None:
            return Decision(observed.at, wanted, "the first poll", {})
        totals = self._target.total(before, observed)
        prefill = _replicas(totals[0], self._target.prefill, wanted.prefill)
        decode = _replicas(totals[1], self._target.decode, wanted.decode)
        self._said.append((observed.at, Size(prefill, decode)))
        while self._said[0][0] < observed.at - self._target.stable_s:
            self._said.popleft()
        held = Size(max(s.prefill for _, s in self._said), max(s.decode for _, s in self._said))
        size = Size(
            min(self._most.prefill, _step(prefill, wanted.prefill, held.prefill)),
            min(self._most.decode, _step(decode, wanted.decode, held.decode)),
        )
        return Decision(observed.at, size, self._target.name, {})


def _step(asked: int, wanted: int, held: int) -> int:
    """Up by so many at once; down no further than what was asked for lately."""
    if asked > wanted:
        return min(asked, wanted + max(UP_PODS, wanted))
    return max(1, min(wanted, held))


def _replicas(total: float, target: float, wanted: int) -> int:
    if abs(total / (target * wanted) - 1) <= TOLERANCE:
        return wanted
    return ceil(total / target)


def queues(before: Observed, now: Observed) -> tuple[float, float]:
    """What is in the system: prompt tokens not yet computed, requests that decode."""
    return now.queued_tokens, now.running


def busy(before: Observed, now: Observed) -> tuple[float, float]:
    """In workers: the time that computed prompts took, and the KV blocks in use."""
    tokens_per_s = (now.computed_tokens - before.computed_tokens) / (now.at - before.at)
    pace = now.prefill_tokens_per_s or inf
    return tokens_per_s / pace, now.kv_share * now.ready.decode


class Schedule:
    """Sizes by time, known beforehand: asked for a start-up ahead where they grow."""

    def __init__(self, window_s: float, sizes: Sequence[Size], ahead_s: float) -> None:
        self.window_s, self.sizes, self._ahead_s = window_s, sizes, ahead_s
        self._starts = [window_s * n for n in range(len(sizes))]

    def at(self, seconds: float) -> Size:
        """What is to be asked for then: the most of all that it is for until it serves."""
        first = max(0, bisect_right(self._starts, seconds) - 1)
        last = max(0, bisect_right(self._starts, seconds + self._ahead_s) - 1)
        some = self.sizes[first : last + 1]
        return Size(max(s.prefill for s in some), max(s.decode for s in some))

    def look(self, observed: Observed) -> Decision:
        return Decision(observed.at, self.at(observed.at), "the schedule", {})


def schedule(
    loads: Sequence[tuple[float, float]], window_s: float, fill: tuple[float, float], ahead_s: float
) -> Schedule:
    """The fewest workers that are no fuller than `fill`, by each window's load in workers."""
    sizes = [
        Size(max(1, ceil(p / fill[0] - 1e-9)), max(1, ceil(d / fill[1] - 1e-9))) for p, d in loads
    ]
    return Schedule(window_s, sizes, ahead_s)
