"""The tables that `python -m kvtransfer.bench` prints, and its targets."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, Final

from rich import box
from rich.console import Console
from rich.table import Table

from kvtransfer.bench_sides import TOTAL

if TYPE_CHECKING:
    from collections.abc import Sequence

    Found = dict[str, dict[str, Any]]

WIDTH: Final = 118
SCATTERED: Final = "1,024 x 32 KiB"
LARGE: Final = ("64 MiB", "256 MiB")
LEVEL: Final = 0.95
"""Two medians of the same thing differ by so much from run to run."""
SAMPLED_SHARE_MAX: Final = 0.05


def print_all(found: Found) -> list[dict[str, Any]]:
    """Every table; the targets, with what was measured, as they go into the report."""
    for title, group in found.items():
        _rates(title, group)
    _costs(found)
    _checksums(found["shared memory"].get("ucx", {}))
    targets = list(_targets(found))
    _print(
        "Targets",
        ["", "measured", "target", ""],
        [[t["what"], t["measured"], t["target"], _verdict(t)] for t in targets],
    )
    return targets


def _rates(title: str, group: dict[str, Any]) -> None:
    sizes = list(group["memcpy"]["gb_per_s"])
    rounds = group["memcpy"]["round_gb_per_s"][SCATTERED]
    rows: list[list[Any]] = []
    for name, figures in group.items():
        if "missing" in figures:
            rows.append([name, *["-"] * len(sizes), "-"])
            continue
        rates = [
            f"{figures['gb_per_s'][s]:.2f} ({_ratio(figures, group['memcpy'], s):.2f})"
            for s in sizes
        ]
        trip = "" if name == "memcpy" else figures["round_trip_us"]
        rows.append([name, *rates, trip])
    _print(
        f"{title}, {len(rounds)} rounds: GB/s (share of memcpy of as many bytes in one piece)",
        ["", *sizes, "4 KiB, us"],
        rows,
    )
    for name, figures in group.items():
        if "missing" in figures:
            Console(width=WIDTH, highlight=False).print(f"  {name}: {figures['missing']}")


def _costs(found: Found) -> None:
    rows: list[list[Any]] = []
    for group in found.values():
        for name, figures in group.items():
            if "missing" in figures or name in [r[0] for r in rows]:
                continue
            whole, scattered = (figures["cpu_s_per_gb"][s] for s in (LARGE[1], SCATTERED))
            rows.append([name, *whole, *scattered, figures["huge_share"] * 100,
                         figures["advise_s_per_gib"]])  # fmt: skip
    _print(
        "CPU seconds a GB, reader (it polls) and sender; huge pages of the sender",
        ["", "reader", "sender", "scattered", "sender", "huge, %", "advise, s/GiB"],
        rows,
    )


def _checksums(ucx: dict[str, Any]) -> None:
    rows = [
        [mode, ucx[f"{mode}_s"] * 1e3, TOTAL / ucx[f"{mode}_s"] / 1e9, f"{share:.1%}"]
        for mode in ("sampled", "full")
        if (share := _sums_share(ucx, mode)) is not None
    ]
    if rows:
        _print(
            "Checksums of one side: 256 blocks of 32 layers, 256 MiB, after a read over ucx",
            ["", "ms", "GB/s of KV", "share of the read's time"],
            rows,
        )


def print_load(load: float) -> None:
    """Other work on the machine takes memory bandwidth from every row alike, at best."""
    Console(width=WIDTH, highlight=False).print(f"Load average before: {load:.1f}")


def _targets(found: Found) -> list[dict[str, Any]]:
    shared, network = found["shared memory"], found["sockets"]

    def ratio(group: dict[str, Any], one: str, other: str, size: str) -> float | None:
        if "missing" in group[one] or "missing" in group[other]:
            return None
        return _ratio(group[one], group[other], size)

    wanted: list[tuple[str, list[float | None], float]] = [
        *((f"ucx beside NIXL bare, {s}", [ratio(shared, "ucx", "NIXL bare", s)], LEVEL)
          for s in shared["memcpy"]["gb_per_s"]),
        ("ucx, share of memcpy, large", [ratio(shared, "ucx", "memcpy", s) for s in LARGE], 0.6),
        ("ucx, share of memcpy, scattered", [ratio(shared, "ucx", "memcpy", SCATTERED)], 0.4),
        ("tcp beside two sockets, large",
         [ratio(network, "tcp", "two sockets", s) for s in LARGE], 0.8),
        ("tcp beside two sockets, scattered",
         [ratio(network, "tcp", "two sockets", SCATTERED)], 0.8),
        ("tcp beside UCX over TCP, scattered",
         [ratio(network, "tcp", "UCX over TCP bare", SCATTERED)], 4.0),
    ]  # fmt: skip
    targets = [_target(what, values, at_least) for what, values, at_least in wanted]
    if (share := _sums_share(shared.get("ucx", {}), "sampled")) is not None:
        targets.append(
            {"what": "sampled sums of one side, share of a read's time", "measured": share,
             "target": f"<= {SAMPLED_SHARE_MAX}", "met": share <= SAMPLED_SHARE_MAX}
        )  # fmt: skip
    return targets


def _target(what: str, values: list[float | None], at_least: float) -> dict[str, Any]:
    known = [v for v in values if v is not None]
    worst = min(known) if len(known) == len(values) else None
    met = None if worst is None else worst >= at_least
    return {"what": what, "measured": worst, "target": f">= {at_least}", "met": met}


def _sums_share(ucx: dict[str, Any], mode: str) -> float | None:
    """Of the time of the read that brought the bytes."""
    if f"{mode}_s" not in ucx:
        return None
    return float(ucx[f"{mode}_s"] / (TOTAL / ucx["gb_per_s"][LARGE[1]] / 1e9))


def _verdict(target: dict[str, Any]) -> str:
    return {True: "met", False: "missed", None: "not measured"}[target["met"]]


def _ratio(one: dict[str, Any], other: dict[str, Any], size: str) -> float:
    """Median of the rounds' ratios: what slows the machine for a while slows both."""
    pairs = zip(one["round_gb_per_s"][size], other["round_gb_per_s"][size], strict=True)
    return float(statistics.median(a / b for a, b in pairs))


def _print(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Numbers get three significant digits and stand right."""
    table = Table(*columns, title=title, title_justify="left", box=box.ASCII2)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*(_text(cell) for cell in row))
    Console(width=WIDTH, highlight=False).print(table)


def _text(cell: Any) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return cell
    return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
