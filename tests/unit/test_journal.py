"""A record is found by what its client calls the request, exactly, and by its own tenant."""

from __future__ import annotations

import pytest

from router.ask import Ask
from router.journal import Journal


def journal_of(*names: str, tenant: str = "a") -> Journal:
    journal = Journal()
    for number, name in enumerate(names):
        journal.start(Ask(f"{name}-{number:08x}", [1, 2], 3, name=name, tenant=tenant), 0.0)
    return journal


@pytest.mark.parametrize(
    ("name", "known_as"),
    [
        ("chatcmpl-mine", ["mine", "chatcmpl-mine"]),
        ("cmpl-mine-0", ["mine", "cmpl-mine", "cmpl-mine-0"]),
        ("resp_mine_0", ["resp_mine", "resp_mine_0"]),
        ("generate-tokens-mine", ["mine"]),
        ("chatcmpl-cmpl-x-0", ["cmpl-x-0"]),
    ],
)
def test_record_is_found_by_each_name_that_a_client_knows(name: str, known_as: list[str]) -> None:
    journal = journal_of(name)
    for known in known_as:
        assert [r.name for r in journal.find(known)] == [name]


@pytest.mark.parametrize(
    "part",
    ["0", "ine", "min", "mine-", "cmpl", "cmpl-", "cmpl-min", "-mine", "", "mine-0", "a-mine"],
)
def test_part_of_a_name_finds_nothing(part: str) -> None:
    names = ("chatcmpl-mine", "cmpl-mine-0", "cmpl-mine-x", "chatcmpl-other-mine", "resp_mine_0")
    assert journal_of(*names).find(part) == []


def test_all_prompts_of_a_completion_are_found_by_its_id() -> None:
    journal = journal_of("cmpl-mine-0", "cmpl-mine-1", "cmpl-mine-0-0")
    assert [r.name for r in journal.find("cmpl-mine")] == ["cmpl-mine-0", "cmpl-mine-1"]


def test_record_is_shown_to_its_own_tenant_and_to_the_admin() -> None:
    journal = journal_of("chatcmpl-mine", tenant="a")
    assert len(journal.find("mine", "a")) == len(journal.find("mine")) == 1
    assert journal.find("mine", "b") == journal.find("mine", "") == []
