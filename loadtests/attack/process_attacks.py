"""Signals to processes that serve."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

from loadtests.attack.registry import attack

if TYPE_CHECKING:
    from loadtests.attack.registry import Tally
    from loadtests.attack.scene import Scene

STOPPED_S = 8.0


async def _stop_for(pid: int, seconds: float) -> None:
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        os.kill(pid, signal.SIGCONT)


@attack("stopped-worker", "SIGSTOP of a decode worker for 8 s", limit_s=60, stops=True)
async def stopped_worker(scene: Scene, tally: Tally) -> None:
    await _stop_for(scene.workers[-1].pid, STOPPED_S)
    await asyncio.sleep(2)


@attack("stopped-prefill", "SIGSTOP of a prefill worker for 8 s", limit_s=60, stops=True)
async def stopped_prefill(scene: Scene, tally: Tally) -> None:
    await _stop_for(scene.workers[0].pid, STOPPED_S)
    await asyncio.sleep(2)


@attack("stopped-router", "SIGSTOP of the router for 8 s", limit_s=60, stops=True, short=True)
async def stopped_router(scene: Scene, tally: Tally) -> None:
    await _stop_for(scene.router.pid, STOPPED_S)
    await asyncio.sleep(2)


@attack(
    "second-sigterm",
    "SIGTERM of the router, and another while it ends",
    limit_s=60,
    short=True,
    last=True,
)
async def second_sigterm(scene: Scene, tally: Tally) -> None:
    process = scene.router.process
    assert process is not None
    os.kill(process.pid, signal.SIGTERM)
    await asyncio.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)
    for _ in range(300):
        if process.poll() is not None:
            break
        await asyncio.sleep(0.1)
    tally.saw(f"exit {process.returncode}")
    tally.expect(process.returncode == 0, f"the router ended with status {process.returncode}")
