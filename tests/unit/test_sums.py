"""What many processes' metrics come to, whatever restarts in between."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, generate_latest

from controller.core.counters import Totals
from controller.core.demand import Observed, Size
from controller.core.sums import OF_ROUTERS, OF_WORKERS, READ, Group, Sums
from controller.observe import read_samples
from router.metrics import DemandMetrics, QueueMetrics
from tests.unit.test_demand import Router
from workers.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client import Metric

STEPS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 50), st.booleans(), st.booleans()), max_size=40
)
"""Whose turn, what it counts, whether it begins anew before that, whether it is seen then."""


@given(STEPS)
def test_what_is_counted_never_falls_and_is_never_more_than_there_was(
    steps: list[tuple[int, int, bool, bool]],
) -> None:
    totals, counts, there_was, before = Totals(), [0, 0, 0], [0, 0, 0], 0.0
    lives = [0.0, 0.0, 0.0]
    for who, more, anew, seen in steps:
        if anew:
            counts[who], lives[who] = 0, lives[who] + 1.0
        counts[who] += more
        there_was[who] += more
        if seen:
            totals.add(str(who), {"n": counts[who]}, lives[who])
        assert before <= totals["n"] <= sum(there_was)
        before = totals["n"]


@given(STEPS)
def test_of_processes_seen_in_each_life_nothing_is_lost(
    steps: list[tuple[int, int, bool, bool]],
) -> None:
    totals, counts, there_was = Totals(), [0, 0, 0], 0
    for who in range(3):
        totals.add(str(who), {"n": 0}, 0.0)
    lives = [0.0, 0.0, 0.0]
    for who, more, anew, _ in steps:
        if anew:
            counts[who], lives[who] = 0, lives[who] + 1.0
        counts[who] += more
        there_was += more
        totals.add(str(who), {"n": counts[who]}, lives[who])
    assert totals["n"] == there_was


def test_history_of_before_a_process_was_known_is_not_news() -> None:
    totals = Totals()
    totals.add("r", {"n": 1e6})
    assert totals["n"] == 0
    totals.add("r", {"n": 1e6 + 5})
    assert totals["n"] == 5


def test_one_counter_that_fell_says_that_all_began_anew() -> None:
    totals = Totals()
    totals.add("r", {"a": 10, "b": 3})
    totals.add("r", {"a": 2, "b": 4})
    assert (totals["a"], totals["b"]) == (2, 4)


def test_what_is_gone_has_counted_all_the_same() -> None:
    totals = Totals()
    totals.add("r", {"n": 1})
    totals.add("r", {"n": 3})
    totals.forget("r")
    totals.add("r", {"n": 100})
    assert totals["n"] == 2


def a_router(**values: float) -> dict[str, float]:
    return dict.fromkeys(OF_ROUTERS, 0.0) | {f"tandem_router_{k}": v for k, v in values.items()}


def a_worker(**values: float) -> dict[str, float]:
    named = {f"tandem_worker_{k}": v for k, v in values.items() if k != "running"}
    running = {"vllm:num_requests_running": values.get("running", 0.0)}
    return dict.fromkeys(OF_WORKERS, 0.0) | named | running


def test_a_look_sums_what_routers_and_workers_say() -> None:
    sums = Sums()
    for came in (10.0, 17.0):
        sums.count("r1", a_router(arrived_total=came))
        sums.count("r2", a_router(arrived_total=2 * came, met_total=came))
        sums.count("d", a_worker(output_tokens_total=100 * came))
    group = Group(
        [
            a_router(queue_prompt_tokens=5, prefill_tokens_per_second=100),
            a_router(queue_prompt_tokens=7, prefill_tokens_per_second=0),
        ],
        [a_worker(prefill_tokens_queued=30, running=9)],
        [
            a_worker(prefill_tokens_queued=1, running=4, blocks_free=10, blocks_total=100),
            a_worker(running=2, blocks_free=20, blocks_total=100),
        ],
    )
    assert sums.observed(group, Size(3, 4), 50.0) == Observed(
        at=50.0, requests=21.0, prompt_tokens=0.0, computed_tokens=0.0, output_tokens=700.0,
        judged=0.0, first_in_time=0.0, met=7.0, queued_tokens=43.0, prefill_tokens_per_s=100.0,
        running=6.0, kv_share=0.85, wanted=Size(3, 4), ready=Size(1, 2),
    )  # fmt: skip


class Unregistered:
    """A collector in a registry of its own."""

    def __init__(self, *parts: DemandMetrics | QueueMetrics) -> None:
        self._parts = parts

    def collect(self) -> Iterator[Metric]:
        for part in self._parts:
            yield from part.collect()


def test_what_is_read_is_what_routers_and_workers_really_say() -> None:
    from prometheus_client import REGISTRY

    router = Router()
    metrics = DemandMetrics(router.dispatch), QueueMetrics(router.dispatch)
    try:
        registry = CollectorRegistry()
        registry.register(Unregistered(*metrics))  # type: ignore[arg-type]
        assert read_samples(generate_latest(registry).decode()).keys() >= OF_ROUTERS
    finally:
        for one in metrics:
            REGISTRY.unregister(one)  # type: ignore[arg-type]
    worker = generate_latest(Metrics().registry).decode()
    assert read_samples(worker).keys() == OF_WORKERS


def test_labels_are_summed_and_what_sizing_does_not_know_is_not_read() -> None:
    registry = CollectorRegistry()
    counter = Counter("tandem_worker_output_tokens_total", "It", ["by"], registry=registry)
    other = Counter("other", "It", ["text"], registry=registry)
    counter.labels("a").inc(2)
    counter.labels('b",x="tandem_router_met_total').inc(3)
    other.labels("tandem_router_met_total 5").inc()
    text = generate_latest(registry).decode()
    assert read_samples(text) == {"tandem_worker_output_tokens_total": 5.0}


@pytest.mark.parametrize("bad", ["tandem_router_met_total x", "tandem_router_met_total NaN"])
def test_what_is_no_number_is_no_answer(bad: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # The parser's own.
        read_samples(bad)


@given(st.sampled_from(sorted(READ)), st.text('{}"=, \\\n#a_1.9e+-Na', max_size=30))
def test_any_text_is_read_or_refused(name: str, rest: str) -> None:
    with suppress(ValueError):
        assert read_samples(name + rest).keys() <= READ
