"""Days of requests: arrivals that rise and fall with the hours, with noise and bursts."""

from __future__ import annotations

import random
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from math import exp
from typing import TYPE_CHECKING, Final

from router.twin.generate import KINDS, gamma_gaps
from router.twin.traces import Request, Trace, own_blocks

if TYPE_CHECKING:
    from router.twin.generate import Kind

HOURS: Final = 24
STEPS: Final = 1440
"""A day's rate is said minute by minute."""
NOISE: Final = 0.05
"""Of the rate, over about half an hour."""
NOISE_KEPT: Final = exp(-1 / 30)


@dataclass(frozen=True, slots=True)
class Burst:
    """From `hour` on, for `hours`, the rate is `factor` times what it would be."""

    hour: float
    hours: float
    factor: float


@dataclass(frozen=True, slots=True)
class Day:
    """A shape: the rate at each full hour over the highest, straight between them."""

    name: str
    by_hour: tuple[float, ...]
    bursts: tuple[Burst, ...] = ()

    def at(self, hour: float) -> float:
        """Bursts included."""
        before = int(hour) % HOURS
        after, share = (before + 1) % HOURS, hour - int(hour)
        rate = self.by_hour[before] * (1 - share) + self.by_hour[after] * share
        for burst in self.bursts:
            if burst.hour <= hour < burst.hour + burst.hours:
                rate *= burst.factor
        return rate


WORKDAY: Final = Day(
    "workday",
    (
        0.40, 0.35, 0.32, 0.30, 0.30, 0.31, 0.35, 0.43, 0.56, 0.74, 0.88, 0.95,
        0.94, 0.96, 1.00, 0.98, 0.92, 0.80, 0.68, 0.60, 0.56, 0.53, 0.49, 0.45,
    ),
    (Burst(10.5, 0.5, 1.3), Burst(20.5, 0.75, 1.35)),
)  # fmt: skip
"""Highest 1.7 times the mean and 3.3 times the lowest."""
TWO_PEAKS: Final = Day(
    "two-peaks",
    (
        0.30, 0.26, 0.24, 0.24, 0.25, 0.30, 0.42, 0.62, 0.86, 0.95, 0.92, 0.78,
        0.62, 0.55, 0.54, 0.56, 0.62, 0.72, 0.88, 1.00, 0.98, 0.80, 0.56, 0.40,
    ),
)  # fmt: skip
FLASH: Final = Day("flash-crowd", WORKDAY.by_hour, (Burst(4.0, 1.5, 2.0),))
LATE_EVENING: Final = Day(
    "late-evening",
    (
        0.82, 0.60, 0.45, 0.36, 0.32, 0.30, 0.30, 0.32, 0.36, 0.40, 0.42, 0.44,
        0.50, 0.48, 0.46, 0.45, 0.47, 0.52, 0.60, 0.72, 0.85, 0.95, 1.00, 0.96,
    ),
    (Burst(8.0, 0.75, 1.4),),
)  # fmt: skip
DAYS: Final = {day.name: day for day in (WORKDAY, TWO_PEAKS, FLASH, LATE_EVENING)}


def generate(
    day: Day, seed: int, per_s: float, seconds: float, kind: str = "azure-conversation"
) -> Trace:
    """A day in `seconds`, with `per_s` requests a second at its shape's highest."""
    rng = random.Random(f"{day.name}/{seed}")
    step_s, wave = seconds / STEPS, 0.0
    expected = []
    for minute in range(STEPS):
        wave = NOISE_KEPT * wave + (1 - NOISE_KEPT**2) ** 0.5 * rng.normalvariate()
        expected.append(per_s * day.at(minute / 60) * exp(NOISE * wave) * step_s)
    sums = [0.0, *accumulate(expected)]
    requests = []
    for number, place in enumerate(_places(rng, KINDS[kind], sums[-1])):
        step = bisect_right(sums, place) - 1
        at_s = (step + (place - sums[step]) / expected[step]) * step_s
        tokens, outputs = KINDS[kind].inputs(rng), KINDS[kind].outputs(rng)
        requests.append(Request(at_s, tokens, outputs, own_blocks(number, tokens)))
    return Trace(f"{kind}, {day.name}", requests)


def _places(rng: random.Random, kind: Kind, total: float) -> list[float]:
    """Arrivals of rate 1, as bursty as the trace's, to be laid out over the day."""
    found, place = [], 0.0
    gaps = gamma_gaps(rng, 1.0, kind.cv)
    while (place := place + next(gaps)) < total:
        found.append(place)
    return found
