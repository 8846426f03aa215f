"""`tandem twin`: policies compared on a trace, in the production router and on virtual time."""

from __future__ import annotations

import gc
import logging
import sys
from dataclasses import asdict
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from router.core.limits import Limits
from router.twin import fleet, plot, report, traces
from router.twin.compare import POLICIES, Comparison, to_stderr
from router.twin.flags import parser
from router.twin.fleet import FleetInvalid
from router.twin.generate import KINDS, generate
from router.twin.run import ALIKE_S, Options

if TYPE_CHECKING:
    import argparse

    from router.twin.compare import Side
    from router.twin.fleet import FleetPlan
    from router.twin.traces import Trace


def main(argv: list[str] | None = None) -> int:
    """0 when every policy ran; 2 for what can't be understood, with the reason on stderr."""
    args = parser().parse_args(sys.argv[1:] if argv is None else argv)
    names = [name.strip() for name in args.policies.split(",")]
    if unknown := [name for name in names if name not in POLICIES]:
        return _bad(f"no policy is called {unknown[0]!r}; there are {', '.join(POLICIES)}")
    try:
        comparison = _comparison(args)
    except (traces.TraceUnreadable, FleetInvalid, ValueError) as error:
        return _bad(str(error))
    logging.getLogger("router").setLevel(logging.ERROR)  # What it warns of is in the figures.
    print(_about(comparison, args))
    # All engines' objects are in this process, which no router has to look through.
    gc.set_threshold(100_000, 50, 1000)
    sides: dict[str, Side] = {}
    for name in names:
        sides[name] = comparison.run(name, (lambda _: None) if args.quiet else to_stderr)
    print(report.table({name: side.figures for name, side in sides.items()}))
    if not args.quiet:
        for name, side in sides.items():
            _tell_real_time(name, side)
    _write(args, comparison, sides)
    return 0


def _comparison(args: argparse.Namespace) -> Comparison:
    trace = _trace(args)
    plan = fleet.read(args.fleet, args.engine)
    if args.block_tokens is not None:
        plan = plan.with_blocks_of(args.block_tokens)
    options = Options(
        limits=Limits(queue_s=args.queue_s, queue_max=max(1, len(trace.requests))),
        reserve=args.reserve,
        relay=not args.no_relay,
        max_tokens=args.max_tokens,
        alike_s=0.0 if args.exact else ALIKE_S,
    )
    objective = report.Objective(args.slo_ttft_ms / 1000, args.slo_itl_ms / 1000)
    return Comparison(trace, plan, objective, options, args.seed)


def _trace(args: argparse.Namespace) -> Trace:
    if args.trace in KINDS:
        trace = generate(args.trace, args.seed, args.requests)
    else:
        trace = traces.read(Path(args.trace))
        if args.requests is not None:
            trace = trace.first(args.requests)
    return trace.scaled(args.divide_lengths, args.stretch_time)


def _about(comparison: Comparison, args: argparse.Namespace) -> str:
    trace, workers = comparison.trace, comparison.fleet.workers
    scale = f"lengths divided by {args.divide_lengths}, time stretched by {args.stretch_time:g}"
    return (
        f"{trace.name}: {len(trace.requests):,} requests in {trace.seconds:,.0f} s ({scale}), "
        f"seed {args.seed}, {_counts(comparison.fleet)} "
        f"({workers[0].settings.block_tokens} tokens a block)\n"
        f"met: TTFT up to {args.slo_ttft_ms:g} ms and mean ITL up to {args.slo_itl_ms:g} ms; "
        "shed and failed requests never count\n"
    )


def _counts(plan: FleetPlan) -> str:
    roles = [str(w.role) for w in plan.workers]
    return ", ".join(f"{roles.count(role)} {role}" for role in dict.fromkeys(roles))


def _tell_real_time(name: str, side: Side) -> None:
    faster = side.figures.virtual_s / side.real_s if side.real_s else inf
    to_stderr(
        f"{name}: {side.real_s:.1f} s, {faster:,.0f} times faster than real time; "
        f"placement {_us(side.place_us)}, an arrival in all {_us(side.submit_us)} "
        "(real clock: differs from run to run)"
    )


def _us(values: dict[str, float]) -> str:
    return f"p50 {values.get('p50', 0):,.0f} us, p99 {values.get('p99', 0):,.0f} us"


def _write(args: argparse.Namespace, comparison: Comparison, sides: dict[str, Side]) -> None:
    if args.json is not None:
        about: dict[str, Any] = {
            "trace": {
                "name": comparison.trace.name,
                "requests": len(comparison.trace.requests),
                "seconds": comparison.trace.seconds,
                "lengths_divided_by": args.divide_lengths,
                "time_stretched_by": args.stretch_time,
            },
            "seed": args.seed,
            "objective": asdict(comparison.objective),
            "fleet": [asdict(w) for w in comparison.fleet.workers],
            "latency_s": comparison.fleet.latency_s,
            "front_s": comparison.fleet.front_s,
        }
        found = {name: side.figures for name, side in sides.items()}
        _to_file(args.json, report.as_json(about, found))
    if args.plot is not None:
        title = _about(comparison, args).splitlines()[0]
        picture = plot.svg(
            title,
            {name: side.ttft_s for name, side in sides.items()},
            {name: side.itl_s for name, side in sides.items()},
            {name: side.figures.goodput_per_s for name, side in sides.items()},
        )
        _to_file(args.plot, picture)


def _to_file(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _bad(reason: str) -> int:
    to_stderr(f"tandem twin: {reason}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
