"""What a replay's outcomes come to: the row of one side."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil, inf, isinf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadtests.replay import Outcome

COLUMNS = [
    "", "req/s", "TTFT p50", "p99", "ITL p50", "p99", "good/s", "met", "failed", "hits", "CPU",
    "router's",
]  # fmt: skip
"""Times in milliseconds, CPU a request."""


@dataclass(frozen=True, slots=True)
class Slo:
    """A request meets it whose first token and whose mean ITL are within."""

    ttft_s: float
    itl_s: float

    def met(self, outcome: Outcome) -> bool:
        if outcome.error is not None or outcome.ttft_s > self.ttft_s:
            return False
        steps = outcome.tokens - 1
        return steps < 1 or sum(outcome.gaps_s) / steps <= self.itl_s


@dataclass(frozen=True, slots=True)
class Row:
    """Of one side. TTFT is of all requests: one that failed never had its first token."""

    requests_per_s: float
    """Answered, over the time until the last answer."""
    ttft_ms_p50: float
    ttft_ms_p99: float
    itl_ms_p50: float
    itl_ms_p99: float
    """Between events of answered requests."""
    goodput_per_s: float
    """Of those that met the SLO, over the time in which all came."""
    met: float
    failed: int
    hits: float
    """Prompt tokens found in a cache, of answered requests."""
    cpu_ms_per_request: float
    """Of all processes of the side."""
    router_cpu_ms_per_request: float
    late_ms_max: float
    """That the clients sent a request after it was due."""

    def cells(self, name: str) -> list[str]:
        numbers = [
            self.requests_per_s, self.ttft_ms_p50, self.ttft_ms_p99, self.itl_ms_p50,
            self.itl_ms_p99, self.goodput_per_s,
        ]  # fmt: skip
        return [
            name, *(_text(n) for n in numbers), f"{self.met:.1%}", str(self.failed),
            f"{self.hits:.1%}", _text(self.cpu_ms_per_request),
            _text(self.router_cpu_ms_per_request),
        ]  # fmt: skip

    def as_json(self) -> dict[str, float | None]:
        return {k: None if isinf(v) else v for k, v in asdict(self).items()}


def row_of(outcomes: Sequence[Outcome], came_s: float, slo: Slo, cpu_s: tuple[float, float]) -> Row:
    """`came_s`: until the last was due; `cpu_s`: that all of the side's processes used meanwhile,
    and its router."""
    answered = [o for o in outcomes if o.error is None]
    ttfts_s = [o.ttft_s if o.error is None else inf for o in outcomes]
    gaps_s = [gap for o in answered for gap in o.gaps_s]
    met = sum(slo.met(o) for o in outcomes)
    ended_s = max((o.ended_s for o in answered), default=0.0)
    prompt_tokens = sum(o.prompt_tokens for o in answered)
    return Row(
        requests_per_s=len(answered) / ended_s if ended_s else 0.0,
        ttft_ms_p50=quantile(ttfts_s, 0.5) * 1e3,
        ttft_ms_p99=quantile(ttfts_s, 0.99) * 1e3,
        itl_ms_p50=quantile(gaps_s, 0.5) * 1e3,
        itl_ms_p99=quantile(gaps_s, 0.99) * 1e3,
        goodput_per_s=met / came_s if came_s else 0.0,
        met=met / len(outcomes) if outcomes else 0.0,
        failed=len(outcomes) - len(answered),
        hits=sum(o.cached_tokens for o in answered) / prompt_tokens if prompt_tokens else 0.0,
        cpu_ms_per_request=cpu_s[0] / len(answered) * 1e3 if answered else inf,
        router_cpu_ms_per_request=cpu_s[1] / len(answered) * 1e3 if answered else inf,
        late_ms_max=max((o.late_s for o in outcomes), default=0.0) * 1e3,
    )


def quantile(values: Sequence[float], q: float) -> float:
    """The least of `values` that a part `q` of them does not exceed; infinite of none."""
    ordered = sorted(values)
    return ordered[max(0, ceil(q * len(ordered)) - 1)] if ordered else inf


def _text(number: float) -> str:
    if isinf(number):
        return "never"
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"
