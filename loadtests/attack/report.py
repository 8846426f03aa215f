"""The attacks' results, as a table and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loadtests.table import print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadtests.attack.measure import Result

_COLUMNS = (
    "attack", "s", "CPU s", "hold ms", "ITL p99", "lost", "MiB router", "MiB worst", "log KiB", "",
)  # fmt: skip


def print_report(results: Sequence[Result], quiet: dict[str, Any]) -> None:
    """One row an attack; below, the statuses it saw and every bound that it broke.

    CPU and hold are the router's. ITL p99 is the other streams', in ms and as a multiple of the
    quiet one. Memory is before/peak/after: the router's, and that of the process that kept most.
    """
    print_table(
        f"quiet: ITL p50 {quiet['itl_ms_p50']:.1f} ms, p99 {quiet['itl_ms_p99']:.1f} ms, "
        f"longest hold {quiet['hold_ms_max']:.0f} ms, {quiet['streams']} streams",
        _COLUMNS,
        [_row(r) for r in results],
    )
    for result in results:
        notes = "".join(f"; {note}" for note in result.tally.notes)
        print(f"  {result.name}: {result.tally.shown() or 'no answers'}{notes}")
    for result in results:
        for breach in result.broken:
            print(f"  BROKEN {result.name}: {breach}")


def _row(r: Result) -> list[str | float]:
    return [
        r.name, r.seconds, r.cpu_s, r.others["hold_ms_max"],
        f"{r.others['itl_ms_p99']:.0f} ({r.itl_ratio:.1f}x)",
        f"{r.others['bad']}/{r.others.get('streams', 0)}", _memory(r, "router"),
        _memory(r, r.worst), r.log_bytes / 1024, "BROKEN" if r.broken else "ok",
    ]  # fmt: skip


def _memory(r: Result, name: str) -> str:
    steps = (r.before, r.peak, r.after)
    return "/".join(str(s[name] >> 20) if name in s else "-" for s in steps)


def as_json(results: Sequence[Result], quiet: dict[str, Any]) -> dict[str, Any]:
    return {
        "quiet": quiet,
        "attacks": [
            {
                "name": r.name, "seconds": r.seconds, "statuses": dict(r.tally.statuses),
                "router_cpu_s": r.cpu_s, "others": r.others, "itl_ratio": r.itl_ratio,
                "memory": {"before": r.before, "peak": r.peak, "after": r.after},
                "log_bytes": r.log_bytes, "broken": r.broken, "notes": r.tally.notes,
            }
            for r in results
        ],
    }  # fmt: skip
