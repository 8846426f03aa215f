"""Figures for people: one table on standard output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

Cell = str | float
_WIDTH = 120


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """Numbers get three significant digits and stand right."""
    table = Table(*columns, title=title, title_justify="left", box=box.ASCII2)
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*(_text(cell) for cell in row))
    Console(width=_WIDTH, highlight=False).print(table)


def _text(cell: Cell) -> str:
    if isinstance(cell, str):
        return cell
    if abs(cell) >= 100:
        return f"{cell:,.0f}"
    return f"{cell:.3g}"
