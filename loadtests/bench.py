"""`make bench`: the router beside vLLM's bare front, and disaggregated beside aggregated.

    python -m loadtests.bench [--only front|engines] [--json FILE]

Both sides of each table are up at once and take turns, so that the machine's noise meets both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from deploy.local.models import prepare
from loadtests import bench_engines, bench_front

MODEL = "smollm2-135m"


def main() -> int:
    """0 when everything was measured; a missed target is printed and is no failure."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m loadtests.bench")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--only", choices=["front", "engines"])
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    folder = str(prepare(args.model))
    figures: dict[str, Any] = {}
    if args.only != "engines":
        figures["front"] = asyncio.run(bench_front.run(args.model, folder, _say))
    if args.only != "front":
        figures["engines"] = asyncio.run(bench_engines.run(args.model, folder, _say))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
