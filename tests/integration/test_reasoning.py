"""With a reasoning parser on both sides a grammar and a budget act as they do on one engine."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from deploy.local.models import prepare
from tests.asking import MODEL
from tests.forks import ForkedAggregated, ForkedGroup
from tests.integration.conftest import APART, FLAGS, OURS, WHOLE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.forks import Zygote

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

THINKING = {5: "<think>", 6: "</think>"}
"""Tokens that the model has no use for, by the names that qwen3's parser looks for."""
ONE_PLACE = [
    "--reasoning-parser", "qwen3", "--structured-outputs-config.backend", "xgrammar",
]  # fmt: skip
"""Given to the group once: workers and router have it from there."""
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "large": {"type": "boolean"}},
    "required": ["city", "large"],
    "additionalProperties": False,
}
JSON = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
SOON_OVER = {"6": 20.0}
"""The model was never taught to end its thinking: with this it does after three tokens."""
ON_AND_ON = {"2": -100.0}
"""It does not end its turn, but where a grammar allows nothing else."""


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with names for the thinking's bounds, and a template that begins with it."""
    folder = tmp_path_factory.mktemp("thinker")
    for file in prepare(MODEL).iterdir():
        shutil.copy(file, folder / file.name)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for token in tokenizer["added_tokens"]:
        if name := THINKING.get(token["id"]):
            vocabulary.pop(token["content"], None)
            vocabulary[name] = token["id"]
            token |= {"content": name, "special": False}
    file.write_text(json.dumps(tokenizer))
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    for name in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
        config.pop(name, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    begins = "<|im_start|>assistant\n"
    assert begins in config["chat_template"]
    config["chat_template"] = config["chat_template"].replace(begins, begins + "<think>\n")
    file.write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def both(thinker: Path, zygote: Zygote) -> Iterator[tuple[str, str]]:
    """The group's address and one engine's, with the same flags."""
    model = str(thinker)
    with (
        ForkedAggregated(zygote, model, flags=[*FLAGS, *WHOLE, *ONE_PLACE]) as one,
        ForkedGroup(zygote, model, flags=[*FLAGS, *OURS, *ONE_PLACE], router_flags=APART) as group,
    ):
        one.await_ready()
        yield group.url, one.url


def ask(url: str, **options: Any) -> tuple[str, str, str]:
    """The thinking, the answer, and why it ended."""
    model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    question = [{"role": "user", "content": "What is the capital of France? Answer in JSON."}]
    body = {"model": model, "messages": question, "temperature": 0, "max_tokens": 60, **options}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    [choice] = answer.json()["choices"]
    message = choice["message"]
    return message["reasoning"] or "", message["content"] or "", choice["finish_reason"]


CASES: list[dict[str, Any]] = [
    {"response_format": JSON, "logit_bias": SOON_OVER},
    {"response_format": JSON, "logit_bias": ON_AND_ON, "thinking_token_budget": 5},
    {
        "response_format": JSON, "logit_bias": ON_AND_ON, "thinking_token_budget": 17,
        "temperature": 1.0, "seed": 4,
    },
    {"logit_bias": ON_AND_ON, "thinking_token_budget": 9},
    {"logit_bias": ON_AND_ON, "thinking_token_budget": 0},
    {"logit_bias": ON_AND_ON},
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=",".join)
def test_thinking_and_answer_are_those_of_one_engine(
    both: tuple[str, str], case: dict[str, Any]
) -> None:
    here, there = (ask(url, **case) for url in both)
    assert here == there
    thinking, answer, _ = here
    if "response_format" in case:
        found = json.loads(answer)
        assert isinstance(found["city"], str)
        assert isinstance(found["large"], bool)
        assert "{" not in thinking  # The grammar did not bind there.
        assert thinking.strip()
    if "thinking_token_budget" in case:
        assert answer.strip()
        assert len(thinking.split()) <= case["thinking_token_budget"]
    elif "response_format" not in case:
        assert not answer  # It never ends its thinking by itself: so it was the budget, above.
