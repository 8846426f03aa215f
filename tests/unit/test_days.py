"""Days of requests: their shape, their noise, and that a seed is one day."""

from __future__ import annotations

from itertools import pairwise

import pytest

from router.twin.days import DAYS, HOURS, WORKDAY, Burst, Day, generate

SECONDS = 4800.0


@pytest.mark.parametrize("day", DAYS.values(), ids=list(DAYS))
def test_a_day_s_requests_follow_its_hours(day: Day) -> None:
    trace = generate(day, 1, 10.0, SECONDS)
    hour_s = SECONDS / HOURS
    for hour in range(HOURS):
        came = sum(hour * hour_s <= r.at_s < (hour + 1) * hour_s for r in trace.requests)
        expected = sum(day.at(hour + (n + 0.5) / 60) for n in range(60)) / 60 * 10.0 * hour_s
        assert came == pytest.approx(expected, rel=0.2)


def test_a_seed_is_one_day_and_another_is_another() -> None:
    one, same, other = (generate(WORKDAY, seed, 2.0, SECONDS).requests for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert all(a.at_s <= b.at_s for a, b in pairwise(one))
    assert one[0].at_s >= 0
    assert one[-1].at_s <= SECONDS


def test_a_burst_is_as_high_and_as_long_as_it_says() -> None:
    day = Day("x", (0.5,) * HOURS, (Burst(3.0, 1.5, 2.0),))
    assert [day.at(hour) for hour in (2.9, 3.0, 4.4, 4.6)] == [0.5, 1.0, 1.0, 0.5]


def test_the_night_goes_on_into_the_morning() -> None:
    day = Day("x", (0.2, *(0.5,) * 22, 1.0))
    assert day.at(23.5) == pytest.approx(0.6)
