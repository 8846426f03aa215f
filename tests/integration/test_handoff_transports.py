"""Tokens are those of one engine over every transport, with every byte's checksum compared."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from deploy.local.group import LocalGroup
from tests.integration.asking import MODEL, await_free, complete
from tests.integration.conftest import FLAGS, OURS
from tests.integration.test_serving import LENGTHS

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]


@pytest.fixture(scope="module", params=["tcp", "collective"])
def over(request: pytest.FixtureRequest) -> Iterator[tuple[str, LocalGroup]]:
    """`ucx` has the session's own group, and `test_serving` this very suite."""
    flags = [*FLAGS, *OURS, "--kv-transports", request.param]
    with LocalGroup(MODEL, flags=flags) as running:
        yield request.param, running


_EXPECTED: dict[str, Any] = {}
"""What one engine said, asked once: a salt changes no token."""


def one_engines_answer(url: str, body: dict[str, Any]) -> Any:
    key = json.dumps({**body, "cache_salt": None}, sort_keys=True)
    if key not in _EXPECTED:
        answer = complete(url, **body)
        assert answer.status_code == 200, answer.text
        _EXPECTED[key] = answer.json()["choices"][0]
    return _EXPECTED[key]


def same_answer(url: str, other: str, body: dict[str, Any]) -> dict[str, Any]:
    """Ask both; the router's record of ours."""
    ours = complete(url, **body)
    assert ours.status_code == 200, ours.text
    mine, expected = ours.json()["choices"][0], one_engines_answer(other, body)
    assert mine["token_ids"] == expected["token_ids"]
    assert mine["text"] == expected["text"]
    assert mine["finish_reason"] == expected["finish_reason"]
    if "logprobs" in body:
        assert mine["logprobs"]["token_logprobs"] == pytest.approx(
            expected["logprobs"]["token_logprobs"], abs=1e-4
        )
    record: dict[str, Any] = httpx.get(f"{url}/tandem/requests/{ours.json()['id']}").json()[0]
    return record


def body_of(length: int, salt: str, **options: Any) -> dict[str, Any]:
    rng = random.Random(length)
    return {
        "prompt": [rng.randrange(20, 40_000) for _ in range(length)],
        "max_tokens": 12, "return_token_ids": True, "cache_salt": salt, "ignore_eos": True,
        **options,
    }  # fmt: skip


@pytest.mark.parametrize("length", LENGTHS)
def test_tokens_are_those_of_one_engine_over_each_transport(
    over: tuple[str, LocalGroup], aggregated: str, length: int
) -> None:
    """Even lengths greedy, so with the first token relayed; odd ones seeded, with logprobs."""
    name, group = over
    options: dict[str, Any] = (
        {"temperature": 0.9, "seed": length, "logprobs": 3} if length % 2 else {"temperature": 0}
    )
    record = same_answer(group.url, aggregated, body_of(length, f"{name}-{length}", **options))
    assert record["kv_failed"] is None
    assert record["kv_transport"] == name
    assert record["kv_bytes"] == -(-length // record["block_tokens"]) * record["block_bytes"]


def test_nothing_is_kept_over_each_transport(over: tuple[str, LocalGroup]) -> None:
    await_free(over[1], 10)


# ------------------------------------------------------------ the relayed first token


OPTIONS: list[dict[str, Any]] = [
    {},
    {"max_tokens": 1},
    {"max_tokens": 2},
    {"min_tokens": 5, "ignore_eos": False},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.7},
    {"frequency_penalty": 0.7, "logprobs": 1},
    {"logit_bias": {"100": 5.0}},
    {"seed": 5, "temperature": 1.0},
    {"seed": 5, "temperature": 1.0, "logprobs": 0},
    {"ignore_eos": False, "stop_token_ids": list(range(20, 5_000))},
    {"bad_words": ["the"]},
]


@pytest.mark.parametrize("which", range(len(OPTIONS)))
@pytest.mark.parametrize("length", [3, 128, 700])
def test_whoever_samples_the_first_token_the_answer_is_one_engines(
    group: LocalGroup, aggregated: str, length: int, which: int
) -> None:
    asked = {"temperature": 0, **OPTIONS[which]}
    same_answer(group.url, aggregated, body_of(length, f"relay-{length}-{which}", **asked))


def test_a_long_prompt_is_read_while_it_is_computed(group: LocalGroup, aggregated: str) -> None:
    record = same_answer(group.url, aggregated, body_of(1500, "long", temperature=0))
    assert record["kv_hidden_s"] > 0
    assert record["kv_s"] > 0
