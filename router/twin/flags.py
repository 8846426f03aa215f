"""What `tandem twin` can be told."""

from __future__ import annotations

import argparse
from math import inf
from pathlib import Path
from typing import Final

from router.ask import Reserve
from router.twin.compare import POLICIES
from router.twin.fleet import ENGINES
from router.twin.generate import KINDS
from router.twin.run import ALIKE_S

DEFAULT_POLICIES: Final = "round-robin,power-of-two,session-hash,prefix-tree,ours,oracle"


def parser() -> argparse.ArgumentParser:
    policies = [f"  {name:<14} {what}" for name, what in POLICIES.items()]
    made = argparse.ArgumentParser(
        prog="tandem twin",
        description="The production router over simulated engines, on virtual time.",
        epilog="\n".join(["policies:", *policies, "", "docs/twin.md says what is in the model."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _what_runs(made.add_argument_group("what comes, and to whom"))
    _how(made.add_argument_group("how"))
    _what_comes_out(made.add_argument_group("what comes out"))
    return made


# fmt: off
def _what_runs(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--trace", default="mooncake-conversation", metavar="NAME|FILE",
        help=f"made up ({', '.join(KINDS)}), or a file: Mooncake's .jsonl, Azure's .csv")
    add("--requests", type=_count, help="only the first so many; default: all")
    add("--divide-lengths", type=_count, default=1, metavar="F",
        help="divide prompts and outputs by F, which divides 512")
    add("--stretch-time", type=_above_zero, default=1.0, metavar="F",
        help="so many times the time between arrivals: 0.5 is twice the load")
    add("--fleet", default="prefill=2,decode=2", metavar="ROLE=N,...|FILE",
        help="counts by role, or a .toml or .json file")
    add("--engine", choices=ENGINES, default="llama70b-8xh100",
        help="the workers' speed and size, where no file says it")
    add("--block-tokens", type=_count, help="the engines' KV block, where it is to be another")
    add("--seed", type=int, default=0, help="of what is made up and drawn")


def _how(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--policies", default=DEFAULT_POLICIES, help="default: %(default)s")
    add("--slo-ttft-ms", type=_above_zero, default=2000.0,
        help="objective for the time to first token; default: %(default)s")
    add("--slo-itl-ms", type=_above_zero, default=100.0,
        help="objective for a request's mean time between tokens; default: %(default)s")
    add("--reserve", choices=list(Reserve), type=Reserve, default=Reserve.AT_LAST_STEP,
        help="as the router's own")
    add("--queue-s", type=_above_zero, default=300.0,
        help="none waits longer in the router; default: %(default)s")
    add("--no-relay", action="store_true", help="first tokens come from decode workers")
    add("--max-tokens", type=_count,
        help="what clients ask for at most; default: the trace's longest output")
    add("--exact", action="store_true",
        help=f"tell every engine step; else those that only generate are told every {ALIKE_S} s")


def _what_comes_out(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--json", type=Path, metavar="FILE", help="the figures, byte for byte the same for a seed")
    add("--plot", type=Path, metavar="FILE", help="a picture of them, as SVG")
    add("--quiet", action="store_true", help="neither progress nor real times on stderr")
# fmt: on


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def _above_zero(text: str) -> float:
    number = float(text)
    if not 0 < number < inf:
        raise argparse.ArgumentTypeError(f"{text} is not above zero")
    return number
