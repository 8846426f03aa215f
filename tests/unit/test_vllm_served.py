"""Flags and models that a worker can't serve are refused before an engine is loaded, and named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from kvtransfer.refusal import Unserved
from workers.engines.vllm_config import parsed
from workers.engines.vllm_served import check_flags, check_model

if TYPE_CHECKING:
    from vllm import AsyncEngineArgs
    from vllm.config import ModelConfig

# Torch warns of its own deprecations while vLLM imports it.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# vLLM asks a hub for a model whose name is no path.
A_FOLDER = str(Path(__file__).parent)
NEVER = {
    "--pooler-config": "some",
    "--runner": "pooling",
    "--convert": "embed",
    "--enable-prompt-embeds": True,
    "--mm-encoder-only": True,
    "--ec-transfer-config": "some",
    "--diffusion-config": {"canvas_length": 32},
    "--worker-extension-cls": "some.Class",
    "--kv-transfer-config": "some",
    "--kv-events-config": "some",
    "--pipeline-parallel-size": 2,
    "--decode-context-parallel-size": 2,
    "--prefill-context-parallel-size": 2,
}
WITH_A_HANDOFF = {"--kv-offloading-size": 1.0}


def arguments(flag: str, value: Any) -> AsyncEngineArgs:
    """As parsed; by hand, since vLLM's parser takes a second to build."""
    from vllm import AsyncEngineArgs

    args = AsyncEngineArgs(model=A_FOLDER)
    name = flag.removeprefix("--").replace("-", "_")
    assert hasattr(args, name)
    setattr(args, name, value)
    return args


@pytest.mark.parametrize("flag", NEVER)
@pytest.mark.parametrize("connector", ["tandem", "nixl", "none"])
def test_a_flag_that_no_worker_can_honour_is_refused_by_its_name(connector: str, flag: str) -> None:
    with pytest.raises(Unserved, match=flag):
        check_flags(arguments(flag, NEVER[flag]), connector=connector)


@pytest.mark.parametrize("flag", WITH_A_HANDOFF)
def test_flags_refused_beside_a_handoff_are_served_without_one(flag: str) -> None:
    args = arguments(flag, WITH_A_HANDOFF[flag])
    for connector in ("tandem", "nixl"):
        with pytest.raises(Unserved, match=rf"{flag}.*--kv-connector none"):
            check_flags(args, connector=connector)
    check_flags(args, connector="none")


def test_vllm_s_own_defaults_are_served() -> None:
    check_flags(parsed(A_FOLDER, []), connector="tandem")


def test_a_flag_that_vllm_does_not_know_ends_with_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed(A_FOLDER, ["--nonsense"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "tandem worker: unrecognized arguments: --nonsense\n"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"data_parallel_size": 2}, "start 2 workers with --data-parallel-rank 0 to 1"),
        ({"data_parallel_size": 2, "data_parallel_rank": 2}, "--data-parallel-rank 2"),
        ({"data_parallel_size_local": 2}, "--data-parallel-size-local"),
        ({"data_parallel_start_rank": 2}, "--data-parallel-start-rank"),
        ({"data_parallel_hybrid_lb": True}, "--data-parallel-hybrid-lb"),
        ({"enable_elastic_ep": True}, "--enable-elastic-ep"),
        ({"data_parallel_backend": "ray"}, "--data-parallel-backend ray"),
    ],
)
def test_a_worker_is_one_data_parallel_rank(given: dict[str, Any], named: str) -> None:
    two = arguments("--data-parallel-size", 2)
    two.data_parallel_rank = 1
    check_flags(two, connector="tandem")
    for name, value in given.items():
        assert hasattr(two, name)
        setattr(two, name, value)
    if len(given) == 1 and "data_parallel_size" in given:
        two.data_parallel_rank = None
    with pytest.raises(Unserved, match=named):
        check_flags(two, connector="tandem")


def model(**facts: object) -> ModelConfig:
    known = {"model": "m", "architectures": ["A"], "runner_type": "generate"}
    found = SimpleNamespace(**{**known, "is_encoder_decoder": False, **facts})
    return cast("ModelConfig", found)


@pytest.mark.parametrize(
    ("facts", "named"),
    [({"runner_type": "pooling"}, "pooling"), ({"is_encoder_decoder": True}, "encoder-decoder")],
)
def test_a_kind_of_model_that_is_not_served_is_refused_by_its_property(
    facts: dict[str, object], named: str
) -> None:
    check_model(model(), data_parallel_size=1)
    with pytest.raises(Unserved, match=rf"m \(A\) is an? {named}"):
        check_model(model(**facts), data_parallel_size=1)


def test_data_parallel_ranks_share_experts_or_are_workers_by_themselves() -> None:
    check_model(model(is_moe=True), data_parallel_size=2)
    with pytest.raises(Unserved, match=r"--data-parallel-size 2: m \(A\) has no experts"):
        check_model(model(is_moe=False), data_parallel_size=2)
