"""`make twin-check`: what the twin foretells of real engines, beside what they do.

One prefill and one decode worker with SmolLM2 are calibrated; then prompts come in that were not
calibrated on, at three levels of load. `--replay FILE` foretells again what a former run measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
from dataclasses import asdict, fields, replace
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
    prompts=(32, 128, 256, 512, 1024, 1500), repeats=2, batches=(1, 2, 3, 4, 5, 6, 8),
    contexts=(64, 700), contexts_sum=3000, outputs=16, handoffs=(128, 512, 1024),
)  # fmt: skip
"""A short one: there is one before and one after each level of load."""
_QUANTILES: Final = (0.5, 0.9)
_AT_ONCE: Final = (1, 3, 6)
_SHORT: Final = 24
_STEPS: Final = 60
_PACES: Final = ("step_s", "pair_s", "stream_s", "context_token_s")
_SETTLED_AT: Final = 0.5
_SETTLED_BY: Final = 30
"""Requests of their own, at that load, by which what traffic adds is known."""
_ROUNDS: Final = 16
"""From fleet to foretold and back; the last two thirds find the noise by halves."""
_LATENCY_MS: Final = 0.2
_NOISE_MAX: Final = 0.4
_ALONE: Final = 9
"""Requests, one at a time, from which the front's own time is known."""


class Unanswered(Exception):
    """A request failed, so nothing is measured."""


def main() -> int:
    """0 when it was measured; a missed target is printed and is no failure."""
    args = _parser().parse_args()
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
    add("--requests", type=int, default=60, help="at each level; default: %(default)s")
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
    prepare(args.model)
    flags = ["--disaggregate", "always"]
    with LocalGroup(args.model, flags=FLAGS, router_flags=flags, progress=to_stderr) as group:
        before, levels = await _calibrate(group, args.model, turn=0), []
        for at, load in enumerate(LOADS):
            await asyncio.sleep(REST_S)
            requests = chats(plan_of(before), load, args.requests, seed=at)
            to_stderr(f"load {load:.0%}: {len(requests)} requests in {requests[-1].at_s:.0f} s")
            heard = await _play(group.url, args.model, requests, seed=9_000_000 + at)
            after = await _calibrate(group, args.model, turn=at + 1)
            levels.append(
                {
                    "load": load,
                    "fleets": [before, after],
                    "requests": [(r.at_s, r.input_tokens, r.output_tokens) for r in requests],
                    "heard": [asdict(h) for h in heard],
                }
            )
            before = after
    return {"levels": levels}


async def _calibrate(group: LocalGroup, model: str, turn: int) -> str:
    """The fleet as it is now: a shared machine is another from minute to minute."""
    channels, sweep = [w.channel for w in group.workers], replace(SWEEP, seed=turn)
    found = await asyncio.to_thread(measure, channels, sweep, to_stderr, one_host=True)
    _add_front(found, await _served(group.url, model, turn))
    alone = await _alone(group.url, model, turn)
    plan = plan_of(as_toml(found, _LATENCY_MS, front_ms=0.0))
    front_s = max(0.0, median(h.ttft_s for h in alone) - _lone_s(plan))
    to_stderr(f"the front takes {front_s * 1000:.1f} ms")
    some = chats(plan, _SETTLED_AT, _SETTLED_BY, seed=100 + turn)
    heard = await _play(group.url, model, some, seed=10_000 * turn + 900)
    return settled(found, front_s * 1000, some, heard)


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


def settled(
    found: Sequence[Calibrated], front_ms: float, some: Sequence[Request], heard: list[Outcome]
) -> str:
    """The fleet, with what traffic adds to the steps of both, since router and clients are on the
    same cores: a factor for each, by the mean time to a first token and the median gap; and the
    noise of gaps, by their p90.
    """
    prefill = next(each for each in found if each.hello.role is Role.PREFILL)
    decode = next(each for each in found if each.hello.role is not Role.PREFILL)
    real_ttft_s = fmean(h.ttft_s for h in heard)
    real_gaps_s = [g for h in heard for g in h.gaps_s]
    real_gap_s, real_long_s = (quantile(real_gaps_s, q) for q in _QUANTILES)
    factors, low, high = [1.0, 1.0], 0.0, _NOISE_MAX
    for turn in range(_ROUNDS):
        outcomes = foretold(plan_of(as_toml(found, _LATENCY_MS, front_ms)), some).outcomes
        gaps = [gap * GAP_GRAIN_S for gap in outcomes.gaps.elements()]
        said_ttft_s = fmean(outcomes.ttft_s(n) for n in range(len(some)))
        said_gap_s, said_long_s = (quantile(gaps, q) for q in _QUANTILES)
        off = real_ttft_s / said_ttft_s, real_gap_s / said_gap_s
        for at, each in enumerate((prefill, decode)):
            # By half: where prompts queue, a step that is longer by some is felt more than once.
            _slow(each.settings, off[at] ** 0.5)
            factors[at] *= off[at] ** 0.5
        if turn >= _ROUNDS // 3:
            noise = decode.settings["noise"]
            enough = said_long_s / said_gap_s > real_long_s / real_gap_s
            low, high = (low, noise) if enough else (noise, high)
            decode.settings["noise"] = (low + high) / 2
    to_stderr(
        f"in traffic: steps take {factors[0]:.3f} and {factors[1]:.3f} times as long, "
        f"noise {decode.settings['noise']:.1%}"
    )
    return as_toml(found, _LATENCY_MS, front_ms)


def _slow(settings: dict[str, Any], factor: float) -> None:
    settings.update({name: settings[name] * factor for name in _PACES})
    settings["prefill_tokens_per_s"] /= factor
    settings["batch_s"] = tuple(s * factor for s in settings["batch_s"])


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
                beside=(a.beside + b.beside) / 2)
        for a, b in zip(before.workers, after.workers, strict=True)
    )  # fmt: skip
    return replace(before, workers=workers, **both(before, after, ["latency_s", "front_s"]))


def _table(measured: dict[str, Any], plan: FleetPlan | None) -> str:
    lines = ["| load | | real p50 | foretold | error | real p90 | foretold | error |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    worst = 0.0
    for level in measured["levels"]:
        requests = [
            Request(at_s, tokens, outputs, own_blocks(n, tokens))
            for n, (at_s, tokens, outputs) in enumerate(level["requests"])
        ]
        known = plan or _between(*(plan_of(text) for text in level["fleets"]))
        outcomes = foretold(known, requests).outcomes
        gaps = [gap * GAP_GRAIN_S for gap in outcomes.gaps.elements()]
        for name, real, said in (
            ("TTFT", [h["ttft_s"] for h in level["heard"]],
             [outcomes.ttft_s(n) for n in range(len(outcomes))]),
            ("ITL", [g for h in level["heard"] for g in h["gaps_s"]], gaps),
        ):  # fmt: skip
            cells = []
            for q in _QUANTILES:
                a, b = quantile(real, q), quantile(said, q)
                worst = max(worst, abs(b / a - 1))
                cells += [f"{a * 1000:.1f} ms", f"{b * 1000:.1f} ms", f"{b / a - 1:+.1%}"]
            lines.append(f"| {level['load']:.0%} | {name} | " + " | ".join(cells) + " |")
    reached = "reached" if worst <= TARGET else "missed"
    lines += ["", f"worst error {worst:.1%}; the target of {TARGET:.0%} is {reached}"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
