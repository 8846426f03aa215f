"""How flags that name roles, ports and servers are written: `role=value`, with commas between."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import NoDecode


def split(value: Any) -> Any:
    """At commas; what is no text is taken as it is."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _by_role(read: Callable[[str], Any]) -> Callable[[Any], Any]:
    def pairs(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found: dict[str, Any] = {}
        for part in split(value):
            role, _, what = part.partition("=")
            if not role or not what or role in found:
                raise ValueError("want role=value, each role once, with commas between")
            found[role] = read(what)
        return found

    return pairs


def _port(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) <= 65535:
        raise ValueError(f"{text} is no port")
    return int(text)


def _url(value: str) -> str:
    if not re.fullmatch(r"https?://[^/\s]+/?", value):
        raise ValueError("want https://host:port")
    return value


# Not decoded: they are no JSON, neither as a flag nor as a variable.
Ports = Annotated[
    Mapping[str, int], NoDecode, BeforeValidator(_by_role(_port)), Field(min_length=1)
]
Names = Annotated[Mapping[str, str], NoDecode, BeforeValidator(_by_role(str)), Field(min_length=1)]
Roles = Annotated[tuple[str, ...], NoDecode, BeforeValidator(split), Field(min_length=1)]
Url = Annotated[str, AfterValidator(_url)]
