"""Figures of a run, and the command that prints them."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest

from router.core.errors import Overloaded, TimedOut
from router.twin import plot
from router.twin.__main__ import main
from router.twin.compare import POLICIES
from router.twin.outcomes import Outcomes, name_of
from router.twin.report import Objective, as_json, curve, figures, gap_quantiles, quantiles, table
from router.twin.traces import Request, Trace
from workers.api import Delta, Finish, Role

if TYPE_CHECKING:
    from pathlib import Path


class Rig:
    """Outcomes under a clock of our own, in a twin that has only what the report reads."""

    def __init__(self, count: int) -> None:
        self.now = 0.0
        self.outcomes = Outcomes(array("d", range(count)), lambda: self.now)
        requests = [Request(float(n), 100, 9, (n,)) for n in range(count)]
        workers = {
            "p": SimpleNamespace(busy_s=4.0, plan=SimpleNamespace(role=Role.PREFILL)),
            "d0": SimpleNamespace(busy_s=3.0, plan=SimpleNamespace(role=Role.DECODE)),
            "d1": SimpleNamespace(busy_s=1.0, plan=SimpleNamespace(role=Role.DECODE)),
        }
        self.twin: Any = SimpleNamespace(
            outcomes=self.outcomes,
            trace=Trace("t", requests),
            workers=workers,
            departed=[],
            dispatch=SimpleNamespace(caches=SimpleNamespace(disbelieved_total=0)),
        )

    def say(self, number: int, at: float, tokens: int, *, last: bool = False, **more: int) -> None:
        self.now = at
        finish = Finish.LENGTH if last else None
        self.outcomes.deliver([Delta(name_of(number), [1] * tokens, finish, **more)], {})


def test_only_who_meets_both_objectives_counts() -> None:
    rig = Rig(5)
    rig.say(0, 1.0, 1, cached_tokens=50)  # TTFT 1, then 0.1 a token.
    rig.say(0, 1.4, 4, last=True)
    rig.say(1, 4.5, 1)  # TTFT 3.5: too late.
    rig.say(1, 4.6, 1, last=True)
    rig.say(2, 3.0, 1)  # 0.5 a token: too slow.
    rig.say(2, 3.5, 1, last=True)
    rig.outcomes.fail(name_of(3), Overloaded(holds="1 request"))
    rig.say(4, 4.1, 1)  # Began well, and failed.
    rig.outcomes.fail(name_of(4), TimedOut(waited_s=1))
    found = figures(rig.twin, Objective(ttft_s=2.0, itl_s=0.2))
    assert (found.requests, found.finished, found.met) == (5, 3, 1)
    assert (found.refused, found.failed) == ({"overloaded": 1}, {"timed_out": 1})
    assert found.goodput_per_s == 1 / 4
    assert found.hit_rate == 50 / 400
    assert found.balance == {"prefill": 1.0, "decode": 1.5}
    assert found.ttft_ms == {"p50": 1000.0, "p90": 3500.0, "p99": 3500.0}
    assert found.request_itl_ms["p50"] == pytest.approx(100)
    assert found.output_tokens == 10


def test_tokens_told_together_are_even_gaps() -> None:
    rig = Rig(1)
    rig.say(0, 1.0, 1)
    rig.say(0, 1.3, 3, last=True)
    assert gap_quantiles(rig.outcomes.gaps) == {"p50": 100.0, "p90": 100.0, "p99": 100.0}


def test_quantiles_are_by_nearest_rank() -> None:
    assert quantiles(list(range(101))) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert quantiles([]) == {}
    assert gap_quantiles(Counter({1: 98, 100_000: 2}))["p99"] == 1000.0
    assert gap_quantiles(Counter()) == {}
    assert curve([]) == []
    assert curve(list(range(501)))[::50] == [0, 250, 500]


def test_a_run_without_any_token_is_told_too() -> None:
    rig = Rig(1)
    rig.outcomes.fail(name_of(0), Overloaded(holds="1 request"))
    found = {"none": figures(rig.twin, Objective())}
    assert "| none" in table(found)
    assert json.loads(as_json({"seed": 1}, found))["policies"]["none"]["ttft_ms"] == {}


def test_the_picture_is_sound_and_names_every_policy() -> None:
    values = {"one & only": [0.1, 0.2, 3.0], "other": []}
    picture = plot.svg("t < 1", values, values, {"one & only": 2.0, "other": 0.0})
    text = "".join(ElementTree.fromstring(picture).itertext())  # Our own text.
    assert "one & only: 2" in text
    assert "other: 0" in text
    assert "t < 1" in text


def test_the_command_prints_a_row_a_policy_and_writes_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, picture = tmp_path / "new" / "t.json", tmp_path / "t.svg"
    flags = ["--requests", "20", "--policies", "round-robin,ours", "--divide-lengths", "16"]
    assert main([*flags, "--json", str(file), "--plot", str(picture)]) == 0
    told = capsys.readouterr()
    assert "| round-robin" in told.out
    assert "lengths divided by 16" in told.out
    assert "TTFT up to 2000 ms" in told.out
    assert "times faster than real time" in told.err
    written = json.loads(file.read_text())
    assert set(written["policies"]) == {"round-robin", "ours"}
    assert picture.read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--policies", "luck"], "no policy is called 'luck'"),
        (["--trace", "none.jsonl"], "No such file"),
        (["--fleet", "prefill=1"], "decode or mixed"),
        (["--divide-lengths", "7"], "can't be divided by 7"),
        (["--block-tokens", "999999999"], "block"),
    ],
)
def test_what_can_t_be_run_is_said_with_status_2(
    flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 2
    assert told in capsys.readouterr().err


def test_help_names_every_policy(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert all(name in told for name in POLICIES)
