"""The comparison itself: it tells a tie from a fault, and finds either."""

from __future__ import annotations

import pytest

from tests.architectures.caches import held
from tests.architectures.compare import Answer, Truth, Verdict, judge
from tests.architectures.prompts import BLOCK, PROMPTS, TOGETHER

TRUTH = Truth([5, 6, 7], [-1.0, -2.0, -3.0], [0.5, 1e-4, 0.5])


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (Answer([5, 6, 7]), Verdict.EQUAL),
        (Answer([5, 6, 7], [-1.0, -2.0, -3.0]), Verdict.EQUAL),
        (Answer([5, 6]), Verdict.EQUAL),
        (Answer([5, 6, 7], [-1.0, -2.01, -3.0]), Verdict.WRONG),
        (Answer([5, 9, 9]), Verdict.TIE),
        (Answer([5, 9, 9], [-1.0, -9.0, -9.0]), Verdict.TIE),
        (Answer([5, 9, 9], [-1.1, -2.0, -3.0]), Verdict.WRONG),
        (Answer([5, 6, 9]), Verdict.WRONG),
        (Answer([9, 6, 7]), Verdict.WRONG),
        (Answer([]), Verdict.WRONG),
        (Answer([5, 6, 7, 8]), Verdict.WRONG),
        (Answer(error="500"), Verdict.FAILED),
    ],
)
def test_an_answer_is_wrong_unless_equal_or_parted_at_a_tie(
    answer: Answer, verdict: Verdict
) -> None:
    assert judge(answer, TRUTH).verdict is verdict


@pytest.mark.parametrize(
    ("tokens", "computed", "hit"),
    [
        (64, [], 0),
        (64, [64], 32),
        (65, [64], 64),
        (65, [1500, 33], 64),
        (1, [1], 0),
        (33, [40], 32),
        (32, [40], 0),
    ],
)
def test_a_cache_holds_whole_blocks_and_never_the_last_token(
    tokens: int, computed: list[int], hit: int
) -> None:
    line = list(range(2000))
    assert held(line[:tokens], [line[:c] for c in computed], BLOCK) == hit


def test_a_prompt_that_forks_is_held_up_to_there() -> None:
    assert held(PROMPTS["700 forked"], [PROMPTS["700"]], BLOCK) == 256
    assert held(PROMPTS["300 continued"], [PROMPTS["300"]], BLOCK) == 288


def test_thirteen_are_asked_together() -> None:
    assert len(TOGETHER) == 13
