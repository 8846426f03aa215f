"""A fleet of the twin that grows and shrinks: nothing is lost, and a seed is one history."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from controller.core.demand import Decision, Observed, Size
from controller.core.sizing import Sizer, SizingPolicy
from router.core.limits import Limits
from router.twin.elastic import Group
from router.twin.generate import generate
from router.twin.report import Objective
from router.twin.rivals import Fixed, Schedule, Target, Threshold, queues
from router.twin.run import Options, Twin
from router.twin.timeline import timeline
from workers.api import Role
from workers.engines.sim_settings import SimSettings

if TYPE_CHECKING:
    from router.twin.elastic import Law

ENGINE = SimSettings(
    prefill_tokens_per_s=2000.0, step_s=0.01, pair_s=2e-8, stream_s=5e-4, context_token_s=2e-7,
    block_tokens=64, blocks_total=512, chunk_tokens=1024, streams=True, lease_s=5.0,
)  # fmt: skip
OBJECTIVE = Objective(ttft_s=1.5, itl_s=0.03)


class Restless:
    """Another size at every look."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def look(self, observed: Observed) -> Decision:
        size = Size(self._rng.randint(1, 5), self._rng.randint(1, 5))
        return Decision(observed.at, size, "a whim", {})


def run(law: Law, requests: int = 400, look_s: float = 3.0) -> tuple[Twin, Group]:
    trace = generate("mooncake-conversation", 3, requests).scaled(lengths=16, time=0.25)
    group = Group({Role.PREFILL: ENGINE, Role.DECODE: ENGINE}, Size(2, 2), law, startup_s=4.0)
    group.look_s = look_s
    # No objective for the first token: who can't meet one is refused.
    limits = Limits(itl_s=OBJECTIVE.itl_s)
    twin = Twin(trace, group.plan, Options(limits=limits), group)
    twin.run()
    return twin, group


@pytest.mark.parametrize("seed", range(8))
def test_a_fleet_that_scales_loses_no_request(seed: int) -> None:
    # Requests are refused again and again by decode workers that began to drain meanwhile.
    twin, _ = run(Restless(seed), look_s=2.0)
    outcomes = twin.outcomes
    assert outcomes.ended.count(1) == len(outcomes)
    assert not outcomes.failed
    assert not outcomes.refused
    for number, request in enumerate(twin.trace.requests):
        assert outcomes.tokens[number] == request.output_tokens
    assert len(twin.dispatch) == 0
    assert twin.departed  # Else it would say nothing.
    for worker in (*twin.workers.values(), *twin.departed):
        load = worker.model.load(twin.now + ENGINE.lease_s)
        assert (load.running, load.waiting) == (0, 0)
        assert load.blocks_free == ENGINE.blocks_total


@pytest.mark.parametrize("seed", range(8))
def test_a_drained_worker_leaves_when_nothing_is_on_it_and_nobody_misses_it(seed: int) -> None:
    lost: list[tuple[str, bool]] = []

    class Watched(Group):
        def left(self, worker_id: str, now: float) -> None:
            lost.append((worker_id, watched.dispatch.is_on(worker_id)))
            super().left(worker_id, now)

    trace = generate("mooncake-conversation", 3, 300).scaled(lengths=16, time=0.25)
    group = Watched({Role.PREFILL: ENGINE, Role.DECODE: ENGINE}, Size(2, 2), Restless(seed), 4.0)
    group.look_s = 3.0
    watched = Twin(trace, group.plan, Options(), group)
    watched.run()
    assert lost
    assert not any(on for _, on in lost)
    gone = {p.worker_id for p in group.pods if p.gone_at < float("inf")}
    assert {worker_id for worker_id, _ in lost} <= gone
    for pod in group.pods:
        assert pod.asked_at <= pod.told_at <= pod.gone_at


def test_a_seed_is_one_history() -> None:
    found = []
    for _ in range(2):
        twin, group = run(Sizer(SizingPolicy(look_s=3.0, startup_s=4.0, ttft_s=1.5, itl_s=0.03)))
        found.append((group.decisions, group.seen, twin.events, list(twin.outcomes.last_s)))
    assert found[0] == found[1]


def test_observations_are_the_run_s_own() -> None:
    _, group = run(Fixed(Size(3, 3)))
    for before, now in pairwise(group.seen):
        for name in (
            "requests", "prompt_tokens", "computed_tokens", "output_tokens", "judged",
            "first_in_time", "met",
        ):  # fmt: skip
            assert getattr(before, name) <= getattr(now, name)
        assert 0 <= now.met <= now.first_in_time <= now.judged <= now.requests
        assert 0 <= now.kv_share <= 1
    last = group.seen[-1]
    assert last.ready == last.wanted == Size(3, 3)
    # The one that learns says what the engine's settings are.
    assert last.prefill_tokens_per_s == pytest.approx(2000.0, rel=0.15)


def test_who_is_told_to_go_before_it_has_loaded_never_serves() -> None:
    sizes = [Size(2, 2), Size(5, 5), Size(2, 2)]
    twin, group = run(Schedule(3.0, [*sizes, *[Size(2, 2)] * 200], 0.0))
    early = [p for p in group.pods if p.told_at < p.ready_at]
    assert len(early) == 6
    assert {p.worker_id for p in early}.isdisjoint(w.worker_id for w in twin.departed)
    assert {p.worker_id for p in early}.isdisjoint(twin.workers)


def test_hours_are_from_asking_to_leaving() -> None:
    twin, group = run(Schedule(12.0, [Size(2, 2), Size(3, 3), *[Size(2, 2)] * 100], 0.0))
    (more,) = [p for p in group.pods if p.role is Role.PREFILL and p.asked_at > 0]
    assert more.ready_at == more.asked_at + 4.0
    assert more.told_at - more.asked_at == pytest.approx(12.0, abs=3.0)
    assert more.gone_at >= more.told_at
    line = timeline(twin, group, OBJECTIVE)
    assert max(count for _, count in line.prefill) <= 3


def test_a_threshold_grows_with_the_queue_and_waits_to_shrink() -> None:
    target = Target("queue", queues, prefill=1000.0, decode=10.0, poll_s=3.0, stable_s=9.0)
    law = Threshold(target, Size(10, 10))

    def seen(at: float, queued: float, wanted: int) -> Observed:
        return Observed(
            at, 0, 0, 0, 0, 0, 0, 0, queued_tokens=queued, prefill_tokens_per_s=1000.0,
            running=10.0, kv_share=0.1, wanted=Size(wanted, 1), ready=Size(wanted, 1),
        )  # fmt: skip

    law.look(seen(0.0, 0.0, 2))
    assert law.look(seen(3.0, 4500.0, 2)).size.prefill == 5
    assert law.look(seen(6.0, 500.0, 5)).size.prefill == 5
    assert law.look(seen(9.0, 500.0, 5)).size.prefill == 5
    assert law.look(seen(15.0, 500.0, 5)).size.prefill == 1
