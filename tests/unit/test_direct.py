"""A body's parts go out in order, at once or when a slow client has caught up."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware

from router.direct import Body, SendMiddleware, allow

if TYPE_CHECKING:
    from collections.abc import MutableMapping


class Server:
    """Whose `send` waits while the client is slow, as uvicorn's does."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.room = asyncio.Event()
        self.room.set()
        self.broken: Exception | None = None

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if not self.room.is_set():
            await self.room.wait()
        if self.broken is not None:
            raise self.broken
        self.sent.append(message["body"])


def test_a_part_is_sent_before_write_returns() -> None:
    async def test() -> None:
        server = Server()
        body = Body(server.send, lambda: None)
        body.write(b"a")
        body.write(b"b")
        assert server.sent == [b"a", b"b"]
        assert not body.waiting

    asyncio.run(test())


def test_a_slow_client_s_part_waits_and_says_when_it_is_gone() -> None:
    async def test() -> None:
        server, ready = Server(), list[int]()
        body = Body(server.send, lambda: ready.append(len(server.sent)))
        server.room.clear()
        body.write(b"a")
        assert body.waiting
        await asyncio.sleep(0.01)
        assert (server.sent, ready) == ([], [])
        server.room.set()
        await asyncio.sleep(0.01)
        assert (server.sent, ready) == ([b"a"], [1])
        assert not body.waiting

    asyncio.run(test())


def test_what_waits_goes_out_before_what_the_response_s_task_sends_after_it() -> None:
    async def test() -> None:
        server = Server()
        body = Body(server.send, lambda: None)
        server.room.clear()
        body.write(b"a")
        last = asyncio.create_task(server.send({"body": b"last"}))
        await asyncio.sleep(0.01)
        server.room.set()
        await last
        assert server.sent == [b"a", b"last"]

    asyncio.run(test())


def test_a_closed_body_sends_nothing_more() -> None:
    async def test() -> None:
        server, ready = Server(), list[None]()
        body = Body(server.send, lambda: ready.append(None))
        server.room.clear()
        body.write(b"a")
        body.close()
        server.room.set()
        await asyncio.sleep(0.01)
        assert (server.sent, ready) == ([], [])

    asyncio.run(test())


@pytest.mark.parametrize("slow", [False, True])
def test_a_client_that_has_gone_harms_nobody_else(slow: bool) -> None:
    async def test() -> None:
        server = Server()
        server.broken = OSError("gone")
        body = Body(server.send, lambda: None)
        if slow:
            server.room.clear()
        body.write(b"a")
        server.room.set()
        await asyncio.sleep(0.01)
        assert body.waiting, "for ever"
        body.close()
        assert server.sent == []

    asyncio.run(test())


def test_a_middleware_with_a_task_of_its_own_forbids_it() -> None:
    plain, other = Starlette(), Starlette()
    other.add_middleware(BaseHTTPMiddleware)
    for app in (plain, other):
        allow(app)
    assert [m.cls for m in plain.user_middleware] == [SendMiddleware]
    assert [m.cls for m in other.user_middleware] == [BaseHTTPMiddleware]
