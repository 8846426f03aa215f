"""A stream's events are those of one engine, field by field, whichever way they are written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.asking import MODEL, random_prompt

if TYPE_CHECKING:
    from deploy.local.group import LocalGroup

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
TEXT: dict[str, Any] = {"prompt": "Once upon a time"}
USAGE = {"stream_options": {"include_usage": True}}
NOISE = {"temperature": 2.0, "seed": 11, "max_tokens": 60, "ignore_eos": True}
"""Its text has characters of several tokens, and bytes that are no character."""

ASKED: list[dict[str, Any]] = [
    CHAT,
    CHAT | USAGE,
    CHAT | {"max_tokens": 1},
    CHAT | {"max_tokens": 1} | USAGE,
    CHAT | {"stop": ["Paris"]},
    CHAT | {"stop": ["tal of Fr"], "include_stop_str_in_output": True} | USAGE,
    CHAT | {"stop_token_ids": [7042]},
    CHAT | NOISE,
    CHAT | NOISE | {"skip_special_tokens": False},
    TEXT,
    TEXT | USAGE,
    TEXT | {"max_tokens": 1} | USAGE,
    TEXT | {"stop": ["\n"], "max_tokens": 80} | USAGE,
    TEXT | NOISE | USAGE,
    {"prompt": random_prompt(300, seed=5), "max_tokens": 30, "ignore_eos": True},
    TEXT | {"echo": True} | USAGE,  # Not plain.
]


def events(url: str, asked: dict[str, Any]) -> list[dict[str, Any]]:
    path = "chat/completions" if "messages" in asked else "completions"
    body = {"model": MODEL, "temperature": 0, "max_tokens": 20, "stream": True, **asked}
    answer = httpx.post(f"{url}/v1/{path}", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    lines = [line for line in answer.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    found = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert len({(event.pop("id"), event.pop("created")) for event in found}) == 1
    for event in found:
        if "system_fingerprint" in event:  # A hash of the engine's configuration.
            event["system_fingerprint"] = "..."
        # What a prompt added to a cache no worker tells.
        details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
        details.pop("created_cache_tokens", None)
    return found


def merged(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whoever is slow gets several tokens an event: events that differ in text only are one."""
    one: list[dict[str, Any]] = []
    texts: list[str] = []
    for event in found:
        text = ""
        for choice in event["choices"]:
            place = choice.get("delta", choice)
            key = "content" if "delta" in choice else "text"
            if key in place:
                text, place[key] = place[key], "..."
        if one and event == one[-1]:
            texts[-1] += text
        else:
            one.append(event)
            texts.append(text)
    return [*one, {"texts": texts}]


@pytest.mark.parametrize("asked", ASKED, ids=[str(asked)[:70] for asked in ASKED])
def test_a_stream_s_events_are_one_engine_s(
    group: LocalGroup, aggregated: str, asked: dict[str, Any]
) -> None:
    ours, theirs = events(group.url, asked), events(aggregated, asked)
    assert merged(ours) == merged(theirs)
