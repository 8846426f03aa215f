"""Rates that explain measured seconds best: least squares, none below zero, by relative error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

ROUNDS: Final = 20_000
OUTLIER: Final = 3.0
"""Samples are fitted again without those whose error is beyond so many times the median error."""
_REFITS: Final = 2


@dataclass(frozen=True, slots=True)
class Fit:
    rates: list[float]
    error_p50: float
    """Of the samples, relative."""
    error_p90: float
    samples: int
    noise: float = 0.0
    """Standard deviation of the samples' errors without the far ones, relative."""


def fit(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> Fit:
    """seconds ~ rates . row for each row. Raises ValueError without samples.

    An engine is now and then late, and never early: what is far off is left out of the second fit,
    but not of the errors.
    """
    samples = [(row, y) for row, y in zip(rows, seconds, strict=True) if y > 0]
    if not samples:
        raise ValueError("there is nothing to fit")
    kept, rates = samples, list[float]()
    for _ in range(_REFITS + 1):
        rates = _nonnegative([[x / y for x in row] for row, y in kept])
        errors = [_error(rates, row, y) for row, y in samples]
        limit = OUTLIER * max(1e-9, sorted(errors)[len(errors) // 2])
        kept = [s for s, error in zip(samples, errors, strict=True) if error <= limit]
    return with_errors(rates, [_error(rates, row, y) for row, y in samples])


def with_errors(rates: list[float], errors: Sequence[float]) -> Fit:
    """Relative ones, of all samples."""
    ordered = sorted(errors)
    # Of a normal one, two thirds are within a standard deviation.
    p50, p68, p90 = (ordered[int(q * (len(ordered) - 1))] for q in (0.5, 0.68, 0.9))
    return Fit(rates, p50, p90, len(ordered), p68)


def seconds_of(rates: Sequence[float], row: Sequence[float]) -> float:
    return sum(r * x for r, x in zip(rates, row, strict=True))


def _error(rates: Sequence[float], row: Sequence[float], y: float) -> float:
    return abs(seconds_of(rates, row) - y) / y


def _nonnegative(rows: Sequence[Sequence[float]]) -> list[float]:
    """Rates r >= 0 with rows . r as near 1 as can be, by coordinate descent."""
    size = len(rows[0])
    scale = [max(1e-300, sum(row[i] ** 2 for row in rows) ** 0.5) for i in range(size)]
    normal = [
        [sum(row[i] * row[j] for row in rows) / scale[i] / scale[j] for j in range(size)]
        for i in range(size)
    ]
    target = [sum(row[i] for row in rows) / scale[i] for i in range(size)]
    rates = [0.0] * size
    for _ in range(ROUNDS):
        moved = 0.0
        for i in range(size):
            if normal[i][i] <= 0:
                continue
            gradient = target[i] - sum(n * r for n, r in zip(normal[i], rates, strict=True))
            after = max(0.0, rates[i] + gradient / normal[i][i])
            moved = max(moved, abs(after - rates[i]))
            rates[i] = after
        if moved < 1e-12 * max(1e-300, *rates):
            break
    return [r / s for r, s in zip(rates, scale, strict=True)]
