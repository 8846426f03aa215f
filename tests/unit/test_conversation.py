"""A conversation has a message, and its speakers are known."""

from __future__ import annotations

import pytest

from router.core.conversation import OPENAI_ROLES, roles_in, trouble

TEMPLATE = """{% if message['role'] == 'ipython' or message.role == "observation" %}"""


@pytest.mark.parametrize("role", sorted(OPENAI_ROLES))
def test_openai_s_roles_are_known_to_every_model(role: str) -> None:
    assert trouble([{"role": role}], roles_in("")) is None


@pytest.mark.parametrize("role", ["ipython", "observation"])
def test_a_role_of_the_model_s_own_is_known_from_its_template(role: str) -> None:
    assert trouble([{"role": role}], roles_in(TEMPLATE)) is None
    assert trouble([{"role": role}], roles_in("")) is not None


def test_the_first_unknown_speaker_is_named_by_place_and_role() -> None:
    messages = [{"role": "user"}, {"role": "alien"}, {"role": ""}]
    found = trouble(messages, roles_in(TEMPLATE))
    assert found is not None
    assert found[0] == "messages[1].role"
    assert "'alien'" in found[1]


@pytest.mark.parametrize("messages", [[{}], [{"role": None}], [{"role": ""}]])
def test_a_message_without_a_role_is_refused(messages: list[dict[str, str]]) -> None:
    assert trouble(messages, roles_in(TEMPLATE)) is not None


def test_silence_is_refused() -> None:
    found = trouble([], roles_in(""))
    assert found is not None
    assert found[0] == "messages"
