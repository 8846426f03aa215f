"""Rows of `make gpu-check`: each is ok, failed or skipped, with one line and its figures."""

from __future__ import annotations

import contextlib
import json
import time
import traceback
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LINE_MAX = 200


@dataclass
class Row:
    group: str
    name: str
    status: str = "ok"
    """`ok`, `failed` or `skipped`."""
    said: str = ""
    """A remark: a failure's or a skip's reason, in one line."""
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)


class Skip(Exception):
    """This row can't be done here; the message says why."""


class Rows:
    """Where a group's process writes its rows, one JSON a line, as they end."""

    def __init__(self, group: str, path: Path) -> None:
        self._group, self._path = group, path

    @contextlib.contextmanager
    def row(self, name: str) -> Iterator[Row]:
        """One row. Whatever is raised inside ends the row and nothing else."""
        row, began = Row(self._group, name), time.monotonic()
        try:
            yield row
        except Skip as skip:
            row.status, row.said = "skipped", one_line(str(skip))
        except Exception as error:  # noqa: BLE001  # A row's edge: the next one goes on.
            traceback.print_exc()
            row.status = "failed"
            while isinstance(error, ExceptionGroup):  # What a task group says tells nothing.
                error = error.exceptions[0]
            row.said = one_line(f"{type(error).__name__}: {error}")
        row.seconds = round(time.monotonic() - began, 2)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row), default=str) + "\n")


def read_rows(path: Path) -> list[Row]:
    """The rows that a group has written; a line that is being written is left for later."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [Row(**json.loads(line)) for line in lines]


def one_line(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= LINE_MAX else words[: LINE_MAX - 1] + "…"


def shown(row: Row) -> str:
    """A row of the table."""
    figures = ", ".join(f"{k} {_short(v)}" for k, v in row.figures.items())
    said = "; ".join(s for s in (row.said, figures) if s)
    return f"| {row.group} | {row.name} | {row.status} | {row.seconds:.1f} | {said} |"


HEAD = "| group | row | | s | |\n|---|---|---|---|---|"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
