"""ZeroMQ and msgpack from the outside: frames as a stranger would write them."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec
import zmq

if TYPE_CHECKING:
    from collections.abc import Iterator

encode = msgspec.msgpack.encode
_PIECE = b"\0" * (1 << 20)


def nested(depth: int) -> bytes:
    """msgpack arrays inside arrays: a byte a level."""
    return b"\x91" * depth + b"\xc0"


def evil_frames(tag: str) -> Iterator[bytes]:
    """Frames that a decoder may trip over; `tag` is a message's that the peer knows."""
    name = encode(tag)
    for depth in (100, 1000, 100_000):
        yield nested(depth)
        yield b"\x92" + name + nested(depth)
        yield b"\xdc\x00\x20" + name + nested(depth) * 31
        yield b"\x81\xa1a" * depth + b"\xc0"
    yield b"\xdd\xff\xff\xff\xff" + name  # An array of four thousand million.
    yield b"\xdf\xff\xff\xff\xff" + name
    yield b"\x92" + name + b"\xc6\xff\xff\xff\xff"
    yield b"\x92" + name + b"\xcf" + b"\xff" * 8
    yield b"\x92" + name + b"\xa4\xff\xfe\xfd\xfc"
    yield b""
    yield b"\xc1" * 1000


class Dealer:
    """A peer that says whatever it likes to a ROUTER socket."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 100_000)
        self._socket.connect(address)

    def send(self, *frames: bytes) -> None:
        with suppress(zmq.Again):
            self._socket.send_multipart(frames, zmq.NOBLOCK)

    async def receive(self, within_s: float) -> bytes | None:
        """The next frame; None when none came."""
        until = asyncio.get_running_loop().time() + within_s
        while asyncio.get_running_loop().time() < until:
            with suppress(zmq.Again):
                return bytes(self._socket.recv_multipart(zmq.NOBLOCK)[-1])
            await asyncio.sleep(0.01)
        return None

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()


async def push_frame(address: str, size: int, hold_s: float = 0.0) -> int:
    """Send one frame of so many bytes as soon as ZMTP's greeting is over; bytes that were taken.

    With `hold_s` all of it but its last MiB, and then nothing for so long.

    By a bare socket: libzmq would hold all of it in our own memory.
    """
    where = urlsplit(address)
    loop = asyncio.get_running_loop()
    connection = socket.socket()
    connection.setblocking(False)
    taken = 0
    try:
        async with asyncio.timeout(20):
            await loop.sock_connect(connection, (where.hostname, where.port))
            greeting = b"\xff" + b"\0" * 8 + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0")
            await loop.sock_sendall(connection, greeting.ljust(64, b"\0"))
            ready = b"\x05READY" + _property("Socket-Type", b"DEALER") + _property("Identity", b"")
            await loop.sock_sendall(connection, b"\x04" + bytes([len(ready)]) + ready)
            await loop.sock_sendall(connection, b"\x02" + size.to_bytes(8, "big"))
            while taken < size - (len(_PIECE) if hold_s else 0):
                await loop.sock_sendall(connection, _PIECE)
                taken += len(_PIECE)
            await asyncio.sleep(hold_s)
    except (OSError, TimeoutError):
        pass
    finally:
        connection.close()
    return taken


def _property(name: str, value: bytes) -> bytes:
    return bytes([len(name)]) + name.encode() + len(value).to_bytes(4, "big") + value


def generate(request_id: str, phase: str, tokens: int, ticket: bytes | None = None) -> bytes:
    """A request as a router writes it to a worker."""
    message: list[Any] = ["Generate", request_id, phase, [7] * tokens, 4, b"", ticket]
    return encode(message)
