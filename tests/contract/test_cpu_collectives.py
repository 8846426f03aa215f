"""The collectives that we give vLLM on a CPU, over two processes, beside plain arithmetic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from deploy.local.parts import ENVIRONMENT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(300)

_RANK = """
import json, sys, torch, torch.distributed as dist
from types import SimpleNamespace
from workers.engines.vllm_cpu_collectives import all_gatherv, reduce_scatterv
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
me = SimpleNamespace(rank_in_group=rank, world_size=2, device_group=dist.group.WORLD)
rows = lambda n, dtype: (torch.arange(n * 2, dtype=dtype) + 100 * rank).reshape(n, 2)
told = {}
for sizes in ([2, 3], [3, 2], [0, 2], [2, 2]):
    mine = sizes[rank]
    floats, ids = all_gatherv(me, [rows(mine, torch.float32), rows(mine, torch.int64)], 0, sizes)
    whole = (torch.arange(sum(sizes) * 2, dtype=torch.float32) * (rank + 1)).reshape(-1, 2)
    kept = reduce_scatterv(me, whole, 0, sizes)
    told[str(sizes)] = [floats.tolist(), ids.tolist(), kept.tolist()]
told["alike"] = all_gatherv(me, rows(2, torch.float32)).tolist()
told["halves"] = reduce_scatterv(me, torch.ones(4, 2), 0).tolist()
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of the two ranks."""
    store: Path = tmp_path_factory.mktemp("ranks") / "store"
    environment = {**ENVIRONMENT, **os.environ}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, str(rank), str(store)],
            stdout=subprocess.PIPE, env=environment, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [rank.communicate(timeout=280)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    return [json.loads(each.splitlines()[-1]) for each in said]


SIZES = [[2, 3], [3, 2], [0, 2], [2, 2]]


def rows(count: int, rank: int) -> list[list[int]]:
    return [[2 * n + 100 * rank, 2 * n + 1 + 100 * rank] for n in range(count)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_all_ranks_get_every_rank_s_rows(told: list[dict[str, Any]], sizes: list[int]) -> None:
    whole = rows(sizes[0], 0) + rows(sizes[1], 1)
    for rank in range(2):
        floats, ids, _ = told[rank][str(sizes)]
        assert floats == ids == whole


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_each_rank_keeps_its_rows_of_the_sum(told: list[dict[str, Any]], sizes: list[int]) -> None:
    summed = [[6 * n, 6 * n + 3] for n in range(sum(sizes))]
    kept = told[0][str(sizes)][2], told[1][str(sizes)][2]
    assert kept == (summed[: sizes[0]], summed[sizes[0] :])


def test_without_sizes_all_have_alike(told: list[dict[str, Any]]) -> None:
    assert [each["alike"] for each in told] == [rows(2, 0) + rows(2, 1)] * 2
    assert [each["halves"] for each in told] == [[[2.0, 2.0]] * 2] * 2
