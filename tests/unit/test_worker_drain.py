"""A worker's drain: who may ask for it, what it waits for, and how it is taken back."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.unit.test_worker_channel import FAST, HELLO, WAIT_S, generate, place, run
from tests.virtual_time import VirtualLoop
from workers.api import Batch, Finish, Phase, Release, Role
from workers.drain import KEPT_S, Drain
from workers.engines.sim import SimEngine
from workers.http import HttpSide
from workers.metrics import Metrics
from workers.server import Identity, Worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from tests.unit.test_worker_channel import Place
    from workers.api import ToRouter

LIMIT_S = 3.0
ENDLESS = 4000
"""Tokens, of two milliseconds each: longer than a drain may take."""


class Ear:
    """A channel whose routers hear everything."""

    def __init__(self) -> None:
        self.heard: list[ToRouter] = []

    def send(self, _: bytes, message: ToRouter) -> bool:
        self.heard.append(message)
        return True

    def ends(self) -> dict[str, Finish]:
        batches = [m for m in self.heard if isinstance(m, Batch)]
        return {d.request_id: d.finish for b in batches for d in b.deltas if d.finish is not None}


class Here:
    """A worker and its drain on virtual time."""

    def __init__(self, role: Role = Role.MIXED) -> None:
        self.loop = asyncio.get_running_loop()
        identity = Identity("w1", "e1", role, "m", "model", "tokenizer", FAST.lease_s)
        self.worker = Worker(SimEngine(FAST, "e1"), identity, Metrics(), self.loop.time)
        self.ear = Ear()
        self.worker.attach(self.ear)  # type: ignore[arg-type]
        self.drain = Drain(self.worker, LIMIT_S, self.loop.time)

    async def until_up(self) -> None:
        await asyncio.sleep(0.1)
        self.worker.on_message(b"r", HELLO)

    def asks(self, request_id: str, outputs: int = 100) -> None:
        self.worker.on_message(b"r", generate(request_id, outputs))


def virtually(test: Callable[[Here], Coroutine[None, None, None]], role: Role = Role.MIXED) -> None:
    async def all_of_it() -> None:
        here = Here(role)
        running = [
            asyncio.create_task(here.worker.run()),
            asyncio.create_task(here.drain.forget_unused()),
        ]
        try:
            await here.until_up()
            await test(here)
        finally:
            for task in running:
                task.cancel()
            await asyncio.wait(running)

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(all_of_it())


def test_routers_are_told_at_once() -> None:
    async def test(here: Here) -> None:
        here.ear.heard.clear()
        asked = asyncio.create_task(here.drain.ask())
        await asyncio.sleep(0)
        [told] = here.ear.heard
        assert isinstance(told, Batch)
        assert told.load.draining
        await asked

    virtually(test)


def test_a_drain_lets_what_runs_end_and_takes_nothing_new() -> None:
    async def test(here: Here) -> None:
        here.asks("old")
        asked = asyncio.create_task(here.drain.ask())
        await asyncio.sleep(0)
        here.asks("new")
        assert here.worker.ready == "draining"
        assert await asked is None
        assert here.ear.ends() == {"new": Finish.REFUSED, "old": Finish.LENGTH}

    virtually(test)


def test_whoever_asks_meanwhile_joins_the_drain_that_is_under_way() -> None:
    async def test(here: Here) -> None:
        here.asks("endless", ENDLESS)
        first = asyncio.create_task(here.drain.ask())
        await asyncio.sleep(LIMIT_S / 2)
        began = here.loop.time()
        assert await here.drain.ask() == await first == "requests that run: 1, open leases: 0"
        assert here.loop.time() - began == pytest.approx(LIMIT_S / 2, abs=0.1)

    virtually(test)


def test_when_its_time_is_over_what_runs_goes_on_until_the_process_ends() -> None:
    async def test(here: Here) -> None:
        here.asks("endless", ENDLESS)
        assert await here.drain.ask()
        await asyncio.sleep(0.5)
        assert here.ear.ends() == {}
        began = here.loop.time()
        await here.drain.finish()
        assert here.loop.time() == began, "it has had its time"
        assert here.ear.ends() == {"endless": Finish.ERROR}

    virtually(test)


def test_the_last_drain_joins_the_one_that_is_under_way() -> None:
    async def test(here: Here) -> None:
        here.asks("endless", ENDLESS)
        asked = asyncio.create_task(here.drain.ask())
        await asyncio.sleep(LIMIT_S / 2)
        began = here.loop.time()
        await here.drain.finish()
        assert here.loop.time() - began == pytest.approx(LIMIT_S / 2, abs=0.1)
        await asked

    virtually(test)


def test_a_drained_worker_ends_at_once() -> None:
    async def test(here: Here) -> None:
        assert await here.drain.ask() is None
        began = here.loop.time()
        await here.drain.finish()
        assert here.loop.time() == began

    virtually(test)


def test_a_drain_that_is_taken_back_is_over_for_all_who_wait() -> None:
    async def test(here: Here) -> None:
        here.asks("endless", ENDLESS)
        asked = asyncio.create_task(here.drain.ask())
        await asyncio.sleep(0.1)
        assert here.drain.take_back()
        assert await asked == "the drain was called off"
        assert here.worker.ready is None
        here.asks("new")
        await asyncio.sleep(1)
        assert here.ear.ends() == {"new": Finish.LENGTH}
        assert isinstance(here.ear.heard[-1], Batch)
        assert not here.ear.heard[-1].load.draining

    virtually(test)


def test_the_last_drain_can_not_be_taken_back() -> None:
    async def test(here: Here) -> None:
        await here.drain.finish()
        assert not here.drain.take_back()
        await asyncio.sleep(LIMIT_S + KEPT_S + 10)
        assert here.worker.ready == "draining"

    virtually(test)


def test_a_drained_worker_that_nobody_ends_takes_work_again() -> None:
    async def test(here: Here) -> None:
        await here.drain.ask()
        await asyncio.sleep(KEPT_S)
        await here.drain.ask()  # Still wanted.
        await asyncio.sleep(KEPT_S)
        assert here.worker.ready == "draining"
        await asyncio.sleep(LIMIT_S + 5)
        assert here.worker.ready is None

    virtually(test)


# ---------------------------------------------------------------- over HTTP


@asynccontextmanager
async def side(here: Place, limit_s: float = WAIT_S) -> AsyncIterator[httpx.AsyncClient]:
    drain = Drain(here.worker, limit_s, time.monotonic)
    http = HttpSide("127.0.0.1", 0, here.worker, Metrics(), drain)
    running = asyncio.create_task(http.run())
    try:
        async with httpx.AsyncClient(base_url=http.address, timeout=WAIT_S) as client:
            yield client
    finally:
        http.leave()
        await running


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_answer_comes_when_the_worker_may_go_and_readiness_goes_first(method: str) -> None:
    async def test() -> None:
        async with place(Role.PREFILL) as here, side(here) as client:
            peer = here.peer()
            await peer.greet()
            await peer.say(generate("r/p", phase=Phase.PREFILL))
            done = await peer.end_of("r/p")
            assert done.ticket is not None
            assert (await client.get("/readyz")).status_code == 200
            asked = asyncio.create_task(client.request(method, "/drain"))
            await peer.until(lambda b: b.load.draining)
            ready = await client.get("/readyz")
            assert (ready.status_code, ready.text) == (503, "draining")
            assert "tandem_worker_draining 1.0" in (await client.get("/metrics")).text
            assert not asked.done()
            await peer.say(Release([done.ticket]))
            assert ((await asked).status_code, (await asked).text) == (200, "drained")

    run(test())


def test_what_is_left_when_the_time_is_over_is_told() -> None:
    async def test() -> None:
        async with place() as here, side(here, 0.1) as client:
            peer = here.peer()
            await peer.greet()
            await peer.say(generate("r", ENDLESS))
            await peer.until(lambda b: bool(b.deltas))
            answer = await client.post("/drain")
            assert answer.status_code == 503
            assert answer.text == "requests that run: 1, open leases: 0"

    run(test())


def test_a_drain_is_taken_back_by_deleting_it() -> None:
    async def test() -> None:
        async with place() as here, side(here) as client:
            await here.peer().greet()
            assert (await client.delete("/drain")).status_code == 200
            assert (await client.post("/drain")).status_code == 200
            assert (await client.get("/readyz")).status_code == 503
            assert (await client.delete("/drain")).status_code == 200
            assert (await client.get("/readyz")).status_code == 200

    run(test())
