"""Rates from samples."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.twin.batches import fit_batches, of_batch
from router.twin.fit import fit, seconds_of
from router.twin.sweeps import Samples

if TYPE_CHECKING:
    from router.twin.sweeps import Row

RATES = (0.02, 1e-4, 2e-8, 1e-3, 5e-7)


def rows() -> list[Row]:
    prompts: list[Row] = [
        (-(-n // 1024), n, n * (n + 1) / 2, 0, 0) for n in (16, 64, 256, 700, 1500, 3000)
    ]
    decodes: list[Row] = [(1, 0, 0, k, k * c) for k in (1, 2, 4, 8, 16) for c in (64, 500, 2000)]
    return [*prompts, *decodes]


def seconds(row: Row) -> float:
    return sum(r * x for r, x in zip(RATES, row, strict=True))


def test_exact_samples_give_exact_rates() -> None:
    found = fit(rows(), [seconds(r) for r in rows()])
    assert found.rates == pytest.approx(RATES, rel=1e-3)
    assert found.error_p90 < 1e-4


def test_a_stall_now_and_then_moves_nothing() -> None:
    rng = random.Random(0)
    samples = rows() * 4
    took = [seconds(r) * rng.uniform(0.97, 1.03) * (5 if n % 19 == 0 else 1)
            for n, r in enumerate(samples)]  # fmt: skip
    found = fit(samples, took)
    for row in rows():
        assert sum(r * x for r, x in zip(found.rates, row, strict=True)) == pytest.approx(
            seconds(row), rel=0.03
        )


@settings(deadline=None)
@given(st.lists(st.floats(0.001, 10), min_size=21, max_size=21))
def test_no_rate_is_below_zero(took: list[float]) -> None:
    assert min(fit(rows(), took).rates) >= 0


BESIDES = {1: 0.001, 2: 0.012, 4: -0.002, 8: 0.0, 16: 0.0}
"""Two sequences take longer than four."""


def bent() -> Samples:
    samples = Samples()
    for row in rows():
        samples.add(row, seconds(row) + BESIDES.get(int(row[3]), 0.0))
    return samples


def test_what_a_batch_of_a_size_takes_besides_is_found() -> None:
    samples = bent()
    found, besides = fit_batches(samples)
    assert len(besides) == 16
    for row, took in zip(samples.rows, samples.seconds, strict=True):
        assert seconds_of(found.rates, row) + of_batch(besides, row) == pytest.approx(
            took, rel=0.06
        )
    assert found.error_p90 < 0.01 < fit(samples.rows, samples.seconds).error_p90


def test_sizes_between_two_are_on_the_line_between_them_and_beyond_the_last_as_it() -> None:
    _, besides = fit_batches(bent())
    assert besides[2] == pytest.approx((besides[1] + besides[3]) / 2)
    assert besides[5] == pytest.approx((besides[3] + besides[7]) / 2)
    assert of_batch(besides, (1, 0, 0, 99, 0)) == besides[15]
    assert of_batch(besides, (1, 5, 15, 3, 0)) == 0, (
        "with a prompt in the step it is another kernel"
    )


def test_without_sequences_that_generate_nothing_is_besides() -> None:
    samples = Samples()
    for row in rows():
        if not row[3]:
            samples.add(row, seconds(row))
    assert fit_batches(samples)[1] == ()


def test_of_nothing_nothing_is_fitted() -> None:
    with pytest.raises(ValueError, match="nothing to fit"):
        fit([], [])
