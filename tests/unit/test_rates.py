"""What is learnt of a worker's steps and pulls, whatever noise is in them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.core.least_squares import LeastSquares
from router.core.rates import CHUNK_TOKENS_PRIOR, PULL_PRIOR, STEP_PRIOR, Rates
from workers.api import Step

if TYPE_CHECKING:
    from collections.abc import Callable

Features = tuple[float, ...]
TRUE = (0.012, 1.3e-4, 1e-8, 3e-4, 2e-8)


def decoding(rng: random.Random) -> Features:
    streams = rng.randint(1, 60)
    return (1.0, 0, 0, streams, streams * rng.randint(100, 4000))


def prefilling(rng: random.Random) -> Features:
    tokens, before = rng.randint(1, 2048), rng.choice((0, 0, 2048, 8192))
    return (1.0, tokens, tokens * (before + (tokens + 1) / 2), 0, 0)


def mixed(rng: random.Random) -> Features:
    return (1.0, *prefilling(rng)[1:3], *decoding(rng)[3:])


def true(rates: Features, x: Features) -> float:
    return sum(a * b for a, b in zip(rates, x, strict=True))


def errors(learnt: LeastSquares, rates: Features, kind: Callable[..., Features]) -> list[float]:
    rng = random.Random(99)
    xs = [kind(rng) for _ in range(100)]
    return sorted(abs(learnt.predict(x) / true(rates, x) - 1) for x in xs)


@pytest.mark.parametrize("kind", [decoding, prefilling, mixed])
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.02, 50.0))
def test_a_hundred_noisy_steps_of_any_worker_foretell_the_next(
    kind: Callable[..., Features], seed: int, pace: float
) -> None:
    rng = random.Random(seed)
    rates = tuple(pace * r * rng.uniform(0.5, 2) for r in TRUE)
    learnt = LeastSquares(STEP_PRIOR)
    for _ in range(150):
        x = kind(rng)
        learnt.learn(x, true(rates, x) * rng.lognormvariate(0, 0.05))
    found = errors(learnt, rates, kind)
    assert found[50] < 0.06
    assert found[95] < 0.2


@pytest.mark.parametrize("stall_s", [5.0, 60.0, 3600.0])
def test_a_stall_moves_nothing_by_much(stall_s: float) -> None:
    rng, learnt = random.Random(1), LeastSquares(STEP_PRIOR)
    for number in range(400):
        x = mixed(rng)
        noise = rng.lognormvariate(0, 0.05)
        learnt.learn(x, stall_s if number % 100 == 99 else true(TRUE, x) * noise)
    assert errors(learnt, TRUE, mixed)[95] < 0.1


def test_a_worker_that_becomes_slower_is_known_to_be() -> None:
    rng, learnt = random.Random(1), LeastSquares(STEP_PRIOR)
    slow = tuple(4 * r for r in TRUE)
    for rates in (TRUE, slow):
        for _ in range(400):
            x = mixed(rng)
            learnt.learn(x, true(rates, x) * rng.lognormvariate(0, 0.05))
    assert errors(learnt, slow, mixed)[50] < 0.05


def test_equal_steps_teach_what_they_take_and_no_more() -> None:
    """Collinear for ever: their sum is known, and what they say nothing of stays the prior."""
    learnt = LeastSquares(STEP_PRIOR)
    for _ in range(20_000):
        learnt.learn((1.0, 0, 0, 8, 8000), 0.05)
    assert learnt.predict((1.0, 0, 0, 8, 8000)) == pytest.approx(0.05, rel=1e-3)
    assert learnt.rates[1:3] == list(STEP_PRIOR[1:3])


def test_a_day_of_decoding_leaves_what_is_known_of_prefill() -> None:
    rng, learnt = random.Random(1), LeastSquares(STEP_PRIOR)
    for kind, steps in ((prefilling, 300), (decoding, 20_000)):
        for _ in range(steps):
            x = kind(rng)
            learnt.learn(x, true(TRUE, x) * rng.lognormvariate(0, 0.05))
    assert errors(learnt, TRUE, prefilling)[95] < 0.1


def test_steps_that_fit_say_nothing_of_those_of_another_kind() -> None:
    rng, learnt = random.Random(7), LeastSquares(STEP_PRIOR)
    rates = tuple(5 * r for r in TRUE)
    for number in range(2000):
        x = prefilling(rng) if number % 50 == 49 else decoding(rng)
        learnt.learn(x, true(rates, x))
    assert errors(learnt, rates, prefilling)[90] < 0.05


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 10**6)] * 4, st.floats(0, 1e4)), max_size=60))
def test_no_rate_is_ever_negative_or_no_number(
    steps: list[tuple[int, int, int, int, float]],
) -> None:
    learnt = LeastSquares(STEP_PRIOR)
    for *x, seconds in steps:
        learnt.learn((1.0, *x), seconds)
        assert all(0 <= r < float("inf") for r in learnt.rates)


def test_the_largest_full_step_is_the_chunk() -> None:
    rates = Rates()
    rates.stepped(Step(0.1, 300), prefill_left=False)
    assert rates.chunk_tokens == CHUNK_TOKENS_PRIOR, "more might have fitted"
    rates.stepped(Step(0.1, 256), prefill_left=True)
    rates.stepped(Step(0.1, 40), prefill_left=True)
    assert rates.chunk_tokens == 256


def test_a_link_s_latency_and_bandwidth_are_learnt() -> None:
    rng, rates = random.Random(1), Rates()
    for _ in range(100):
        size = rng.randint(10**5, 10**9)
        rates.pulled(size, (0.01 + size / 3e9) * rng.lognormvariate(0, 0.1))
    latency_s, byte_s = rates.pull.rates
    assert byte_s == pytest.approx(1 / 3e9, rel=0.15)
    assert latency_s == pytest.approx(0.01, rel=0.3)


def test_a_new_worker_is_taken_for_one_of_its_kind() -> None:
    known = Rates()
    for _ in range(100):
        known.stepped(Step(0.5, 1000), prefill_left=False)
    new = Rates([known])
    assert new.step.predict((1.0, 1000, 0, 0, 0)) == pytest.approx(0.5, rel=0.05)
    assert new.pull.rates == list(PULL_PRIOR)


def test_a_new_worker_costs_no_more_than_those_whose_streams_were_found_to_cost_nothing() -> None:
    old = [Rates(), Rates()]
    for rates in old:
        for step in range(200):
            streams = step % 7 + 1
            said = Step(0.015, decodes=streams, context_tokens=1000 * streams)
            rates.stepped(said, prefill_left=False)
    new, x = Rates(old), (1.0, 0.0, 0.0, 5.0, 5000.0)
    assert min(old[0].step.rates[3:]) == 0, "what this is about"
    assert new.step.predict(x) == pytest.approx(old[0].step.predict(x))
    for _ in range(50):  # And it is believed when it is another.
        new.step.learn(x, 0.03)
    assert new.step.predict(x) == pytest.approx(0.03, rel=0.05)
