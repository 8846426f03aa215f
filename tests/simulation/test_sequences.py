"""Workers that run few sequences at once: shares hold beside a flood."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from router.ask import Ask, Reserve
from tests.simulation.cluster import Cluster
from tests.simulation.plan import Call, Departure, Plan, WorkerPlan
from tests.simulation.processes import ProcessLoop
from workers.api import Role
from workers.engines.sim_settings import SimSettings

SEQUENCES, OUTPUTS, STEP_S = 8, 100, 0.01
SERVED_S = OUTPUTS * STEP_S
"""From a sequence's beginning to its end."""
FLOOD = 100
SETTINGS = SimSettings(step_s=STEP_S, running_max=SEQUENCES, prefill_tokens_per_s=1e6)


def call(name: str, tenant: str, at: float) -> Call:
    ask = Ask(f"ra-{name}", [len(name)] * 20, OUTPUTS, tenant=tenant)
    return Call(at, "ra", ask, Departure())


def waits(plan: Plan) -> tuple[dict[str, float], int]:
    """Each request's wait for its first token, and the longest queue on any worker."""
    longest = 0

    async def run() -> dict[str, float]:
        nonlocal longest
        cluster = Cluster(plan, random.Random(0))
        cluster.begin()
        router = cluster.routers["ra"]
        while not router.clients.requests or router.clients.open:
            await cluster.until(cluster.loop.time() + 0.3)
            for host in cluster.live_workers:
                assert host.life
                longest = max(longest, host.life.worker.load.waiting)
        records = router.dispatch.journal._records.values()
        found = {r.request_id.removeprefix("ra-"): r.ttft_s or 0.0 for r in records}
        for router in cluster.routers.values():
            router.task.cancel()
        for host in cluster.workers.values():
            assert host.life
            host.life.task.cancel()
        return found

    with asyncio.Runner(loop_factory=ProcessLoop) as runner:
        return runner.run(run()), longest


@pytest.mark.parametrize("apart", [False, True])
def test_one_request_beside_another_tenant_s_flood_waits_for_one_place(apart: bool) -> None:
    workers = (WorkerPlan("m0", Role.MIXED, SETTINGS),)
    if apart:
        streams = replace(SETTINGS, streams=True)
        workers = (
            WorkerPlan("p0", Role.PREFILL, streams),
            WorkerPlan("d0", Role.DECODE, streams),
        )
    calls = [call(f"flood{n}", "a", 1.0) for n in range(FLOOD)]
    calls += [call(f"one{n}", "b", 1.5 + n * 3.3 * SERVED_S) for n in range(4)]
    plan = Plan(0, 0.0002, workers, ("ra",), tuple(calls), (), (Reserve.AT_LAST_STEP,))
    waited, longest = waits(plan)
    assert len(waited) == len(calls)
    ones = [waited[f"one{n}"] for n in range(4)]
    assert max(ones) < 2.5 * SERVED_S, "a place becomes free, and what waits on the worker is few"
    assert max(waited.values()) > FLOOD / SEQUENCES * SERVED_S * 0.8
    assert longest <= SEQUENCES
