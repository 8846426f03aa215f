"""Disaggregated beside aggregated, on real engines: time to first token and between tokens."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import aiohttp

from deploy.local.aggregated import Aggregated
from deploy.local.group import LocalGroup
from loadtests.sse import REST_S, stream
from loadtests.table import print_table

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPT_TOKENS = (256, 1024, 2048)
OUTPUT_TOKENS = 33
REPEATS = 5
STREAMS = 3
"""Streams that decode while long prompts arrive."""
INTRUDERS = 3
FLAGS = ["--max-model-len", "4096", "--enforce-eager"]

Figures = dict[str, float]


async def run(model: str, folder: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure and print; figures by side."""
    with ExitStack() as stack:
        say("aggregated: one vLLM server, loading")
        aggregated = stack.enter_context(Aggregated(folder, served_as=model, flags=FLAGS))
        aggregated.await_ready()
        group = stack.enter_context(
            LocalGroup(model, flags=FLAGS, router_flags=["--disaggregate", "always"], progress=say)
        )
        sides = {"aggregated": aggregated.url, "disaggregated": group.url}
        # Ids from the middle of the vocabulary; no two prompts share a block.
        prompts = _Prompts(random.Random(0))
        timeout = aiohttp.ClientTimeout(total=120)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            client = _Client(session, model, prompts)
            for url in sides.values():  # The first hand-off between two workers connects them.
                await client.complete(url, 64, 4)
            alone = await _alone(client, sides, say)
            crowded = await _crowded(client, sides, say)
    return {"alone": alone, "crowded": crowded}


class _Prompts:
    def __init__(self, seed: random.Random) -> None:
        self._random = seed

    def make(self, tokens: int) -> list[int]:
        return [self._random.randrange(1000, 40_000) for _ in range(tokens)]


class _Client:
    def __init__(self, session: aiohttp.ClientSession, model: str, prompts: _Prompts) -> None:
        self._session, self._model, self._prompts = session, model, prompts

    async def complete(self, url: str, prompt_tokens: int, output_tokens: int) -> Any:
        """One completion of exactly so many tokens, of a prompt that was never seen before."""
        body = {
            "model": self._model, "prompt": self._prompts.make(prompt_tokens), "temperature": 0,
            "max_tokens": output_tokens, "ignore_eos": True,
        }  # fmt: skip
        return await stream(self._session, f"{url}/v1/completions", body)


async def _alone(
    client: _Client, sides: dict[str, str], say: Callable[[str], None]
) -> dict[str, dict[str, Figures]]:
    """One request at a time."""
    found: dict[tuple[str, int], list[Any]] = {}
    for tokens, repeat in itertools.product(PROMPT_TOKENS, range(REPEATS)):
        for name, url in sides.items():
            await asyncio.sleep(REST_S)
            done = await client.complete(url, tokens, OUTPUT_TOKENS)
            found.setdefault((name, tokens), []).append(done)
        if repeat == REPEATS - 1:
            say(f"engines: prompts of {tokens} tokens measured")
    figures = {
        name: {
            str(tokens): {
                "ttft_ms": statistics.median(s.ttft_s for s in found[name, tokens]) * 1e3,
                "itl_ms_p50": _quantile([g for s in found[name, tokens] for g in s.gaps_s], 0.5),
                "itl_ms_p99": _quantile([g for s in found[name, tokens] for g in s.gaps_s], 0.99),
            }
            for tokens in PROMPT_TOKENS
        }
        for name in sides
    }
    one, two = figures.values()
    rows: list[list[str | float]] = []
    for length, what in itertools.product(one, ("ttft_ms", "itl_ms_p50", "itl_ms_p99")):
        a, b = one[length][what], two[length][what]
        rows.append([f"{int(length):,} tokens", what, a, b, b / a])
    print_table(
        f"One request at a time, {OUTPUT_TOKENS} tokens out, {REPEATS} in turns; aggregated has "
        "both cores, prefill and decode one each",
        ["prompt", "", *figures, "ratio"],
        rows,
    )
    return figures


async def _crowded(
    client: _Client, sides: dict[str, str], say: Callable[[str], None]
) -> dict[str, Figures]:
    """Streams under way when long prompts come in: what splitting the two is for."""
    figures: dict[str, Figures] = {}
    for name, url in sides.items():
        await asyncio.sleep(REST_S)
        streams = [asyncio.create_task(client.complete(url, 64, 250)) for _ in range(STREAMS)]
        await asyncio.sleep(1.0)
        intruders = [await client.complete(url, PROMPT_TOKENS[-1], 1) for _ in range(INTRUDERS)]
        gaps_s = [gap for done in await asyncio.gather(*streams) for gap in done.gaps_s]
        figures[name] = {
            "itl_ms_p50": _quantile(gaps_s, 0.5),
            "itl_ms_p99": _quantile(gaps_s, 0.99),
            "itl_ms_max": max(gaps_s) * 1e3,
            "ttft_ms": statistics.median(s.ttft_s for s in intruders) * 1e3,
        }
        say(f"engines: {name} measured under long prompts")
    one, two = figures.values()
    names = {
        "itl_ms_p50": "ITL of the streams, p50", "itl_ms_p99": "ITL of the streams, p99",
        "itl_ms_max": "longest pause", "ttft_ms": "TTFT of the long prompts, p50",
    }  # fmt: skip
    print_table(
        f"{STREAMS} streams, while {INTRUDERS} prompts of {PROMPT_TOKENS[-1]:,} tokens come in",
        ["", "unit", *figures, "ratio"],
        [[text, "ms", one[k], two[k], two[k] / one[k]] for k, text in names.items()],
    )
    return figures


def _quantile(seconds: list[float], share: float) -> float:
    """In milliseconds."""
    return sorted(seconds)[int(share * (len(seconds) - 1))] * 1e3
