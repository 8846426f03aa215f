"""The figures as a picture: SVG, written by hand, since nothing here needs a plotting library."""

from __future__ import annotations

from html import escape
from math import ceil, floor, log10
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

WIDTH, HEIGHT = 420, 300
LEFT, TOP, RIGHT, BOTTOM = 60, 40, 15, 45
COLOURS: Final = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999",
)  # fmt: skip
"""Okabe and Ito's, which the colour-blind tell apart."""


def svg(
    title: str,
    ttft_s: Mapping[str, Sequence[float]],
    itl_s: Mapping[str, Sequence[float]],
    goodput_per_s: Mapping[str, float],
) -> str:
    """By policy: quantiles of requests' TTFT and mean ITL, from least to most, and goodput."""
    colours = {name: COLOURS[n % len(COLOURS)] for n, name in enumerate(goodput_per_s)}
    panels = [
        _curves("time to first token, s", ttft_s, colours),
        _curves("mean time between tokens, s", itl_s, colours),
        _bars("goodput, requests a second", goodput_per_s, colours),
    ]
    width, height = WIDTH * len(panels), HEIGHT + 30
    drawn = "\n".join(
        f'<g transform="translate({n * WIDTH},30)">\n{panel}\n</g>'
        for n, panel in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="11">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n'
        f'<text x="12" y="20" font-size="14">{escape(title)}</text>\n{drawn}\n</svg>\n'
    )


def _curves(label: str, curves: Mapping[str, Sequence[float]], colours: Mapping[str, str]) -> str:
    """Which share of requests had so much or less; the scale across is logarithmic."""
    values = [v for curve in curves.values() for v in curve if v > 0]
    low, high = (floor(log10(min(values))), ceil(log10(max(values)))) if values else (-1, 0)
    high = max(high, low + 1)

    def x(value: float) -> float:
        share = (log10(max(value, 10.0**low)) - low) / (high - low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    lines = list(_frame(label))
    for power in range(low, high + 1):
        lines += _tick(x(10.0**power), HEIGHT - BOTTOM + 15, f"{10.0**power:g}", "middle")
    for tenth in (0.0, 0.5, 0.9, 1.0):
        lines += _tick(LEFT - 6, _y(tenth) + 4, f"{tenth:.0%}", "end")
    for name, curve in curves.items():
        last = max(1, len(curve) - 1)
        points = " ".join(f"{x(v):.1f},{_y(n / last):.1f}" for n, v in enumerate(curve))
        lines.append(
            f'<polyline points="{points}" fill="none" stroke="{colours[name]}" stroke-width="1.5"/>'
        )
    return "\n".join(lines)


def _bars(label: str, values: Mapping[str, float], colours: Mapping[str, str]) -> str:
    """They are the legend too."""
    most = max(values.values(), default=0.0) or 1.0
    lines = list(_frame(label))
    each = (HEIGHT - TOP - BOTTOM) / max(1, len(values))
    for n, (name, value) in enumerate(values.items()):
        y, width = TOP + n * each, (WIDTH - LEFT - RIGHT) * value / most
        lines.append(
            f'<rect x="{LEFT}" y="{y + 2:.1f}" width="{width:.1f}" height="{each - 4:.1f}" '
            f'fill="{colours[name]}" fill-opacity="0.55"/>'
        )
        lines += _tick(LEFT + 5, y + each / 2 + 4, f"{name}: {value:.3g}", "start")
    return "\n".join(lines)


def _frame(label: str) -> Iterator[str]:
    yield (
        f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" '
        f'height="{HEIGHT - TOP - BOTTOM}" fill="none" stroke="#888"/>'
    )
    yield f'<text x="{LEFT}" y="{TOP - 8}">{escape(label)}</text>'


def _tick(x: float, y: float, text: str, anchor: str) -> Iterator[str]:
    yield f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
