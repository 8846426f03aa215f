"""A worker that beats and answers nothing: what it costs, on virtual time."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from router.ask import Ask, Reserve
from tests.simulation.cluster import Cluster
from tests.simulation.laws import every_request_ends
from tests.simulation.plan import Call, Departure, Fault, Kind, Plan, WorkerPlan
from tests.simulation.processes import ProcessLoop
from workers.api import Role
from workers.engines.sim_settings import SimSettings

if TYPE_CHECKING:
    from router.journal import Record

SETTINGS = SimSettings(step_s=0.01, prefill_tokens_per_s=1e5)
FIRST_S = 5.0
"""Patience is two seconds and three estimates, looked at once a second."""


def fleet(apart: bool) -> tuple[WorkerPlan, ...]:
    if not apart:
        return tuple(WorkerPlan(f"m{n}", Role.MIXED, SETTINGS) for n in range(3))
    streams = replace(SETTINGS, streams=True)
    return tuple(
        WorkerPlan(f"{role[0]}{n}", role, streams)
        for role in (Role.PREFILL, Role.DECODE)
        for n in range(3)
    )


def records(plan: Plan) -> list[Record]:
    async def run() -> list[Record]:
        cluster = Cluster(plan, random.Random(0))
        cluster.begin()
        await cluster.until(plan.calls[-1].at + 0.1)
        await every_request_ends(cluster)
        router = cluster.routers["ra"]
        router.task.cancel()
        for host in cluster.workers.values():
            assert host.life
            host.life.task.cancel()
        return list(router.dispatch.journal._records.values())

    with asyncio.Runner(loop_factory=ProcessLoop) as runner:
        return runner.run(run())


@pytest.mark.parametrize(
    ("who", "kind"), [("m0", Kind.HANG), ("p0", Kind.HANG), ("d0", Kind.HANG), ("m0", Kind.FREEZE)]
)
def test_worker_that_answers_nothing_costs_its_requests_seconds_and_others_nothing(
    who: str, kind: Kind
) -> None:
    calls = [
        Call(2.5 + n * 0.25, "ra", Ask(f"ra-{n}", [n] * 40, 20, relay=True), Departure())
        for n in range(80)
    ]
    fault = Fault(2.0, kind, who, 55.0)
    plan = Plan(
        0, 0.0002, fleet(who != "m0"), ("ra",), tuple(calls), (fault,), (Reserve.AT_LAST_STEP,)
    )
    found = records(plan)
    assert [r.outcome for r in found] == ["finished"] * len(calls)
    # As a whole: where the prefill worker relays the first token, the second is what is late.
    took = sorted((r.ended_at or 0.0) - r.started_at for r in found)
    assert took[-1] < FIRST_S
    slow = [t for t in took if t > 1.0]
    assert 1 <= len(slow) <= 20, "then it is known, and tried again every ten seconds"
