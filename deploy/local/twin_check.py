"""`make twin-check`: what the twin foretells of real engines, beside what they do.

One prefill and one decode worker with SmolLM2 are calibrated; then prompts come in that were not
calibrated on, at three levels of load by turns. Between any two such *segments* some other requests
say how long steps take at the time: a shared machine is another from minute to minute. `--replay
FILE` foretells again what a former run measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, Final

from deploy.local.group import LocalGroup
from deploy.local.models import prepare
from loadtests.peers_figures import quantile
from loadtests.replay import Due, Outcome, replay
from loadtests.sse import REST_S
from router.twin import fleet
from router.twin.batches import of_batch
from router.twin.calibrate import as_toml, measure
from router.twin.compare import Comparison, to_stderr
from router.twin.fit import fit, seconds_of
from router.twin.outcomes import GAP_GRAIN_S
from router.twin.run import Options, Twin
from router.twin.sweeps import Sweep
from router.twin.traces import Request, Trace, own_blocks
from workers.api import Role
from workers.engines.sim_settings import SimSettings, besides_s

if TYPE_CHECKING:
    from collections.abc import Sequence

    from router.twin.calibrate import Calibrated
    from router.twin.fleet import FleetPlan

FLAGS: Final = ["--max-model-len", "4096", "--enforce-eager"]
LOADS: Final = (0.25, 0.5, 0.75)
"""Of the time that the prefill worker has, what prompts take."""
TARGET: Final = 0.10
SWEEP: Final = Sweep(
    prompts=(32, 128, 256, 512, 1024, 1500), repeats=3, batches=(1, 2, 3, 4, 5, 6, 8),
    contexts=(64, 700), contexts_sum=3000, outputs=16, handoffs=(128, 512, 1024),
)  # fmt: skip
"""A short one: there is one before all segments and one after."""
_QUANTILES: Final = (0.5, 0.9)
_AT_ONCE: Final = (1, 3, 6)
_SHORT: Final = 24
_STEPS: Final = 60
_PACES: Final = ("step_s", "pair_s", "stream_s", "context_token_s")
_ROUNDS: Final = 4
"""Each level comes once in each."""
_SETTLED_AT: Final = 0.5
_SETTLED_BY: Final = 20
"""Requests of their own, at that load, before and after each segment."""
_NEAR: Final = 2
"""So many before and as many after a segment are what is known of it: each is off by 2 % itself."""
_TURNS: Final = 16
"""From fleet to foretold and back; the last two thirds find the noise by halves."""
_LATENCY_MS: Final = 0.2
_NOISE_MAX: Final = 0.4
_ALONE: Final = 9
"""Requests, one at a time, from which the front's own time is known."""


class Unanswered(Exception):
    """A request failed, so nothing is measured."""


def main() -> int:
    """0 when it was measured; a missed target is printed and is no failure."""
    parser = _parser()
    args = parser.parse_args()
    if args.requests < _ROUNDS:
        parser.error(f"--requests: want {_ROUNDS} or more, one for each round")
    if args.replay is not None:
        measured = json.loads(args.replay.read_text(encoding="utf-8"))
    else:
        measured = asyncio.run(_measure(args))
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(measured) + "\n", encoding="utf-8")
    print(_table(measured, fleet.read(str(args.fleet)) if args.fleet else None))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m deploy.local.twin_check")
    add = parser.add_argument
    add("--model", default="smollm2-135m")
    add("--requests", type=int, default=120, help="at each level; default: %(default)s")
    add("--seed", type=int, default=0, help="of arrivals and prompts; default: %(default)s")
    add(
        "--json",
        type=Path,
        default=Path("reports/twin-check.json"),
        help="what was measured, fleets included; default: %(default)s",
    )
    add("--replay", type=Path, help="foretell again what this file has, without engines")
    add("--fleet", type=Path, help="with another fleet than the calibrated one")
    return parser  # fmt: skip


# ---------------------------------------------------------------- real engines


async def _measure(args: argparse.Namespace) -> dict[str, Any]:
    """What it comes to: two fleets, and segments in order, each beside the load that it had; those
    without are there to calibrate by.
    """
    prepare(args.model)
    flags = ["--disaggregate", "always"]
    with LocalGroup(args.model, flags=FLAGS, router_flags=flags, progress=to_stderr) as group:
        played: list[dict[str, Any]] = []

        async def play(load: float | None, requests: Sequence[Request]) -> None:
            await asyncio.sleep(REST_S)
            to_stderr(f"{f'load {load:.0%}' if load else 'what traffic adds'}: "
                      f"{len(requests)} requests in {requests[-1].at_s:.0f} s")  # fmt: skip
            text_seed = 1_000_000 * (args.seed + 1) + len(played)
            heard = await _play(group.url, args.model, requests, text_seed)
            asked = [(r.at_s, r.input_tokens, r.output_tokens) for r in requests]
            played.append({"load": load, "requests": asked, "heard": [asdict(h) for h in heard]})

        fleets = [await _calibrate(group, args.model, turn=0)]
        plan, first = plan_of(fleets[0]), 10_000 * args.seed
        for turn in range(_ROUNDS):
            for at, load in enumerate(LOADS):
                number = first + turn * len(LOADS) + at
                await play(None, chats(plan, _SETTLED_AT, _SETTLED_BY, seed=1000 + number))
                count = args.requests * (turn + 1) // _ROUNDS - args.requests * turn // _ROUNDS
                await play(load, chats(plan, load, count, seed=number))
        await play(None, chats(plan, _SETTLED_AT, _SETTLED_BY, seed=first + 2000))
        fleets.append(await _calibrate(group, args.model, turn=1))
    return {"fleets": fleets, "segments": played}


async def _calibrate(group: LocalGroup, model: str, turn: int) -> str:
    """The fleet, its workers idle but for what measures them."""
    channels, sweep = [w.channel for w in group.workers], replace(SWEEP, seed=turn)
    found = await asyncio.to_thread(measure, channels, sweep, to_stderr, one_host=True)
    _add_front(found, await _served(group.url, model, turn))
    alone = await _alone(group.url, model, turn)
    plan = plan_of(as_toml(found, _LATENCY_MS, front_ms=0.0))
    front_s = max(0.0, median(h.ttft_s for h in alone) - _lone_s(plan))
    to_stderr(f"the front takes {front_s * 1000:.1f} ms")
    return as_toml(found, _LATENCY_MS, front_s * 1000)


_LONE: Final = Request(0.0, 128, 4, own_blocks(0, 128))


async def _play(url: str, model: str, requests: Sequence[Request], seed: int) -> list[Outcome]:
    """Each at its time from now on, of a prompt that nobody has seen. Raises `Unanswered`."""
    rng = random.Random(seed)
    due = [Due(r.at_s, _body(model, r, rng)) for r in requests]
    heard = await replay(f"{url}/v1/completions", due)
    if error := next((h.error for h in heard if h.error is not None), None):
        raise Unanswered(error)
    return heard


def _body(model: str, request: Request, rng: random.Random) -> dict[str, Any]:
    prompt = [rng.randrange(1000, 40_000) for _ in range(request.input_tokens)]
    return {
        "model": model, "prompt": prompt, "temperature": 0, "ignore_eos": True,
        "max_tokens": request.output_tokens,
    }  # fmt: skip


async def _served(url: str, model: str, turn: int) -> list[tuple[int, float]]:
    """So many streams at once through the router, and the seconds of a step of theirs."""
    found = []
    for count in _AT_ONCE:
        asked = [Request(0.0, _SHORT, _STEPS, own_blocks(n, _SHORT)) for n in range(count)]
        heard = await _play(url, model, asked, seed=10_000 * turn + 100 + count)
        # Between the last one's prompt and the first one's end.
        found.append((count, median(gap for h in heard for gap in h.gaps_s[_STEPS // 3 : -8])))
        to_stderr(f"{count} streams through the router: a step takes {found[-1][1] * 1000:.1f} ms")
    return found


def _add_front(found: Sequence[Calibrated], served: Sequence[tuple[int, float]]) -> None:
    """What router and clients add to the decode worker's steps: here they share its cores."""
    decode = next(each for each in found if each.hello.role is not Role.PREFILL)
    before = float(_SHORT + _STEPS / 2)
    more = []
    for n, s in served:
        row = (1.0, 0.0, 0.0, float(n), n * before)
        known_s = seconds_of(decode.fit.rates, row) + of_batch(decode.settings["batch_s"], row)
        more.append(max(1e-5, s - known_s))
    a_step_s, a_stream_s = fit([(1.0, float(n)) for n, _ in served], more).rates
    decode.settings["step_s"] += a_step_s
    decode.settings["stream_s"] += a_stream_s


async def _alone(url: str, model: str, turn: int) -> list[Outcome]:
    heard = []
    for n in range(_ALONE + 1):
        heard += await _play(url, model, [_LONE], seed=10_000 * turn + 500 + n)
        await asyncio.sleep(0.2)
    return heard[1:]


def _lone_s(plan: FleetPlan) -> float:
    return foretold(plan, [_LONE]).outcomes.ttft_s(0)


def plan_of(toml: str) -> FleetPlan:
    """As `tandem twin --fleet FILE` reads it. Raises `FleetInvalid`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fleet.toml"
        path.write_text(toml, encoding="utf-8")
        return fleet.read(str(path))


def chats(plan: FleetPlan, load: float, count: int, seed: int) -> list[Request]:
    """Chats: prompts log-normal around 250 tokens, a dozen to four dozen tokens out."""
    rng = random.Random(f"twin-check/{seed}")
    lengths = [round(min(1500, max(24, rng.lognormvariate(5.5, 0.8)))) for _ in range(count)]
    s = next(w.settings for w in plan.workers if w.role == "prefill")
    work_s = sum(
        s.step_s + n / s.prefill_tokens_per_s + n * (n + 1) / 2 * s.pair_s for n in lengths
    )
    per_s = load * count / work_s
    ats = accumulate(rng.expovariate(per_s) for _ in range(count))
    return [
        Request(at_s, tokens, rng.randint(12, 48), own_blocks(n, tokens))
        for n, (at_s, tokens) in enumerate(zip(ats, lengths, strict=True))
    ]


# ---------------------------------------------------------------- foretold


def settled(
    plan: FleetPlan, some: Sequence[Request], heard: Sequence[Outcome]
) -> tuple[float, float, float]:
    """What traffic adds to the steps of both, since router and clients are on the same cores.

    A factor for each, by the mean time to a first token and the median gap; and the noise of gaps,
    by their p90. For `slowed`.
    """
    real_ttft_s = fmean(h.ttft_s for h in heard)
    real_gaps_s = [g for h in heard for g in h.gaps_s]
    real_gap_s, real_long_s = (quantile(real_gaps_s, q) for q in _QUANTILES)
    prefill, decode = 1.0, 1.0
    noise = next(w.settings.noise for w in plan.workers if w.role != Role.PREFILL)
    low, high = 0.0, _NOISE_MAX
    found = plan
    for turn in range(_TURNS):
        outcomes = foretold(found, some).outcomes
        gaps = [gap * GAP_GRAIN_S for gap in outcomes.gaps.elements()]
        said_gap_s, said_long_s = (quantile(gaps, q) for q in _QUANTILES)
        # By half: where prompts queue, a step that is longer by some is felt more than once.
        prefill *= (real_ttft_s / fmean(outcomes.ttft_s(n) for n in range(len(some)))) ** 0.5
        decode *= (real_gap_s / said_gap_s) ** 0.5
        if turn >= _TURNS // 3:
            enough = said_long_s / said_gap_s > real_long_s / real_gap_s
            low, high = (low, noise) if enough else (noise, high)
            noise = (low + high) / 2
        found = slowed(plan, prefill, decode, noise)
    return prefill, decode, noise


def slowed(plan: FleetPlan, prefill: float, decode: float, noise: float) -> FleetPlan:
    """With steps that take so many times as long, and the decode worker's with that noise."""

    def slow(s: SimSettings, factor: float) -> SimSettings:
        return replace(
            s,
            **{name: getattr(s, name) * factor for name in _PACES},
            prefill_tokens_per_s=s.prefill_tokens_per_s / factor,
            batch_s=tuple(b * factor for b in s.batch_s),
        )

    workers = tuple(
        replace(w, settings=slow(w.settings, prefill) if w.role == Role.PREFILL
                else replace(slow(w.settings, decode), noise=noise))
        for w in plan.workers
    )  # fmt: skip
    return replace(plan, workers=workers)


def foretold(plan: FleetPlan, requests: Sequence[Request]) -> Twin:
    """The twin, after it has served these by the production router's own policy."""
    comparison = Comparison(Trace("twin-check", requests), plan, options=Options(alike_s=0.0))
    twin = Twin(comparison.trace, plan, comparison.options)
    twin.run(comparison.policy("ours-always", twin))
    return twin


def _between(before: FleetPlan, after: FleetPlan) -> FleetPlan:
    """The mean of two that differ in their times alone."""

    def mean(a: Any, b: Any, name: str) -> Any:
        if isinstance(a, tuple):
            most = max(len(a), len(b))  # The largest batch may have been seen once only.
            return tuple((besides_s(a, n) + besides_s(b, n)) / 2 for n in range(1, most + 1))
        if not isinstance(a, float):
            return a
        return 2 / (1 / a + 1 / b) if name.endswith("_per_s") else (a + b) / 2

    def both(a: Any, b: Any, names: Sequence[str]) -> dict[str, Any]:
        return {n: mean(getattr(a, n), getattr(b, n), n) for n in names}

    names = [f.name for f in fields(SimSettings)]
    workers = tuple(
        replace(a, settings=replace(a.settings, **both(a.settings, b.settings, names)),
                beside=(a.beside + b.beside) / 2, host=a.host or b.host)
        for a, b in zip(before.workers, after.workers, strict=True)
    )  # fmt: skip
    return replace(before, workers=workers, **both(before, after, ["latency_s", "front_s"]))


def _requests(segment: dict[str, Any]) -> list[Request]:
    return [
        Request(at_s, tokens, outputs, own_blocks(n, tokens))
        for n, (at_s, tokens, outputs) in enumerate(segment["requests"])
    ]


@dataclass(slots=True)
class _Level:
    """Seconds, real and foretold, of all segments of one load."""

    ttfts: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    gaps: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))

    def add(self, heard: Sequence[Outcome], twin: Twin) -> None:
        outcomes = twin.outcomes
        self.ttfts[0].extend(h.ttft_s for h in heard)
        self.ttfts[1].extend(outcomes.ttft_s(n) for n in range(len(outcomes)))
        self.gaps[0].extend(g for h in heard for g in h.gaps_s)
        self.gaps[1].extend(gap * GAP_GRAIN_S for gap in outcomes.gaps.elements())


def _levels(measured: dict[str, Any], given: FleetPlan | None) -> dict[float, _Level]:
    """Each segment by what traffic said before it and after, or by the `given` fleet."""
    base = _between(*(plan_of(text) for text in measured["fleets"]))
    known: list[tuple[float, float, float]] = []
    segments: list[tuple[int, float, list[Request], list[Outcome]]] = []
    for played in measured["segments"]:
        requests, heard = _requests(played), [Outcome(**h) for h in played["heard"]]
        if played["load"] is not None:
            segments.append((len(known), played["load"], requests, heard))
            continue
        known.append(settled(base, requests, heard))
        to_stderr("in traffic: steps take {:.3f} and {:.3f} times as long".format(*known[-1]))
    levels: defaultdict[float, _Level] = defaultdict(_Level)
    for before, load, requests, heard in segments:
        near = known[max(0, before - _NEAR) : before + _NEAR]
        plan = given or slowed(base, *(fmean(each) for each in zip(*near, strict=True)))
        levels[load].add(heard, foretold(plan, requests))
    return levels


def _table(measured: dict[str, Any], given: FleetPlan | None) -> str:
    lines = ["| load | | real p50 | foretold | error | real p90 | foretold | error |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    worst = 0.0
    for load, level in sorted(_levels(measured, given).items()):
        for name, (real, said) in (("TTFT", level.ttfts), ("ITL", level.gaps)):
            cells = []
            for q in _QUANTILES:
                a, b = quantile(real, q), quantile(said, q)
                worst = max(worst, abs(b / a - 1))
                cells += [f"{a * 1000:.1f} ms", f"{b * 1000:.1f} ms", f"{b / a - 1:+.1%}"]
            lines.append(f"| {load:.0%} | {name} | " + " | ".join(cells) + " |")
    reached = "reached" if worst <= TARGET else "missed"
    lines += ["", f"worst error {worst:.1%}; the target of {TARGET:.0%} is {reached}"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
