"""`make bench-peers`: the same simulated engines behind our router and behind others'.

    python -m loadtests.bench_peers [--only SIDE,…] [--requests N] [--json FILE]

Sides run one after another, each with processes of its own, and are sent the same trace by the same
clients. A side that can't be installed or started is a row that says so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

import aiohttp

from deploy.local.models import prepare
from deploy.local.peers.fleet import Fleet
from deploy.local.peers.load import Shape, load, shaped
from deploy.local.peers.sides import FAILURES, PEERS, SIDES, Plan, Side
from loadtests.peers_figures import COLUMNS, Row, Slo, row_of
from loadtests.replay import Due, replay
from loadtests.sse import Stream, StreamFailed, stream
from loadtests.table import print_table

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from deploy.local.peers.load import Ask

MODEL = "smollm2-135m"
REFUSING = "tandem refusing"
"""Ours with the SLO's TTFT as its objective: it refuses what can't be in time."""
ALIKE = (REFUSING, "vllm-router kv")
"""Their CPU a token is another row's."""
ROWS = ["tandem", REFUSING, *(name for name in SIDES if name != "tandem")]
INSTANT = Fleet(prefill=1, decode=1, instant=True)
PACED = Fleet(prefill=1, decode=1, step_ms=2.0, prefill_tokens_per_s=1e9, stream_us=0.0)
"""An instant engine floods a router, which may then send many tokens in one event."""
STRETCHES = (0.25, 0.14)
"""Of the trace's times: a load that the engines carry, and one that they do not."""
REST_S = 2.0
WARM = 16
CLIENTS, STREAM_TOKENS, SHORT, ROUNDS = 16, 512, 400, 3
_PATH = "/v1/completions"
_TRACE = "the trace"
_T = TypeVar("_T")


@dataclass(slots=True)
class Report:
    """What was measured so far, in order."""

    rows: dict[float, dict[str, Row]] = field(default_factory=dict)
    """By how far apart the trace's arrivals are, then by side."""
    cpu: dict[str, dict[str, float]] = field(default_factory=dict)
    config: dict[str, Sequence[str]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


def main() -> int:
    """0 when it was measured, also where a side is not there."""
    args = _parser().parse_args()
    names = args.only.split(",") if args.only else ROWS
    if unknown := [n for n in names if n not in ROWS]:
        print(f"bench_peers: no side is called {unknown[0]!r}; there are {ROWS}", file=sys.stderr)
        return 2
    base = Shape(**{f.name: vars(args)[f.name] for f in fields(Shape) if f.name != "stretch_time"})
    plan = Plan(args.model, prepare(args.model), Fleet(args.prefill, args.decode), args.peers)
    shapes = [replace(base, stretch_time=stretch) for stretch in args.stretch_time]
    loads = {s: load(plan.folder, shaped(s), plan.fleet.max_model_len) for s in shapes}
    slo = Slo(args.slo_ttft_ms / 1e3, args.slo_itl_ms / 1e3)
    report = Report()
    for shape, asks in loads.items():
        rows = report.rows[shape.stretch_time] = {}
        for name in names:
            if (row := _measure(name, plan, asks, slo, report)) is not None:
                rows[name] = row
    if not args.no_cpu:
        for name in (n for n in names if n not in ALIKE):
            for fleet in (INSTANT, PACED):
                _measure_cpu(name, plan, fleet, report)
    _print(report, plan, slo, loads)
    if args.json:
        written = {
            "order": names, "fleet": asdict(plan.fleet), "slo": asdict(slo),
            "trace": asdict(base), "config": report.config,
            "rows": {
                f"{stretch:g}": {name: row.as_json() for name, row in rows.items()}
                for stretch, rows in report.rows.items()
            },
            "cpu": report.cpu, "errors": report.errors,
        }  # fmt: skip
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        prog="python -m loadtests.bench_peers",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    fleet, shape = Fleet(), Shape()
    add("--model", default=MODEL, help="whose tokenizer all sides use")
    add("--only", help=f"sides, with commas between, of: {'; '.join(ROWS)}")
    add("--name", default=shape.name, help="a trace that router/twin/generate.py makes")
    add("--seed", type=int, default=shape.seed, help="of the trace")
    add("--requests", type=int, default=shape.requests, help="of the trace, from its start")
    add("--divide-lengths", type=int, default=shape.divide_lengths, help="of prompts and answers")
    add(
        "--stretch-time",
        type=float,
        nargs="+",
        default=STRETCHES,
        help="arrivals apart by this; a table for each",
    )
    add(
        "--reuse-sooner", type=float, default=shape.reuse_sooner, help="shared beginnings come back"
    )
    add("--prefill", type=int, default=fleet.prefill, help="prefill engines")
    add("--decode", type=int, default=fleet.decode, help="decode engines")
    add("--slo-ttft-ms", type=float, default=2000, help="of a request's first token")
    add("--slo-itl-ms", type=float, default=25, help="of the mean of a request's ITL")
    add("--no-cpu", action="store_true", help="leave the section of CPU a token out")
    add("--peers", type=Path, default=PEERS, help="the Python that has the others' packages")
    add("--json", type=Path, help="write the figures there too")
    return parser


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- the trace


def _measure(name: str, plan: Plan, asks: Sequence[Ask], slo: Slo, report: Report) -> Row | None:
    if name == REFUSING:
        plan = replace(plan, ttft_objective_s=slo.ttft_s)
    requests = [Due(ask.at_s, _body(plan.model, ask.prompt, ask.output_tokens)) for ask in asks]

    async def turn(side: Side) -> Row:
        warm = [Due(n * 0.02, _body(plan.model, f"Question {n}?", 4)) for n in range(WARM)]
        await replay(side.url + _PATH, warm)
        all_s, router_s = side.cpu_s(), side.router_cpu_s()
        outcomes = await replay(side.url + _PATH, requests)
        cpu_s = side.cpu_s() - all_s, side.router_cpu_s() - router_s
        for error, times in Counter(o.error for o in outcomes if o.error).most_common(2):
            _say(f"{name}: {times} times: {error}")
        return row_of(outcomes, asks[-1].at_s, slo, cpu_s)

    return _on_side(name, plan, report, turn)


def _body(model: str, prompt: str, tokens: int) -> dict[str, Any]:
    return {
        "model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0,
        "ignore_eos": True,
    }  # fmt: skip


def _on_side(
    name: str, plan: Plan, report: Report, turn: Callable[[Side], Coroutine[Any, Any, _T]]
) -> _T | None:
    """What `turn` brings with the side up; None, and the reason in the report, without it."""
    make = SIDES["tandem" if name == REFUSING else name]
    cores = sorted(os.sched_getaffinity(0))
    alone = plan.fleet in (INSTANT, PACED)
    what = _TRACE
    if alone:
        what = "instant engines" if plan.fleet.instant else "paced engines"
    began = time.monotonic()
    try:
        if alone:  # Its processes share a core, and the clients have the rest.
            os.sched_setaffinity(0, cores[:1])
        with make(plan) as side:
            os.sched_setaffinity(0, (alone and cores[1:]) or cores)
            _say(f"{name}: {what}: ready after {time.monotonic() - began:.0f} s")
            report.config.setdefault(name, side.config)
            result = asyncio.run(turn(side))
            side.check()
    except (*FAILURES, StreamFailed, aiohttp.ClientError) as error:
        report.errors[f"{name}, {what}"] = str(error).strip() or type(error).__name__
        _say(f"{name}: {what}: {error}")
        return None
    finally:
        os.sched_setaffinity(0, cores)
    _say(f"{name}: {what}: done after {time.monotonic() - began:.0f} s")
    time.sleep(REST_S)
    return result


# ---------------------------------------------------------------- CPU a token


def _measure_cpu(name: str, plan: Plan, fleet: Fleet, report: Report) -> None:
    """Of streams and of short requests, while all processes of the side share one core."""
    if f"{name}, {_TRACE}" in report.errors:
        return

    async def turn(side: Side) -> dict[str, float]:
        url = side.url + _PATH
        async with aiohttp.ClientSession() as session:

            async def ask(tokens: int) -> Stream:
                body = _body(plan.model, "What is the capital of France?", tokens)
                return await stream(session, url, body)

            async def client(left: int, tokens: int) -> list[Stream]:
                return [await ask(tokens) for _ in range(left)]

            async def cpu_of(each: int, tokens: int) -> tuple[float, float, list[Stream]]:
                """Seconds of the router, of all, and what `CLIENTS` clients heard meanwhile."""
                router_s, all_s = side.router_cpu_s(), side.cpu_s()
                heard = await asyncio.gather(*(client(each, tokens) for _ in range(CLIENTS)))
                cpu_s = side.router_cpu_s() - router_s, side.cpu_s() - all_s
                return *cpu_s, [s for streams in heard for s in streams]

            await cpu_of(SHORT // CLIENTS, 2)
            shorts = [await cpu_of(SHORT // CLIENTS, 2) for _ in range(ROUNDS)]
            longs = [await cpu_of(1, STREAM_TOKENS) for _ in range(ROUNDS)]
        tokens = sum(s.tokens for s in longs[0][2])
        return {
            "tokens_per_event": tokens / sum(s.events for s in longs[0][2]),
            "router_us_per_token": median(s for s, _, _ in longs) / tokens * 1e6,
            "all_us_per_token": median(s for _, s, _ in longs) / tokens * 1e6,
            "router_ms_per_request": median(s for s, _, _ in shorts) / len(shorts[0][2]) * 1e3,
            "all_ms_per_request": median(s for _, s, _ in shorts) / len(shorts[0][2]) * 1e3,
        }

    what = "instant" if fleet.instant else f"a step every {fleet.step_ms:g} ms"
    if (figures := _on_side(name, replace(plan, fleet=fleet), report, turn)) is not None:
        report.cpu[f"{name}, {what}"] = figures


# ---------------------------------------------------------------- on paper


def _print(report: Report, plan: Plan, slo: Slo, loads: Mapping[Shape, Sequence[Ask]]) -> None:
    print("How each side was run:")
    for name, lines in report.config.items():
        print(f"  {name}")
        for line in lines:
            print(f"    {line}")
    print(
        f"\n{plan.fleet.prefill} prefill and {plan.fleet.decode} decode engines. SLO: TTFT up to"
        f" {slo.ttft_s:g} s, mean ITL up to {slo.itl_s * 1e3:g} ms. Measured in this order:"
    )
    missing = [[n, "not there", *[""] * (len(COLUMNS) - 2)] for n in ROWS if _missing(n, report)]
    for shape, asks in loads.items():
        prompts = [a.input_tokens for a in asks]
        print(
            f"\n{shape.name} (made up, seed {shape.seed}), {len(asks)} requests in"
            f" {asks[-1].at_s:.0f} s: lengths divided by {shape.divide_lengths}, times by"
            f" {1 / shape.stretch_time:g}, beginnings reused {shape.reuse_sooner:g} times sooner;"
            f" prompts of {sum(prompts) / len(prompts):,.0f} tokens, at most {max(prompts):,}."
        )
        rows = [row.cells(name) for name, row in report.rows[shape.stretch_time].items()]
        print_table(
            f"{len(asks) / asks[-1].at_s:.0f} requests a second; times in ms, CPU a request",
            COLUMNS, [*rows, *missing],
        )  # fmt: skip
    if report.cpu:
        print_table(
            f"CPU of streams of {STREAM_TOKENS} tokens and of requests for 2: {CLIENTS} clients,"
            f" medians of {ROUNDS},\n1 prefill and 1 decode, all processes of a side on one core",
            ["engines", "tokens an event", "router us/token", "all", "router ms/request", "all"],
            [[name, *figures.values()] for name, figures in report.cpu.items()],
        )
    for name, why in report.errors.items():
        print(f"{name}: {why}")


def _missing(name: str, report: Report) -> bool:
    return f"{name}, {_TRACE}" in report.errors


if __name__ == "__main__":
    sys.exit(main())
