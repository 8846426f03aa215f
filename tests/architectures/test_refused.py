"""Families not served are refused in one line; that no engine here serves the others is shown."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from deploy.local.parts import PartDied
from tests.architectures.compare import Answer, judge
from tests.architectures.families import Family, NotHere, Refused, Unsure, expecting
from tests.architectures.runs import VARIANTS, Bench, NoReference, last_line
from tests.asking import EVERYTHING

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]


def rows(kind: type[Refused | NotHere | Unsure]) -> list[Family]:
    return [f for f in expecting(kind) if EVERYTHING or f.short]


@pytest.mark.parametrize("family", rows(Refused), ids=lambda f: f.name)
def test_a_family_not_served_is_refused_in_the_last_line(bench: Bench, family: Family) -> None:
    assert isinstance(family.expected, Refused)
    group = bench.group(family, VARIANTS[0], prefill=1)
    with pytest.raises(PartDied), group:
        pass
    ended = {name for name, status in group.statuses.items() if status in (1, 2)}
    said = {name: last_line(group.logs[name]) for name in ended}
    assert said
    assert [line for line in said.values() if not re.search(family.expected.line, line)] == []


@pytest.mark.parametrize("family", rows(NotHere), ids=lambda f: f.name)
def test_plain_vllm_does_not_serve_it_here(bench: Bench, family: Family) -> None:
    """When this fails, the row can be opened."""
    assert isinstance(family.expected, NotHere)
    if family.expected.runs:
        pytest.skip(f"this processor has {family.expected.runs_with}: the row is of those without")
    with pytest.raises(NoReference, match=family.expected.error):
        bench.reference(family).truths()


@pytest.mark.parametrize("family", rows(Unsure), ids=lambda f: f.name)
def test_plain_vllm_is_not_equal_to_itself_here(bench: Bench, family: Family) -> None:
    """When this fails, the row can be opened."""
    truths = bench.reference(family).truths()
    together = replace(
        family, name=f"{family.name} together", reference={**family.reference, "together": True}
    )
    answers = bench.reference(together).truths()
    judged = [judge(Answer(a.tokens, a.logprobs), truths[name]) for name, a in answers.items()]
    assert not all(each.right for each in judged)
