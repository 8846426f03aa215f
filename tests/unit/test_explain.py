"""What was decided, as people read it."""

from __future__ import annotations

import pytest

from controller import explain
from controller.__main__ import main
from controller.records import RECORDS_MAX, Kind, Record, Records

KEPT = {
    "at": "2026-11-25T10:00:00Z", "at_s": 1.0, "kind": "kept", "reason": "enough for 3 req/s",
    "prefill": [2, 2], "decode": [4, 4], "facts": {"forecast_per_s": 3.25}, "trouble": "",
}  # fmt: skip
SCALED = KEPT | {"kind": "failed", "prefill": [2, 5], "trouble": "prefill: HTTP 403 no"}
HELD = KEPT | {
    "kind": "held",
    "prefill": None,
    "decode": None,
    "reason": "hold: no router is ready",
}


def test_decisions_are_a_table() -> None:
    decisions = [KEPT, SCALED, HELD]
    content = {"dry_run": False, "leads": True, "holder": "a_1", "decisions": decisions}
    assert list(explain.lines(content, facts=False)) == [
        "it leads",
        "at                    what    prefill  decode  why",
        "2026-11-25T10:00:00Z  kept    2        4       enough for 3 req/s",
        "2026-11-25T10:00:00Z  failed  2 > 5    4       enough for 3 req/s (prefill: HTTP 403 no)",
        "2026-11-25T10:00:00Z  held    -        -       hold: no router is ready",
    ]


def test_facts_are_told_on_request() -> None:
    content = {"dry_run": False, "leads": False, "holder": "", "decisions": [KEPT]}
    told = list(explain.lines(content, facts=True))
    assert told[0] == "it does not lead; the Lease is nobody's"
    told = list(explain.lines(content | {"dry_run": True}, facts=True))
    assert told[0] == "a dry run: it scales nothing"
    assert told[-1] == "    forecast_per_s = 3.25"


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("1.5m", 90), ("2h", 7200)])
def test_times_are_as_one_writes_them(text: str, seconds: float) -> None:
    assert explain.parse(["--since", text]).since == seconds


def test_a_time_that_is_none_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        explain.parse(["--since", "yesterday"])
    assert ended.value.code == 2
    assert "want 90s, 10m or 2h" in capsys.readouterr().err


def test_records_are_kept_for_a_while_and_counted_for_ever() -> None:
    records = Records()
    for n in range(RECORDS_MAX + 5):
        records.add(Record("", float(n), Kind.KEPT if n % 2 else Kind.SCALED, "why"))
    assert len(list(records)) == RECORDS_MAX
    assert sum(records.counts.values()) == RECORDS_MAX + 5
    assert [r.at_s for r in records.since(-1.0, 2)] == [RECORDS_MAX + 3.0, RECORDS_MAX + 4.0]
    assert records.since(RECORDS_MAX + 4.0, 10) == [records.last]
    assert records.since(0.0, 0) == []


def test_a_flag_that_is_none_of_its_own_stops_a_controller(
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--group=g", "--metrics-ports=router=1,prefill=2,decode=3"]
    for command in ([], ["run"]):
        assert main([*command, *given, "--modle=x"]) == 2
        assert capsys.readouterr().err == "tandem controller: unknown argument '--modle=x'\n"


def test_a_controller_that_is_not_there_explains_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for url in ("http://127.0.0.1:1", "nonsense"):
        assert main(["explain", "--url", url]) == 1
        assert capsys.readouterr().err.startswith(f"tandem controller explain: {url}: ")
