"""What a worker can't serve of vLLM is refused before an engine is loaded, and named."""

from __future__ import annotations

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

    args = AsyncEngineArgs(model="m")
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
def test_what_can_t_be_handed_off_is_left_to_workers_that_hand_nothing_off(flag: str) -> None:
    args = arguments(flag, WITH_A_HANDOFF[flag])
    for connector in ("tandem", "nixl"):
        with pytest.raises(Unserved, match=rf"{flag}.*--kv-connector none"):
            check_flags(args, connector=connector)
    check_flags(args, connector="none")


def test_vllm_s_own_defaults_are_served() -> None:
    check_flags(parsed("m", []), connector="tandem")


def test_a_flag_that_vllm_does_not_know_ends_with_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed("m", ["--nonsense"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "tandem worker: unrecognized arguments: --nonsense\n"


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
    check_model(model())
    with pytest.raises(Unserved, match=rf"m \(A\) is an? {named}"):
        check_model(model(**facts))
