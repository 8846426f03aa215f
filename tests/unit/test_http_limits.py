"""Bodies and names are looked at before the application, which then reads what it would have."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from router.core.request_limits import RequestLimits
from router.http_limits import BodyLimits

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

LIMITS = RequestLimits(json_values_max=10, token_ids_max=10)
GONE: Message = {"type": "http.disconnect"}


def asked(*messages: Message, method: str = "POST", **headers: str) -> tuple[list[Any], list[Any]]:
    """The body that the application read, and the answer in its stead."""
    read: list[Message] = []
    answered: list[Message] = []
    left = list(messages)

    async def app(_: Scope, receive: Receive, __: Send) -> None:
        while left or not read or read[-1]["type"] != "http.disconnect":
            read.append(await receive())

    async def receive() -> Message:
        return left.pop(0) if left else GONE

    async def send(message: Message) -> None:
        answered.append(message)

    given = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
    scope = {"type": "http", "method": method, "headers": given}
    asyncio.run(BodyLimits(app, LIMITS)(scope, receive, send))
    return read, answered


def body(*parts: bytes) -> list[Message]:
    last = len(parts) - 1
    return [
        {"type": "http.request", "body": part, "more_body": at < last}
        for at, part in enumerate(parts)
    ]


def test_the_application_reads_a_body_whole_and_then_hears_of_the_client_s_end() -> None:
    read, answered = asked(*body(b'{"a":', b"1", b"}"))
    assert read == [*body(b'{"a":1}'), GONE]
    assert answered == []


def test_a_body_of_too_many_values_is_answered_in_the_application_s_stead() -> None:
    read, answered = asked(*body(b"[" + b"1," * 15, b"1," * 15 + b"1]"))
    assert read == []
    assert answered[0]["status"] == 400
    error = json.loads(answered[1]["body"])["error"]
    assert error["param"] == "body"
    assert "--json-values-max" in error["message"]


def test_a_client_that_goes_while_it_sends_is_told_of_as_ever() -> None:
    read, answered = asked(body(b"{", b"}")[0], GONE)
    assert next(message["type"] for message in read) == "http.disconnect"
    assert answered == []


def test_a_request_whose_name_can_not_be_logged_is_refused_unread() -> None:
    read, answered = asked(*body(b"{}"), x_request_id="a" * 129)
    assert (read, answered[0]["status"]) == ([], 400)
    assert json.loads(answered[1]["body"])["error"]["param"] == "X-Request-Id"
    assert asked(*body(b"{}"), x_request_id="a-name.of:1")[1] == []


def test_what_has_no_body_is_passed_on_as_it_comes() -> None:
    read, answered = asked(*body(b""), method="GET")
    assert read == [*body(b""), GONE]
    assert answered == []
