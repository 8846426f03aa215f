"""Requests made up with the statistics of published traces, from a seed.

Lengths and rates were measured from the public files of Mooncake (Qin et al., FAST 2025), the Azure
LLM inference dataset of 2023 (Patel et al., "Splitwise", ISCA 2024) and BurstGPT (Wang et al., KDD
2025). What no page of theirs gives is a choice of ours, and says so.
"""

from __future__ import annotations

import random
from bisect import bisect
from dataclasses import dataclass
from itertools import accumulate
from math import exp, log
from statistics import NormalDist
from typing import TYPE_CHECKING, Final, Protocol

from router.twin.traces import BLOCK_TOKENS, Request, Trace, own_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_NORMAL: Final = NormalDist()
_Z90, _Z99 = _NORMAL.inv_cdf(0.9), _NORMAL.inv_cdf(0.99)


class Draw(Protocol):
    """A length in tokens."""

    def __call__(self, rng: random.Random) -> int: ...


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal in pieces: p50, p90 and p99 are exact, `low` (the slope below the median, in
    standard deviations of ln) makes the mean the published one."""

    p50: float
    p90: float
    p99: float
    low: float
    most: int
    scale: float = 1.0

    def __call__(self, rng: random.Random) -> int:
        z = rng.normalvariate()
        p50, p90, p99 = log(self.p50), log(self.p90), log(self.p99)
        if z < 0:
            value = p50 + self.low * z
        elif z < _Z90:
            value = p50 + (p90 - p50) * z / _Z90
        else:
            value = p90 + (p99 - p90) * (z - _Z90) / (_Z99 - _Z90)
        return max(1, round(min(self.most, exp(value)) * self.scale))


class Zipf:
    """P(n) in proportion to n^-s, n from 1 to `most`."""

    def __init__(self, s: float, most: int) -> None:
        self._sums = list(accumulate(n**-s for n in range(1, most + 1)))

    def __call__(self, rng: random.Random) -> int:
        return 1 + bisect(self._sums, rng.random() * self._sums[-1])


# ---------------------------------------------------------------- arrivals


def gamma_gaps(rng: random.Random, per_s: float, cv: float) -> Iterator[float]:
    """A Gamma renewal process; Poisson at CV 1."""
    shape = 1 / cv**2
    while True:
        yield rng.gammavariate(shape, 1 / (per_s * shape))


def burst_gaps(rng: random.Random, per_s: float, cv: float) -> Iterator[float]:
    """A hyper-exponential of two kinds: few long silences, and between them bursts.

    CV^2 + 1 = 2 (p m1^2 + q m2^2) / m^2; q = 0.5 % long gaps, which leaves the bursts (two hundred
    requests on average) about three times the mean rate.
    """
    q, mean_s = 0.005, 1 / per_s
    # With m1 = (m - q m2) / p, a quadratic in m2.
    p, square = 1 - q, (cv**2 + 1) / 2 * mean_s**2
    a, b, c = q + q * q / p, -2 * mean_s * q / p, mean_s**2 / p - square
    long_s = (-b + (b * b - 4 * a * c) ** 0.5) / (2 * a)
    short_s = (mean_s - q * long_s) / p
    while True:
        yield rng.expovariate(1 / (long_s if rng.random() < q else short_s))


# ---------------------------------------------------------------- shared beginnings


@dataclass(frozen=True, slots=True)
class Sharing:
    """How requests go on from earlier ones. `again`: the part of them that does; the longer a
    prompt, the likelier it does, by its length to the power of `bias`."""

    again: float
    bias: float
    candidates: int
    """Of so many about as old as was drawn, the one is taken that leaves the least to compute."""
    one_root: bool
    """All have their first block in common."""
    gap_p50_s: float = 200.0
    gap_p90_s: float = 790.0


class _Conversations:
    """Gives each request in turn the ids of its blocks."""

    def __init__(self, rng: random.Random, sharing: Sharing, weights: Sequence[float]) -> None:
        self._rng = rng
        self._sharing = sharing
        self._weights = weights
        self._next_id = 1
        self._at: list[float] = []
        self._full: list[int] = []
        self._blocks: list[tuple[int, ...]] = []

    def blocks(self, at_s: float, tokens: int) -> tuple[int, ...]:
        sharing, number = self._sharing, len(self._at)
        count = -(-tokens // BLOCK_TOKENS)
        known: tuple[int, ...] = (0,) if sharing.one_root else ()
        if self._rng.random() < self._weights[number]:
            known = self._earlier(at_s, count) or known
        fresh = count - len(known)
        blocks = (*known[:count], *range(self._next_id, self._next_id + fresh))
        self._next_id += max(0, fresh)
        self._at.append(at_s)
        self._full.append(tokens // BLOCK_TOKENS)
        self._blocks.append(blocks)
        return blocks

    def _earlier(self, at_s: float, count: int) -> tuple[int, ...]:
        """What is shared with one of those that came about so long ago; nothing without any."""
        sharing = self._sharing
        sigma = log(sharing.gap_p90_s / sharing.gap_p50_s) / _Z90
        ago_s = self._rng.lognormvariate(log(sharing.gap_p50_s), sigma)
        middle, half = bisect(self._at, at_s - ago_s), sharing.candidates // 2
        if not middle:
            return ()
        near = range(max(0, middle - half), min(len(self._at), middle + half + 1))
        best = max(near, key=lambda n: (min(self._full[n], count - 1), -self._full[n]))
        return self._blocks[best][: min(self._full[best], count - 1)]


def _weights(lengths: Sequence[int], sharing: Sharing) -> list[float]:
    """By request, how likely it goes on from another: `again` on average."""
    raw = [float(n) ** sharing.bias for n in lengths]
    low, high = 0.0, 1e9
    for _ in range(60):
        scale = (low + high) / 2 if high < 1e9 else max(1e-12, low * 2)
        if sum(min(1.0, scale * r) for r in raw) < sharing.again * len(raw):
            low = scale or 1e-12
        else:
            high = scale
    return [min(1.0, high * r) for r in raw]


# ---------------------------------------------------------------- the traces


@dataclass(frozen=True, slots=True)
class Kind:
    """What a trace is like."""

    per_s: float
    cv: float
    inputs: Draw
    outputs: Draw
    requests: int
    """As many as the published one has, or (BurstGPT) an hour's."""
    gaps: Callable[[random.Random, float, float], Iterator[float]] = gamma_gaps
    sharing: Sharing | None = None


KINDS: Final = {
    "mooncake-conversation": Kind(
        3.40, 1.0,
        Lengths(6909, 27367, 85401, low=1.20, most=126_000),
        Lengths(350, 597, 1120, low=1.21, most=2000),
        12_031, sharing=Sharing(0.43, 0.0, 16, one_root=True),
    ),
    "mooncake-synthetic": Kind(
        3.91, 1.0,
        Lengths(11587, 38615, 66458, low=1.96, most=126_000),
        Lengths(69, 389, 769, low=0.28, most=2000),
        3_993, sharing=Sharing(0.50, 0.6, 16, one_root=False, gap_p50_s=60.0, gap_p90_s=240.0),
    ),
    # Published are the means, and 59 % of blocks found; the shape is the conversation's, and the
    # rate 23,608 requests in an hour.
    "mooncake-tool": Kind(
        6.56, 1.0,
        Lengths(6909, 27367, 85401, low=1.20, most=126_000, scale=8596 / 12035),
        Lengths(350, 597, 1120, low=1.21, most=2000, scale=182 / 343),
        23_608, sharing=Sharing(0.50, 0.5, 16, one_root=True),
    ),
    "azure-conversation": Kind(
        5.53, 1.09,
        Lengths(1020, 2734, 4142, low=2.04, most=14_050),
        Lengths(129, 424, 601, low=0.05, most=1000),
        19_366,
    ),
    "azure-code": Kind(
        2.57, 13.2,
        Lengths(1469, 5186, 7436, low=1.14, most=7437),
        Lengths(13, 55, 249, low=0.87, most=1899),
        8_819, gaps=burst_gaps,
    ),
    # Gamma and Zipf are published, the parameters are a choice.
    "burstgpt": Kind(2.0, 1.41, Zipf(1.1, 8192), Zipf(1.1, 2048), 7_200),
}  # fmt: skip


def generate(name: str, seed: int, requests: int | None = None) -> Trace:
    """`requests`: all that the published one has, by default. Raises KeyError."""
    kind = KINDS[name]
    return generate_kind(name, kind, seed, kind.requests if requests is None else requests)


def generate_kind(name: str, kind: Kind, seed: int, count: int) -> Trace:
    """One that is like `kind`; equal names and seeds draw the same random numbers."""
    # A stream of random numbers for each, so that more requests begin with the same ones.
    rngs = [random.Random(f"{name}/{seed}/{what}") for what in ("gaps", "in", "out", "share")]
    gaps = kind.gaps(rngs[0], kind.per_s, kind.cv)
    inputs = [kind.inputs(rngs[1]) for _ in range(count)]
    conversations = None
    if kind.sharing is not None:
        conversations = _Conversations(rngs[3], kind.sharing, _weights(inputs, kind.sharing))
    found, at_s = [], 0.0
    for number, tokens in enumerate(inputs):
        at_s += next(gaps)
        if conversations is None:
            blocks = own_blocks(number, tokens)
        else:
            blocks = conversations.blocks(at_s, tokens)
        found.append(Request(at_s, tokens, kind.outputs(rngs[2]), blocks))
    return Trace(name, found)
