"""The forecast of arrivals: what it follows, what it does not fall for."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.core.forecast import Forecast


def poisson(rng: random.Random, mean: float) -> int:
    count, at = 0, rng.expovariate(1.0)
    while at < mean:
        count, at = count + 1, at + rng.expovariate(1.0)
    return count


@given(st.lists(st.tuples(st.floats(0, 1e5), st.floats(0.1, 1000)), min_size=1, max_size=50))
def test_whatever_is_counted_the_forecast_is_a_number_from_zero_on(
    counts: list[tuple[float, float]],
) -> None:
    forecast = Forecast()
    for arrived, seconds in counts:
        forecast.count(arrived, seconds)
        ahead = forecast.ahead(60.0)
        assert 0 <= ahead.per_s < 1e12
        assert 0 <= ahead.deviation < 1e12


@pytest.mark.parametrize("per_s", [0.2, 2.0, 50.0])
def test_a_steady_load_is_foreseen_to_stay(per_s: float) -> None:
    rng, forecast, errors = random.Random(1), Forecast(), []
    for look in range(400):
        forecast.count(poisson(rng, per_s * 15), 15.0)
        if look > 40:
            ahead = forecast.ahead(75.0)
            errors.append((ahead.per_s - per_s) / ahead.deviation)
    assert abs(sum(errors) / len(errors)) < 0.5
    assert sum(abs(e) > 2 for e in errors) < 0.1 * len(errors)
    assert forecast.dispersion < 1.5


def test_a_ramp_is_foreseen_further_up_than_it_is() -> None:
    forecast = Forecast()
    for look in range(80):
        forecast.count((100 + look) * 15, 15.0)
    assert forecast.level == pytest.approx(179, rel=0.05)
    assert forecast.ahead(75.0).per_s == pytest.approx(184, rel=0.05)
    assert forecast.ahead(75.0).per_s > forecast.level


def test_twice_the_load_is_believed_after_two_looks() -> None:
    forecast = Forecast()
    for _ in range(60):
        forecast.count(300, 15.0)
    forecast.count(600, 15.0)
    forecast.count(600, 15.0)
    assert forecast.level > 32


def test_bursts_make_it_less_sure() -> None:
    even, bursty = Forecast(), Forecast()
    for look in range(200):
        even.count(30, 15.0)
        bursty.count(60 if look % 2 else 0, 15.0)
    assert bursty.dispersion > 3 * even.dispersion
    assert bursty.ahead(75.0).deviation > even.ahead(75.0).deviation


def test_a_larger_group_is_known_more_exactly() -> None:
    shares = []
    for per_look in (10, 1000):
        forecast = Forecast()
        for _ in range(100):
            forecast.count(per_look, 15.0)
        ahead = forecast.ahead(75.0)
        shares.append(ahead.deviation / ahead.per_s)
    assert shares[1] < shares[0] / 2
