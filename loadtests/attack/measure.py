"""One attack by itself, and what it did to router, workers and everybody else."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deploy.local.parts import PartDied
from loadtests.attack import bounds
from loadtests.attack.registry import Tally

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loadtests.attack.registry import Attack
    from loadtests.attack.scene import Scene

_SAMPLE_S = 0.1
_SETTLE_S = 6.0
"""How long memory may take to come back."""
_KEPT_SHARE_MAX = 0.1
"""The router's share of the time without a core, for other people's processes: above it nothing
can be said of its times."""
_CALM_S, _LOOK_S = 20.0, 0.3
_MEMORY = dict[str, int]


@dataclass(slots=True)
class Result:
    """One row."""

    name: str
    tally: Tally
    seconds: float
    cpu_s: float
    others: dict[str, Any]
    """The bystanders' figures."""
    itl_ratio: float
    before: _MEMORY
    peak: _MEMORY
    after: _MEMORY
    log_bytes: int
    died: str = ""
    broken: list[str] = field(default_factory=list)
    """The bounds that were broken, one sentence each."""

    @property
    def worst(self) -> str:
        """The process that kept most."""
        return max(self.after, key=lambda name: self.after[name] - self.before[name])


async def measure(scene: Scene, attack: Attack, quiet_itl_s: float, *, timings: bool) -> Result:
    """Run it, wait for whom it concerned, and judge. `timings`: those too."""
    tally, died = Tally(), ""
    before, peak = scene.memory(), scene.memory()
    cpu_s, log_bytes = scene.router_cpu_s(), scene.log_bytes()
    kept_s = scene.others_cpu_s()
    sampling = asyncio.create_task(_sample(scene, peak))
    began = time.monotonic()
    try:
        async with asyncio.timeout(attack.limit_s):
            await attack.run(scene, tally)
    except TimeoutError:
        tally.broken.append(f"not over after {attack.limit_s:.0f} s")
    except PartDied as error:
        died = str(error).splitlines()[0]
    except Exception as error:  # noqa: BLE001  # One attack's end must not be the end of all.
        tally.broken.append(f"the attack itself failed: {type(error).__name__}: {error}"[:300])
    ended = time.monotonic()
    others: dict[str, Any] = {"bad": 0, "troubles": [], "itl_ms_p99": 0.0, "hold_ms_max": 0.0}
    if not attack.last:
        others = await asyncio.to_thread(scene.others, began, ended)
    cpu_s, kept_s = max(0.0, scene.router_cpu_s() - cpu_s), scene.others_cpu_s() - kept_s
    if kept_s > _KEPT_SHARE_MAX * (time.monotonic() - began) and timings:
        timings = False
        tally.notes.append(
            f"not judged by time: others kept the router from its core {kept_s:.1f} s"
        )
    after = scene.memory() if attack.last else await _settled(scene, before)
    sampling.cancel()
    if not died and not attack.last:
        try:
            scene.check()
        except PartDied as error:
            died = str(error).splitlines()[0]
    quiet_s = max(quiet_itl_s, bounds.ITL_FLOOR_S)
    result = Result(
        attack.name, tally, ended - began, cpu_s, others, others["itl_ms_p99"] / 1e3 / quiet_s,
        before, peak, after, scene.log_bytes() - log_bytes, died,
    )  # fmt: skip
    result.broken += [*judge(result, timings=timings and attack.judged_by_time)]
    return result


def judge(result: Result, *, timings: bool) -> Iterator[str]:
    """The bounds that it broke."""
    others, tally = result.others, result.tally
    yield from tally.broken
    if result.died:
        yield result.died
    if others["bad"] > bounds.LOST_MAX:
        yield f"{others['bad']} streams lost or wrong: {'; '.join(others['troubles'])}"
    for status, count in tally.statuses.items():
        if status.startswith("5") and status not in bounds.MAY_ANSWER_5XX:
            yield f"{count} answers of status {status}"
    for name, was in result.before.items():
        grown = result.after.get(name, was) - was
        if grown > max(bounds.MEMORY_FLOOR_BYTES, was * (bounds.MEMORY_RATIO_MAX - 1)):
            yield f"{name} keeps {grown >> 20} MiB more"
        if result.peak[name] - was > bounds.PEAK_BYTES_MAX:
            yield f"{name} took {result.peak[name] - was >> 20} MiB at its peak"
    if result.log_bytes > bounds.LOG_BYTES_MAX + bounds.LOG_BYTES_A_REQUEST * (
        others.get("streams", 0) + tally.statuses.total()
    ):
        yield f"{result.log_bytes >> 10} KiB of log"
    if timings and result.itl_ratio > bounds.ITL_RATIO_MAX:
        yield f"the others' ITL p99 is {result.itl_ratio:.1f} times the quiet one"
    if timings and others["hold_ms_max"] > bounds.HOLD_S_MAX * 1e3:
        yield f"the router was held up for {others['hold_ms_max'] / 1e3:.1f} s"


async def await_calm(scene: Scene, quiet_itl_s: float) -> None:
    """Until the others' streams are as they were before, so that no attack is judged by the last.

    They may never be: then the next one begins after `_CALM_S`.
    """
    until = time.monotonic() + _CALM_S
    while time.monotonic() < until:
        began = time.monotonic()
        await asyncio.sleep(_LOOK_S)
        now = await asyncio.to_thread(scene.others, began, time.monotonic(), wait=False)
        if now["events"] and now["itl_ms_max"] < 2e3 * max(quiet_itl_s, bounds.ITL_FLOOR_S):
            return


async def _sample(scene: Scene, peak: _MEMORY) -> None:
    while True:
        for name, now in scene.memory().items():
            peak[name] = max(peak.get(name, 0), now)
        await asyncio.sleep(_SAMPLE_S)


async def _settled(scene: Scene, before: _MEMORY) -> _MEMORY:
    """Memory once it is back to what it was, or after `_SETTLE_S`."""
    until = time.monotonic() + _SETTLE_S
    while True:
        now = scene.memory()
        back = all(
            now.get(name, 0) - was
            <= max(bounds.MEMORY_FLOOR_BYTES, was * (bounds.MEMORY_RATIO_MAX - 1))
            for name, was in before.items()
        )
        if back or time.monotonic() > until:
            return now
        await asyncio.sleep(_SAMPLE_S)
