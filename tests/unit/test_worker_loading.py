"""A router and a worker whose engine takes a while to load."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.unit.test_worker_channel import FAST, HELLO
from tests.unit.test_worker_drain import Ear
from tests.virtual_time import VirtualLoop
from workers.api import SILENCE_S, Role, WorkerHello
from workers.engines.sim import SimEngine
from workers.metrics import Metrics
from workers.server import Identity, Worker

if TYPE_CHECKING:
    from workers.engines.base import EngineFacts

LOADS_S = 20.0


class Slow(SimEngine):
    async def start(self) -> EngineFacts:
        await asyncio.sleep(LOADS_S)
        return await super().start()


def heard(*hello_at: float) -> list[float]:
    """When a router that said hello at these times was answered."""
    answered: list[float] = []

    class Noting(Ear):
        def send(self, router: bytes, message: object) -> bool:
            if isinstance(message, WorkerHello):
                answered.append(asyncio.get_running_loop().time())
            return True

    async def test() -> None:
        loop = asyncio.get_running_loop()
        identity = Identity("w1", "e1", Role.MIXED, "m", "model", "tokenizer", FAST.lease_s)
        worker = Worker(Slow(FAST, "e1"), identity, Metrics(), loop.time)
        worker.attach(Noting())  # type: ignore[arg-type]
        running = asyncio.create_task(worker.run())
        for at in hello_at:
            loop.call_at(at, worker.on_message, b"r", HELLO)
        await asyncio.sleep(LOADS_S + 1)
        running.cancel()
        await asyncio.wait([running])

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(test())
    return answered


def test_who_said_hello_while_it_loaded_is_answered_as_soon_as_it_is_ready() -> None:
    """A rollout goes on when a worker is ready: its routers must know it by then."""
    assert heard(LOADS_S - 2, LOADS_S - 1) == [LOADS_S]


def test_who_has_fallen_silent_since_is_not() -> None:
    assert heard(LOADS_S - SILENCE_S - 1) == []
