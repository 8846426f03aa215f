"""`make twin-scaling`: ways to size a group, side by side, over days in the twin."""

from __future__ import annotations

import argparse
import gc
import logging
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

from controller.core.capacity import Prior
from controller.core.demand import Size
from controller.core.sizing import Sizer, SizingPolicy
from router.core.limits import Limits
from router.twin import days
from router.twin.compare import to_stderr
from router.twin.days import DAYS
from router.twin.elastic import Group
from router.twin.report import Objective, figures
from router.twin.rivals import Fixed, Target, Threshold, busy, queues, schedule
from router.twin.run import Options, Twin
from router.twin.scaling_report import table, verdict
from router.twin.timeline import Timeline, svg, timeline
from workers.api import Role
from workers.engines.sim_settings import SimSettings

if TYPE_CHECKING:
    from router.twin.elastic import Law
    from router.twin.report import Figures
    from router.twin.rivals import Schedule
    from router.twin.traces import Trace

COARSE: Final = 8
"""A simulated token stands for so many: the same seconds, and fewer events."""
PREFILL_TOKENS_PER_S: Final = 400.0
STEP_S, STREAM_S = 0.05, 0.0055
KV_TOKENS: Final = 46_080
"""An engine that is slow on purpose: as few requests make as large a group, and what counts is how
a worker's start compares with the day's slopes. SmolLM2 on less than half a core."""
DAY_S: Final = 7200.0
PEAK_PER_S: Final = 2.0
STARTUP_S: Final = 60.0
LOOK_S: Final = 10.0
OBJECTIVE: Final = Objective(ttft_s=20.0, itl_s=0.25)
ATTAINMENT: Final = 0.99
MOST: Final = Size(24, 16)
START: Final = Size(3, 2)
WINDOW_S: Final = 150.0
FILLS: Final = [(p, d) for p in (0.9, 0.95, 1.0, 1.05) for d in (0.9, 1.0, 1.1)]
"""How full the oracle's workers may be."""
TRIED_BELOW: Final = 3
CAUTIOUS: Final = 4.0
KEDA_GRID: Final = [(s, k) for s in (7.0, 8.0, 9.0) for k in (14.0, 17.0)]
"""Seconds of prompts queued for each prefill worker, streams on each decode worker."""
SEEN: Final = (("workday", 0), ("two-peaks", 0), ("flash-crowd", 0))
HELD_OUT: Final = (("workday", 7), ("late-evening", 7))
"""Neither these seeds nor these shapes were looked at while the law was made."""

_PREFILL: Final = SimSettings(
    streams=True, prefill_tokens_per_s=PREFILL_TOKENS_PER_S / COARSE, step_s=STEP_S,
    stream_s=STREAM_S * COARSE, block_tokens=128 // COARSE, blocks_total=KV_TOKENS // 128,
    token_bytes=23_040 * COARSE, chunk_tokens=2048 // COARSE, max_model_len=16_384 // COARSE,
)  # fmt: skip
TIMES: Final = 86_400 / DAY_S
ABOUT: Final = (
    f"A day in {DAY_S / 3600:g} h: {TIMES:.0f} times compressed. Not compressed: requests, a\n"
    f"worker's start ({STARTUP_S:g} s, worth {STARTUP_S * TIMES / 60:.0f} min of the day), looks "
    f"every {LOOK_S:g} s, all laws' windows.\n"
    f"Met: TTFT up to {OBJECTIVE.ttft_s:g} s and mean ITL up to {OBJECTIVE.itl_s * 1000:g} ms; "
    "refused and failed requests never are.\n"
    f"The objective is held where {ATTAINMENT:.0%} of all the day's requests are met.\n"
    f"Lengths as Azure's conversations of 2023; engines of {PREFILL_TOKENS_PER_S:g} prompt tokens\n"
    f"a second, steps of {STEP_S * 1000:g} ms and {STREAM_S * 1000:g} a stream; a simulated token "
    f"stands for {COARSE}.\n"
    "Hours are of workers, from asked for to gone, their start and drain included."
)
ENGINES: Final = {Role.PREFILL: _PREFILL, Role.DECODE: replace(_PREFILL, step_s=STEP_S * COARSE)}


@dataclass(frozen=True, slots=True)
class Side:
    """One way to size the group, over one day. Hours are of workers, from asked for to gone."""

    name: str
    figures: Figures
    prefill_h: float
    decode_h: float
    scalings: int
    first: Size
    """That it begins with: of all but the static one, the oracle's."""
    peak: Size
    line: Timeline

    @property
    def hours(self) -> float:
        return self.prefill_h + self.decode_h


@dataclass(frozen=True, slots=True)
class Case:
    """A day."""

    day: str
    seed: int

    def __str__(self) -> str:
        return f"{self.day}, seed {self.seed}"

    @property
    def trace(self) -> Trace:
        return _trace(self.day, self.seed)

    def run(self, name: str, law: Law, start: Size = START) -> Side:
        trace = self.trace
        objective = Objective(OBJECTIVE.ttft_s, OBJECTIVE.itl_s * COARSE)
        group = Group(ENGINES, start, law, STARTUP_S)
        group.look_s = LOOK_S
        limits = Limits(
            ttft_s=objective.ttft_s, itl_s=objective.itl_s, queue_max=len(trace.requests)
        )
        twin = Twin(trace, group.plan, Options(limits=limits), group)
        twin.run()
        found = figures(twin, objective)
        hours = {
            role: sum(p.paid_s(trace.seconds) for p in group.pods if p.role is role) / 3600
            for role in ENGINES
        }
        sizes = [start, *(d.size for d in group.decisions)]
        return Side(
            name, found, hours[Role.PREFILL], hours[Role.DECODE],
            scalings=sum(a != b for a, b in pairwise(sizes)),
            first=start,
            peak=Size(max(s.prefill for s in sizes), max(s.decode for s in sizes)),
            line=timeline(twin, group, objective),
        )  # fmt: skip

    # ------------------------------------------------------------ the oracle

    def oracle(self) -> Side:
        """The cheapest schedule found that holds the objective; else the best there was.

        The schedules are put in the order of what they cost, and halved as if more always served
        more; then the next cheaper ones are tried too.
        """
        plans = sorted(self._schedules(), key=lambda s: _cost(s, self.trace.seconds))
        sides: dict[int, Side] = {}

        def holds(at: int) -> bool:
            if at not in sides:
                sides[at] = self.run("oracle", plans[at], plans[at].at(0.0))
            return sides[at].figures.attainment >= ATTAINMENT

        low, high = 0, len(plans) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) else (middle + 1, high)
        for cheaper in range(max(0, low - TRIED_BELOW), low + 1):
            holds(cheaper)
        held = [s for s in sides.values() if s.figures.attainment >= ATTAINMENT]
        if held:
            return min(held, key=lambda s: s.hours)
        return max(sides.values(), key=lambda s: s.figures.attainment)

    def _schedules(self) -> list[Schedule]:
        ahead_s = STARTUP_S + LOOK_S
        loads = _loads(self.trace, WINDOW_S)
        return [schedule(loads, WINDOW_S, fill, ahead_s) for fill in FILLS]


@cache
def _trace(day: str, seed: int) -> Trace:
    return days.generate(DAYS[day], seed, PEAK_PER_S, DAY_S).scaled(lengths=COARSE)


def _loads(trace: Trace, window_s: float) -> list[tuple[float, float]]:
    """By window and for each role: what came, in workers that do nothing else."""
    count = int(trace.seconds // window_s) + 1
    prefill, decode = [0.0] * count, [0.0] * count
    tokens = sum(r.input_tokens + r.output_tokens for r in trace.requests)
    streams = 0.9 * KV_TOKENS / COARSE / (tokens / len(trace.requests))
    token_s = (STEP_S / streams + STREAM_S) * COARSE
    for request in trace.requests:
        window = int(request.at_s // window_s)
        prefill[window] += request.input_tokens * COARSE / PREFILL_TOKENS_PER_S / window_s
        decode[window] += request.output_tokens * token_s / window_s
    return list(zip(prefill, decode, strict=True))


def _cost(plan: Schedule, seconds: float) -> float:
    sizes = [plan.at(LOOK_S * n) for n in range(int(seconds // LOOK_S))]
    return sum(s.prefill + s.decode for s in sizes)


# ---------------------------------------------------------------- the others


def ours(caution: float | None = None) -> Sizer:
    """Told the objectives, and of workers and requests no more than a guess twice too high."""
    policy = SizingPolicy(
        most=MOST, attainment=ATTAINMENT, ttft_s=OBJECTIVE.ttft_s,
        itl_s=OBJECTIVE.itl_s * COARSE, look_s=LOOK_S, startup_s=STARTUP_S,
        prior=Prior(
            prompt_tokens=2000 / COARSE, output_tokens=400 / COARSE,
            prefill_tokens_per_s=2 * PREFILL_TOKENS_PER_S / COARSE,
            itl_s=STEP_S / 2 * COARSE, itl_stream_s=STREAM_S / 2 * COARSE, streams=64.0,
        ),
    )  # fmt: skip
    return Sizer(policy if caution is None else replace(policy, caution=caution))


def keda(seconds: float, streams: float) -> Threshold:
    tokens = seconds * PREFILL_TOKENS_PER_S / COARSE
    return Threshold(Target("queue", queues, tokens, streams), MOST)


def hpa() -> Threshold:
    return Threshold(Target("utilisation", busy, 0.7, 0.7, poll_s=LOOK_S), MOST)


def keda_usual() -> tuple[float, float]:
    """What a worker can have and meet the objectives, with a fifth to spare: half of the TTFT's
    time, and the streams that the ITL allows."""
    return 0.8 * OBJECTIVE.ttft_s / 2, 0.8 * (OBJECTIVE.itl_s - STEP_S) / STREAM_S


def _tried(job: tuple[Case, tuple[float, float]]) -> tuple[float, float]:
    side = job[0].run("keda", keda(*job[1]))
    return side.figures.attainment, side.hours


def best_keda(pool: ProcessPoolExecutor, case: Case) -> tuple[float, float]:
    """Of the grid, the cheapest that holds the objective; else what comes nearest."""
    found = dict(zip(KEDA_GRID, pool.map(_tried, [(case, g) for g in KEDA_GRID]), strict=True))
    held = [g for g, (attained, _) in found.items() if attained >= ATTAINMENT]
    if held:
        return min(held, key=lambda g: found[g][1])
    return max(found, key=lambda g: found[g][0])


def all_sides(job: tuple[Case, tuple[float, float]]) -> list[Side]:
    case, best = job
    _settle()
    oracle = case.oracle()
    return [
        case.run("ours", ours(), oracle.first),
        case.run("ours, more cautious", ours(CAUTIOUS), oracle.first),
        case.run("keda, usual", keda(*keda_usual()), oracle.first),
        case.run("keda, best of grid", keda(*best), oracle.first),
        case.run("hpa, 70 % busy", hpa(), oracle.first),
        case.run("static", Fixed(oracle.peak), oracle.peak),
        oracle,
    ]


def _settle() -> None:
    logging.getLogger("router").setLevel(logging.ERROR)
    gc.set_threshold(100_000, 50, 1000)


def main(argv: list[str] | None = None) -> int:
    """0 when all ran, whoever is ahead; 2 for a day that there is not."""
    args = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    wanted = args.days.split(",") if args.days else list(DAYS)
    if unknown := [day for day in wanted if day not in DAYS]:
        to_stderr(f"twin-scaling: no day is called {unknown[0]!r}; there are {', '.join(DAYS)}")
        return 2
    cases = [Case(*c) for c in SEEN + HELD_OUT if c[0] in wanted]
    _say(ABOUT)
    found: dict[str, list[Side]] = {}
    with ProcessPoolExecutor(args.processes, initializer=_settle) as pool:
        best = best_keda(pool, cases[0])
        to_stderr(
            f"keda's best of {len(KEDA_GRID)} on {cases[0]}: {best[0]:g} s, {best[1]:g} streams"
        )
        for case, sides in zip(cases, pool.map(all_sides, [(c, best) for c in cases]), strict=True):
            told = "" if (case.day, case.seed) in SEEN else " (held out)"
            _say(f"\n{case}{told}, {len(case.trace.requests):,} requests\n")
            _say(f"{table(sides, COARSE)}\n\n{verdict(sides, ATTAINMENT)}")
            found[str(case)] = sides
    if args.plot is not None:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        args.plot.write_text(svg({c: {s.name: s.line for s in f} for c, f in found.items()}))
    return 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m router.twin.scaling", description=__doc__)
    made.add_argument("--plot", type=Path, metavar="FILE", help="a picture, as SVG")
    made.add_argument("--days", help=f"only these, of {', '.join(DAYS)}")
    made.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    return made


if __name__ == "__main__":
    sys.exit(main())
