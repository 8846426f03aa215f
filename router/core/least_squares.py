"""Weighted least squares, learnt one sample at a time, with a prior and without negative rates."""

from __future__ import annotations

from operator import mul
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

FORGOTTEN: Final = 0.01, 0.3
"""Least and most of what is known that a sample replaces: a rate hangs on its last hundred samples,
or on the last few while these don't fit."""
FORGOTTEN_BY_ERROR: Final = 0.2
"""Of the usual relative error: a worker that has become another is learnt anew (Fortescue,
Kershenbaum and Ydstie, "Implementation of self-tuning regulators with variable forgetting factors",
Automatica 17, 1981)."""
CLIP: Final = 3.0
"""A residual beyond so many usual ones pulls no harder than one of so many (Huber, "Robust
estimation of a location parameter", 1964)."""
UNKNOWN: Final = 3.0
USUAL_KEPT: Final = 0.95
TRUST: Final = 0.01
"""In the prior: a guess good to a factor of two, against samples good to a tenth."""
LEAST: Final = 1e-6
"""What is below, of samples and of what is foretold of them, is taken for this."""


class LeastSquares:
    """Learns `rates` of y = rates . x, by relative error: a short step teaches as much as a long.

    The information form of recursive least squares: R (what is known, by pairs of rates) and the
    gradient g = b - R rates. Only rates that a sample has part in are forgotten a little (R is
    scaled from both sides, which leaves it sound), so a day of decode steps leaves what is known of
    prefill. Then one round of coordinate descent, each rate held at zero or above. It divides by
    R's diagonal alone, so samples that never tell two rates apart leave them as they were.
    """

    __slots__ = ("_gradient", "_information", "_usual_errors", "rates", "samples")

    def __init__(self, prior: Sequence[float], rates: Sequence[float] | None = None) -> None:
        """`prior`: a first guess, above zero. `rates`: a better one, where there is one."""
        self.rates = list(prior if rates is None else rates)
        self.samples = 0
        self._usual_errors: dict[tuple[bool, ...], float] = {}
        """Relative, by which rates have part in a sample: a thousand steps of one kind that fit say
        nothing of how well the next of another will. It decays from `UNKNOWN` as samples fit."""
        self._information = [
            [TRUST / (g * g) if i == j else 0.0 for j in range(len(prior))]
            for i, g in enumerate(prior)
        ]
        self._gradient = [0.0] * len(prior)

    def predict(self, x: Sequence[float]) -> float:
        return float(sum(map(mul, self.rates, x)))

    def learn(self, x: Sequence[float], y: float) -> None:
        """One sample, none of it negative. Some ten microseconds for five rates."""
        if y <= 0.0:
            return
        rates, information, gradient = self.rates, self._information, self._gradient
        self.samples += 1
        y = max(y, LEAST)
        foretold = max(sum(map(mul, rates, x)), LEAST)
        # Relative to the geometric mean: too high and too low by a factor weigh alike.
        weight = (foretold * y) ** -0.5
        error = abs(y - foretold) * weight
        kind = tuple(map(bool, x))
        usual = self._usual_errors.get(kind, UNKNOWN)
        kept = 1.0 - min(FORGOTTEN[1], max(FORGOTTEN[0], FORGOTTEN_BY_ERROR * usual))
        if error > (limit := CLIP * usual):
            weight *= (limit / error) ** 0.5
            error = limit
        self._usual_errors[kind] = max(0.01, USUAL_KEPT * usual + (1 - USUAL_KEPT) * error)
        miss = weight * (y - foretold)
        some = kept**0.5
        parts = [(weight * each, some if each else 1.0) for each in x]
        for i, (xi, ki) in enumerate(parts):
            information[i] = [
                r * ki * kj + xi * xj
                for r, (xj, kj) in zip(information[i], parts, strict=True)
            ]  # fmt: skip
            gradient[i] = gradient[i] * ki * ki + xi * miss
        for i, row in enumerate(information):
            rate = rates[i]
            change = max(-rate, gradient[i] / row[i])
            if change:
                rates[i] = rate + change
                self._gradient = gradient = [
                    g - change * r for g, r in zip(gradient, row, strict=True)
                ]
