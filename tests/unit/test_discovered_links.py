"""What becomes of a worker's requests when discovery says that it drains, or is gone."""

from __future__ import annotations

import asyncio
import time

import pytest
import uvloop

from controller.core.peers import Change, Kind, Peer
from router.ask import Ask
from router.core.errors import NoWorkers
from router.discover import Follower
from tests.unit.test_curve import Router, router
from tests.unit.test_dispatch import hello
from tests.unit.test_worker_channel import FAST, place, run, until
from workers.api import Role

OUTPUTS = 300
"""Two milliseconds each."""


def tell(here: Router, address: str, *kinds: Kind) -> None:
    follower = Follower(here.links)
    for kind in kinds:
        follower.on_change(Change(kind, Peer("u", "p", "mixed", address)))


async def refuses(here: Router) -> None:
    with pytest.raises(NoWorkers):
        here.dispatch.submit(Ask(f"r{time.monotonic()}", [1, 2, 3], 4))


async def is_spared(here: Router) -> None:
    """What is asked now goes to another, as soon as there is one."""
    fleet, name = here.dispatch.fleet, f"r{time.monotonic()}"
    fleet.join(hello("other", Role.MIXED), time.monotonic())
    here.dispatch.submit(Ask(name, [1, 2, 3], 4))
    assert here.dispatch.journal.find(name)[-1].decode_worker == "other"
    here.dispatch.cancel([name])
    fleet.remove("other")


async def starts(here: Router) -> None:
    here.tokens.clear()
    here.dispatch.submit(Ask(f"long{time.monotonic()}", [1, 2, 3], OUTPUTS))
    await until(lambda: len(here.tokens) > 3)


def test_a_ready_peer_is_served_and_a_draining_one_is_spared() -> None:
    async def test() -> None:
        async with place(config=FAST) as worker, router(None) as here:
            address = worker.channel.address
            tell(here, address, Kind.JOINED)
            await asyncio.sleep(0.1)
            assert list(here.links) == []
            tell(here, address, Kind.READY)
            await here.is_served()
            await starts(here)
            tell(here, address, Kind.DRAINING)
            await is_spared(here)
            await until(lambda: len(here.tokens) == OUTPUTS)
            assert here.knows == ["w1"]
            tell(here, address, Kind.READY)
            await here.is_served()

    run(test())


def test_a_draining_worker_that_is_greeted_anew_is_still_spared() -> None:
    async def test() -> None:
        async with place() as worker, router(None) as here:
            address = worker.channel.address
            tell(here, address, Kind.READY)
            await here.is_served()
            tell(here, address, Kind.DRAINING)
            [link] = here.links
            link.lost("cut")
            await until(lambda: here.knows == ["w1"])
            await is_spared(here)

    run(test())


def test_a_draining_worker_serves_while_nobody_else_does_unless_it_drains_by_its_own_word() -> None:
    """Probes of a whole fleet fail at once, and discovery is late when the last comes back."""

    async def test() -> None:
        async with place() as worker, router(None) as here:
            tell(here, worker.channel.address, Kind.READY)
            await here.is_served()
            tell(here, worker.channel.address, Kind.DRAINING)
            await here.is_served()
            worker.worker.rest(True)
            await until(lambda: here.dispatch.fleet.get("w1").load.draining)
            await refuses(here)

    run(test())


def test_who_is_gone_ends_its_streams_first() -> None:
    """Discovery may err; a stream that runs is no error."""

    async def test() -> None:
        async with place(config=FAST) as worker, router(None) as here:
            tell(here, worker.channel.address, Kind.READY)
            await here.is_served()
            await starts(here)
            tell(here, worker.channel.address, Kind.GONE)
            await refuses(here)
            await until(lambda: len(here.tokens) == OUTPUTS)
            await until(lambda: here.knows == [] and list(here.links) == [])

    run(test())


def test_who_is_gone_and_idle_is_left_at_once_and_may_come_back() -> None:
    async def test() -> None:
        async with place() as worker, router(None) as here:
            tell(here, worker.channel.address, Kind.READY)
            await here.is_served()
            tell(here, worker.channel.address, Kind.GONE)
            assert here.knows == []
            assert list(here.links) == []
            tell(here, worker.channel.address, Kind.READY)
            await here.is_served()

    run(test())


def test_who_comes_back_while_it_leaves_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.link.BEAT_S", 0.05)

    async def test() -> None:
        async with place(config=FAST) as worker, router(None) as here:
            tell(here, worker.channel.address, Kind.READY)
            await here.is_served()
            await starts(here)
            tell(here, worker.channel.address, Kind.GONE)
            tell(here, worker.channel.address, Kind.READY)
            await until(lambda: len(here.tokens) == OUTPUTS)
            await asyncio.sleep(0.2)
            assert len(list(here.links)) == 1
            await here.is_served()

    run(test())


def test_who_stood_still_hears_the_others_before_it_calls_them_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On uvloop, as in production: it runs late timers before it reads."""
    monkeypatch.setattr("router.core.fleet.SILENCE_S", 1.5)

    async def test() -> None:
        async with place() as worker, router(None) as here:
            worker.worker._router_silence_s = 1.5
            tell(here, worker.channel.address, Kind.READY)
            await here.is_served()
            known = here.dispatch.fleet.get("w1")
            time.sleep(2.0)  # noqa: ASYNC251  # Both are on this loop.
            await asyncio.sleep(0.5)
            assert known is not None
            assert here.dispatch.fleet.get("w1") is known
            await here.is_served()

    uvloop.run(test())
