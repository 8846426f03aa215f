"""Workers whose KV memory is cut differently hand off to each other, or say why they can't."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from deploy.local.group import LocalGroup
from tests.integration.asking import MODEL, OneEngine, await_free
from tests.integration.conftest import APART, FLAGS, OURS
from tests.integration.test_equivalence import Answers, body_of, of_length

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        os.environ.get("TANDEM_LONG") != "1", reason="takes a minute a layout: `make test-long`"
    ),
]

LENGTHS = [1, 63, 64, 65, 128, 300, 700]
THREE_RANKS = ["--tensor-parallel-size", "3"]
"""The model has three KV heads: one a rank."""
Roles = dict[str, list[str]]
LAYOUTS: dict[str, Roles] = {
    "smaller blocks to larger": {"prefill": ["--block-size", "64"], "decode": []},
    "larger blocks to smaller": {"prefill": [], "decode": ["--block-size", "64"]},
    "three ranks to one": {"prefill": THREE_RANKS},
    "one rank to three": {"decode": THREE_RANKS},
    "three ranks to three": {"prefill": THREE_RANKS, "decode": THREE_RANKS},
}


@pytest.fixture(scope="module", params=LAYOUTS)
def unlike(request: pytest.FixtureRequest) -> Iterator[LocalGroup]:
    roles = LAYOUTS[request.param]
    # Ranks take turns on two cores: nobody's patience may be that of one engine a core.
    patience = ["--kv-answer-s", "20", "--kv-read-s", "30"]
    flags = [*FLAGS, *OURS, *patience]
    with LocalGroup(MODEL, flags=flags, role_flags=roles, router_flags=APART) as running:
        yield running


@pytest.fixture(scope="module")
def answers(unlike: LocalGroup, one_engine: OneEngine) -> Answers:
    bodies: list[dict[str, Any]] = [of_length(length) for length in LENGTHS]
    bodies.append(body_of(500, "relayed", temperature=0))
    return Answers(unlike.url, one_engine, bodies)


@pytest.mark.parametrize("index", range(len(LENGTHS) + 1))
def test_tokens_are_those_of_one_engine_whatever_the_two_cuts(answers: Answers, index: int) -> None:
    record = answers.record(index)
    assert (record["prefill_worker"], record["decode_worker"]) == ("prefill-0", "decode-0")
    assert record["kv_failed"] is None
    assert record["kv_bytes"] > 0


def test_nothing_is_kept_whatever_the_two_cuts(unlike: LocalGroup) -> None:
    await_free(unlike, 40)
