"""Rates from samples, and what a sweep refuses to take for one."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from router.twin.batches import fit_batches, of_batch
from router.twin.fit import fit, seconds_of
from router.twin.probe import ProbeFailed
from router.twin.sweeps import Samples, Sweep, Sweeper
from tests.unit.test_dispatch import hello
from workers.api import Role, Step

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


def sweep_over(monkeypatch: pytest.MonkeyPatch, told: int, real: int) -> tuple[Samples, int]:
    """Prompts' samples, of a worker that tells `told` tokens a step and computes `real`."""
    worker = structs.replace(hello("w", Role.PREFILL), step_tokens=told, max_model_len=4096)
    asked = [0]

    def ask(_: Sweeper, __: Any, tokens: int) -> float:
        asked.append(tokens)
        return 1.0

    monkeypatch.setattr(Sweeper, "_prompt_s", ask)
    last = lambda *_: Step(1.0, prefill_tokens=(asked[-1] - 1) % real + 1)  # noqa: E731
    monkeypatch.setattr(Sweeper, "_last_step", last)
    line: Any = SimpleNamespace(hello=worker)
    sweep = Sweep(prompts=(100, 200, 900), repeats=1)
    return Sweeper(cast("Any", None), sweep, lambda _: b"").prompts(line)


def test_a_prompt_takes_as_many_steps_as_the_worker_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, chunk = sweep_over(monkeypatch, told=256, real=256)
    assert chunk == 256
    assert [(row[0], row[1]) for row in samples.rows] == [(1, 100), (1, 200), (4, 900)]


@pytest.mark.parametrize(("told", "real", "why"), [(0, 256, "tell"), (512, 256, "add up")])
def test_a_worker_that_does_otherwise_than_it_tells_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, told: int, real: int, why: str
) -> None:
    with pytest.raises(ProbeFailed, match=why):
        sweep_over(monkeypatch, told, real)
