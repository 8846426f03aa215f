"""Runs a seed; says what happened, and how to see it again."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.simulation.cluster import Cluster
from tests.simulation.laws import conclude
from tests.simulation.plan import make_plan
from tests.simulation.processes import ProcessLoop

if TYPE_CHECKING:
    from collections import Counter

EVENTS_SHOWN = 60


class SeedFailed(AssertionError):
    """A law was broken under this seed; how to run it again."""


@dataclass(frozen=True, slots=True)
class Report:
    seed: int
    fingerprint: str
    events: int
    virtual_s: float
    counts: Counter[str]


def run_seed(seed: int) -> Report:
    """Raises `SeedFailed`."""
    plan = make_plan(seed)
    loop = ProcessLoop()
    clusters: list[Cluster] = []

    async def run() -> None:
        cluster = Cluster(plan, random.Random(f"{seed}/network/latency"))
        clusters.append(cluster)
        cluster.begin()
        await conclude(cluster)

    try:
        loop.run_until_complete(run())
    except Exception as error:  # Whatever it is, the seed belongs to it.
        last = "\n  ".join(clusters[0].events.tail(EVENTS_SHOWN)) if clusters else ""
        raise SeedFailed(
            f"{error}\n{plan.describe()}\nlast events:\n  {last}\n"
            f"run it again: SEED={seed} python -m pytest tests/simulation"
        ) from error
    finally:
        _end(loop, clusters)
    (cluster,) = clusters
    events = cluster.events
    return Report(seed, events.fingerprint, events.count, events.now, cluster.counts)


def _end(loop: ProcessLoop, clusters: list[Cluster]) -> None:
    """Let every task end, those of stopped and killed processes too."""
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    for cluster in clusters:
        cluster.release()
    if tasks:
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    loop.close()
