"""`make attack`'s judgement: a bystander sees what is wrong, a bound that is broken is told."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import Counter
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from loadtests.attack import bounds
from loadtests.attack.bystanders import Client, Log
from loadtests.attack.frames import nested
from loadtests.attack.measure import Result, judge
from loadtests.attack.registry import Tally

MIB = 1 << 20


def result(**changes: Any) -> Result:
    memory = {"router": 700 * MIB, "worker": 50 * MIB}
    others = {"bad": 0, "troubles": [], "hold_ms_max": 20.0, "itl_ms_p99": 30.0, "streams": 20}
    made = Result(
        "name", Tally(Counter({"200": 3, "503": 1, "401": 2})), 1.0, 0.1, others, 1.0,
        dict(memory), dict(memory), dict(memory), 1000,
    )  # fmt: skip
    return replace(made, **changes)


def test_attack_that_changes_nothing_breaks_no_bound() -> None:
    assert list(judge(result(), timings=True)) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tally": Tally(Counter({"500": 1}))}, "status 500"),
        ({"tally": Tally(Counter({"502": 1}))}, "status 502"),
        ({"tally": Tally(broken=["it answers"])}, "it answers"),
        ({"died": "worker ended with status 1"}, "ended with status 1"),
        ({"after": {"router": 800 * MIB, "worker": 50 * MIB}}, "router keeps 100 MiB more"),
        ({"peak": {"router": 1100 * MIB, "worker": 50 * MIB}}, "router took 400 MiB"),
        ({"log_bytes": 1 << 20}, "KiB of log"),
        ({"itl_ratio": bounds.ITL_RATIO_MAX + 0.1}, "times the quiet one"),
        ({"others": {**result().others, "hold_ms_max": 2500.0}}, "held up for 2.5 s"),
        ({"others": {**result().others, "bad": 1, "troubles": ["other text"]}}, "other text"),
    ],
)
def test_each_broken_bound_is_told(changes: dict[str, Any], told: str) -> None:
    found = list(judge(result(**changes), timings=True))
    assert len(found) == 1
    assert told in found[0]


def test_times_of_an_unquiet_machine_are_not_judged() -> None:
    slow = result(itl_ratio=50.0, others={**result().others, "hold_ms_max": 9000.0})
    assert list(judge(slow, timings=False)) == []


def event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text}]}).encode() + b"\n\n"


def run_client(answers: list[list[bytes] | int]) -> Log:
    """One client that is answered so, in order; the last answer again and again."""
    log = Log()

    async def main() -> None:
        turns = iter(answers)
        last: list[list[bytes] | int] = [200]

        async def answer(request: web.Request) -> web.StreamResponse:
            last[0] = next(turns, last[0])
            if isinstance(last[0], int):
                return web.Response(status=last[0], text="refused")
            response = web.StreamResponse()
            await response.prepare(request)
            for chunk in last[0]:
                await response.write(chunk)
            return response

        app = web.Application()
        app.router.add_post("/v1/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        args = argparse.Namespace(url=f"http://{host}:{port}", model="m", key="k")
        async with aiohttp.ClientSession() as session:
            task = asyncio.create_task(Client(args, 0, log).run(session))
            while len(log.streams) < len(answers):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await runner.cleanup()

    asyncio.run(main())
    log.streams = log.streams[: len(answers)]
    return log


WHOLE = [event("a"), event("b"), b"data: [DONE]\n\n"]


@pytest.mark.parametrize(
    ("second", "trouble"),
    [
        (WHOLE, ""),
        ([event("a"), event("x"), b"data: [DONE]\n\n"], "other text"),
        ([event("a"), b"data: [DONE]\n\n"], "other text"),
        ([event("a"), event("b")], "broke off"),
        ([event("a"), b'data: {"error": {"code": "worker_lost"}}\n\n'], "worker_lost"),
        (503, "503"),
    ],
)
def test_stream_unlike_its_undisturbed_one_is_lost(second: list[bytes] | int, trouble: str) -> None:
    streams = run_client([WHOLE, second]).streams
    assert streams[0].trouble == ""
    assert (trouble in streams[1].trouble) if trouble else streams[1].trouble == ""
    figures = Log(streams=streams).figures(0.0, 1e18)
    assert figures["bad"] == bool(trouble)


def test_gap_counts_where_it_overlaps_the_attack() -> None:
    log = Log(gaps=[(10.0, 0.02), (15.0, 5.0), (21.0, 0.02)])
    assert log.figures(11.0, 12.0)["itl_ms_max"] == 5000.0
    assert log.figures(16.0, 17.0)["events"] == 0


@pytest.mark.parametrize("depth", [1, 1000])
def test_nested_frame_is_an_array_a_level(depth: int) -> None:
    assert nested(depth).count(b"\x91") == depth
