"""Controllers as real processes: one leads and scales, whatever becomes of it."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import TYPE_CHECKING

import pytest

from controller.core.lease import Terms
from tests.apiserver.store import Refusal
from tests.contract.controller_rig import LEASE_S, TOP, WAIT_S, Controller, Rig, rig

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from tests.apiserver.server import ApiServer

BUSY = 200.0
"""Requests a second: far more than a worker of each role can do."""
SCALES = "rolebasedgroupscalingadapters/scale"


def play(folder: Path, story: Callable[[Rig], Awaitable[None]]) -> None:
    async def told() -> None:
        async with rig(folder) as here:
            await story(here)

    asyncio.run(told())


async def pair(here: Rig) -> tuple[Controller, Controller]:
    """The one that leads, and the other."""
    await asyncio.gather(here.start("a"), here.start("b"))
    await here.until(lambda: here.holder != "")
    leader = here.controllers[here.holder]
    other = here.controllers["b" if here.holder == "a" else "a"]
    for controller in (leader, other):
        async with asyncio.timeout(WAIT_S):
            while (await controller.get("/readyz")).status_code != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    return leader, other


def test_one_scales_on_load_and_when_it_is_killed_the_other_does(tmp_path: Path) -> None:
    async def story(here: Rig) -> None:
        leader, other = await pair(here)
        here.requests_per_s = BUSY
        await here.until(lambda: here.wanted("prefill") > 2 and here.wanted("decode") > 2)
        assert set(here.scaled_by) == {leader.name}
        assert await leader.metric("tandem_controller_leader") == 1
        assert await other.metric("tandem_controller_leader") == 0
        assert await other.metric('tandem_controller_decisions_total{kind="followed"}') > 0
        leader.send(signal.SIGKILL)
        killed = asyncio.get_running_loop().time()
        await here.until(lambda: here.holder == other.name)
        took_s = asyncio.get_running_loop().time() - killed
        assert took_s <= Terms("", "", "", LEASE_S).vacant_s_max + 1.0
        here.reset()
        await here.until(lambda: here.wanted("prefill") > 2 and here.wanted("decode") > 2)
        assert here.scaled_by[-1] == other.name

    play(tmp_path, story)


def test_one_that_slept_past_its_lease_does_not_scale_when_it_wakes(tmp_path: Path) -> None:
    async def story(here: Rig) -> None:
        leader, other = await pair(here)
        here.requests_per_s = BUSY
        for nap in range(2):
            # It has something to scale at every look, so it is stopped in the middle of things.
            await self_scaling(here, leader.name)
            await asyncio.sleep(0.1 * nap)
            leader.send(signal.SIGSTOP)
            await here.until(lambda name=other.name: here.holder == name)
            await self_scaling(here, other.name)
            until_then = len(here.scaled_by)
            leader.send(signal.SIGCONT)
            for _ in range(20):
                here.reset()
                await asyncio.sleep(0.1)
            assert set(here.scaled_by[until_then:]) == {other.name}
            assert other.lives
            leader, other = other, leader

    async def self_scaling(here: Rig, name: str) -> None:
        done = len(here.scaled_by)
        here.reset()
        await here.until(lambda: name in here.scaled_by[done:])
        here.reset()

    play(tmp_path, story)


def test_one_that_is_told_to_end_gives_the_lease_away(tmp_path: Path) -> None:
    async def story(here: Rig) -> None:
        leader, other = await pair(here)
        leader.send(signal.SIGTERM)
        assert await leader.ended() == 0
        ended = asyncio.get_running_loop().time()
        await here.until(lambda: here.holder == other.name)
        assert asyncio.get_running_loop().time() - ended < LEASE_S / 2
        other.send(signal.SIGTERM)
        assert await other.ended() == 0
        assert here.holder == ""

    play(tmp_path, story)


def test_without_the_right_to_scale_it_lives_and_says_so(tmp_path: Path) -> None:
    async def story(here: Rig) -> None:
        here.server.forbidden = {("patch", SCALES)}
        controller = await here.start("a")
        here.requests_per_s = BUSY
        await here.until(lambda: len(here.scaled_by) >= 2)
        assert here.wanted("prefill") == 1
        failed = 'tandem_controller_scale_failures_total{reason="forbidden"}'
        assert await controller.metric(failed) >= 2
        assert (await controller.get("/livez")).status_code == 200
        assert "cannot patch" in controller.told("decided")[-1]["trouble"]
        here.server.forbidden = set()
        await here.until(lambda: here.wanted("prefill") > 1 and here.wanted("decode") > 1)

    play(tmp_path, story)


def test_a_dry_run_tells_what_it_would_do_and_writes_nothing(tmp_path: Path) -> None:
    async def story(here: Rig) -> None:
        controller = await here.start("a", "--dry-run")
        here.requests_per_s = BUSY
        await here.until(lambda: any(r["kind"] == "dry_run" for r in controller.told("decided")))
        assert here.server.written == []
        told = await explained(controller.url, "-n", "50", "--since", "1h", "--facts")
        assert any("dry_run" in line and "1 > " in line for line in told.splitlines())
        assert "arrivals_per_s = " in told
        wanted = 'tandem_controller_replicas_wanted{role="prefill"}'
        assert await controller.metric(wanted) > 1

    play(tmp_path, story)


async def explained(url: str, *flags: str) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tandem", "controller", "explain", "--url", url, *flags,
        cwd=TOP, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode()


def test_while_a_router_can_t_be_read_nothing_is_decided(tmp_path: Path) -> None:
    async def story(here: Rig) -> None:
        here.router.well = False
        controller = await here.start("a")
        here.requests_per_s = BUSY
        await here.until(lambda: len(controller.told("decided")) >= 1)
        await here.until(lambda: here.holder == "a")
        assert (await controller.get("/readyz")).status_code == 503
        assert "no metrics of tandem-router-1" in (await controller.get("/readyz")).text
        assert await controller.metric('tandem_controller_scrapes_failed_total{role="router"}') > 0
        assert here.scaled_by == []
        here.router.well = True
        await here.until(lambda: here.wanted("prefill") > 1)

    play(tmp_path, story)


OUTAGES: dict[str, Callable[[ApiServer], object]] = {
    "500": lambda s: setattr(s, "refusal", (Refusal(500, "InternalError", "oh"), {})),
    "hangs": lambda s: setattr(s, "hangs", True),
    "no rights": lambda s: s.forbidden.update({("update", "leases"), ("get", "leases")}),
}


@pytest.mark.parametrize("how", OUTAGES)
def test_while_the_api_server_fails_nobody_leads_and_nobody_dies(how: str, tmp_path: Path) -> None:
    async def story(here: Rig) -> None:
        controller = await here.start("a")
        await here.until(lambda: here.holder == "a")
        OUTAGES[how](here.server)
        await here.until(lambda: len(controller.told("leads no more")) == 1)
        assert (await controller.get("/livez")).status_code == 200
        written = len(here.scaled_by)
        here.requests_per_s = BUSY
        await asyncio.sleep(1.0)
        assert len(here.scaled_by) == written
        here.server.refusal, here.server.hangs = None, False
        here.server.forbidden.clear()
        await here.until(lambda: len(controller.told("leads")) == 2)
        await here.until(lambda: here.wanted("decode") > 1)

    play(tmp_path, story)


def test_it_is_small(tmp_path: Path) -> None:
    """Neither an engine nor the router is loaded."""

    async def story(here: Rig) -> None:
        controller = await here.start("a")
        await here.until(lambda: here.holder == "a")
        pages = int((await read(controller)).split()[1])
        assert pages * 4096 < 100e6

    async def read(controller: Controller) -> str:
        from pathlib import Path

        return await asyncio.to_thread(Path(f"/proc/{controller.pid}/statm").read_text)

    play(tmp_path, story)
