"""How a group's size followed what came, over time, as figures and as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from router.twin.plot import COLOURS
from workers.api import Role

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from router.twin.elastic import Group
    from router.twin.report import Objective
    from router.twin.run import Twin

GRAIN_S: Final = 60.0
WINDOW_S: Final = 300.0
SHOWN: Final = ("ours", "oracle", "keda, best of grid")
WIDTH, HEIGHT = 460, 210
LEFT, TOP, RIGHT, BOTTOM = 45, 25, 10, 25


@dataclass(frozen=True, slots=True)
class Timeline:
    """Of one run. Points of (seconds, value)."""

    arrivals_per_s: list[tuple[float, float]]
    prefill: list[tuple[float, float]]
    """Workers that are paid for."""
    decode: list[tuple[float, float]]
    met: list[tuple[float, float]]
    """Share of those that came in a window."""


def timeline(twin: Twin, group: Group, objective: Objective) -> Timeline:
    until, outcomes = twin.trace.seconds, twin.outcomes
    count = int(until // WINDOW_S) + 1
    came, met = [0] * count, [0] * count
    for number, request in enumerate(twin.trace.requests):
        window = int(request.at_s // WINDOW_S)
        came[window] += 1
        met[window] += (
            outcomes.ended[number] == 1
            and outcomes.ttft_s(number) <= objective.ttft_s
            and outcomes.itl_s(number) <= objective.itl_s
        )
    middles = [(n + 0.5) * WINDOW_S for n in range(count)]
    lasts = [min(WINDOW_S, until - n * WINDOW_S) or WINDOW_S for n in range(count)]
    return Timeline(
        [(at, c / s) for at, c, s in zip(middles, came, lasts, strict=True)],
        _paid(group, Role.PREFILL, until),
        _paid(group, Role.DECODE, until),
        [(at, m / c if c else 1.0) for at, m, c in zip(middles, met, came, strict=True)],
    )


def _paid(group: Group, role: Role, until: float) -> list[tuple[float, float]]:
    pods = [p for p in group.pods if p.role is role]
    ats = [GRAIN_S * n for n in range(int(until // GRAIN_S) + 1)]
    return [(at, float(sum(p.asked_at <= at < p.gone_at for p in pods))) for at in ats]


def svg(cases: Mapping[str, Mapping[str, Timeline]]) -> str:
    """A row for each day: what came, both roles' workers, and how much of it was in time."""
    rows = []
    for row, (name, lines) in enumerate(cases.items()):
        some = {side: lines[side] for side in SHOWN if side in lines}
        colours = {side: COLOURS[n] for n, side in enumerate(some)}
        panels = [
            _panel(
                f"{name}: requests a second", {"": lines["oracle"].arrivals_per_s}, {"": "#000"}
            ),
            _panel("prefill workers", {s: each.prefill for s, each in some.items()}, colours),
            _panel("decode workers", {s: each.decode for s, each in some.items()}, colours),
            _panel("met, of each five minutes", {s: e.met for s, e in some.items()}, colours),
        ]
        rows += [
            f'<g transform="translate({n * WIDTH},{row * HEIGHT})">\n{panel}\n</g>'
            for n, panel in enumerate(panels)
        ]
    width, height = WIDTH * 4, HEIGHT * len(cases)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="11">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(rows) + "\n</svg>\n"
    )


def _panel(
    label: str,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    colours: Mapping[str, str],
) -> str:
    points = [point for curve in curves.values() for point in curve]
    last = max((x for x, _ in points), default=1.0)
    most = max((y for _, y in points), default=1.0) * 1.05 or 1.0
    lines = [
        f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" '
        f'height="{HEIGHT - TOP - BOTTOM}" fill="none" stroke="#888"/>',
        f'<text x="{LEFT}" y="{TOP - 8}">{escape(label)}</text>',
    ]
    for share in (0.0, 0.5, 1.0):
        y = HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
        lines.append(
            f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{share * most:.3g}</text>'
        )
    for n, (name, curve) in enumerate(curves.items()):
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in _scaled(curve, last, most))
        lines.append(
            f'<polyline points="{drawn}" fill="none" stroke="{colours[name]}" stroke-width="1.5"/>'
        )
        if name:
            lines.append(
                f'<text x="{LEFT + 8 + 130 * n}" y="{HEIGHT - 8}" '
                f'fill="{colours[name]}">{escape(name)}</text>'
            )
    return "\n".join(lines)


def _scaled(
    curve: Sequence[tuple[float, float]], last: float, most: float
) -> Iterator[tuple[float, float]]:
    """As steps."""
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + wide * x / last, HEIGHT - BOTTOM - high * y / most

    yield from (at(*point) for point in curve[:1])
    for (_, before), (x, y) in pairwise(curve):
        yield at(x, before)
        yield at(x, y)
