"""Each family, disaggregated: the tokens of one engine, each prompt computed once."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from tests.architectures.caches import held
from tests.architectures.families import Equal, Family, expecting
from tests.architectures.passes import CACHED, KILLED, ONE_BY_ONE, SALTED
from tests.architectures.prompts import PROMPTS
from tests.architectures.runs import MORE_VARIANTS, VARIANTS, Run, Variant
from tests.asking import EVERYTHING

pytestmark = [pytest.mark.real, pytest.mark.timeout(1200)]

CROSSED = ("llama", "mistral", "gemma3", "gemma4")
"""Families over every transport with either kind of checksums."""


def variants(family: Family) -> tuple[Variant, ...]:
    if not EVERYTHING:
        return VARIANTS[:1]
    return MORE_VARIANTS if family.name in CROSSED else VARIANTS


def marks(family: Family) -> list[pytest.MarkDecorator]:
    needed = family.needs
    missing = needed is not None and find_spec(needed) is None
    reason = f"it needs {needed}, which the environment has not"
    return [pytest.mark.skipif(missing, reason=reason)]


RUNS = [
    pytest.param(
        (family, variant),
        id=f"{family.name}-{variant.transport}-{variant.checksums}",
        marks=marks(family),
    )
    for family in expecting(Equal)
    if EVERYTHING or family.short
    for variant in variants(family)
]
each_run = pytest.mark.parametrize("run", RUNS, indirect=True)
each_pass = pytest.mark.parametrize("name", [ONE_BY_ONE, CACHED, SALTED])


def started(run: Run) -> Run:
    assert run.refusal is None, run.refusal
    return run


@each_run
def test_a_served_family_starts_and_stays(run: Run) -> None:
    assert started(run).died is None
    others = {name: status for name, status in run.statuses.items() if name != "prefill-0"}
    assert set(others.values()) == {0}, run.logs


@each_run
@pytest.mark.parametrize("name", [ONE_BY_ONE, CACHED, SALTED, KILLED])
def test_tokens_are_those_of_one_aggregated_engine(run: Run, name: str) -> None:
    judged = started(run).judged(name)
    assert {p: str(j) for p, j in judged.items() if not j.right} == {}
    assert set(judged) == set(PROMPTS)


@each_run
def test_no_token_is_wrong_in_rounds_of_thirteen_together(run: Run) -> None:
    rounds = started(run).judged_rounds()
    assert {
        (number, prompt): str(judged)
        for number, each in enumerate(rounds)
        for prompt, judged in each.items()
        if not judged.right
    } == {}
    assert len(rounds) == run.rounds


@each_run
@each_pass
def test_a_prompt_is_computed_once_and_handed_over(run: Run, name: str) -> None:
    assert started(run).computed_twice(name) == {}


@each_run
def test_a_window_alone_is_handed_over(run: Run) -> None:
    """No token to come attends to what is before it."""
    windows = run.family.windows
    if windows is None:
        pytest.skip("all of its blocks are attended to")
    answers = started(run).passes.answers[ONE_BY_ONE]
    moved = {name: answer.record.get("kv_bytes", 0) for name, answer in answers.items()}
    assert {n: b for n, b in moved.items() if b > windows.bytes_max(len(PROMPTS[n]))} == {}


@each_run
def test_cached_tokens_are_what_the_prefill_worker_had(run: Run) -> None:
    """One by one nothing is evicted, and each prompt finds what came before it."""
    computed: dict[str, list[list[int]]] = {}
    told, expected = {}, {}
    for name, answer in started(run).passes.answers[ONE_BY_ONE].items():
        there = computed.setdefault(answer.record["prefill_worker"], [])
        told[name] = answer.cached_tokens
        expected[name] = cached(run, prefilled(name, ONE_BY_ONE), there)
        there.append(prefilled(name, ONE_BY_ONE))
        assert answer.record["cached_tokens"] == answer.cached_tokens
    if run.family.windows is None:
        assert told == expected
    else:  # A cache of windows may keep less.
        assert {n for n, tokens in told.items() if tokens > expected[n]} == set()


@each_run
@each_pass
def test_cached_tokens_are_within_what_was_asked(run: Run, name: str) -> None:
    """Together, whatever the order: at least what earlier passes left, at most what all asked."""
    started(run)
    left: dict[str, list[list[int]]] = {}
    if name == CACHED:
        for prompt, answer in run.passes.answers[ONE_BY_ONE].items():
            there = left.setdefault(answer.record["prefill_worker"], [])
            there.append(prefilled(prompt, ONE_BY_ONE))
    wrong: dict[str, Any] = {}
    for prompt, answer in run.passes.answers[name].items():
        ids = prefilled(prompt, name)
        others = [other for n, other in PROMPTS.items() if n != prompt or name == CACHED]
        least = cached(run, ids, left.get(answer.record["prefill_worker"], []))
        least = 0 if run.family.windows is not None else least
        most = cached(run, ids, others)
        if not least <= answer.cached_tokens <= most:
            wrong[prompt] = (least, answer.cached_tokens, most)
    assert wrong == {}


def prefilled(prompt: str, name: str) -> list[int]:
    """The tokens that a prefill worker computes: all where it says the first of the answer itself.

    Else the prompt's last one is left to the decode worker.
    """
    ids = PROMPTS[prompt]
    return ids if name == CACHED else ids[:-1] or ids


def cached(run: Run, prompt: list[int], computed: list[list[int]]) -> int:
    block = run.family.block
    return 0 if block is None or not run.family.caches else held(prompt, computed, block)


@each_run
def test_nothing_is_kept_of_requests_that_have_ended(run: Run) -> None:
    assert started(run).passes.kept is None
