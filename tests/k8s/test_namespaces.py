"""A group's pods come, go and are updated under load, and no client notices.

Processes as pods run them, each in a network namespace with an address of its own; the tests' API
server says who is there, and `pods.py` does what kubelet and the controllers do.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from deploy.local.models import prepare
from tests.k8s.netns import Network, NoNamespaces
from tests.k8s.pods import with_flags
from tests.k8s.world import DRAIN_S, MODEL, WAIT_S, WINDOW_S, World, controller

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.k8s.pods import Stop

CLIENTS = 6
SOON_S = 1.0
"""A router learns of a change within that: the debounce is as long."""

Test = "Callable[[World], Coroutine[Any, Any, None]]"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Test], None]]:
    """All tests' world: routers take long to start. Its loop runs while a test does."""
    prepare(MODEL)
    try:
        network = Network()
    except NoNamespaces as error:
        pytest.skip(str(error))
    try:
        with asyncio.Runner() as runner:
            world = World(network, tmp_path_factory.mktemp("pods"))
            try:
                runner.run(world.start())
                yield lambda test: runner.run(_as_deployed(world, test))
            finally:
                runner.run(world.close())
    finally:
        network.close()


async def _as_deployed(world: World, test: Test) -> None:
    """Whatever the one before has left."""
    for role in ("prefill", "decode"):
        await world.scale(role, 2)
    await world.knows()
    await test(world)


def went_well(stop: Stop) -> None:
    """The process said that it may go, and went, long before its grace was over."""
    assert (stop.status, stop.killed) == (0, False), stop
    assert stop.hook in ("200 drained", "none"), stop
    assert stop.seconds < DRAIN_S, stop


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_new_worker_is_used_and_one_that_leaves_breaks_no_stream(
    run: Callable[[Test], None], role: str
) -> None:
    async def test(world: World) -> None:
        load, loop = world.load(), asyncio.get_running_loop()
        names = [f"tandem-{role}-{n}" for n in range(3)]
        async with load.running(CLIENTS):
            await world.scale(role, 3)
            await world.uses(load, *names)
            went = loop.time()
            stops = await world.scale(role, 1)
            await world.uses(load, names[0])
        assert load.failed == []
        for stop in stops:
            went_well(stop)
        used = await load.used(world.client, went + SOON_S, loop.time())
        assert set(used) & set(names) <= {names[0]}

    run(test)


def test_a_new_version_takes_over_in_place_and_kv_goes_between_equals_only(
    run: Callable[[Test], None],
) -> None:
    """Other blocks, as another release may have: old and new can't read each other's."""

    async def test(world: World) -> None:
        load = world.load()
        async with load.running(CLIENTS):
            for role in ("prefill", "decode"):
                for index in (1, 0):
                    pod = world.pod(role, index)
                    template = with_flags(pod.template, "--block-size", "32")
                    went_well(await world.node.update(pod, template, WINDOW_S))
            await world.knows()
            await world.uses(load, *(p.name for p in world.workers()))
        assert load.failed == []
        assert all(w["kv_digest"].startswith("sim-32") for w in await world.hellos())

    run(test)


def test_a_worker_that_leaves_while_the_api_server_is_away_breaks_no_stream(
    run: Callable[[Test], None],
) -> None:
    """Its own word suffices."""

    async def test(world: World) -> None:
        load = world.load()
        async with load.running(CLIENTS):
            await world.uses(load, *(p.name for p in world.workers()))
            await world.api.stop()
            for role in ("decode", "prefill"):
                [stop] = await world.scale(role, 1)
                went_well(stop)
            await asyncio.sleep(1)
            await world.api.start()
            await world.knows()
        assert load.failed == []

    run(test)


def test_a_router_leaves_and_clients_of_its_service_see_nothing_of_it(
    run: Callable[[Test], None],
) -> None:
    async def test(world: World) -> None:
        load, pod = world.load(), await world.second_router
        async with load.running(CLIENTS):
            await asyncio.sleep(1)
            [stop] = await world.scale("router", 1)
            went_well(stop)
            await asyncio.sleep(1)
        assert load.failed == []
        assert {a.router for a in load.answers if a.began} > {pod.http}

    run(test)


def test_the_controller_asks_for_other_sizes_and_no_client_notices(
    run: Callable[[Test], None],
) -> None:
    """By bounds that the sizes of now are outside of: what it decides of load is for the twin."""
    bounds = ("--prefill-min", "3", "--prefill-max", "3", "--decode-min", "1", "--decode-max", "1")

    async def test(world: World) -> None:
        load = world.load()
        for role in ("prefill", "decode"):
            world.ask(role, 2)
        async with load.running(CLIENTS):
            pod = await world.node.create(controller(world.api.url, *bounds), 0)
            async with asyncio.timeout(WAIT_S):
                while (world.asked("prefill"), world.asked("decode")) != (3, 1):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            assert world.leader == pod.name
            await world.scale("prefill", world.asked("prefill"))
            [stop] = await world.scale("decode", world.asked("decode"))
            went_well(stop)
            await world.uses(load, "tandem-prefill-2", "tandem-decode-0")
            went_well(await world.node.delete(pod))
        assert load.failed == []
        assert world.leader == ""  # It gave the Lease away.

    run(test)


def test_who_left_as_it_should_is_told_of_as_no_loss(run: Callable[[Test], None]) -> None:
    async def test(world: World) -> None:
        lines = [json.loads(at) for at in world.pod("router", 0).log.splitlines() if at[0] == "{"]
        ours = [at for at in lines if at["logger"].startswith(("router", "controller"))]
        assert "worker left" in {at["message"] for at in ours}
        # While versions are mixed, a pair that can't be is worth a word; we stopped the API server.
        known = ("no handoff", "the API server fails us")
        assert [at for at in ours if at["level"] != "info" and at["message"] not in known] == []

    run(test)
