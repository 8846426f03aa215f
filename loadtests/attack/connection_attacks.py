"""Attacks by connections alone: bytes, pauses, and ends."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp

from loadtests.attack.registry import attack
from loadtests.attack.scene import ask

if TYPE_CHECKING:
    from loadtests.attack.registry import Tally
    from loadtests.attack.scene import Scene

_COMPLETIONS = "/v1/completions"


async def _connect(scene: Scene) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    where = urlsplit(scene.url)
    return await asyncio.open_connection(where.hostname, where.port)


def _request(scene: Scene, body: dict[str, Any], *headers: str) -> bytes:
    """One whole POST, bare."""
    content = json.dumps(body).encode()
    key = [f"{name}: {value}" for name, value in scene.headers().items()]
    lines = [
        f"POST {_COMPLETIONS} HTTP/1.1", "Host: router", "Content-Type: application/json",
        f"Content-Length: {len(content)}", *key, *headers,
    ]  # fmt: skip
    return "\r\n".join([*lines, "", ""]).encode() + content


async def _status(reader: asyncio.StreamReader, within_s: float) -> str:
    """The answer's status, or how it ended without one."""
    try:
        async with asyncio.timeout(within_s):
            line = await reader.readline()
    except TimeoutError:
        return "silence"
    except (OSError, ValueError):
        return "closed"
    return line.split(b" ")[1].decode() if line.startswith(b"HTTP/") else "closed"


def _small(scene: Scene, **more: Any) -> dict[str, Any]:
    return {"model": scene.plan.model, "prompt": "Hello", "max_tokens": 2, **more}


@attack("long-headers", "headers of 64 KiB and more, and a thousand of them", short=True)
async def long_headers(scene: Scene, tally: Tally) -> None:
    cases = [
        ["X-Long: " + "a" * (65 << 10)],
        ["X-Long: " + "a" * (4 << 20)],
        [f"X-{n}: {n}" for n in range(5000)],
        ["Authorization: Bearer " + "a" * (1 << 20)],
        ["Cookie: " + "a=b; " * 20_000],
    ]
    for headers in cases:
        reader, writer = await _connect(scene)
        with suppress(OSError):
            writer.write(_request(scene, _small(scene), *headers))
            await writer.drain()
        status = await _status(reader, 5)
        tally.saw(status)
        tally.expect(status[0] == "4" or status == "closed", f"{headers[0][:14]}…: {status}")
        writer.close()


@attack("long-request-id", "request ids of 60 KB, and ids of others", short=True)
async def long_request_id(scene: Scene, tally: Tally) -> None:
    async with scene.session() as session:
        for request_id in ("a" * 60_000, "x" * 4096, "same", "same", "\u00e9" * 40):
            headers = {"X-Request-Id": request_id}
            status, _ = await ask(session, tally, _COMPLETIONS, json=_small(scene), headers=headers)
            tally.expect(
                status == 200 if request_id == "same" else 0 < status < 500,
                f"a request id of {len(request_id)} characters: {status}",
            )


@attack("slowloris", "200 clients that send a header a letter at a time", limit_s=60)
async def slowloris(scene: Scene, tally: Tally) -> None:
    async def drip(body: bytes) -> None:
        reader, writer = await _connect(scene)
        try:
            for letter in body[:25]:
                writer.write(bytes([letter]))
                await writer.drain()
                await asyncio.sleep(0.4)
            tally.saw(await _status(reader, 0.1))
        except OSError:
            tally.saw("closed")
        finally:
            writer.close()

    head = b"POST /v1/completions HTTP/1.1\r\nX-Slow: "
    await asyncio.gather(*(drip(head) for _ in range(200)))


@attack("idle-connections", "1,000 connections that say nothing", limit_s=60)
async def idle_connections(scene: Scene, tally: Tally) -> None:
    opened = []
    for _ in range(1000):
        try:
            opened.append(await _connect(scene))
        except OSError:
            tally.saw("closed")
    await asyncio.sleep(5)
    open_still = sum(not reader.at_eof() for reader, _ in opened)
    tally.notes.append(f"{open_still} of {len(opened)} open after 5 s")
    async with scene.session() as session:  # Somebody comes all the same.
        status, _ = await ask(session, tally, _COMPLETIONS, json=_small(scene))
        tally.expect(status in (200, 503), f"beside idle connections a request gets {status}")
    for _, writer in opened:
        writer.close()


@attack("slow-readers", "60 clients that ask for 4,000 tokens each and read none", limit_s=60)
async def slow_readers(scene: Scene, tally: Tally) -> None:
    where = urlsplit(scene.url)
    body = _request(scene, _small(scene, max_tokens=4000, ignore_eos=True, stream=True))
    loop = asyncio.get_running_loop()
    held = []
    for _ in range(60):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.setblocking(False)
        await loop.sock_connect(connection, (where.hostname, where.port))
        await loop.sock_sendall(connection, body)
        held.append(connection)
    await asyncio.sleep(12)
    for connection in held:
        connection.close()


@attack("half-closed", "100 clients that send a request and close their half", short=True)
async def half_closed(scene: Scene, tally: Tally) -> None:
    """Answered or closed; never left open without a word."""

    async def one(body: bytes) -> None:
        reader, writer = await _connect(scene)
        writer.write(body)
        await writer.drain()
        writer.write_eof()
        status = await _status(reader, 10)
        tally.saw(status)
        tally.expect(status != "silence", "a half-closed client is neither answered nor closed")
        writer.close()

    whole = _request(scene, _small(scene))
    stream = _request(scene, _small(scene, stream=True, max_tokens=20))
    part = whole[: len(whole) // 2]
    await asyncio.gather(*(one(body) for body in [whole, stream, part] * 33))


@attack("aborts", "300 streams that their clients leave in the middle", short=True)
async def aborts(scene: Scene, tally: Tally) -> None:
    body = _small(scene, stream=True, max_tokens=400, ignore_eos=True)

    async def one(number: int, session: aiohttp.ClientSession) -> None:
        await asyncio.sleep(number * 0.008)
        try:
            async with session.post(_COMPLETIONS, json=body) as response:
                tally.saw(response.status)
                for _ in range(number % 5):
                    await response.content.readline()
                response.close()
        except (aiohttp.ClientError, OSError, TimeoutError):
            tally.saw("closed")

    async with scene.session() as session:
        await asyncio.gather(*(one(n, session) for n in range(300)))


@attack("pipelined", "1,000 requests on one connection before the first answer", limit_s=40)
async def pipelined(scene: Scene, tally: Tally) -> None:
    reader, writer = await _connect(scene)
    request = b"GET /v1/models HTTP/1.1\r\nHost: router\r\n" + b"".join(
        f"{name}: {value}\r\n".encode() for name, value in scene.headers().items()
    )
    writer.write((request + b"\r\n") * 1000)
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(15):
            seen = b""
            while seen.count(b"HTTP/1.1 ") < 1000 and (more := await reader.read(1 << 16)):
                seen += more
    answers = seen.split(b"HTTP/1.1 ")[1:]
    for answer in answers:
        tally.saw(answer[:3].decode(errors="replace"))
    writer.close()


@attack("smuggling", "requests whose end can be read in two ways", short=True)
async def smuggling(scene: Scene, tally: Tally) -> None:
    inner = b"GET /v1/models HTTP/1.1\r\nHost: router\r\n\r\n"
    cases = [
        b"POST / HTTP/1.1\r\nHost: r\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"0\r\n\r\n" + inner,
        b"POST / HTTP/1.1\r\nHost: r\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"POST / HTTP/1.1\r\nHost: r\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: r\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
        b"POST / HTTP/1.1\r\nHost: r\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\0" * 4096,
    ]  # fmt: skip
    for case in cases:
        reader, writer = await _connect(scene)
        with suppress(OSError):
            writer.write(case)
            await writer.drain()
            writer.write_eof()
        began = time.monotonic()
        status = await _status(reader, 4)
        tally.saw(status)
        tally.expect(
            status[0] == "4" or status == "closed",
            f"{case[:40]!r}: {status} after {time.monotonic() - began:.0f} s",
        )
        writer.close()
