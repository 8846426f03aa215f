"""Tokens are those of one engine over every transport, with every byte's checksum compared."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.asking import (
    BLOCK,
    EVERYTHING,
    OneEngine,
    await_free,
    complete,
    random_prompt,
)

if TYPE_CHECKING:
    from deploy.local.group import LocalGroup

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]

AT_ONCE = 4
"""Requests under way together: batches of every mixture, in a third of the time."""

LENGTHS = [1, 2, 5, 17, 64, 100, 126, 127, 128, 129, 130, 200, 255, 256, 257, 300, 383, 384, 385,
           450, 512, 513, 640, 700, 768, 900, 1023, 1024, 1025, 1200, 1300, 1500]  # fmt: skip
SOME_LENGTHS = [2, 17, 127, 128, 129, 256, 257, 385, 700, 1025]
"""`make test-long` has time for all, and tests/architectures asks tiny models many more."""
ASKED = LENGTHS if EVERYTHING else SOME_LENGTHS


def body_of(length: int, salt: str, **options: Any) -> dict[str, Any]:
    return {
        "prompt": random_prompt(length, seed=length), "cache_salt": salt,
        "max_tokens": 12, "ignore_eos": True, "return_token_ids": True, **options,
    }  # fmt: skip


def of_length(length: int) -> dict[str, Any]:
    """Even lengths greedy, so with the first token relayed; odd ones seeded, with logprobs."""
    odd: dict[str, Any] = {"temperature": 0.9, "seed": length, "logprobs": 3}
    return body_of(length, f"{length}", **(odd if length % 2 else {"temperature": 0}))


class Answers:
    """To many questions, several at once: each beside one engine's, and the router's record."""

    def __init__(self, url: str, one_engine: OneEngine, bodies: list[dict[str, Any]]) -> None:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            self.ours = list(pool.map(lambda body: complete(url, **body), bodies))
            self.theirs = list(pool.map(one_engine.choice, bodies))
        self._url = url

    def record(self, index: int) -> dict[str, Any]:
        """Asserts that both answers are the same; what the router noted of ours."""
        ours, theirs = self.ours[index], self.theirs[index]
        assert ours.status_code == 200, ours.text
        mine = ours.json()["choices"][0]
        assert mine["token_ids"] == theirs["token_ids"]
        assert mine["text"] == theirs["text"]
        assert mine["finish_reason"] == theirs["finish_reason"]
        if theirs["logprobs"] is not None:
            assert mine["logprobs"]["token_logprobs"] == pytest.approx(
                theirs["logprobs"]["token_logprobs"], abs=1e-4
            )
        path = f"{self._url}/tandem/requests/{ours.json()['id']}"
        record: dict[str, Any] = httpx.get(path).json()[0]
        return record


@pytest.fixture(scope="module")
def of_lengths(over: tuple[str, LocalGroup], one_engine: OneEngine) -> Answers:
    bodies = [of_length(length) for length in ASKED]
    return Answers(over[1].url, one_engine, bodies)


@pytest.mark.parametrize("length", ASKED)
def test_tokens_are_those_of_one_engine_over_each_transport(
    over: tuple[str, LocalGroup], of_lengths: Answers, length: int
) -> None:
    record = of_lengths.record(ASKED.index(length))
    assert (record["prefill_worker"], record["decode_worker"]) == ("prefill-0", "decode-0")
    assert record["kv_failed"] is None
    # Without a relayed first token the decode worker computes the prompt's last.
    handed = length - length % 2
    assert record["kv_bytes"] == -(-handed // BLOCK) * record["block_bytes"]
    assert record["kv_transport"] == (over[0] if handed else "")


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
    {"ignore_eos": False, "stop_token_ids": list(range(20, 5_000, 5))},
    {"bad_words": ["the"]},
]
FIRSTS = [(length, which) for length in (3, 128, 300) for which in range(len(OPTIONS))]


@pytest.fixture(scope="module")
def of_options(group: LocalGroup, one_engine: OneEngine) -> Answers:
    bodies = [
        body_of(length, f"first-{length}-{which}", **{"temperature": 0, **OPTIONS[which]})
        for length, which in FIRSTS
    ]
    return Answers(group.url, one_engine, bodies)


@pytest.mark.parametrize(("length", "which"), FIRSTS)
def test_whoever_samples_the_first_token_the_answer_is_one_engines(
    of_options: Answers, length: int, which: int
) -> None:
    of_options.record(FIRSTS.index((length, which)))


def test_a_long_prompt_is_read_while_it_is_computed(
    group: LocalGroup, one_engine: OneEngine
) -> None:
    """With nothing else under way, so that the decode worker is listening."""
    record = Answers(group.url, one_engine, [body_of(1500, "alone", temperature=0)]).record(0)
    assert record["kv_hidden_s"] > 0
    assert record["kv_s"] > 0
