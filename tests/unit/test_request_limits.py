"""How large a request may be, field by field, and how it is told so."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.request_limits import (
    OverLimit,
    RequestLimits,
    check_json_size,
    check_request,
    check_request_id,
)

LIMITS = RequestLimits(
    json_depth_max=8, json_values_max=40, token_ids_max=50, text_chars_max=150, prompts_max=4,
    sequences_max=6, messages_max=5, stops_max=2, stop_chars_max=8, bad_words_max=3,
    logit_bias_max=4, input_items_max=3, tools_max=2, entries_max=30, grammar_bytes_max=60,
)  # fmt: skip
USER = {"role": "user", "content": "hi"}
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["b" * 60]}}}


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 1


OVER: list[tuple[dict[str, Any], str, str]] = [
    ({"a": nested(8)}, "body", "json_depth_max"),
    ({"a": [[{}] * 21] * 2}, "body", "json_values_max"),
    ({"a": [{str(i): i for i in range(21)}] * 2}, "body", "json_values_max"),
    ({"a": [{}] * 31}, "body", "entries_max"),
    ({"a": [*range(30), "x"]}, "body", "entries_max"),
    ({"a": {str(i): i for i in range(31)}}, "body", "entries_max"),
    ({"tools": [{}] * 3}, "tools", "tools_max"),
    ({"messages": [{"content": [{}] * 5}]}, "messages", "messages_max"),
    ({"input": [{"content": [{}, {}]}] * 2}, "input", "messages_max"),
    ({"prompt": [1] * 51}, "body", "token_ids_max"),
    ({"prompt": [[1] * 26] * 2}, "body", "token_ids_max"),
    ({"prompt": "x" * 151}, "body", "text_chars_max"),
    ({"messages": [{"role": "user", "content": [{"text": "x" * 151}]}]}, "body", "text_chars_max"),
    ({"x" * 151: 1}, "body", "text_chars_max"),
    ({"a": ["x" * 76] * 2}, "body", "text_chars_max"),
    ({"prompt": ["x"] * 5}, "prompt", "prompts_max"),
    ({"prompt": [[1]] * 5}, "prompt", "prompts_max"),
    ({"prompt": [{}] * 5}, "prompt", "prompts_max"),
    ({"items": ["x"] * 5}, "items", "prompts_max"),
    ({"messages": [[USER]] * 5}, "messages", "prompts_max"),
    ({"messages": [USER] * 6}, "messages", "messages_max"),
    ({"messages": [[USER] * 3] * 2}, "messages", "messages_max"),
    ({"input": [USER] * 4}, "input", "input_items_max"),
    ({"n": 7}, "n", "sequences_max"),
    ({"n": "7"}, "n", "sequences_max"),
    ({"n": 7.0}, "n", "sequences_max"),
    ({"best_of": 7}, "best_of", "sequences_max"),
    ({"prompt": ["x"] * 4, "n": 2}, "n", "sequences_max"),
    ({"messages": [[USER]] * 4, "n": 2}, "n", "sequences_max"),
    ({"token_ids": [1], "sampling_params": {"n": 7}}, "sampling_params.n", "sequences_max"),
    ({"stop": ["a", "b", "c"]}, "stop", "stops_max"),
    ({"stop": "x" * 9}, "stop", "stop_chars_max"),
    ({"stop": ["x" * 9]}, "stop", "stop_chars_max"),
    ({"stop_sequences": ["a", "b", "c"]}, "stop_sequences", "stops_max"),
    ({"sampling_params": {"stop": ["a", "b", "c"]}}, "sampling_params.stop", "stops_max"),
    ({"bad_words": ["a"] * 4}, "bad_words", "bad_words_max"),
    ({"logit_bias": {str(i): 1 for i in range(5)}}, "logit_bias", "logit_bias_max"),
    ({"allowed_token_ids": [1] * 5}, "allowed_token_ids", "logit_bias_max"),
    ({"stop_token_ids": [1] * 5}, "stop_token_ids", "logit_bias_max"),
    ({"structured_outputs": {"regex": "a|" * 30}}, "structured_outputs", "grammar_bytes_max"),
    ({"structured_outputs": {"json": SCHEMA}}, "structured_outputs", "grammar_bytes_max"),
    ({"response_format": {"json_schema": SCHEMA}}, "response_format", "grammar_bytes_max"),
    ({"text": {"format": SCHEMA}}, "text", "grammar_bytes_max"),
    ({"output_config": {"format": SCHEMA}}, "output_config", "grammar_bytes_max"),
]


@pytest.mark.parametrize(("body", "field", "setting"), OVER, ids=lambda v: str(v)[:50])
def test_a_field_beyond_its_bound_is_refused_by_its_name_and_the_setting(
    body: dict[str, Any], field: str, setting: str
) -> None:
    with pytest.raises(OverLimit) as caught:
        check_request(body, LIMITS)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")
    assert f"--{setting.replace('_', '-')}" in str(caught.value)
    assert str(getattr(LIMITS, setting)) in str(caught.value)


WITHIN: list[dict[str, Any]] = [
    {},
    {"a": nested(7)},
    {"prompt": [1] * 50},
    {"prompt": "x" * 90},
    {"prompt": ["x"] * 4, "n": 1},
    {"prompt": "x", "n": 6, "stop": ["a" * 8, "b"], "bad_words": ["a"] * 3},
    {"prompt": "x", "n": None, "best_of": "many", "stop": None, "logit_bias": None},
    {"prompt": "x", "n": "1e999", "temperature": "nan"},
    {"messages": [USER] * 5},
    {"messages": [{"content": [{"image_url": {"url": "data:image/png;base64," + "A" * 200}}]}]},
    {"messages": [{"content": [{"input_audio": {"data": "A" * 200}}]}]},
    {"logit_bias": {str(i): 1 for i in range(4)}, "stop_token_ids": [1] * 4},
    {"text": "a text that is no grammar, and is longer than one may be here: let it be"},
]


@pytest.mark.parametrize("body", WITHIN, ids=lambda v: str(v)[:50])
def test_a_request_at_its_bounds_and_what_others_will_refuse_passes(body: dict[str, Any]) -> None:
    check_request(body, LIMITS)
    check_json_size(json.dumps(body).encode(), LIMITS)


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=20) | st.sampled_from([',,,[{"', '\\"', "\\"]),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=60,
)


@given(JSON, st.booleans())
def test_whatever_passes_the_whole_check_passes_as_bytes(value: Any, ascii_only: bool) -> None:
    """The look at the bytes is the cheaper of the two, and never the stricter."""
    body = {"a": value}
    try:
        check_request(body, LIMITS)
    except OverLimit:
        return
    raw = json.dumps(body, ensure_ascii=ascii_only, separators=(",", ":"))
    check_json_size(raw.encode(errors="surrogatepass"), LIMITS)


@pytest.mark.parametrize(
    "raw",
    [b"[" * 500, b"[1" + b",1" * 500 + b"]", b"[" + b"{}," * 500, b"[" + b'"a",' * 500],
    ids=["lists", "numbers", "objects", "strings"],
)
def test_a_body_of_too_many_values_is_refused_unparsed(raw: bytes) -> None:
    with pytest.raises(OverLimit, match="--json-values-max"):
        check_json_size(raw, LIMITS)


def test_text_may_be_full_of_commas_and_brackets() -> None:
    text = ',[{"\\' * 500
    check_json_size(json.dumps({"prompt": text}).encode(), LIMITS)
    check_json_size(json.dumps([text] * 3).encode(), LIMITS)


@pytest.mark.parametrize("name", ["a", "x" * 128, "Root=1-67891233;Parent=53995c3f/a:b", None])
def test_a_name_of_visible_characters_is_taken(name: str | None) -> None:
    check_request_id(name, "X-Request-Id")


@pytest.mark.parametrize("name", ["", "x" * 129, "a b", "a\n", "é", "\x00"])
def test_a_name_that_logs_could_not_show_is_refused(name: str) -> None:
    with pytest.raises(OverLimit, match="request_id: want 1 to 128"):
        check_request({"request_id": name}, LIMITS)


def test_defaults_allow_what_clients_send() -> None:
    """A chat of long turns with tools, a batch of prompts, and a whole context as token ids."""
    limits = RequestLimits()
    tool = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
    chat = {"messages": [USER, {**USER, "tool_calls": [tool]}] * 500, "tools": [tool] * 128}
    batch = {"prompt": ["word " * 500] * 128, "stop": ["\n\n", "User:"], "n": 1}
    whole = {"prompt": list(range(50_000, 50_000 + 131_072)), "logit_bias": {"5": 1}}
    for body in (chat, batch, whole):
        raw = json.dumps(body).encode()
        assert len(raw) < 4 * 1024 * 1024
        check_json_size(raw, limits)
        check_request(body, limits)
    assert all(getattr(limits, each.name) > 0 for each in fields(limits))
