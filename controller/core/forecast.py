"""How many requests a second will come, from how many came: a level and a trend, and how sure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

LEVEL_NOISE: Final = 2e-5
"""Variance that the level gains a second, of its square: 3.5 % in a minute."""
TREND_NOISE: Final = 2e-10
"""Variance that the trend gains a second, of the level's square: in ten minutes it may turn from
flat to a fiftieth of the level more each minute."""
DISPERSION_KEPT: Final = 0.95
DISPERSION: Final = 1.0, 20.0
"""Least and most variance over the mean: 1 of Poisson arrivals, more of bursty ones."""
SURPRISE: Final = 3.0
"""Standard deviations off twice in a row, to one side: the load has changed, and did not drift."""


@dataclass(frozen=True, slots=True)
class Foreseen:
    """Requests a second at some time to come."""

    per_s: float
    deviation: float
    """Standard, of what was foreseen and not of single arrivals."""


class Forecast:
    """A local linear trend, followed by a Kalman filter (Harvey, "Forecasting, structural time
    series models and the Kalman filter", 1989).

    The noise of a count is known beforehand: of n arrivals it is n times their dispersion, which is
    measured. So a small group's trend is believed as little as it deserves to be.
    """

    def __init__(self) -> None:
        self.dispersion = 1.0
        self._level = self._trend = 0.0
        self._p = (0.0, 0.0, 0.0)
        """Covariance: of the level, of both, of the trend."""
        self._known = False
        self._surprised = 0

    @property
    def level(self) -> float:
        return max(0.0, self._level)

    @property
    def trend(self) -> float:
        """Requests a second, a second."""
        return self._trend

    def count(self, arrived: float, seconds: float) -> None:
        """So many came in the last so many seconds, above zero."""
        seen = arrived / seconds
        if not self._known:
            self._known, self._level = True, seen
            self._p = (self._noise(seconds), 0.0, 0.0)
            return
        self._pass(seconds)
        noise = self._noise(seconds)
        off, (a, b, c) = seen - self._level, self._p
        spread = a + noise
        self._learn_dispersion(off * off / spread)
        self._surprise(off / spread**0.5)
        if abs(self._surprised) > 1:
            a += off * off
            spread = a + noise
        gain, turn = a / spread, b / spread
        self._level += gain * off
        self._trend += turn * off
        self._p = (a - gain * a, b - gain * b, c - turn * b)

    def ahead(self, seconds: float) -> Foreseen:
        a, b, c = self._p
        deviation = (a + 2 * b * seconds + c * seconds * seconds) ** 0.5
        return Foreseen(max(0.0, self._level + self._trend * seconds), deviation)

    def _noise(self, seconds: float) -> float:
        """Variance of what is seen about the level, by the level alone: were it by what is seen,
        much would count for less than little. One more: of none it is not known that none come."""
        return self.dispersion * (self.level + 1 / seconds) / seconds

    def _pass(self, seconds: float) -> None:
        a, b, c = self._p
        square = max(self._level, 1 / seconds) ** 2
        self._level += self._trend * seconds
        self._p = (
            a + 2 * b * seconds + c * seconds**2 + LEVEL_NOISE * square * seconds,
            b + c * seconds,
            c + TREND_NOISE * square * seconds,
        )

    def _learn_dispersion(self, ratio: float) -> None:
        low, high = DISPERSION
        kept = DISPERSION_KEPT
        found = self.dispersion * (kept + (1 - kept) * min(ratio, SURPRISE**2))
        self.dispersion = min(high, max(low, found))

    def _surprise(self, off: float) -> None:
        side = 1 if off > SURPRISE else -1 if off < -SURPRISE else 0
        self._surprised = self._surprised + side if side and side * self._surprised >= 0 else side
