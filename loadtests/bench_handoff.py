"""The handoff end to end on real vLLM: streamed, whole, vLLM's own, and none.

    python -m loadtests.bench_handoff [--json FILE] [--repeats N]

Ours and aggregated are up at once and take turns. NixlConnector comes after them: its progress
threads spin on both cores as long as it is up, whoever is measured. Prefill has one core, decode
the other, whoever's they are; chunked prefill is on, with the same chunk for all.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import httpx

from deploy.local.aggregated import Aggregated
from deploy.local.group import LocalGroup
from deploy.local.models import prepare
from loadtests.sse import REST_S, Stream, stream
from loadtests.table import print_table

PROMPT_TOKENS = (512, 1024, 2048)
OUTPUT_TOKENS = 8
CHUNK_TOKENS = 256
FLAGS = [
    "--max-model-len", "4096", "--enforce-eager", "--max-num-batched-tokens", str(CHUNK_TOKENS),
]  # fmt: skip
APART = ["--disaggregate", "always"]
STREAMED, AT_ONCE, WHOLE = "streamed", "streamed, at dispatch", "whole"
NIXL, AGGREGATED = "NixlConnector", "aggregated"
HIDDEN_TARGET = 0.8


def main() -> int:
    """0 when everything was measured; a missed target is printed and is no failure."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m loadtests.bench_handoff")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    figures = asyncio.run(run(args.model, str(prepare(args.model)), args.repeats))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


async def run(model: str, folder: str, repeats: int) -> dict[str, Any]:
    """Measure and print; figures by side and prompt length."""
    found: Found = {}
    with ExitStack() as stack:
        _say("loading: three engines")
        ours = stack.enter_context(
            LocalGroup(model, flags=FLAGS, router_flags=APART, progress=_say)
        )
        at_once = ours.add_router("router-at-once", [*APART, "--reserve", "at_dispatch"])
        whole = ours.add_router("router-whole", [*APART, "--reserve", "at_prefill_done"])
        one = stack.enter_context(Aggregated(folder, served_as=model, flags=FLAGS))
        one.await_ready()
        sides = {
            STREAMED: ours.url, AT_ONCE: at_once.http, WHOLE: whole.http, AGGREGATED: one.url,
        }  # fmt: skip
        found |= await _measure(model, sides, repeats)
    _say("loading: two engines with NixlConnector")
    with LocalGroup(
        model, flags=[*FLAGS, "--kv-connector", "nixl"], router_flags=APART, progress=_say
    ) as theirs:  # fmt: skip
        found |= await _measure(model, {NIXL: theirs.url}, repeats)
    sides[NIXL] = theirs.url
    figures = {side: {n: _figures(found[side, n]) for n in PROMPT_TOKENS} for side in sides}
    _print(figures, repeats)
    return figures


class _Client:
    """Completions of random tokens that no cache has seen."""

    def __init__(self, session: aiohttp.ClientSession, model: str) -> None:
        self._session, self._model = session, model
        self._random = random.Random(0)
        self._count = 0

    async def complete(self, url: str, tokens: int) -> tuple[Stream, dict[str, Any]]:
        """The stream as it came, and the router's record of it (empty of vLLM's own server)."""
        self._count += 1
        name = f"cmpl-handoff-{self._count}"  # As the front will call it.
        body = {
            "model": self._model, "temperature": 0, "ignore_eos": True,
            "prompt": [self._random.randrange(1000, 40_000) for _ in range(tokens)],
            "max_tokens": OUTPUT_TOKENS, "request_id": name.removeprefix("cmpl-"),
        }  # fmt: skip
        done = await stream(self._session, f"{url}/v1/completions", body)
        async with httpx.AsyncClient() as http:
            answer = await http.get(f"{url}/tandem/requests/{name}")
        return done, answer.json()[0] if answer.status_code == 200 else {}


Found = dict[tuple[str, int], list[tuple[Stream, dict[str, Any]]]]


async def _measure(model: str, sides: dict[str, str], repeats: int) -> Found:
    found: Found = {}
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        client = _Client(session, model)
        for url, _ in itertools.product(sides.values(), range(2)):  # The first connects a pair.
            await client.complete(url, PROMPT_TOKENS[0])
        for tokens, repeat in itertools.product(PROMPT_TOKENS, range(repeats)):
            names = list(sides)
            names = names[repeat % len(names) :] + names[: repeat % len(names)]
            for name in names:
                await asyncio.sleep(REST_S)
                done = await client.complete(sides[name], tokens)
                found.setdefault((name, tokens), []).append(done)
            if repeat == repeats - 1:
                _say(f"prompts of {tokens} tokens measured")
    return found


def _figures(runs: list[tuple[Stream, dict[str, Any]]]) -> dict[str, float]:
    """Medians, in milliseconds; the share of reading time that was hidden over all runs."""
    read_s = sum(r.get("kv_s", 0.0) for _, r in runs)
    return {
        "first_ms": statistics.median(s.ttft_s for s, _ in runs) * 1e3,
        "second_ms": statistics.median(s.ttft_s + s.gaps_s[0] for s, _ in runs) * 1e3,
        "read_ms": statistics.median(r.get("kv_s", 0.0) for _, r in runs) * 1e3,
        "exposed_ms": statistics.median(
            r.get("kv_s", 0.0) - r.get("kv_hidden_s", 0.0) for _, r in runs
        ) * 1e3,
        "hidden": sum(r.get("kv_hidden_s", 0.0) for _, r in runs) / read_s if read_s else 0.0,
        "failed": float(sum(r.get("kv_failed") is not None for _, r in runs)),
    }  # fmt: skip


def _print(figures: dict[str, dict[int, dict[str, float]]], repeats: int) -> None:
    rows: list[list[str | float]] = []
    for tokens, side in itertools.product(PROMPT_TOKENS, figures):
        f, base = figures[side][tokens], figures[NIXL][tokens]
        own = side in (STREAMED, AT_ONCE, WHOLE)
        rows.append(
            [
                f"{tokens:,} tokens", side,
                f["first_ms"], f["first_ms"] / base["first_ms"],
                f["second_ms"], f["second_ms"] / base["second_ms"],
                f["read_ms"] if own else "", f["hidden"] if own else "",
            ]
        )  # fmt: skip
    print_table(
        f"Time to first and second token, ms; {repeats} in turns, medians; chunks of "
        f"{CHUNK_TOKENS}; x: of NixlConnector's",
        ["prompt", "side", "first", "x", "second", "x", "read ms", "hidden"],
        rows,
    )
    last = PROMPT_TOKENS[-1]
    ours, theirs = figures[STREAMED][last], figures[NIXL][last]
    for what, met in (
        (f"{ours['hidden']:.0%} of the reading hidden at {last:,} tokens, target 80 %",
         ours["hidden"] >= HIDDEN_TARGET),
        ("first token ahead of NixlConnector's", ours["first_ms"] < theirs["first_ms"]),
        ("second token ahead of NixlConnector's", ours["second_ms"] < theirs["second_ms"]),
        ("no handoff failed", not any(f["failed"] for s in figures.values() for f in s.values())),
    ):  # fmt: skip
        print(f"{'met' if met else 'MISSED'}: {what}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
