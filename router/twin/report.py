"""What a run comes to: figures, the same byte for byte for one seed, and a table of them."""

from __future__ import annotations

import json
from bisect import bisect_left
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

from router.twin.outcomes import GAP_GRAIN_S, NEVER

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Mapping, Sequence

    from router.twin.run import Twin

QUANTILES: Final = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
DIGITS: Final = 6
"""Of every figure, significant."""
CURVE_POINTS: Final = 100


@dataclass(frozen=True, slots=True)
class Objective:
    """A request meets it with its TTFT and its mean ITL; one refused or failed never does."""

    ttft_s: float = 2.0
    itl_s: float = 0.1


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one policy. Seconds are virtual."""

    requests: int
    finished: int
    refused: dict[str, int]
    """Before the first token, by error code: shed."""
    failed: dict[str, int]
    """After it."""
    met: int
    """Requests that met both objectives."""
    goodput_per_s: float
    """Those, by the time in which all came."""
    virtual_s: float
    """Until the last one ended."""
    output_tokens: int
    ttft_ms: dict[str, float]
    """Of requests with a first token."""
    itl_ms: dict[str, float]
    """Of all gaps between tokens."""
    request_itl_ms: dict[str, float]
    """Of requests, the mean of each."""
    hit_rate: float
    """Prompt tokens that nobody had to compute, of those requests."""
    disbelieved: int
    """Times that a worker's prefix index was thrown away for what it had foretold."""
    balance: dict[str, float]
    """By role, the busiest worker's time in steps over the mean."""
    busy: dict[str, float]
    """By role, the mean part of the time in steps."""

    @property
    def attainment(self) -> float:
        return self.met / self.requests if self.requests else 0.0


def figures(twin: Twin, objective: Objective) -> Figures:
    outcomes, requests = twin.outcomes, twin.trace.requests
    begun = [n for n in range(len(outcomes)) if outcomes.first_s[n] != NEVER]
    prompt_tokens = sum(requests[n].input_tokens for n in begun)
    met = sum(
        outcomes.ended[n] == 1
        and outcomes.ttft_s(n) <= objective.ttft_s
        and outcomes.itl_s(n) <= objective.itl_s
        for n in begun
    )
    virtual_s = max((outcomes.last_s[n] for n in begun), default=0.0)
    several = [n for n in begun if outcomes.tokens[n] > 1]
    by_role: dict[str, list[float]] = {}
    for worker in (*twin.workers.values(), *twin.departed):
        by_role.setdefault(str(worker.plan.role), []).append(worker.busy_s)
    return Figures(
        requests=len(outcomes),
        finished=outcomes.ended.count(1),
        refused=dict(sorted(outcomes.refused.items())),
        failed=dict(sorted(outcomes.failed.items())),
        met=met,
        goodput_per_s=_rounded(met / twin.trace.seconds if twin.trace.seconds else 0.0),
        virtual_s=_rounded(virtual_s),
        output_tokens=sum(outcomes.tokens),
        ttft_ms=quantiles([outcomes.ttft_s(n) for n in begun], 1000),
        itl_ms=gap_quantiles(outcomes.gaps),
        request_itl_ms=quantiles([outcomes.itl_s(n) for n in several], 1000),
        hit_rate=_rounded(
            sum(outcomes.cached_tokens[n] for n in begun) / prompt_tokens if prompt_tokens else 0.0
        ),
        disbelieved=twin.dispatch.caches.disbelieved_total,
        balance={role: _rounded(max(b) * len(b) / (sum(b) or 1)) for role, b in by_role.items()},
        busy={role: _rounded(sum(b) / len(b) / (virtual_s or 1)) for role, b in by_role.items()},
    )


def curve(values: Sequence[float]) -> list[float]:
    """So many quantiles, from the least to the most."""
    ordered = sorted(values)
    if not ordered:
        return []
    return [ordered[round(n * (len(ordered) - 1) / CURVE_POINTS)] for n in range(CURVE_POINTS + 1)]


def quantiles(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """By nearest rank; none of nothing."""
    ordered = sorted(values)
    if not ordered:
        return {}
    last = len(ordered) - 1
    return {name: _rounded(ordered[round(q * last)] * scale) for name, q in QUANTILES.items()}


def gap_quantiles(gaps: Counter[int]) -> dict[str, float]:
    """In ms, of counts by `GAP_GRAIN_S`."""
    ordered = sorted(gaps.items())
    sums = list(accumulate(count for _, count in ordered))
    if not sums:
        return {}
    return {
        name: _rounded(ordered[bisect_left(sums, q * sums[-1])][0] * GAP_GRAIN_S * 1000)
        for name, q in QUANTILES.items()
    }


def as_json(about: Mapping[str, Any], found: Mapping[str, Figures]) -> str:
    """Nothing in it hangs on the real clock."""
    whole = {**about, "policies": {name: asdict(f) for name, f in found.items()}}
    return json.dumps(whole, indent=1, sort_keys=True) + "\n"


HEAD: Final = (
    "policy", "goodput/s", "met", "shed", "TTFT p50", "p90", "p99 ms", "ITL p50", "p90", "p99 ms",
    "hits", "max/mean busy",
)  # fmt: skip


def table(found: Mapping[str, Figures]) -> str:
    """A row for each policy, in Markdown."""
    rows = [HEAD, *(_row(name, f) for name, f in found.items())]
    widths = [max(len(row[at]) for row in rows) for at in range(len(HEAD))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _row(name: str, f: Figures) -> tuple[str, ...]:
    def ms(values: Mapping[str, float], digits: int) -> list[str]:
        return [f"{values[q]:,.{digits}f}" if q in values else "-" for q in QUANTILES]

    shed = sum(f.refused.values()) + sum(f.failed.values())
    balance = ", ".join(f"{role} {value:.2f}" for role, value in f.balance.items())
    return (
        name, f"{f.goodput_per_s:.3f}", f"{f.attainment:.1%}", str(shed),
        *ms(f.ttft_ms, 0), *ms(f.itl_ms, 1), f"{f.hit_rate:.1%}", balance,
    )  # fmt: skip


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
