"""Workers whose KV memory is cut differently hand off to each other, or say why they can't."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.asking import EVERYTHING, MODEL, OneEngine, await_free
from tests.forks import ForkedGroup
from tests.integration.conftest import APART, FLAGS, OURS
from tests.integration.test_equivalence import Answers, body_of, of_length

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deploy.local.group import LocalGroup
    from tests.forks import Zygote

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not EVERYTHING, reason="takes a minute a layout: `make test-long`"),
]

LENGTHS = [1, 63, 64, 65, 128, 300, 700]
THREE_RANKS = ["--tensor-parallel-size", "3"]
"""The model has three KV heads: one a rank."""
Roles = dict[str, list[str]]
DIVIDE: dict[str, Roles] = {
    "three ranks to one": {"prefill": THREE_RANKS},
    "one rank to three": {"decode": THREE_RANKS},
    "three ranks to three": {"prefill": THREE_RANKS, "decode": THREE_RANKS},
}
# The CPU's kernels keep a block's tokens in an order of their own, so that blocks are not halved.
DO_NOT_DIVIDE: dict[str, Roles] = {
    "smaller blocks to larger": {"prefill": ["--block-size", "64"]},
    "larger blocks to smaller": {"decode": ["--block-size", "64"]},
}
LAYOUTS = DIVIDE | DO_NOT_DIVIDE


@pytest.fixture(scope="module", params=LAYOUTS)
def unlike(request: pytest.FixtureRequest, zygote: Zygote) -> Iterator[tuple[str, LocalGroup]]:
    # Ranks take turns on two cores: nobody's patience may be that of one engine a core.
    patience = ["--kv-answer-s", "20", "--kv-read-s", "30"]
    roles, flags = LAYOUTS[request.param], [*FLAGS, *OURS, *patience]
    with ForkedGroup(zygote, MODEL, flags=flags, role_flags=roles, router_flags=APART) as running:
        yield request.param, running


@pytest.fixture(scope="module")
def answers(unlike: tuple[str, LocalGroup], one_engine: OneEngine) -> Answers:
    bodies: list[dict[str, Any]] = [of_length(length) for length in LENGTHS]
    # Ranks end their reads one by one: the relayed first token must be taken once.
    bodies += [
        body_of(length, f"relayed-{length}-{again}", temperature=0)
        for length in (64, 300, 500, 700)
        for again in range(3)
    ]
    return Answers(unlike[1].url, one_engine, bodies)


@pytest.mark.parametrize("index", range(len(LENGTHS) + 12))
def test_tokens_are_those_of_one_engine_whatever_the_two_cuts(
    unlike: tuple[str, LocalGroup], answers: Answers, index: int
) -> None:
    record = answers.record(index)
    assert record["kv_failed"] is None
    if unlike[0] in DIVIDE:
        assert (record["prefill_worker"], record["decode_worker"]) == ("prefill-0", "decode-0")
        assert record["kv_bytes"] > 0
    else:
        assert (record["prefill_worker"], record["decode_worker"]) == (None, "decode-0")


def test_the_router_says_who_can_not_hand_off_and_why(unlike: tuple[str, LocalGroup]) -> None:
    layout, group = unlike
    assert group.router is not None
    said = [x for x in group.router.log.read_text().splitlines() if "no handoff" in x]
    if layout in DIVIDE:
        assert not said
    else:
        [line] = said
        assert "prefill-0 (prefill) keeps" in line
        assert "decode-0 (decode) keeps" in line


def test_nothing_is_kept_whatever_the_two_cuts(unlike: tuple[str, LocalGroup]) -> None:
    await_free(unlike[1], 40)
