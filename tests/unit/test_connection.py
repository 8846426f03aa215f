"""One client's HTTP connection has bounds on what the router waits for and keeps."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import uvloop
from starlette.applications import Starlette
from starlette.requests import Request  # noqa: TC002  # Starlette reads the annotation.
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from router.connection import ConnectionLimits
from router.leaving import Departure, LeavingServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

WAIT_S = 20.0
SOON_S = 0.3
PATIENT = ConnectionLimits(
    header_bytes_max=2_000, headers_max=20, body_bytes_max=10_000,
    header_s=WAIT_S, body_s=WAIT_S, idle_s=WAIT_S, unread_s=WAIT_S,
)  # fmt: skip
GET = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"
STREAM = b"GET /stream HTTP/1.1\r\nhost: a\r\n\r\n"


class Front:
    """A server with those limits; it tells which requests began, and whether a stream ended."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.asked: list[str] = []
        self.begun: asyncio.Queue[str] = asyncio.Queue()
        self.streamed = 0
        self.stream_ended = asyncio.Event()
        self.hold = asyncio.Event()
        self.hold.set()
        self.part = b"x"
        routes = [
            Route("/", self._root, methods=["GET", "POST"]),
            Route("/stream", self._stream),
        ]
        self.server = LeavingServer(Starlette(routes=routes), Departure(), 1, limits)
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self.running = asyncio.create_task(self.server._serve([listener]))

    async def _root(self, request: Request) -> PlainTextResponse:
        self.asked.append(request.method)
        self.begun.put_nowait(request.method)
        size = len(await request.body())
        await self.hold.wait()
        return PlainTextResponse(str(size))

    async def _stream(self, _: object) -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield self.part
                    self.streamed += len(self.part)
                    await asyncio.sleep(0)
            finally:
                self.stream_ended.set()

        return StreamingResponse(parts())


class Client:
    """One connection, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self) -> tuple[int, bytes]:
        """Status and content of the next answer."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        return int(head.split()[1]), await self.reader.readexactly(size)

    async def code(self) -> tuple[int, str, str]:
        """Status, code and message of a refusal, after which the connection ends."""
        status, content = await self.answer()
        with suppress(ConnectionError):
            assert await self.reader.read() == b""
        error = json.loads(content)["error"]
        return status, error["code"], error["message"]

    async def ended(self) -> bool:
        """True when the server has closed it without a word."""
        try:
            return await self.reader.read() == b""
        except ConnectionError:
            return True


@asynccontextmanager
async def served(limits: ConnectionLimits) -> AsyncIterator[tuple[Front, Callable[[], Any]]]:
    clients: list[Client] = []
    async with asyncio.timeout(WAIT_S):
        front = Front(limits)

        async def connect() -> Client:
            clients.append(Client(*await asyncio.open_connection("127.0.0.1", front.port)))
            return clients[-1]

        try:
            yield front, connect
        finally:
            for client in clients:
                client.writer.transport.abort()
            front.hold.set()
            front.server.force_exit = front.server.should_exit = True
            await front.running


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    uvloop.run(test())


def post(body: bytes, *headers: bytes, size: int | None = None) -> bytes:
    length = b"content-length: %d" % (len(body) if size is None else size)
    return b"\r\n".join([b"POST / HTTP/1.1", b"host: a", length, *headers, b"", body])


def test_requests_within_every_limit_are_answered_on_one_connection() -> None:
    async def test() -> None:
        async with served(PATIENT) as (_, connect):
            client = await connect()
            for size in (0, 5, 10_000):
                client.send(post(b"x" * size))
                assert await client.answer() == (200, b"%d" % size)
            chunked = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
            client.send(chunked + b"3\r\nabc\r\n0\r\n\r\n")
            assert await client.answer() == (200, b"3")

    run(test)


def test_headers_beyond_the_bounds_are_refused_before_the_application_sees_them() -> None:
    async def test() -> None:
        async with served(PATIENT) as (front, connect):
            long = b"GET / HTTP/1.1\r\nhost: a\r\nx-a: %s\r\n\r\n" % (b"a" * 3_000)
            url = b"GET /?%s HTTP/1.1\r\nhost: a\r\n\r\n" % (b"a" * 3_000)
            many = b"GET / HTTP/1.1\r\n%s\r\n" % (b"a: b\r\n" * 50)
            for head, setting in ((long, "bytes"), (url, "bytes"), (many, "s")):
                client = await connect()
                client.send(head)
                status, code, message = await client.code()
                assert (status, code) == (431, "headers_too_large")
                assert f"--header{'-bytes' if setting == 'bytes' else 's'}-max" in message
            assert front.asked == []

    run(test)


def test_a_header_without_end_is_refused_while_it_comes_in() -> None:
    async def test() -> None:
        async with served(PATIENT) as (_, connect):
            client = await connect()
            client.send(b"GET / HTTP/1.1\r\nhost: a\r\nx-a: ")
            await client.writer.drain()
            answer = asyncio.create_task(client.code())
            while not answer.done():
                client.send(b"a" * 1_000)
                await asyncio.sleep(0.01)
            assert (await answer)[:2] == (431, "headers_too_large")

    run(test)


def test_a_body_announced_too_large_is_refused_before_it_is_sent() -> None:
    async def test() -> None:
        async with served(PATIENT) as (front, connect):
            client = await connect()
            client.send(post(b"", size=10_001))
            status, code, message = await client.code()
            assert (status, code) == (413, "body_too_large")
            assert "--body-bytes-max" in message
            assert front.asked == []

    run(test)


def test_a_chunked_body_is_refused_when_it_has_grown_too_large() -> None:
    async def test() -> None:
        async with served(PATIENT) as (_, connect):
            client = await connect()
            client.send(b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
            client.send(b"2000\r\n" + b"x" * 0x2000 + b"\r\n2000\r\n" + b"x" * 0x2000 + b"\r\n")
            assert (await client.code())[:2] == (413, "body_too_large")

    run(test)


def test_a_body_that_comes_too_slowly_is_given_up() -> None:
    async def test() -> None:
        async with served(replace(PATIENT, body_s=SOON_S)) as (_, connect):
            client = await connect()
            client.send(post(b"abc", size=5))
            status, code, message = await client.code()
            assert (status, code) == (408, "request_timeout")
            assert "--body-s" in message

    run(test)


def test_bodies_of_all_requests_have_one_bound_that_answered_ones_leave() -> None:
    async def test() -> None:
        async with served(replace(PATIENT, bodies_bytes_max=15_000)) as (front, connect):
            front.hold.clear()
            first, second, third = await connect(), await connect(), await connect()
            first.send(post(b"x" * 9_000))
            await front.begun.get()
            second.send(post(b"x" * 9_000))
            assert (await second.code())[:2] == (503, "too_many_bodies")
            front.hold.set()
            assert await first.answer() == (200, b"9000")
            third.send(post(b"x" * 9_000))
            assert await third.answer() == (200, b"9000")

    run(test)


def test_a_connection_that_says_nothing_is_closed_and_one_that_dawdles_is_told_why() -> None:
    async def test() -> None:
        async with served(replace(PATIENT, header_s=SOON_S)) as (_, connect):
            silent, slow, again, blank = [await connect() for _ in range(4)]
            slow.send(b"GET / HT")
            again.send(GET)
            assert (await again.answer())[0] == 200
            again.send(b"GET / HTTP/1.1\r\nhost")
            blank.send(GET)
            assert (await blank.answer())[0] == 200
            blank.send(b"\r\n")  # It ends the wait for the next request, and begins none.
            assert await silent.ended()
            for client in (slow, again, blank):
                assert (await client.code())[:2] == (408, "request_timeout")

    run(test)


def test_a_connection_kept_without_a_request_is_closed_in_time() -> None:
    async def test() -> None:
        # uvicorn by itself waits for 5 s, and so for longer than for a silent connection here.
        async with served(replace(PATIENT, idle_s=SOON_S, header_s=8 * SOON_S)) as (_, connect):
            client = await connect()
            client.send(GET)
            assert (await client.answer())[0] == 200
            silent = asyncio.create_task((await connect()).ended())
            assert await client.ended()
            assert not silent.done()
            assert await silent

    run(test)


def test_the_connection_idle_for_longest_makes_room_for_one_too_many() -> None:
    async def test() -> None:
        async with served(replace(PATIENT, connections_max=2)) as (front, connect):
            front.hold.clear()
            busy = await connect()
            busy.send(GET)
            await front.begun.get()
            idle, new = await connect(), await connect()
            assert await idle.ended()
            new.send(GET)
            await front.begun.get()
            assert (await (await connect()).code())[:2] == (503, "too_many_connections")
            front.hold.set()
            assert (await busy.answer())[0] == (await new.answer())[0] == 200

    run(test)


def test_a_stream_that_is_not_read_ends_and_is_not_kept_meanwhile() -> None:
    async def test() -> None:
        async with served(replace(PATIENT, unread_s=SOON_S)) as (front, connect):
            front.part = b"x" * 10_000
            client = await connect()
            client.writer.transport.pause_reading()
            client.send(STREAM)
            await front.stream_ended.wait()
            # What the two sockets took, and 64 KiB here.
            assert front.streamed < 30_000_000
            client.writer.transport.resume_reading()
            while not client.reader.at_eof() and client.reader.exception() is None:
                with suppress(ConnectionError):
                    await client.reader.read(1 << 20)

    run(test)


def test_a_half_closed_client_is_taken_for_gone() -> None:
    async def test() -> None:
        async with served(PATIENT) as (front, connect):
            streaming, asking, idle = [await connect() for _ in range(3)]
            streaming.send(STREAM)
            await streaming.reader.readuntil(b"\r\n\r\n")
            front.hold.clear()
            asking.send(GET)
            await front.begun.get()
            for client in (streaming, asking, idle):
                client.writer.write_eof()
            await front.stream_ended.wait()
            assert await asking.ended()
            assert await idle.ended()

    run(test)


def test_a_client_gone_with_a_request_sent_ahead_ends_the_one_being_answered() -> None:
    async def test() -> None:
        async with served(PATIENT) as (front, connect):
            client = await connect()
            client.send(STREAM + GET)
            await client.reader.readuntil(b"\r\n\r\n")
            client.writer.transport.abort()
            await front.stream_ended.wait()
            assert front.asked == []

    run(test)


def test_a_body_sent_ahead_is_not_late_while_it_has_to_wait() -> None:
    async def test() -> None:
        async with served(replace(PATIENT, body_s=SOON_S)) as (front, connect):
            front.hold.clear()
            client = await connect()
            client.send(GET + post(b"", size=5))
            await front.begun.get()
            await asyncio.sleep(2 * SOON_S)
            front.hold.set()
            assert (await client.answer())[0] == 200
            assert (await client.code())[:2] == (408, "request_timeout")

    run(test)


def test_a_client_that_sends_far_ahead_of_the_answers_is_reset() -> None:
    async def test() -> None:
        async with served(PATIENT) as (front, connect):
            client = await connect()
            client.send(GET * 16)
            for _ in range(16):
                assert (await client.answer())[0] == 200
            front.hold.clear()
            client.send(GET * 1_000)
            assert await client.ended()
            assert len(front.asked) == 17

    run(test)


def test_a_body_of_tiny_chunks_is_refused_and_one_of_small_ones_is_not() -> None:
    async def test() -> None:
        head = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
        roomy = replace(PATIENT, body_bytes_max=1_000_000)
        async with served(roomy) as (_, connect):
            client = await connect()
            client.send(head + b"1\r\na\r\n" * 4_000 + b"0\r\n\r\n")
            assert await client.answer() == (200, b"4000")
            client.send(head + b"20\r\n%s\r\n" % (b"a" * 32) * 10_000 + b"0\r\n\r\n")
            assert await client.answer() == (200, b"320000")
            client.send(head + b"1\r\na\r\n" * 20_000 + b"0\r\n\r\n")
            assert (await client.code())[:2] == (400, "bad_http")

    run(test)


def test_what_is_no_http_and_what_wants_another_protocol_does_not_stay() -> None:
    async def test() -> None:
        async with served(PATIENT) as (_, connect):
            client = await connect()
            client.send(b"\x16\x03\x01 hello\r\n\r\n")
            assert (await client.code())[:2] == (400, "bad_http")
            client = await connect()
            client.send(GET[:-2] + b"connection: upgrade\r\nupgrade: websocket\r\n\r\n")
            assert (await client.answer())[0] == 200
            assert await client.ended()

    run(test)
