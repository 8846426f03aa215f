"""`make loadtest`: locust's chats against a group on this machine, and a report."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from deploy.local.group import LocalGroup
from deploy.local.models import prepare
from deploy.local.parts import PartDied

CHAT = Path(__file__).with_name("chat.py")


def main() -> int:
    """locust's own status: 0, or 1 with a failure among the requests."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m loadtests.local")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--users", type=int, default=2)
    parser.add_argument("--duration-s", type=int, default=60)
    parser.add_argument("--html", type=Path, default=Path("reports/loadtest.html"))
    args = parser.parse_args()
    prepare(args.model)
    args.html.parent.mkdir(parents=True, exist_ok=True)
    try:
        with LocalGroup(args.model, flags=["--max-model-len", "4096"], progress=_say) as group:
            status = subprocess.run(
                [
                    sys.executable, "-m", "locust", "-f", str(CHAT), "--headless",
                    "--host", group.url, "--users", str(args.users), "--spawn-rate", "1",
                    "--run-time", f"{args.duration_s}s", "--stop-timeout", "30s",
                    "--only-summary", "--html", str(args.html), "--model", args.model,
                ],
                check=False,
            ).returncode  # fmt: skip
            group.check()
    except PartDied as error:
        _say(f"loadtest: {error}")
        return 1
    _say(f"report: {args.html}")
    return status


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
