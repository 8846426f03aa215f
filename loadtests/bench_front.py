"""What the router costs: beside vLLM's bare front, both over engines that answer at once."""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import psutil

from deploy.local.group import LocalGroup
from deploy.local.parts import Part, end
from loadtests.sse import Stream, stream
from loadtests.table import print_table

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

ROUNDS = 5
CLIENTS = 32
STREAMS = 16
FRONT_FLAGS = ["--max-model-len", "8192"]
SIM_FLAGS = ["--engine", "sim", "--max-model-len", "8192"]
STEP_MS = 2.0
"""Of the engines for the row of paced tokens: an instant one floods its router, which then sends
many tokens in one event. At this pace each token is an event of its own, as in service."""
TTFT_ADDED_MS_TARGET = 2.0
CPU_RATIO_TARGET = 2.0
TOKENS_PER_CORE_S_TARGET = 10_000

_PATH = "/v1/chat/completions"
Figures = dict[str, float]


async def run(model: str, folder: str, say: Callable[[str], None]) -> dict[str, Figures]:
    """Measure and print; figures by side, medians over the rounds."""
    cores = sorted(os.sched_getaffinity(0))
    paced_flags = ["--sim-step-ms", str(STEP_MS), "--sim-prefill-tokens-per-s", "1e9"]
    with ExitStack() as stack:
        # The front has one core to itself; simulated workers and clients have the rest.
        os.sched_setaffinity(0, cores[1:] or cores)
        stack.callback(os.sched_setaffinity, 0, cores)
        bare = stack.enter_context(_Bare(model, folder))
        instant = LocalGroup(model, flags=[*SIM_FLAGS, "--sim-instant"], progress=say)
        paced = LocalGroup(model, flags=[*SIM_FLAGS, *paced_flags], progress=say)
        stack.enter_context(instant)
        stack.enter_context(paced)
        assert instant.router is not None
        assert paced.router is not None
        sides = {
            "vLLM's bare front": (bare, bare),
            "Tandem's router": (instant.router, paced.router),
        }
        for part in (bare, instant.router, paced.router):
            _pin(part.pid, cores[0])
        rounds: dict[str, list[Figures]] = {name: [] for name in sides}
        for number in range(-1, ROUNDS):  # The first warms up and is not counted.
            for name, parts in sides.items():
                figures = await _round(*parts, model)
                if number >= 0:
                    say(f"front: round {number + 1} of {ROUNDS}: {name}")
                    rounds[name].append(figures)
    medians = {
        name: {k: statistics.median(f[k] for f in found) for k in found[0]}
        for name, found in rounds.items()
    }
    _print(medians)
    return medians


class _Bare:
    """The bare front's process, as a context manager."""

    def __init__(self, model: str, folder: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bare-front-")
        address_file = Path(self._folder.name) / "address.json"
        command = [
            sys.executable, "-m", "deploy.local.bare_front", "--model", folder,
            "--served-model-name", model, "--address-file", str(address_file), *FRONT_FLAGS,
        ]  # fmt: skip
        log = Path(self._folder.name) / "log"
        self._part = Part("bare front", command, log, address_file, ready_path="/health")

    def __enter__(self) -> Part:
        self._part.spawn()
        try:
            self._part.await_address(self._part.check)
            self._part.await_ready(self._part.check)
        except BaseException:
            self.__exit__()
            raise
        return self._part

    def __exit__(self, *_: object) -> None:
        end([self._part])
        self._folder.cleanup()


def _pin(pid: int, core: int) -> None:
    for thread in psutil.Process(pid).threads():
        os.sched_setaffinity(thread.id, {core})


async def _round(instant: Part, paced: Part, model: str) -> Figures:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    short = {"model": model, "messages": question, "temperature": 0, "max_tokens": 1}
    words = "the quick brown fox jumps over the lazy dog and then " * 364
    long = {**short, "messages": [{"role": "user", "content": words}]}
    connector = aiohttp.TCPConnector(limit=CLIENTS)
    async with aiohttp.ClientSession(connector=connector) as session:
        url = f"{instant.http}{_PATH}"
        alone = [await stream(session, url, short) for _ in range(150)]
        ttfts_ms = sorted(s.ttft_s * 1e3 for s in alone)
        figures = {
            "ttft_ms_p50": ttfts_ms[len(ttfts_ms) // 2],
            "ttft_ms_p99": ttfts_ms[int(len(ttfts_ms) * 0.99)],
        }

        async def answer(body: dict[str, Any]) -> None:
            async with session.post(url, json=body) as response:
                response.raise_for_status()
                await response.read()

        for name, body, clients, count in (("", short, CLIENTS, 800), ("long_", long, 8, 80)):
            wall_s, cpu_s = await _timed(instant, clients, count, partial(answer, body))
            figures[f"{name}requests_per_s"] = count / wall_s
            figures[f"{name}cpu_ms_per_request"] = cpu_s / count * 1e3
        figures |= await _tokens(session, instant, short)
        steady = await _tokens(session, paced, short)
        figures |= {f"paced_{name}": figure for name, figure in steady.items()}
    figures["memory_mb"] = psutil.Process(instant.pid).memory_info().rss / 1e6
    return figures


async def _tokens(session: aiohttp.ClientSession, part: Part, short: dict[str, Any]) -> Figures:
    streams: list[Stream] = []
    body = {**short, "max_tokens": 512, "ignore_eos": True}

    async def read() -> None:
        streams.append(await stream(session, f"{part.http}{_PATH}", body))

    wall_s, cpu_s = await _timed(part, STREAMS, STREAMS, read)
    count, events = sum(s.tokens for s in streams), sum(s.events for s in streams)
    return {
        "tokens_per_s": count / wall_s,
        "tokens_per_core_s": count / cpu_s,
        "cpu_us_per_token": cpu_s / count * 1e6,
        "tokens_per_event": count / events,
    }


async def _timed(
    part: Part, clients: int, count: int, call: Callable[[], Awaitable[None]]
) -> tuple[float, float]:
    """`count` calls by `clients` in a closed loop: wall seconds, CPU seconds of the front."""
    left = iter(range(count))

    async def client() -> None:
        for _ in left:
            await call()

    before, began = _cpu_s(part.pid), time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(clients):
            tasks.create_task(client())
    return time.perf_counter() - began, _cpu_s(part.pid) - before


def _cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


_ROWS = [
    ("TTFT, one client, p50", "ms", "ttft_ms_p50"),
    ("TTFT, one client, p99", "ms", "ttft_ms_p99"),
    (f"requests, {CLIENTS} clients, 1 token", "/s", "requests_per_s"),
    ("CPU a request", "ms", "cpu_ms_per_request"),
    ("requests of 4,000 words, 8 clients", "/s", "long_requests_per_s"),
    ("CPU a request of 4,000 words", "ms", "long_cpu_ms_per_request"),
    (f"streamed tokens, {STREAMS} streams, instant", "/s", "tokens_per_s"),
    ("the same a core", "/s", "tokens_per_core_s"),
    ("tokens an event", "", "tokens_per_event"),
    (f"streamed tokens, a step every {STEP_MS} ms", "/s", "paced_tokens_per_s"),
    ("the same a core", "/s", "paced_tokens_per_core_s"),
    ("tokens an event", "", "paced_tokens_per_event"),
    ("CPU a streamed token", "µs", "paced_cpu_us_per_token"),
    ("resident memory", "MB", "memory_mb"),
]


def _print(medians: dict[str, Figures]) -> None:
    (bare_name, bare), (our_name, ours) = medians.items()
    print_table(
        f"The front on one core, instant engines, medians of {ROUNDS} alternating rounds",
        ["", "unit", bare_name, our_name, "ratio"],
        [[what, unit, bare[k], ours[k], ours[k] / bare[k]] for what, unit, k in _ROWS],
    )
    added_ms = ours["ttft_ms_p50"] - bare["ttft_ms_p50"]
    cpu_ratio = ours["cpu_ms_per_request"] / bare["cpu_ms_per_request"]
    per_core = ours["paced_tokens_per_core_s"]
    print_table(
        "Targets",
        ["", "target", "measured", ""],
        [
            ["TTFT added at one client", f"≤ {TTFT_ADDED_MS_TARGET} ms", f"{added_ms:.2f} ms",
             _met(added_ms <= TTFT_ADDED_MS_TARGET)],
            ["CPU a request, over the bare front's", f"≤ {CPU_RATIO_TARGET} times",
             f"{cpu_ratio:.2f} times", _met(cpu_ratio <= CPU_RATIO_TARGET)],
            ["streamed tokens a second a core", f"≥ {TOKENS_PER_CORE_S_TARGET:,}",
             f"{per_core:,.0f}", _met(per_core >= TOKENS_PER_CORE_S_TARGET)],
        ],
    )  # fmt: skip


def _met(yes: bool) -> str:
    return "met" if yes else "MISSED"
