"""What several ranks of one vLLM worker say of one pull, each at a step of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from kvtransfer.orders import Order, Pulled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from kvtransfer.vllm_scheduler import SchedulerHalf

# Torch warns of its own deprecations while vLLM imports it.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture
def half() -> Iterator[SchedulerHalf]:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    from kvtransfer.vllm_scheduler import SchedulerHalf

    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(get_from_extra_config=lambda _, default: default),
        cache_config=SimpleNamespace(block_size=4),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=8, max_num_seqs=4),
    )
    spec = FullAttentionSpec(block_size=4, num_kv_heads=1, head_size=8, dtype=torch.float32)
    cache = KVCacheConfig(10, [], [KVCacheGroupSpec(["layer"], spec)])
    made = SchedulerHalf(cast("VllmConfig", config), cache)
    yield made
    made.close()


@pytest.fixture
def pulling(half: SchedulerHalf) -> Request:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    fetch = {"handle": "h", "epoch": "e", "endpoint": "tcp://127.0.0.1:1", "tokens": len(PROMPT)}
    params = SamplingParams(max_tokens=12, min_tokens=2)
    request = Request("r", list(PROMPT), params, None)
    request.kv_transfer_params = {"tandem_fetch": fetch}
    blocks = SimpleNamespace(get_block_ids=lambda: ([1, 2],))
    half.allocated(request, cast("KVCacheBlocks", blocks), len(PROMPT))
    return request


def told(tokens: dict[str, int], finished: set[str] | None = None) -> KVConnectorOutput:
    from vllm.v1.outputs import KVConnectorOutput

    from kvtransfer.vllm_records import StepReport

    report = StepReport(first_tokens=tokens)
    return KVConnectorOutput(kv_connector_worker_meta=report, finished_recving=finished)


def test_a_first_token_is_taken_once_however_many_ranks_tell_it(
    half: SchedulerHalf, pulling: Request
) -> None:
    half.reported(told({"r": 42}))
    half.reported(told({"r": 42}))
    assert pulling.num_prompt_tokens == len(PROMPT), "some rank still reads"
    half.reported(told({"r": 42}, {"r"}))
    assert pulling.prompt_token_ids == [*PROMPT, 42]
    assert list(pulling.all_token_ids) == [*PROMPT, 42]
    assert (pulling.max_tokens, pulling.sampling_params.min_tokens) == (11, 1)


def test_a_first_token_that_one_rank_only_has_counts(half: SchedulerHalf, pulling: Request) -> None:
    half.reported(told({"r": 42}))
    half.reported(told({}, {"r"}))
    assert pulling.prompt_token_ids == [*PROMPT, 42]


def test_a_request_that_was_aborted_adopts_nothing(half: SchedulerHalf, pulling: Request) -> None:
    half.reported(told({"r": 42}))
    half.finished(pulling, ([],))
    half.reported(told({"r": 42}, {"r"}))
    assert pulling.prompt_token_ids == PROMPT


@pytest.mark.parametrize("failed_first", [True, False])
def test_one_rank_s_failure_is_the_request_s(failed_first: bool) -> None:
    from kvtransfer.vllm_records import account
    from workers.engines.vllm import _merged

    good = account(Pulled("r", None, False, "tcp", 100, 0.5, 0.3, 42), tokens=5)
    bad = account(Pulled("r", "the read timed out", False, "tcp", 0, 1.0, 0.1, None), tokens=5)
    told: list[dict[str, Any]] = [bad, good] if failed_first else [good, bad]
    merged = _merged(told[0], told[1])
    assert merged["error"] == "the read timed out"
    assert (merged["tokens"], merged["first_token"]) == (0, 42)
    assert (merged["seconds"], merged["hidden_s"]) == (1.0, 0.1)


def test_columns_are_announced_once_every_rank_has_told_their_checksums(
    half: SchedulerHalf,
) -> None:
    """Ranks' devices are not done at the same step."""
    from vllm.v1.outputs import KVConnectorOutput

    from kvtransfer.vllm_records import Computed, StepReport

    announced: list[Any] = []
    half._ranks = 2
    half._sender = cast(
        "Any", SimpleNamespace(computed=lambda *told: announced.append(told), close=lambda: None)
    )

    def told(first: int, rank: int, total: int) -> StepReport:
        return StepReport([Computed("h", 0, first, [[first + 1]], {rank: [total]})])

    def report(*reports: StepReport) -> None:
        whole = reports[0]
        for other in reports[1:]:
            whole = cast("StepReport", whole.aggregate(other))
        half.reported(KVConnectorOutput(kv_connector_worker_meta=whole))

    report(told(0, 0, 10), told(0, 1, 20))
    report(told(1, 1, 21))
    assert announced == [("h", 0, [[1]], [[10, 20]])]
    report(told(2, 1, 22), told(1, 0, 11))
    report(told(2, 0, 12))
    assert announced[1:] == [("h", 0, [[2]], [[11, 21]]), ("h", 0, [[3]], [[12, 22]])]


@pytest.mark.parametrize(
    ("window", "relay", "brought"), [(0, False, 5), (4, True, 5), (4, False, 0)]
)
def test_a_window_that_has_moved_past_the_last_token_is_not_fetched(
    half: SchedulerHalf, window: int, relay: bool, brought: int
) -> None:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    from kvtransfer.vllm_groups import Columns, KvGroup

    half._columns = Columns([KvGroup("sliding_window", window, 4)])
    request = Request("r", list(PROMPT), SamplingParams(max_tokens=3), None)
    fetch = {"handle": "h", "epoch": "e", "endpoint": "tcp://127.0.0.1:1", "tokens": len(PROMPT)}
    request.kv_transfer_params = {"tandem_fetch": {**fetch, "relay": relay}}
    assert half.match(request, 0)[0] == brought
    assert len(half.take_stats().data["pulls"]) == (brought == 0), "a prompt computed here is told"


def test_a_failed_pull_is_its_request_s_alone() -> None:
    """Block ids are shared: by requests of one prefix, and the null block by all."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    from kvtransfer.vllm_connector import TandemConnector
    from kvtransfer.vllm_worker import WorkerHalf

    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(get_from_extra_config=lambda _, default: default)
    )
    half = WorkerHalf(cast("VllmConfig", config), cast("Any", None))
    ended = [Pulled("failed", "the read timed out"), Pulled("right", None)]
    half._receiver = cast("Any", SimpleNamespace(ended=lambda _: ended))
    half._orders = {
        name: Order(name, "h", "e", "", [1, 2], None, None, "m", "t", 0, [[1]])
        for name in ("failed", "right")
    }
    results = half.results()
    assert results.finished_recving == {"failed", "right"}
    assert results.failed_recving == {"failed"}
    ids = KVConnectorBase_V1.get_block_ids_with_load_errors
    assert TandemConnector.get_block_ids_with_load_errors is ids
