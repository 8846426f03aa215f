"""`make gpu-check` itself: its dry run, what a hung or dead group costs, the pieces that travel.

On a machine with a GPU the whole of it runs, and must find nothing failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gpu import bundle, check, unpack
from tests.gpu.groups import GROUPS, Group
from tests.gpu.report import Rows, read_rows, shown

if TYPE_CHECKING:
    from pathlib import Path

PATIENCE = "6"
"""No test fails because its machine is busy."""


def run_check(report: Path, *flags: str, timeout_s: float) -> list[dict[str, str]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.check", "--json", str(report), *flags],
        capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    rows: list[dict[str, str]] = json.loads(report.read_text())["rows"]
    bad = [r for r in rows if r["status"] == "failed"]
    assert not bad, (bad, json.loads(report.read_text())["logs"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "0 failed" in done.stdout
    return rows


def planned(*names: str) -> list[tuple[str, str]]:
    return [(g.name, row) for g in GROUPS if g.name in names for row in g.rows]


def test_the_dry_run_brings_every_row_of_what_needs_no_engine(tmp_path: Path) -> None:
    groups = ("machine", "ucx", "steps")
    rows = run_check(
        tmp_path / "report.json", "--dry-run", "--only", *groups, "--patience", PATIENCE,
        timeout_s=280,
    )  # fmt: skip
    assert [(r["group"], r["name"]) for r in rows] == planned(*groups)
    assert {r["status"] for r in rows} == {"ok"}


@pytest.mark.real
@pytest.mark.timeout(1500)
@pytest.mark.skipif("TANDEM_LONG" not in os.environ, reason="engines start: make test-long")
def test_the_dry_run_brings_every_row_of_the_engines_too(tmp_path: Path) -> None:
    rows = run_check(
        tmp_path / "report.json", "--dry-run", "--only", "llama-1b", "collective", "tcp",
        "--patience", PATIENCE, "--total-s", "1400", timeout_s=1450,
    )  # fmt: skip
    assert sorted((r["group"], r["name"]) for r in rows) == sorted(
        planned("llama-1b", "collective", "tcp")
    )


@pytest.mark.timeout(700)
def test_all_of_it_on_the_gpu(tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device on this machine")
    run_check(tmp_path / "report.json", timeout_s=650)


# ------------------------------------------------------------ groups that go wrong


class Told(check.Check):
    """Runs a line of Python in place of a group."""

    def __init__(self, code: str, folder: Path) -> None:
        given = argparse.Namespace(
            device="cpu", peer="cpu", dry_run=True, json=folder / "report.json", total_s=60.0,
            patience=1.0,
        )  # fmt: skip
        super().__init__(given, folder)
        self._code = code

    def command(self, group: Group, path: Path) -> list[str]:
        code = f"from pathlib import Path; path = Path({str(path)!r})\n{self._code}"
        return [sys.executable, "-c", code]


FIRST = """
from tests.gpu.report import Rows
with Rows("g", path).row("one") as row: row.figures["n"] = 1
"""


@pytest.mark.parametrize(
    ("then", "why"),
    [
        ("raise RuntimeError('no such kernel')", "RuntimeError: no such kernel"),
        ("import os; os._exit(7)", "its process ended with 7"),
        ("import time; time.sleep(600)", "its group was ended after 5 s"),
    ],
)
def test_a_group_that_dies_or_hangs_costs_the_rows_that_it_had_not_brought(
    tmp_path: Path, then: str, why: str
) -> None:
    told = Told(FIRST + then, tmp_path)
    told.run(Group("g", "none", ("one", "two", "three"), limit_s=5, least_s=1))
    assert [(r.name, r.status, r.said) for r in told.rows] == [
        ("one", "ok", ""), ("two", "failed", why), ("three", "failed", why),
    ]  # fmt: skip
    written = json.loads((tmp_path / "report.json").read_text())
    assert [r["name"] for r in written["rows"]] == ["one", "two", "three"]
    assert written["rows"][0]["figures"] == {"n": 1}


def test_a_group_for_which_no_time_is_left_is_skipped_and_says_so(tmp_path: Path) -> None:
    told = Told("raise AssertionError", tmp_path)
    told.run(Group("g", "none", ("one",), limit_s=90, least_s=61))
    assert [(r.name, r.status) for r in told.rows] == [("one", "skipped")]
    assert "of 60 were left" in told.rows[0].said


def test_a_row_ends_with_its_reason_and_the_next_one_goes_on(tmp_path: Path) -> None:
    rows = Rows("g", tmp_path / "rows")
    with rows.row("bad") as row:
        row.figures["kept"] = 0.123456
        raise ValueError("first\nsecond line")
    with rows.row("good"):
        pass
    bad, good = read_rows(tmp_path / "rows")
    assert (bad.status, bad.said) == ("failed", "ValueError: first second line")
    assert good.status == "ok"
    assert "kept 0.1235" in shown(bad)
    assert shown(bad).count("\n") == 0


def test_the_rows_limits_fit_the_whole_time_but_for_the_slowest() -> None:
    assert sum(g.least_s for g in GROUPS) < check.TOTAL_S
    assert all(g.least_s < g.limit_s for g in GROUPS)


# ------------------------------------------------------------ pieces


@given(st.lists(st.integers(1, 900), max_size=40))
def test_pieces_hold_each_file_once_and_none_is_too_large(sizes: list[int]) -> None:
    from pathlib import Path

    found = [(Path("a.whl"), f"file{i}", size) for i, size in enumerate(sizes)]
    pieces = bundle.divide(found, most=1200)
    assert sorted(m for p in pieces for m in p.members) == sorted(found)
    assert all(p.size <= 1200 for p in pieces)


def test_a_file_that_fits_no_piece_is_named() -> None:
    from pathlib import Path

    with pytest.raises(SystemExit, match=r"huge\.so has .* a piece has 1000"):
        bundle.divide([(Path("a.whl"), "huge.so", 900)], most=1000)


def test_a_library_that_is_left_out_and_needed_is_found(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("nixl_ep_cu13/liba.so.1.0", b"")
        archive.writestr("nixl_ep_cu13/libb.so", b"")
        archive.writestr("libs/libnixl.so", b"\x7fELF\0liba.so.1.0\0mylibb.so\0")
    assert bundle.unmet([wheel]) == ["liba.so.1.0"]


def test_everything_that_is_packed_has_its_version_from_the_lock() -> None:
    lock = (bundle.TOP / "requirements/gpu.lock").read_text()
    wanted = (bundle.TOP / "tests/gpu/bundle.in").read_text()
    names = bundle.requirements(lock, wanted)
    assert "vllm==0.32.0" in names
    with pytest.raises(SystemExit, match="not in the lock file: left-pad"):
        bundle.requirements(lock, "left-pad\n")


def test_pieces_are_put_together_as_they_come_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "a-1-py3-none-any.whl"
    contents = {f"a/m{i}.py": os.urandom(40) for i in range(9)}
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
        archive.writestr("a-1.data/purelib/b.py", b"b")
        archive.writestr("vllm/vllm-rs", b"left out")
    folder, site = tmp_path / "bundle", tmp_path / "site"
    folder.mkdir()
    pieces = bundle.divide(list(bundle.members([wheel])), most=900)
    assert len(pieces) > 2
    told = [bundle.write(piece, folder) for piece in pieces]
    (folder / "manifest.json").write_text(json.dumps({"pieces": told}))
    last = folder / pieces[-1].name
    last.rename(tmp_path / "later")
    assert unpack.unpack(folder, site) == [last.name]
    last.write_bytes((tmp_path / "later").read_bytes()[:-1])
    with pytest.raises(SystemExit, match="damaged"):
        unpack.unpack(folder, site)
    (tmp_path / "later").rename(last)
    for piece in pieces[:-1]:
        (folder / piece.name).unlink()  # They came before, and are gone.
    assert unpack.unpack(folder, site) == []
    found = {
        str(f.relative_to(site)): f.read_bytes() for f in site.rglob("*.py")
    }  # fmt: skip
    assert found == {**contents, "b.py": b"b"}
