"""The `tcp` transport's frames: what may be in them, and what a reader of them must refuse.

All integers but unit numbers are big-endian. On each connection:

| frame | from | bytes |
|---|---|---|
| hello | receiver | magic `TKVH`, version u16, u16 zero, token 16, unit bytes u64 |
| welcome | sender | magic `TKVW`, reason bytes u32, units i64, -1 for no; then the reason |
| request | receiver | magic `TKVQ`, number u32, form u32, values u32; then little-endian i32s |
| reply | sender | magic `TKVP`, number u32, payload bytes u64; then the payload |

A request's values are unit numbers (form 0), or pairs of first and how many (form 1). Replies come
in the order of the requests. A sender answers what it does not understand by closing.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np

from kvtransfer.transports.api import TransferError
from kvtransfer.transports.unit_views import numbers_of, runs_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvtransfer.transports.api import Units

VERSION: Final = 1
TOKEN_BYTES: Final = 16
UNITS_MAX: Final = 8192
"""Of one request: a frame of 32 KiB at most, so that a few fit any socket's buffer."""
REPLY_BYTES_MAX: Final = 64 << 20
"""Of one request, unless a single unit is larger."""
REASON_BYTES_MAX: Final = 512

HELLO: Final = struct.Struct("!4sHH16sQ")
WELCOME: Final = struct.Struct("!4sIq")
REQUEST: Final = struct.Struct("!4sIII")
REPLY: Final = struct.Struct("!4sIQ")
_NUMBERS, _RUNS = 0, 1


class WireError(TransferError):
    """The other side's frame is not one of ours; its connection is of no use any more."""


class TcpDescription(msgspec.Struct, frozen=True, array_like=True):
    """Where to connect, and what proves that one was told."""

    version: int
    host: str
    port: int
    token: bytes
    boot: str
    """With `net_ns`: who else can reach a loopback address."""
    net_ns: str


def pack_hello(token: bytes, unit_bytes: int) -> bytes:
    return HELLO.pack(b"TKVH", VERSION, 0, token, unit_bytes)


def parse_hello(frame: bytes) -> tuple[bytes, int]:
    """Token and unit bytes."""
    magic, version, _zero, token, unit_bytes = HELLO.unpack(frame)
    if magic != b"TKVH" or version != VERSION:
        raise WireError("not a hello of this version")
    return token, unit_bytes


def pack_welcome(units: int, reason: str = "") -> bytes:
    text = reason.encode()[:REASON_BYTES_MAX]
    return WELCOME.pack(b"TKVW", len(text), units) + text


def parse_welcome(frame: bytes) -> tuple[int, int]:
    """Units, or -1; and how many bytes of reason follow."""
    magic, reason_bytes, units = WELCOME.unpack(frame)
    if magic != b"TKVW" or reason_bytes > REASON_BYTES_MAX:
        raise WireError("not a welcome")
    return units, reason_bytes


def pack_request(number: int, units: Units) -> bytes:
    runs = runs_of(units)
    form, values = (_RUNS, runs) if 2 * len(runs) < len(units) else (_NUMBERS, units)
    body = np.ascontiguousarray(values, dtype="<i4").tobytes()
    return REQUEST.pack(b"TKVQ", number, form, len(body) // 4) + body


def parse_request(frame: bytes) -> tuple[int, int, int]:
    """Number, form, and how many bytes of body follow."""
    magic, number, form, values = REQUEST.unpack(frame)
    if magic != b"TKVQ" or form not in (_NUMBERS, _RUNS):
        raise WireError("not a request")
    if not 0 < values <= UNITS_MAX or (form == _RUNS and values % 2):
        raise WireError(f"a request of {values} values")
    return number, form, 4 * values


def parse_units(form: int, body: bytes) -> NDArray[np.int64]:
    values = np.frombuffer(body, dtype="<i4")
    if form == _NUMBERS:
        return values.astype(np.int64)
    runs = values.reshape(-1, 2)
    if int(runs[:, 1].min()) < 1 or int(runs[:, 1].sum(dtype=np.int64)) > UNITS_MAX:
        raise WireError("a request's runs are empty, or too long")
    return numbers_of(runs)


def pack_reply(number: int, payload_bytes: int) -> bytes:
    return REPLY.pack(b"TKVP", number, payload_bytes)
