"""Bad input gets a 4xx in OpenAI's shape that names the field, and reaches no worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.asking import MODEL, metrics

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deploy.local.group import LocalGroup

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]

USER = {"role": "user", "content": "hi"}
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {}}}
OTHER = {"type": "function", "function": {"name": "g"}}
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


@pytest.fixture
def router(group: LocalGroup) -> Iterator[httpx.Client]:
    """The router's client; whatever the test sent, no worker has seen it."""

    def taken() -> float:
        samples = [metrics(group, worker.name) for worker in group.workers]
        return sum(
            value
            for each in samples
            for name, value in each.items()
            if name.startswith("tandem_worker_requests_total")
        )

    before = taken()
    with httpx.Client(base_url=group.url, timeout=30) as client:
        yield client
    assert taken() == before


def assert_names(answer: httpx.Response, status: int, field: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert field in f"{error['message']} {error['param']}"


CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": "hi"}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": [5]}, "messages.0"),
    ({"messages": [{"content": "hi"}]}, "role"),
    ({"messages": [USER, {"role": "alien", "content": "hi"}]}, "messages[1].role"),
    ({"messages": [{"role": 7, "content": "hi"}]}, "role"),
    ({"messages": [{"role": "user", "content": 5}]}, "content"),
    ({"messages": [{"role": "user", "content": "word " * 3000}]}, "input tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "many"}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_tokens"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"top_k": -5}, "top_k"),
    ({"n": 0}, "n must be"),
    ({"stop": 5}, "stop"),
    ({"seed": "x"}, "seed"),
    ({"stream": "perhaps"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"top_logprobs": 2}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 500}, "logprobs"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    ({"min_tokens": 9, "max_tokens": 5}, "min_tokens"),
    ({"presence_penalty": 9}, "presence_penalty"),
    ({"priority": "high"}, "priority"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"structured_outputs": 5}, "structured_outputs"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "json_schema"),
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [FUNCTION], "tool_choice": OTHER}, "tool_choice"),
]


@pytest.mark.parametrize(("body", "field"), CHATS, ids=[str(body)[:60] for body, _ in CHATS])
def test_a_bad_chat_is_refused_by_the_field(
    router: httpx.Client, body: dict[str, Any], field: str
) -> None:
    answer = router.post(CHAT, json={"model": MODEL, "messages": [USER], **body})
    assert_names(answer, 400, field)


TEXTS: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": [49_999_999]}, "vocab"),
    ({"prompt": [-1]}, "prompt.0"),
    ({"prompt": [1] * 3000, "max_tokens": 5}, "input tokens"),
    ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "x", "max_tokens": 5000}, "max_tokens"),
    ({"prompt": "x", "temperature": -1}, "temperature"),
    ({"prompt": "x", "logprobs": 5000}, "logprobs"),
    ({"prompt": "x", "suffix": "y"}, "suffix"),
    ({"prompt": "x", "kv_transfer_params": {"tandem_produce": True}}, "kv_transfer_params"),
    ({"prompt": "x", "vllm_xargs": {"kv_cache_report_mode": "full"}}, "kv_cache_report_mode"),
]


@pytest.mark.parametrize(("body", "field"), TEXTS, ids=[str(body)[:60] for body, _ in TEXTS])
def test_a_bad_completion_is_refused_by_the_field(
    router: httpx.Client, body: dict[str, Any], field: str
) -> None:
    assert_names(router.post(TEXT, json={"model": MODEL, **body}), 400, field)


@pytest.mark.parametrize(
    ("path", "body"), [(CHAT, {"messages": [USER]}), (TEXT, {"prompt": "x"})], ids=["chat", "text"]
)
def test_an_unknown_model_is_not_found(
    router: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    assert_names(router.post(path, json={"model": "nope", **body}), 404, "nope")


@pytest.mark.parametrize(
    "content", [b"", b'{"model": ', b"[1]", b'"x"', b"\xff\xfe", b"[" * 100_000],
    ids=["empty", "cut", "list", "string", "no UTF-8", "deep"],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(router: httpx.Client, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    assert_names(router.post(CHAT, content=content, headers=headers), 400, "body")


def test_a_stream_that_can_t_begin_is_refused_before_it_begins(router: httpx.Client) -> None:
    body = {"model": MODEL, "messages": [USER], "stream": True, "temperature": -1}
    assert_names(router.post(CHAT, json=body), 400, "temperature")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("POST", "/v1/nothing", 404), ("GET", CHAT, 405), ("GET", "/tandem/requests/nobody", 404)],
)
def test_what_is_not_served_is_told_in_the_same_shape(
    router: httpx.Client, method: str, path: str, status: int
) -> None:
    answer = router.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
