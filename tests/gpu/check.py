"""`make gpu-check`: what of Tandem runs on a GPU, and how fast. A table, and a JSON.

Each group of rows is a process of its own with a time limit, so that one that hangs or dies costs
its own rows alone. The JSON is written anew after each row. With `--dry-run` everything that can
run on a CPU does: host memory in place of the device's, tiny models.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tests.gpu.groups import GROUPS
from tests.gpu.report import HEAD, Row, one_line, read_rows, shown

if TYPE_CHECKING:
    from tests.gpu.groups import Group

TOTAL_S = 470.0
LOOK_S = 0.2
LOG_LINES = 40


class Check:
    """One run: its rows so far, and where they are written."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given, self.folder = given, folder
        self.began = time.monotonic()
        self.rows: list[Row] = []
        self.logs: dict[str, list[str]] = {}

    def left_s(self) -> float:
        return float(self.given.total_s) - (time.monotonic() - self.began)

    def add(self, rows: list[Row]) -> None:
        for row in rows:
            print(shown(row), flush=True)
        self.rows += rows
        if rows:
            self.write()

    def write(self) -> None:
        report = {
            "device": self.given.device,
            "dry_run": self.given.dry_run,
            "seconds": round(time.monotonic() - self.began, 1),
            "rows": [asdict(row) for row in self.rows],
            "logs": self.logs,
        }
        path: Path = self.given.json
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
        part.replace(path)

    def skip(self, group: Group, reason: str) -> None:
        self.add([Row(group.name, name, "skipped", reason) for name in group.rows])

    def run(self, group: Group) -> None:
        if self.left_s() < group.least_s:
            self.skip(group, f"{self.left_s():.0f} s of {self.given.total_s:.0f} were left")
            return
        limit_s = min(group.limit_s * self.given.patience, self.left_s())
        path, log = self.folder / f"{group.name}.rows", self.folder / f"{group.name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                self.command(group, path), stdout=output, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        ended, seen = self._follow(process, path, limit_s)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        missing = [name for name in group.rows if name not in seen]
        if missing or any(r.status == "failed" for r in self.rows if r.group == group.name):
            told = [line for line in lines[:-LOG_LINES] if "Error" in line]
            kept = told[:LOG_LINES] + lines[-LOG_LINES:]
            self.logs[group.name] = [one_line(line) for line in kept]
        why = ended or _last(lines) or f"its process ended with {process.returncode}"
        self.add([Row(group.name, name, "failed", one_line(why)) for name in missing])
        self.write()

    def command(self, group: Group, path: Path) -> list[str]:
        given = self.given
        return [sys.executable, "-m", "tests.gpu.group", group.name, "--rows", str(path),
                "--device", given.device, "--peer", given.peer]  # fmt: skip

    def _follow(
        self, process: subprocess.Popen[bytes], path: Path, limit_s: float
    ) -> tuple[str, set[str]]:
        """Take its rows as they come; why it had to be ended, if so, and which rows came."""
        until, seen, ended = time.monotonic() + limit_s, 0, ""
        while True:
            over = process.poll() is not None
            rows = read_rows(path)
            self.add(rows[seen:])
            seen = len(rows)
            if over:
                break
            if time.monotonic() > until:
                ended = f"its group was ended after {limit_s:.0f} s"
                os.killpg(process.pid, signal.SIGKILL)  # A session of its own: nobody else's.
                process.wait()
            time.sleep(LOOK_S)
        _sweep(process.pid)
        return ended, {row.name for row in read_rows(path)}


def _sweep(session: int) -> None:
    """End what a group has left behind: an engine would hold the GPU's memory."""
    try:
        os.killpg(session, signal.SIGKILL)
    except ProcessLookupError:
        return


def _last(lines: list[str]) -> str:
    """The line of a log that says most: the last error, or the last line."""
    errors = [line for line in lines if "Error" in line or "error" in line]
    return (errors or lines or [""])[-1]


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny models")
    parser.add_argument("--only", nargs="*", choices=[g.name for g in GROUPS], help="groups")
    parser.add_argument("--json", type=Path, default=Path("reports/gpu-check.json"))
    parser.add_argument("--total-s", type=float, default=TOTAL_S)
    parser.add_argument("--patience", type=float, default=1.0, help="times each group's limit")
    given = parser.parse_args(arguments)
    given.device = given.peer = "cpu"
    if not given.dry_run:
        given.device, given.peer = _devices(parser)
    return given


def _devices(parser: argparse.ArgumentParser) -> tuple[str, str]:
    try:
        import torch
    except ImportError:
        parser.error("there is no PyTorch here: --dry-run needs it too")
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here: --dry-run runs what a CPU can")
    return "cuda:0", "cuda:1" if torch.cuda.device_count() > 1 else "cuda:0"


def environment() -> dict[str, str]:
    """The environment that rows run under, where it is not set."""
    from deploy.local.parts import ENVIRONMENT

    return {**ENVIRONMENT, "NIXL_LOG_LEVEL": "WARN", "PYTHONUNBUFFERED": "1"}


def main(arguments: list[str] | None = None) -> int:
    given = _parsed(arguments)
    for name, value in environment().items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory() as folder:
        check = Check(given, Path(folder))
        print(HEAD, flush=True)
        for group in GROUPS:
            if given.only is None or group.name in given.only:
                check.run(group)
            for row in check.rows:
                if folder_of_modules := row.figures.get("UCX_MODULE_DIR"):
                    os.environ["UCX_MODULE_DIR"] = folder_of_modules
    statuses = [row.status for row in check.rows]
    counts = ", ".join(f"{statuses.count(s)} {s}" for s in ("ok", "failed", "skipped"))
    print(f"{counts} in {time.monotonic() - check.began:.0f} s")
    return 1 if "failed" in statuses else 0


if __name__ == "__main__":
    sys.exit(main())
