"""A worker and a router that was silent: who knows whom, to the tenth of a second."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from msgspec.structs import replace

from tests.simulation.events import Events
from tests.simulation.hosts import WorkerHost
from tests.simulation.network import Network, Wire, WireOwner
from tests.simulation.plan import WorkerPlan
from tests.simulation.processes import Process, ProcessLoop
from workers.api import (
    PROTOCOL,
    ROUTER_SILENCE_S,
    Batch,
    Generate,
    Heartbeat,
    Phase,
    Refused,
    Role,
    RouterHello,
    WorkerHello,
    decode_to_router,
    encode,
)
from workers.engines.sim_blocks import Handoffs
from workers.engines.sim_settings import SimSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from workers.api import ToRouter, ToWorker
    from workers.server import Worker

HELLO = RouterHello(PROTOCOL, "r", None, None)
ASK = Generate("r", Phase.BOTH, [1, 2, 3], 2, b"")


class Router(WireOwner):
    """Says what it is told to, and remembers what it heard."""

    def __init__(self, network: Network) -> None:
        self.heard: list[ToRouter] = []
        self.network = network
        self.worker: Worker
        self._wire = Wire(network, "w", Process("r"), self)

    def say(self, message: ToWorker) -> None:
        self._wire.send(encode(message))

    def on_frame(self, frame: bytes) -> None:
        self.heard.append(decode_to_router(frame))

    def on_broken(self) -> None:
        raise AssertionError("nothing breaks here")

    @property
    def tokens(self) -> int:
        batches = [m for m in self.heard if isinstance(m, Batch)]
        return sum(len(d.token_ids) for b in batches for d in b.deltas)


def run(test: Callable[[Router], Coroutine[None, None, None]]) -> None:
    async def all_of_it() -> None:
        loop = asyncio.get_running_loop()
        network = Network(random.Random(0), Events(loop.time), latency_s=0.001)
        host = WorkerHost(WorkerPlan("w", Role.MIXED, SimSettings()), network, Handoffs())
        host.start()
        assert host.life
        try:
            router = Router(network)
            router.worker = host.life.worker
            await test(router)
        finally:
            host.life.task.cancel()
            await asyncio.wait([host.life.task])

    with asyncio.Runner(loop_factory=ProcessLoop) as runner:
        runner.run(all_of_it())


def test_a_router_that_was_given_up_is_told_when_it_speaks() -> None:
    async def test(router: Router) -> None:
        router.say(HELLO)
        await asyncio.sleep(ROUTER_SILENCE_S + 1)
        router.heard.clear()
        router.say(Heartbeat())
        await asyncio.sleep(0.1)
        assert [type(m) for m in router.heard] == [Refused]
        router.say(HELLO)
        router.say(ASK)
        await asyncio.sleep(1)
        assert router.tokens == 2

    run(test)


def test_a_hello_is_a_sign_of_life() -> None:
    async def test(router: Router) -> None:
        for _ in range(2):  # Its answers are slow to come: it says hello until one does.
            router.say(HELLO)
            await asyncio.sleep(ROUTER_SILENCE_S * 0.6)
        router.say(ASK)
        await asyncio.sleep(1)
        assert not any(isinstance(m, Refused) for m in router.heard)
        assert sum(isinstance(m, WorkerHello) for m in router.heard) == 2
        assert router.tokens == 2

    run(test)


def test_requests_of_a_router_that_greets_over_another_connection_are_given_up() -> None:
    """Its machine's network was away: nothing else tells the worker for half a minute."""

    async def test(router: Router) -> None:
        router.say(replace(HELLO, connection=1))
        router.say(replace(ASK, max_tokens=4000))
        await asyncio.sleep(1)
        assert router.worker.load.busy
        again = Router(router.network)
        again.say(replace(HELLO, connection=2))
        await asyncio.sleep(1)
        assert not router.worker.load.busy
        router.say(replace(HELLO, connection=1))  # What was under way over the former connection.
        again.say(replace(ASK, request_id="r/2"))
        await asyncio.sleep(1)
        assert again.tokens == 2

    run(test)


def test_requests_of_a_router_held_up_for_long_go_on() -> None:
    async def test(router: Router) -> None:
        router.say(HELLO)
        router.say(replace(ASK, max_tokens=900))
        await asyncio.sleep(ROUTER_SILENCE_S - 1)
        router.say(Heartbeat())
        await asyncio.sleep(2)
        assert router.tokens == 900

    run(test)


def test_a_stranger_is_told_to_say_hello() -> None:
    async def test(router: Router) -> None:
        router.say(ASK)
        await asyncio.sleep(1)
        assert [type(m) for m in router.heard] == [Refused]

    run(test)
