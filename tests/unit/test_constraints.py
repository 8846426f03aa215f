"""A router's front and its workers constrain answers alike, or the router refuses the worker."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import msgspec
import pytest

from deploy.local.group import shared_flags
from router.core.compat import RouterFacts, refusal
from tests.unit.test_dispatch import hello
from workers.api import Role
from workers.constraints import FLAGS, constraints

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Torch warns of its own deprecations while vLLM imports it.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PARSER = "--structured-outputs-config.reasoning_parser=qwen3"


def config(reasoning: dict[str, Any] | None = None, **structured: Any) -> VllmConfig:
    from vllm.config import StructuredOutputsConfig
    from vllm.config.reasoning import ReasoningConfig

    found = SimpleNamespace(
        structured_outputs_config=StructuredOutputsConfig(**structured),
        reasoning_config=None if reasoning is None else ReasoningConfig(**reasoning),
    )
    return cast("VllmConfig", found)


def test_defaults_are_no_constraints_with_a_reasoning_configuration_and_without() -> None:
    assert constraints(config()) == constraints(config({})) == ""


@pytest.mark.parametrize(
    ("structured", "reasoning"),
    [
        ({"reasoning_parser": "qwen3"}, None),
        ({"backend": "guidance"}, None),
        ({"disable_any_whitespace": True, "backend": "xgrammar"}, None),
        ({"enable_in_reasoning": True}, None),
        ({}, {"reasoning_end_str": "</t>"}),
    ],
)
def test_settings_that_decide_where_a_grammar_binds_are_compared(
    structured: dict[str, Any], reasoning: dict[str, Any] | None
) -> None:
    told = constraints(config(reasoning, **structured))
    for name, value in {**structured, **(reasoning or {})}.items():
        assert f"{name}={value}" in told


def test_where_a_plugin_s_file_lies_is_each_process_s_own_affair() -> None:
    here, there = (
        config(reasoning_parser="mine", reasoning_parser_plugin=f"/{at}/p.py") for at in "ab"
    )
    assert constraints(here) == constraints(there) != ""


ROUTER = RouterFacts("r", "m", "td", "md", 1024, constraints=PARSER)
WORKER = msgspec.structs.replace(hello("w", Role.DECODE), engine="vllm", constraints=PARSER)


def test_a_worker_with_other_flags_is_refused_and_both_sides_and_the_flag_are_named() -> None:
    assert refusal(ROUTER, WORKER) is None
    reason = refusal(ROUTER, msgspec.structs.replace(WORKER, constraints=""))
    assert reason is not None
    for named in ("router r", "worker w", PARSER, "vLLM's defaults", "same --reasoning-parser"):
        assert named in reason
    without = dataclasses.replace(ROUTER, constraints="")
    assert PARSER in (refusal(without, WORKER) or "")


def test_a_simulated_worker_constrains_nothing_and_is_not_compared() -> None:
    assert refusal(ROUTER, msgspec.structs.replace(WORKER, engine="sim", constraints="")) is None


def test_a_router_gets_those_of_its_workers_flags_that_it_must_share() -> None:
    own = ["--block-size", "64", "--enforce-eager", "--reasoning-parser-other", "x"]
    shared = [
        "--max-model-len", "2048", "--dtype=float32", "--reasoning-parser", "qwen3",
        "--structured-outputs-config.backend", "xgrammar", "--structured_outputs_config={}",
    ]  # fmt: skip
    assert shared_flags([*own, *shared, *own]) == shared
    for flag in FLAGS:
        assert shared_flags([flag, "a"]) == [flag, "a"]
