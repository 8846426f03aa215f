"""A seeded prompt that a worker computes in pieces is answered as one engine answers it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.asking import MODEL, OneEngine
from tests.forks import ForkedGroup
from tests.integration.conftest import FLAGS, OURS
from tests.integration.test_equivalence import Answers, body_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deploy.local.group import LocalGroup
    from tests.forks import Zygote

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

LENGTHS = [3, 257, 300, 600, 700, 1025]
"""Up to five pieces each, several prompts a step."""


@pytest.fixture(scope="module")
def alone(zygote: Zygote) -> Iterator[LocalGroup]:
    """A decode worker that computes its prompts itself."""
    with ForkedGroup(zygote, MODEL, prefill=0, flags=[*FLAGS, *OURS]) as running:
        yield running


@pytest.fixture(scope="module")
def answers(alone: LocalGroup, one_engine: OneEngine) -> Answers:
    seeded: list[dict[str, Any]] = [
        body_of(length, f"pieces-{length}", temperature=1.0, seed=length, **options)
        for length in LENGTHS
        for options in ({}, {"top_k": 20, "n": 2}, {"presence_penalty": 0.5})
    ]
    return Answers(alone.url, one_engine, seeded)


@pytest.mark.parametrize("index", range(3 * len(LENGTHS)))
def test_a_seeded_prompt_in_pieces_is_answered_as_one_engine_answers_it(
    answers: Answers, index: int
) -> None:
    record = answers.record(index)
    assert (record["prefill_worker"], record["attempts"]) == (None, 1)
