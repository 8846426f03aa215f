"""Prompts with images: two images with equal placeholders are two prompts, on any worker."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest

from tests.architectures.compare import judge
from tests.architectures.families import FAMILIES
from tests.architectures.images import QUESTIONS, answer, chat, truth
from tests.architectures.runs import ENGINE, VARIANTS, twice
from tests.asking import EVERYTHING
from tests.forks import ForkedAggregated

if TYPE_CHECKING:
    from tests.architectures.compare import Answer, Truth
    from tests.architectures.runs import Bench

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        find_spec("torchvision") is None,
        reason="vLLM needs torchvision for images, which the environment has not",
    ),
    pytest.mark.skipif(not EVERYTHING, reason="takes minutes: `make test-long`"),
]

FAMILY = next(f for f in FAMILIES if f.name == "qwen2-vl")
WITH_LOGPROBS = {"logprobs": True, "top_logprobs": 2}
AGAIN = 3
"""Times that each question is asked together with all others: of two prefill workers each comes to
see images that the other had first."""


@pytest.fixture(scope="module")
def truths(bench: Bench) -> dict[str, Truth]:
    model = str(bench.model(FAMILY.model))
    flags = [*ENGINE, "--block-size", str(FAMILY.block)]
    with ForkedAggregated(bench.zygote, model, flags=flags) as plain:
        plain.await_ready()
        return {q: truth(chat(plain.url, model, q, **WITH_LOGPROBS)) for q in QUESTIONS}


@pytest.fixture(scope="module")
def answers(bench: Bench, truths: dict[str, Truth]) -> dict[str, Answer]:
    """One by one with logprobs, then as the router relays them; then all together, thrice."""
    model = str(bench.model(FAMILY.model))
    said: dict[str, dict[str, Any]] = {}
    with bench.group(FAMILY, VARIANTS[0]) as group:
        for question in QUESTIONS:
            said[question] = chat(group.url, model, question, **WITH_LOGPROBS)
            said[f"{question}, relayed"] = chat(group.url, model, question)
        with ThreadPoolExecutor(len(QUESTIONS)) as pool:
            asked = {
                f"{question}, together {number}": pool.submit(
                    chat, group.url, model, question, cache_salt=f"{number}"
                )
                for number in range(AGAIN)
                for question in QUESTIONS
            }
            said |= {name: each.result() for name, each in asked.items()}
        return {name: answer(group.url, each) for name, each in said.items()}


def test_the_engine_itself_tells_the_images_apart(truths: dict[str, Truth]) -> None:
    """Else nothing here could fail."""
    assert truths["one"].tokens != truths["other"].tokens
    assert truths["two"].tokens != truths["two, turned"].tokens
    assert truths["one"] == truths["one again"]


def test_tokens_are_those_of_one_engine_whatever_the_images(
    truths: dict[str, Truth], answers: dict[str, Answer]
) -> None:
    judged = {
        name: judge(each, truths[next(q for q in _longest_first() if name.startswith(q))])
        for name, each in answers.items()
    }
    assert {name: str(each) for name, each in judged.items() if not each.right} == {}


def test_prompts_with_images_are_computed_once(answers: dict[str, Answer]) -> None:
    assert {name: reason for name, each in answers.items() if (reason := twice(each))} == {}


def _longest_first() -> list[str]:
    return sorted(QUESTIONS, key=len, reverse=True)
