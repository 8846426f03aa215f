"""What `make twin-scaling` says of its figures: it never calls a loss a win."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from controller.core.demand import Size
from router.twin import scaling
from router.twin.scaling_report import table, verdict
from router.twin.timeline import Timeline, svg

if TYPE_CHECKING:
    from router.twin.scaling import Side


def side(name: str, met: float, hours: float) -> Side:
    figures = SimpleNamespace(
        attainment=met, goodput_per_s=1.0, ttft_ms={"p99": 1000.0}, request_itl_ms={"p99": 80.0}
    )
    found = SimpleNamespace(
        name=name, figures=figures, prefill_h=hours / 2, decode_h=hours / 2, hours=hours,
        scalings=3, peak=Size(4, 2),
    )  # fmt: skip
    return cast("Side", found)


@pytest.mark.parametrize(
    ("ours", "cautious", "keda", "won"),
    [
        ((0.992, 11.0), (0.997, 12.0), (0.980, 15.0), True),
        ((0.992, 11.0), (0.997, 12.0), (0.995, 15.0), True),  # By the cautious one.
        ((0.992, 11.0), (0.994, 12.0), (0.995, 15.0), False),
        ((0.992, 11.0), (0.997, 16.0), (0.995, 15.0), False),
        ((0.992, 16.0), (0.997, 17.0), (0.980, 15.0), False),
        ((0.985, 11.0), (0.986, 12.0), (0.987, 15.0), False),
    ],
)
def test_a_rival_is_beaten_in_both_figures_or_not_at_all(
    ours: tuple[float, float], cautious: tuple[float, float], keda: tuple[float, float], won: bool
) -> None:
    sides = [
        side("ours", *ours), side("ours, more cautious", *cautious), side("keda, x", *keda),
        side("oracle", 0.991, 10.0),
    ]  # fmt: skip
    (line,) = [x for x in verdict(sides, 0.99).splitlines() if "beats" in x]
    assert line.startswith("yes") == won


@pytest.mark.parametrize(
    ("met", "hours", "said"),
    [(0.990, 11.5, ["yes", "yes"]), (0.989, 11.5, ["NO", "yes"]), (0.995, 11.6, ["yes", "NO"])],
)
def test_the_target_is_said_to_be_missed_where_it_is(
    met: float, hours: float, said: list[str]
) -> None:
    sides = [side("ours", met, hours), side("oracle", 0.991, 10.0)]
    assert [line.split()[0] for line in verdict(sides, 0.99).splitlines()] == said
    assert f"{hours / 10:.2f}" in table(sides, 8).splitlines()[2]


def test_a_picture_has_a_panel_for_each_figure() -> None:
    line = Timeline([(0, 1), (60, 2)], [(0, 3), (60, 4)], [(0, 1), (60, 1)], [(0, 1), (60, 0.9)])
    drawn = svg({"a <day>": {"ours": line, "oracle": line}})
    assert drawn.count("<polyline") == 1 + 3 * 2
    assert "a &lt;day&gt;" in drawn


def test_an_unknown_day_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main(["--days", "doomsday"]) == 2
    assert "doomsday" in capsys.readouterr().err
