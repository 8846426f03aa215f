"""The laws of a fleet, under whatever a seed brings. How to replay one: docs/testing.md."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.simulation.plan import Kind, make_plan
from tests.simulation.run import SeedFailed, run_seed

SEEDS_BY_DEFAULT = 60
FIRST = int(os.environ.get("SEED", "0"))
COUNT = int(os.environ.get("SEEDS", "1" if "SEED" in os.environ else SEEDS_BY_DEFAULT))
BY_DEFAULT = (FIRST, COUNT) == (0, SEEDS_BY_DEFAULT)

# What each of these once broke is in the body of its commit. A change to `plan.py` changes what
# a seed means: then look for new ones, with the fix taken out.
REGRESSIONS = [
    (103, "a pull given up for memory left its lease to nobody"),
    (4, "a worker that had given a router up did not say so, and what it sent vanished"),
    (601, "a request that was wrong was told of after its abort"),
]

_counts: Counter[str] = Counter()


@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_whatever_happens_every_request_ends_once_and_nothing_is_kept(seed: int) -> None:
    _counts.update(run_seed(seed).counts)


@pytest.mark.parametrize("seed", [s for s, _ in REGRESSIONS], ids=[w for _, w in REGRESSIONS])
def test_what_was_broken_once_holds(seed: int) -> None:
    run_seed(seed)


@pytest.mark.skipif(not BY_DEFAULT, reason="only the default seeds are known to reach all")
def test_the_seeds_reach_what_they_are_for() -> None:
    wanted = [
        *Kind,
        *(f"ended {how}" for how in ("finished", "enough", "cancelled", "refused", "router died")),
        *(f"failed {c}" for c in ("invalid_request", "worker_lost", "worker_failed", "no_workers")),
        "handed off", "pull failed", "tried again", "memory full",
        "reserved early", "relay was all", "went on from a relayed token",
    ]  # fmt: skip
    assert [w for w in wanted if _counts[w] < 3] == []
    assert any(make_plan(seed).calm for seed in range(COUNT))


@pytest.mark.parametrize("seed", [0, 7, 21])
def test_a_seed_replays_exactly(seed: int) -> None:
    assert run_seed(seed) == run_seed(seed)


def test_seeds_differ() -> None:
    assert len({run_seed(seed).fingerprint for seed in range(5)}) == 5


def test_a_seed_replays_exactly_in_another_process() -> None:
    top = Path(__file__).parents[2]
    code = (
        "from tests.simulation.run import run_seed\n"
        "for seed in range(8): print(run_seed(seed).fingerprint)"
    )
    told = []
    for hash_seed in ("1", "2"):  # The order of a set of strings hangs on it.
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        told.append(
            subprocess.run(
                [sys.executable, "-c", code],
                cwd=top, env=environment, check=True, capture_output=True, text=True,
            ).stdout
        )  # fmt: skip
    assert told[0].split() == [run_seed(seed).fingerprint for seed in range(8)]
    assert told[0] == told[1]


def test_a_failure_says_how_to_see_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.simulation.laws.LOST_S", -1.0)
    with pytest.raises(SeedFailed) as failed:
        run_seed(3)
    assert "SEED=3 python -m pytest tests/simulation" in str(failed.value)
    assert make_plan(3).describe() in str(failed.value)
