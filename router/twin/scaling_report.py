"""What ways to size a group come to, as a table and in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from router.twin.scaling import Side

HEAD: Final = (
    "sizing", "met", "goodput/s", "TTFT p99 s", "ITL p99 ms", "prefill h", "decode h", "both",
    "of oracle's", "scalings", "highest",
)  # fmt: skip
RATIO_MAX: Final = 1.15


def table(sides: Sequence[Side], coarse: int) -> str:
    """A row for each, in Markdown. `coarse`: tokens that a simulated one stands for."""
    oracle = next(s for s in sides if s.name == "oracle")
    rows = [HEAD, *(_row(side, oracle, coarse) for side in sides)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(HEAD))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _row(side: Side, oracle: Side, coarse: int) -> tuple[str, ...]:
    f = side.figures
    return (
        side.name, f"{f.attainment:.2%}", f"{f.goodput_per_s:.3f}",
        f"{f.ttft_ms['p99'] / 1000:.1f}", f"{f.request_itl_ms['p99'] / coarse:.0f}",
        f"{side.prefill_h:.2f}", f"{side.decode_h:.2f}", f"{side.hours:.2f}",
        f"{side.hours / oracle.hours:.2f}", str(side.scalings),
        f"{side.peak.prefill}+{side.peak.decode}",
    )  # fmt: skip


def verdict(sides: Sequence[Side], attainment: float) -> str:
    """Whether ours is what it should be, each figure with what it should have been."""
    by_name = {s.name: s for s in sides}
    ours, oracle = by_name["ours"], by_name["oracle"]
    ratio = ours.hours / oracle.hours
    lines = [
        _said("ours holds the objective", ours.figures.attainment >= attainment,
              f"{ours.figures.attainment:.2%}, the oracle {oracle.figures.attainment:.2%}"),
        _said(f"at no more than {RATIO_MAX} of the oracle's worker-hours", ratio <= RATIO_MAX,
              f"{ratio:.2f}"),
    ]  # fmt: skip
    for name in [n for n in by_name if n.startswith("keda")]:
        lines.append(_beats(by_name, by_name[name], attainment))
    return "\n".join(lines)


def _beats(by_name: Mapping[str, Side], rival: Side, attainment: float) -> str:
    """One of ours meets as many or more in fewer hours; or the rival does not hold the objective,
    and ours does in no more hours."""
    met, holds = rival.figures.attainment, rival.figures.attainment >= attainment
    for name in [n for n in by_name if n.startswith("ours")]:
        side = by_name[name]
        spared = 1 - side.hours / rival.hours
        if spared > 0 and side.figures.attainment >= met:
            figures = (
                f"{name}: {side.figures.attainment:.2%} beside {met:.2%}, {spared:.0%} fewer hours"
            )
            return _said(f"beats {rival.name}", True, figures)
    ours = by_name["ours"]
    spared = 1 - ours.hours / rival.hours
    figures = f"{ours.figures.attainment:.2%} beside {met:.2%}, {spared:.0%} fewer hours"
    won = spared >= 0 and ours.figures.attainment >= attainment and not holds
    return _said(f"beats {rival.name}", won, figures)


def _said(what: str, true: bool, figures: str) -> str:
    return f"{'yes' if true else 'NO '}  {what}: {figures}"
