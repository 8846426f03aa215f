"""One group of rows, in a process of its own: `python -m tests.gpu.group NAME --rows FILE`."""

from __future__ import annotations

import argparse
import importlib
import inspect
from pathlib import Path

from tests.gpu.groups import GROUPS
from tests.gpu.machine import Machine
from tests.gpu.report import Rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[g.name for g in GROUPS])
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--peer", default=None, help="the reader's device")
    given = parser.parse_args()
    group = next(g for g in GROUPS if g.name == given.name)
    run = importlib.import_module(f"tests.gpu.{group.module}").run
    machine = Machine(given.device, given.peer or given.device)
    named = {"name": group.name} if "name" in inspect.signature(run).parameters else {}
    run(Rows(group.name, given.rows), machine, **named)


if __name__ == "__main__":
    main()
