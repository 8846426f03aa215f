"""Rates of an engine's steps, and what steps of so many sequences take besides.

A step's time is linear in what it computes, but for steps that only generate: kernels are chosen by
the batch's size, and one of two sequences may take longer than one of three.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

from router.twin.fit import Fit, fit, seconds_of, with_errors
from workers.engines.sim_settings import besides_s

if TYPE_CHECKING:
    from collections.abc import Sequence

    from router.twin.sweeps import Row, Samples


def fit_batches(samples: Samples) -> tuple[Fit, tuple[float, ...]]:
    """The rates; and seconds that a step of one sequence takes besides, of two, and so on, with
    those that no sample has between those that some have."""
    rates = fit(samples.rows, samples.seconds).rates
    off: defaultdict[int, list[float]] = defaultdict(list)
    for row, y in zip(samples.rows, samples.seconds, strict=True):
        if _generates(row):
            off[int(row[3])].append(y - seconds_of(rates, row))
    besides = _filled({count: median(seconds) for count, seconds in off.items()})
    errors = [
        abs(seconds_of(rates, row) + of_batch(besides, row) - y) / y
        for row, y in zip(samples.rows, samples.seconds, strict=True)
        if y > 0
    ]
    return with_errors(rates, errors), besides


def of_batch(besides: Sequence[float], row: Row) -> float:
    """What of them this step takes."""
    return besides_s(besides, int(row[3])) if _generates(row) else 0.0


def _generates(row: Row) -> bool:
    """And nothing else."""
    return row[3] > 0 and not row[1]


def _filled(known: dict[int, float]) -> tuple[float, ...]:
    """From one on; between two that are known on the line between them, before the first as it."""
    counts = sorted(known)
    found = [known[counts[0]]] * counts[0] if counts else []
    for low, high in pairwise(counts):
        a, b = known[low], known[high]
        found += [a + (b - a) * (n - low) / (high - low) for n in range(low + 1, high + 1)]
    return tuple(found)
