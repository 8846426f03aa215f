"""Each option acts as it does on one engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import openai
import pytest

from tests.asking import MODEL, complete

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deploy.local.group import LocalGroup

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
PLAIN = {"temperature": 0, "max_tokens": 12}
PARIS = [7042]
"""The token that the plain answer, `The capital of France is Paris.`, names the city with."""

Answer = list[tuple[int, str, str | None, Any]]
"""Index, text, finish reason and stop reason of each choice."""


@pytest.fixture(scope="module")
def ours(group: LocalGroup) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{group.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def theirs(aggregated: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{aggregated}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client: openai.OpenAI, options: dict[str, Any]) -> tuple[Answer, int]:
    """The choices, and how many tokens they have."""
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, **options)
    choices = [
        (c.index, c.message.content or "", c.finish_reason, c.stop_reason) for c in answer.choices
    ]
    return sorted(choices), answer.usage.completion_tokens


def streamed_chat(client: openai.OpenAI, options: dict[str, Any]) -> tuple[Answer, int]:
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    texts: dict[int, str] = {}
    ends: dict[int, tuple[str, Any]] = {}
    with client.chat.completions.create(
        model=MODEL, messages=QUESTION, **usage, **options
    ) as chunks:  # fmt: skip
        for chunk in chunks:
            for c in chunk.choices:
                texts[c.index] = texts.get(c.index, "") + (c.delta.content or "")
                if c.finish_reason:
                    ends[c.index] = c.finish_reason, c.stop_reason
    return sorted((i, texts[i], *ends[i]) for i in texts), chunk.usage.completion_tokens


@pytest.fixture(scope="module")
def plain(ours: openai.OpenAI) -> Answer:
    answer, tokens = chat(ours, PLAIN)
    assert answer == [(0, "The capital of France is Paris.", "stop", None)]
    assert tokens == 8
    return answer


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 1.0, "seed": 11},
    {"temperature": 1.0, "seed": 12, "top_p": 0.8},
    {"temperature": 1.0, "seed": 13, "n": 3},
    {"temperature": 1.0, "seed": 14, "extra_body": {"top_k": 5, "min_p": 0.05}},
    {"stop": ["Paris", "London"]},
    {"stop": [" of Fr"], "extra_body": {"include_stop_str_in_output": True}},
    {"extra_body": {"stop_token_ids": PARIS}},
    {"logit_bias": {str(PARIS[0]): -100}},
    {"extra_body": {"bad_words": ["Paris"]}},
    {"extra_body": {"allowed_token_ids": [*range(100, 400)]}},
    {"extra_body": {"min_tokens": 11}},
    {"extra_body": {"ignore_eos": True}, "max_tokens": 10},
    {"extra_body": {"repetition_penalty": 1.8}, "frequency_penalty": 1.5},
    {"extra_body": {"structured_outputs": {"choice": ["Rome", "Oslo"]}}},
    {"max_completion_tokens": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=[str(o)[:60] for o in OPTIONS])
def test_an_option_acts_in_a_stream_as_it_does_on_one_engine(
    ours: openai.OpenAI, theirs: openai.OpenAI, plain: Answer, options: dict[str, Any]
) -> None:
    asked = {**PLAIN, **options}
    if "max_completion_tokens" in options:
        del asked["max_tokens"]
    here = streamed_chat(ours, asked)
    assert here[0] != plain, "the option does not act"
    assert here == chat(theirs, asked)


def test_a_seed_gives_the_same_again_and_another_something_else(ours: openai.OpenAI) -> None:
    def told(seed: int) -> Answer:
        return chat(ours, {"temperature": 1.0, "max_tokens": 8, "n": 2, "seed": seed})[0]

    one = told(1)
    assert one == told(1)
    assert one != told(2)


def test_logprobs_are_streamed_as_one_engine_streams_them(
    ours: openai.OpenAI, theirs: openai.OpenAI
) -> None:
    told = []
    for client in (ours, theirs):
        chunks = client.chat.completions.create(
            model=MODEL, messages=QUESTION, stream=True, logprobs=True, top_logprobs=2, **PLAIN
        )
        told.append(
            [
                (entry.token, entry.logprob, [top.token for top in entry.top_logprobs])
                for chunk in chunks
                for choice in chunk.choices
                for entry in (choice.logprobs.content if choice.logprobs else [])
            ]
        )
    here, there = told
    assert len(here) == 8
    assert [(t, tops) for t, _, tops in here] == [(t, tops) for t, _, tops in there]
    assert [p for _, p, _ in here] == pytest.approx([p for _, p, _ in there], abs=1e-4)


def texts(url: str, **body: Any) -> list[tuple[int, str, str]]:
    answer = complete(url, **{"temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    return [(c["index"], c["text"], c["finish_reason"]) for c in answer.json()["choices"]]


PROMPTS = ["One, two,", "The sea is", "Once upon a time"]


def test_prompts_in_a_list_are_answered_in_their_order(group: LocalGroup, aggregated: str) -> None:
    together = texts(group.url, prompt=PROMPTS, max_tokens=6)
    assert together == texts(aggregated, prompt=PROMPTS, max_tokens=6)
    assert len({text for _, text, _ in together}) == len(PROMPTS)


def test_prompts_of_token_ids_in_a_list_are_answered_in_their_order(
    group: LocalGroup, aggregated: str
) -> None:
    prompts = [[100, 200, 300], [400, 500], [600]]
    seeded = {"temperature": 1.0, "seed": 5}
    together = texts(group.url, prompt=prompts, max_tokens=6, n=2, **seeded)
    assert together == texts(aggregated, prompt=prompts, max_tokens=6, n=2, **seeded)
    assert [index for index, _, _ in together] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("max_tokens", [0, 5])
def test_an_echo_has_the_prompt_and_its_logprobs(
    group: LocalGroup, aggregated: str, max_tokens: int
) -> None:
    body = {"prompt": PROMPTS[2], "echo": True, "logprobs": 2, "max_tokens": max_tokens}
    here, there = (
        complete(url, temperature=0, **body).json()["choices"][0] for url in (group.url, aggregated)
    )
    assert here["text"] == there["text"]
    assert here["text"].startswith(PROMPTS[2])
    mine, other = here["logprobs"], there["logprobs"]
    assert mine["tokens"] == other["tokens"]
    assert mine["token_logprobs"][0] is other["token_logprobs"][0] is None
    assert len(mine["tokens"]) > max_tokens + 3
    assert mine["token_logprobs"][1:] == pytest.approx(other["token_logprobs"][1:], abs=1e-4)


def test_a_beam_search_finds_what_it_finds_on_one_engine(
    group: LocalGroup, aggregated: str
) -> None:
    body = {"prompt": PROMPTS[0], "use_beam_search": True, "n": 2, "max_tokens": 3}
    here = texts(group.url, **body)
    assert here == texts(aggregated, **body)
    assert len({text for _, text, _ in here}) == 2
