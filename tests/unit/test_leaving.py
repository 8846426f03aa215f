"""What clients and balancers see of a router that leaves."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from router.leaving import Departure, LeavingServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

WAIT_S = 10.0
NOTICE_S = 0.3


class Front:
    """A router's HTTP side, with one stream that ends when it is told to."""

    def __init__(self) -> None:
        self.end = asyncio.Event()
        self.departure = Departure()
        app = Starlette(routes=[Route("/stream", self._stream), Route("/", self._root)])
        self.server = LeavingServer(app, self.departure, drain_s=1)
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.running = asyncio.create_task(self.server._serve([listener]))

    async def _root(self, _: object) -> PlainTextResponse:
        return PlainTextResponse("ok")

    async def _stream(self, _: object) -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            yield "first"
            await self.end.wait()
            yield "last"

        return StreamingResponse(parts())


@asynccontextmanager
async def front() -> AsyncIterator[tuple[Front, httpx.AsyncClient]]:
    async with asyncio.timeout(WAIT_S):
        here = Front()
        async with httpx.AsyncClient(base_url=here.url, timeout=WAIT_S) as client:
            yield here, client
        here.end.set()
        here.server.force_exit = here.server.should_exit = True
        await here.running


def test_it_takes_requests_while_balancers_are_yet_to_notice_and_none_later() -> None:
    async def test() -> None:
        async with front() as (here, client):
            assert "connection" not in (await client.get("/")).headers
            here.server.leave(NOTICE_S)
            answer = await client.get("/")
            assert (answer.status_code, answer.headers["connection"]) == (200, "close")
            await here.running
            with pytest.raises(httpx.ConnectError):
                await client.get("/")

    asyncio.run(test())


def test_a_stream_ends_whole_after_it_takes_nothing_more() -> None:
    async def test() -> None:
        async with front() as (here, client), client.stream("GET", "/stream") as answer:
            parts = answer.aiter_text()
            assert await anext(parts) == "first"
            here.server.leave(0)
            await asyncio.sleep(0.4)
            assert not here.running.done()
            with pytest.raises(httpx.ConnectError):
                await client.get("/")
            here.end.set()
            assert [part async for part in parts] == ["last"]
            await here.running

    asyncio.run(test())


def test_whoever_asks_a_second_time_means_now() -> None:
    async def test() -> None:
        async with front() as (here, client), client.stream("GET", "/stream"):
            here.server.leave(WAIT_S)
            here.server.leave(WAIT_S)
            await here.running

    asyncio.run(test())


def test_a_stream_that_does_not_end_in_time_is_cut() -> None:
    async def test() -> None:
        async with front() as (here, client), client.stream("GET", "/stream"):
            here.server.leave(0)
            await here.running

    asyncio.run(test())
