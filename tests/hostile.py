"""Frames that nobody of good will sends: nested, huge, cut, made up; and ZMTP spoken by hand."""

from __future__ import annotations

import random
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DEPTHS = (1, 2, 100, 1_000, 10_000, 100_000)
SIZES = (0, 1, 2**16 - 1, 2**31, 2**32 - 1)


def nested(depth: int, heads: Sequence[bytes] = ()) -> list[bytes]:
    """Arrays and maps in each other, alone and behind the beginnings of known messages."""
    bodies = (b"\x91" * depth, b"\x81\x00" * depth)
    return [head + body for head in (b"", *heads) for body in bodies]


def huge(size: int, heads: Sequence[bytes] = ()) -> list[bytes]:
    """Headers that promise so much, and nothing behind them."""
    length = size.to_bytes(4, "big")
    bodies = [kind + length for kind in (b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9")]
    return [head + body for head in (b"", *heads) for body in bodies]


def hostile(heads: Sequence[bytes] = ()) -> list[bytes]:
    """All of both."""
    found = [frame for depth in DEPTHS for frame in nested(depth, heads)]
    return found + [frame for size in SIZES for frame in huge(size, heads)]


def heads_of(frames: Sequence[bytes]) -> list[bytes]:
    """Beginnings of real frames, each with more fields announced than its type has."""
    found = []
    for frame in frames:
        assert 0x90 <= frame[0] <= 0x9F or frame[0] == 0xDC, "a tagged array"
        skip = 1 if frame[0] != 0xDC else 3
        found += [b"\xdc\xff\xff" + frame[skip:], b"\xdc\xff\xff" + frame[skip : skip + 9]]
    return found


def mutated(frames: Sequence[bytes], seed: int, count: int) -> Iterator[bytes]:
    """Real frames with bytes changed, cut out, doubled and swapped for headers."""
    chance = random.Random(seed)
    for _ in range(count):
        frame = bytearray(chance.choice(frames))
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(frame)) if frame else 0
            match chance.randrange(4):
                case 0:
                    frame[at : at + 1] = chance.randbytes(1)
                case 1:
                    del frame[at : at + chance.randrange(1, 8)]
                case 2:
                    frame[at:at] = frame[at : at + chance.randrange(1, 8)]
                case _:
                    frame[at : at + 1] = chance.choice([b"\xdd\xff\xff\xff\xff", b"\x91" * 5000])
        yield bytes(frame)


class Zmtp:
    """A peer of a ZeroMQ socket without the library, which is too polite for what it does."""

    def __init__(self, endpoint: str, mechanism: bytes = b"NULL") -> None:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=20)
        greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + mechanism.ljust(20, b"\0") + bytes(32)
        try:
            self._socket.sendall(greeting)
            self._heard(64)
        except (AssertionError, OSError):
            self._socket.close()
            raise

    def ready(self) -> None:
        """Without keys: the handshake's only message, and its answer."""
        body = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
        self._socket.sendall(b"\x04" + bytes([len(body)]) + body)
        _, size = self._heard(2)
        self._heard(size)

    def pour(self, size: int, flags: int = 2, taken: int | None = None) -> int:
        """A frame of this size, zeros; how much of it was taken before the line was cut.

        With `taken` only so much of it is sent, and the rest is left open.
        """
        sent, chunk, most = 0, bytes(1 << 20), size if taken is None else taken
        try:
            self._socket.sendall(bytes([flags]) + size.to_bytes(8, "big"))
            while sent < most:
                sent += self._socket.send(chunk[: most - sent])
        except (TimeoutError, ConnectionError):
            return sent
        return sent

    def close(self) -> None:
        self._socket.close()

    def _heard(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            part = self._socket.recv(size - len(found))
            assert part, "the peer hung up"
            found += part
        return found
