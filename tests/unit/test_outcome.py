"""A response's status is what became of the request before its first output."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from router.asker import AccessRules
from router.core.access import Keys
from router.core.errors import QueueFull, WorkerLost
from router.guard import GuardMiddleware, at_admin_address
from router.outcome import Outcome, OutcomeMiddleware, outcome

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
BUSY = QueueFull(waiting=9, retry_s=7)
LOST = WorkerLost("w", reason="gone", tokens_sent=3)
EVENT = b'data: {"text": "a"}\n\n'

Step = tuple[str, Any]


async def nothing() -> Message:
    raise AssertionError("it has nothing to read")


def scope_of(path: str, **headers: str) -> Scope:
    named = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
    return {"type": "http", "method": "POST", "path": path, "headers": named}


def play(*steps: Step) -> ASGIApp:
    """An application that streams, and an engine behind it, step by step."""

    async def app(_: Scope, __: Receive, send: Send) -> None:
        result = outcome.get()
        assert isinstance(result, Outcome)
        for kind, value in steps:
            match kind:
                case "start":
                    await send({"type": "http.response.start", "status": 200, "headers": []})
                case "event":
                    await send({"type": "http.response.body", "body": value, "more_body": True})
                case "end":
                    await send({"type": "http.response.body", "body": value, "more_body": False})
                case "begun":
                    result.begun = True
                case "error":
                    result.error = value
                case "raise":
                    raise value
                case "look":
                    value()

    return app


def serve(path: str, *steps: Step) -> list[Message]:
    sent: list[Message] = []
    asyncio.run(_serve(path, sent, *steps))
    return sent


async def _serve(path: str, sent: list[Message], *steps: Step) -> None:
    async def send(message: Message) -> None:
        sent.append(message)

    def explain(error: Exception) -> tuple[int, Any]:
        return 400, {"type": "Bad", "message": str(error), "param": "p", "code": 400}

    await OutcomeMiddleware(play(*steps), explain)(scope_of(path), nothing, send)


def body_of(sent: list[Message]) -> bytes:
    return b"".join(m.get("body", b"") for m in sent)


def header(message: Message, name: bytes) -> bytes | None:
    return dict(message["headers"]).get(name)


def test_response_is_held_until_the_first_output() -> None:
    sent: list[Message] = []
    seen: list[int] = []

    async def run() -> None:
        def look() -> None:
            seen.append(len(sent))

        await _serve(
            RESPONSES, sent, ("start", None), ("event", EVENT), ("event", EVENT), ("look", look),
            ("begun", None), ("event", EVENT), ("look", look), ("event", EVENT), ("look", look),
            ("end", b""),
        )  # fmt: skip

    asyncio.run(run())
    assert seen == [0, 4, 5]
    assert body_of(sent) == EVENT * 4


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_error_before_the_first_output_is_a_status(path: str) -> None:
    sent = serve(
        path, ("start", None), ("event", EVENT), ("error", BUSY), ("event", EVENT), ("end", b"")
    )
    assert [m["type"] for m in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 503
    assert header(sent[0], b"retry-after") == b"7"
    content = json.loads(body_of(sent))
    assert content["error"]["type"] == "queue_full"
    assert (content.get("type") == "error") == (path == MESSAGES)


def test_error_that_is_not_ours_is_explained() -> None:
    sent = serve(CHAT, ("start", None), ("error", ValueError("bad")), ("event", EVENT))
    assert sent[0]["status"] == 400
    assert json.loads(body_of(sent))["error"]["message"] == "bad"
    assert header(sent[0], b"retry-after") is None


def test_later_error_is_the_last_event_in_the_shape_of_its_endpoint() -> None:
    begin = [("start", None), ("begun", None), ("event", EVENT), ("error", LOST)]
    for path in (CHAT, RESPONSES, MESSAGES):
        sent = serve(path, *begin, ("event", b"vLLM's own"), ("end", b"and more"))
        assert sent[0]["status"] == 200
        assert sent[-1]["more_body"] is False
        assert b"vLLM" not in body_of(sent)
        last = body_of(sent).removeprefix(EVENT).decode()
        found = json.loads(last.split("data: ")[1])
        if path == CHAT:
            assert last.endswith("data: [DONE]\n\n")
            assert found["error"]["code"] == "worker_lost"
        elif path == RESPONSES:
            assert (found["type"], found["code"]) == ("error", "worker_lost")
            assert found["sequence_number"] == 1
        else:
            assert found["error"]["type"] == "worker_lost"


def test_layer_that_fails_of_the_engine_s_error_changes_nothing() -> None:
    sent = serve(
        RESPONSES, ("start", None), ("begun", None), ("event", EVENT), ("error", LOST),
        ("raise", TypeError("no such event")),
    )  # fmt: skip
    assert b"worker_lost" in body_of(sent)
    sent = serve(RESPONSES, ("error", BUSY), ("raise", TypeError("no such event")))
    assert sent[0]["status"] == 503


def test_error_that_the_engine_does_not_know_is_raised() -> None:
    with pytest.raises(TypeError):
        serve(CHAT, ("start", None), ("raise", TypeError()))


def test_nothing_follows_a_response_that_is_over() -> None:
    sent = serve(CHAT, ("start", None), ("end", b"{}"), ("error", LOST), ("raise", LOST))
    assert body_of(sent) == b"{}"


def test_comment_that_keeps_a_connection_open_is_not_held() -> None:
    comment = b": keep-alive\n\n"
    sent = serve(CHAT, ("start", None), ("event", comment), ("error", BUSY), ("event", EVENT))
    assert sent[0]["status"] == 200
    assert body_of(sent).startswith(comment)
    assert b"queue_full" in body_of(sent)


# ------------------------------------------------------------ the guard


def guarded(rules: AccessRules, *mounted: str) -> ASGIApp:
    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    return GuardMiddleware(app, rules, frozenset(mounted))


def status(app: ASGIApp, path: str, **headers: str) -> int:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    running: Awaitable[None] = app(scope_of(path, **headers), nothing, send)
    asyncio.run(running)  # type: ignore[arg-type]
    found: int = sent[0]["status"]
    return found


def test_route_that_is_listed_but_not_mounted_is_not_found() -> None:
    app = guarded(AccessRules(), CHAT)
    assert (status(app, CHAT), status(app, "/docs")) == (200, 404)


def test_admin_routes_are_at_the_admin_address_only() -> None:
    rules = AccessRules(Keys(["k"]), admin_address=True)
    app = guarded(rules, CHAT, "/metrics", "/tandem/requests/{name}", "/readyz")
    there = at_admin_address(app)
    for path, here, at_admin in (
        ("/metrics", 404, 200), (CHAT, 401, 404), ("/readyz", 200, 200),
        ("/tandem/requests/a", 401, 200), ("/invocations", 404, 404),
    ):  # fmt: skip
        assert (status(app, path), status(there, path)) == (here, at_admin)


def test_websocket_is_closed() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}
    asyncio.run(guarded(AccessRules())(scope, nothing, send))  # type: ignore[arg-type]
    assert [m["type"] for m in sent] == ["websocket.close"]
