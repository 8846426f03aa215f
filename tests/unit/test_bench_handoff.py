"""What `make bench-handoff` concludes, and the plain copy that it measures `tcp` beside."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvtransfer.bench_bare import SocketCopy, SocketSource
from kvtransfer.bench_sides import MIB, SMALL_UNIT, TOTAL, UNIT, Job
from kvtransfer.bench_tables import print_all
from kvtransfer.transports.api import Memory, Segment

SIZES = ("1 MiB", "64 MiB", "256 MiB", "1,024 x 32 KiB")
NAMES = {
    "shared memory": ("memcpy", "ucx", "NIXL bare"),
    "sockets": ("memcpy", "tcp", "two sockets", "collective", "UCX over TCP bare"),
}


def figures(rates: list[float]) -> dict[str, Any]:
    """Of a contender that made these rates, round by round, at every size."""
    middle = sorted(rates)[len(rates) // 2]
    return {
        "gb_per_s": dict.fromkeys(SIZES, middle),
        "round_gb_per_s": {size: list(rates) for size in SIZES},
        "cpu_s_per_gb": {size: [0.1, 0.2] for size in SIZES},
        "round_trip_us": 5.0,
        "huge_share": 1.0,
        "advise_s_per_gib": 0.5,
    }


def report(**rates: list[float]) -> dict[str, Any]:
    """All contenders alike, but those named."""
    return {
        group: {n: figures(rates.get(n.replace(" ", "_"), [10.0, 10.0, 10.0])) for n in names}
        for group, names in NAMES.items()
    }


def verdicts(found: dict[str, Any]) -> dict[str, bool | None]:
    return {t["what"]: t["met"] for t in print_all(found)}


def test_a_transport_as_fast_as_what_it_is_beside_meets_its_targets() -> None:
    found = verdicts(report(UCX_over_TCP_bare=[2.0, 2.0, 2.0]))
    assert all(found.values())
    assert len(found) == 9


def test_one_that_is_slower_misses_them() -> None:
    found = verdicts(report(ucx=[5.0] * 3, tcp=[7.0] * 3))
    assert [what for what, met in found.items() if met] == ["ucx, share of memcpy, scattered"]


def test_a_machine_slow_for_a_round_changes_no_share() -> None:
    """Both halved in the last two rounds: rates differ, shares don't."""
    found = report(ucx=[8.0, 4.0, 4.0], memcpy=[10.0, 5.0, 5.0], NIXL_bare=[8.0, 4.0, 4.0])
    measured = {t["what"]: t["measured"] for t in print_all(found)}
    assert measured["ucx, share of memcpy, large"] == pytest.approx(0.8)


def test_what_could_not_run_is_neither_met_nor_missed_and_says_why(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = report()
    found["sockets"]["tcp"] = {"missing": "there is no network"}
    assert verdicts(found)["tcp beside two sockets, large"] is None
    assert "there is no network" in capsys.readouterr().out


@pytest.mark.parametrize("share", [0.01, 0.2])
def test_sampled_sums_are_held_to_their_share_of_a_read(share: float) -> None:
    found = report()
    read_s = TOTAL / 10e9
    found["shared memory"]["ucx"] |= {"sampled_s": share * read_s, "full_s": read_s}
    met = verdicts(found)["sampled sums of one side, share of a read's time"]
    assert met == (share <= 0.05)


def test_a_scattered_job_names_as_many_different_units_as_it_has_bytes() -> None:
    job = Job("scattered", 4 * MIB, 1, scattered=True)
    local, remote = job.units(1)
    for units in (local, remote):
        assert len(set(units.tolist())) == 4 * MIB // UNIT
    assert local.tolist() != remote.tolist()
    assert job.units(2)[0].tolist() != local.tolist()


def test_two_sockets_bring_each_unit_to_its_own_place() -> None:
    rng = np.random.default_rng(1)
    source = rng.integers(0, 256, (2000, SMALL_UNIT), np.uint8)
    target = np.zeros_like(source)

    def memory(array: Any) -> Memory:
        return Memory((Segment(array.ctypes.data, SMALL_UNIT, SMALL_UNIT, len(array)),))

    offer = SocketSource(memory(source))
    copy = SocketCopy(memory(target), offer.description, SMALL_UNIT)
    order = rng.permutation(2000).astype(np.int32)
    copy(np.arange(2000, dtype=np.int32), order)
    assert (target == source[order]).all()
    copy.close()
    offer.close()
