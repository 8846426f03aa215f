"""`make attack`: every attack by itself beside ordinary streams, judged by stated bounds.

    python -m loadtests.attack [--only NAME,…] [--short] [--list] [--json FILE]

A router, four workers with simulated engines and a handoff port run as processes on 127.0.0.1, with
API keys. Twenty ordinary streams run all the while; what they lose, and how long they wait, is the
measure. The bounds are in loadtests/attack/bounds.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

from deploy.local.models import prepare
from deploy.local.parts import PartDied
from loadtests.attack import (  # noqa: F401  # Each registers its attacks.
    access_attacks,
    connection_attacks,
    fuzz_attacks,
    liars,
    process_attacks,
    wire_attacks,
    work_attacks,
)
from loadtests.attack.measure import Result, await_calm, measure
from loadtests.attack.registry import ATTACKS, Attack, chosen
from loadtests.attack.report import as_json, print_report
from loadtests.attack.scene import MODEL, Plan, Scene

QUIET_S = 8.0
QUIET_SHORT_S = 1.5


def main() -> int:
    """0 when every bound held, 1 when one was broken, 2 for a name that no attack has."""
    args = _parser().parse_args()
    if args.list:
        for attack in ATTACKS.values():
            print(f"{attack.name:<20}{'short  ' if attack.short else '       '}{attack.what}")
        return 0
    try:
        attacks = attacks_of(args.only, short=args.short)
    except ValueError as error:
        print(f"attack: {error}", file=sys.stderr)
        return 2
    prepare(args.model)
    plan = Plan(
        args.model,
        streams=args.streams,
        keys=not args.no_keys,
        seed=args.seed,
        pin=not (args.short or args.unpinned),
    )
    try:
        results = asyncio.run(_run(plan, attacks, args))
    except PartDied as error:
        print(f"attack: {error}", file=sys.stderr)
        return 1
    broken = [r.name for r in results if r.broken]
    _say(f"attack: {len(results) - len(broken)} held, {len(broken)} broken: {' '.join(broken)}")
    return 1 if broken or len(results) < len(attacks) else 0


def attacks_of(only: str, *, short: bool) -> list[Attack]:
    """As `chosen`, of all that there are: this module imports them."""
    return chosen(only, short=short)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        prog="python -m loadtests.attack",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", default="", help="attacks, commas between")
    add("--short", action="store_true", help="the quick ones, and no timing is judged")
    add("--list", action="store_true", help="all names, and what each does")
    add("--model", default=MODEL, help="whose tokenizer and template the router has")
    add("--streams", type=int, default=20, help="ordinary streams beside")
    add("--seed", type=int, default=0, help="where hypothesis begins")
    add("--minutes", type=float, default=9.0, help="no attack begins after so long")
    add("--unpinned", action="store_true", help="the processes share all cores")
    add("--no-keys", action="store_true", help="a router without API keys")
    add("--json", type=Path, help="write the figures there too")
    return parser


async def _run(plan: Plan, attacks: list[Attack], args: argparse.Namespace) -> list[Result]:
    results: list[Result] = []
    until = time.monotonic() + args.minutes * 60
    scene = Scene(plan, _say).__enter__()
    try:
        quiet = await _quiet(scene, QUIET_SHORT_S if args.short else QUIET_S)
        for number, attack in enumerate(attacks, 1):
            if time.monotonic() > until:
                _say(
                    f"attack: {len(attacks) - len(results)} left out after {args.minutes:g} minutes"
                )
                break
            await await_calm(scene, quiet["itl_ms_p99"] / 1e3)
            result = await measure(scene, attack, quiet["itl_ms_p99"] / 1e3, timings=not args.short)
            results.append(result)
            said = "ok" if not result.broken else f"BROKEN: {result.broken[0]}"
            _say(f"attack: {number}/{len(attacks)} {attack.name} ({result.seconds:.1f} s): {said}")
            if result.died and not attack.last:
                _say("attack: a process died; the others are started anew")
                scene.__exit__()
                scene = Scene(plan, _say).__enter__()
                await _quiet(scene, 2.0)
    finally:
        scene.__exit__()
        if results:
            print_report(results, quiet)
        if results and args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            content = json.dumps(as_json(results, quiet), indent=1)
            args.json.write_text(content + "\n", encoding="utf-8")
    return results


async def _quiet(scene: Scene, seconds: float) -> dict[str, float]:
    """The bystanders alone, once each has its undisturbed text."""
    began = time.monotonic()
    await asyncio.to_thread(scene.others, began, began + 0.5)
    began = time.monotonic()
    await asyncio.sleep(seconds)
    quiet = await asyncio.to_thread(scene.others, began, time.monotonic())
    if quiet["bad"]:
        raise PartDied(f"streams fail without an attack: {quiet['troubles']}")
    found: dict[str, float] = quiet
    return found


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
