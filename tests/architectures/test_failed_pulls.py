"""A pull that fails costs its own request time, and no other request anything."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.architectures.families import FAMILIES
from tests.architectures.passes import CACHED, ONE_BY_ONE, SALTED
from tests.architectures.prompts import PROMPTS
from tests.architectures.runs import VARIANTS
from tests.asking import EVERYTHING
from tests.zygote import PLANTED

if TYPE_CHECKING:
    from tests.architectures.runs import Bench, Run

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not EVERYTHING, reason="takes minutes: `make test-long`"),
]

NAMES = ("llama", "mistral", "gemma3", "granite4")
"""Requests share blocks of the prefix cache; with a sliding window they share the null block."""


@pytest.fixture(params=[f for f in FAMILIES if f.name in NAMES], ids=lambda f: f.name)
def failing(request: pytest.FixtureRequest, bench: Bench) -> Run:
    family = request.param
    changed = replace(family, name=f"{family.name}, failing", change="every third pull fails")
    run = bench.run(changed, VARIANTS[0])
    assert run.refusal is None, run.refusal
    return run


def test_no_token_is_wrong_where_pulls_fail(failing: Run) -> None:
    wrong = {
        (name, prompt): str(judged)
        for name in (ONE_BY_ONE, CACHED, SALTED)
        for prompt, judged in failing.judged(name).items()
        if not judged.right
    }
    rounds = [
        (number, prompt, str(judged))
        for number, each in enumerate(failing.judged_rounds())
        for prompt, judged in each.items()
        if not judged.right
    ]
    assert (wrong, rounds) == ({}, [])


@pytest.mark.parametrize("name", [ONE_BY_ONE, CACHED, SALTED])
def test_a_failed_pull_is_its_own_requests_alone(failing: Run, name: str) -> None:
    failures = [a.record["kv_failed"] for a in failing.passes.answers[name].values()]
    failed = [reason for reason in failures if reason is not None]
    assert set(failed) == {PLANTED}
    # Each third of those that came, whichever came first.
    assert abs(len(failed) - len(PROMPTS) / 3) < 1.5
