"""Which conversations make sense to the model: somebody speaks, in a role that it may know."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping, Sequence

OPENAI_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_QUOTED = re.compile(r"""["']([A-Za-z][\w.-]*)["']""")


def roles_in(template: str) -> frozenset[str]:
    """OpenAI's roles and every other word that a chat template has in quotes.

    Some models are taught roles of their own (`ipython`), and their templates compare with them.
    Quoted words that are no roles do no harm: most templates print whatever role they are given.
    """
    return OPENAI_ROLES | frozenset(_QUOTED.findall(template))


def trouble(messages: Sequence[Mapping[str, Any]], roles: frozenset[str]) -> tuple[str, str] | None:
    """Field and reason of what is wrong with a conversation; None when nothing is."""
    if not messages:
        return "messages", "there must be at least one message"
    for at, message in enumerate(messages):
        role = message.get("role")
        if role not in roles:
            known = ", ".join(sorted(OPENAI_ROLES))
            return f"messages[{at}].role", f"role {role!r} is not known; known are {known}"
    return None


def name_for(tenant: str, messages: Sequence[MutableMapping[str, Any]]) -> None:
    """Make names that a client gives its images (`uuid`) the tenant's own.

    Such a name stands for the image's content in caches that all tenants share. Left as it is, it
    would bring one tenant's image to another who names it, or stand for another's image whose hash
    it is.
    """
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("uuid") is not None:
                part["uuid"] = f"{tenant}/{part['uuid']}"
