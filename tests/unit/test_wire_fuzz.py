"""The raw transports' frames, descriptions and offers: read or refused, whatever the bytes are."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.transports import collective_wire as collective
from kvtransfer.transports.api import Memory, Segment, TransferError
from kvtransfer.transports.collective import CollectiveTransport
from kvtransfer.transports.collective_offer import Description
from kvtransfer.transports.tcp import TcpTransport
from kvtransfer.transports.tcp_wire import (
    HELLO,
    REQUEST,
    UNITS_MAX,
    VERSION,
    WELCOME,
    TcpDescription,
    WireError,
    pack_hello,
    pack_request,
    parse_hello,
    parse_request,
    parse_units,
    parse_welcome,
)
from tests.hostile import heads_of, hostile, mutated

ARRAY = np.zeros((4, 64), dtype=np.uint8)
MEMORY = Memory((Segment(ARRAY.ctypes.data, 64, 64, len(ARRAY)),))
TCP = msgspec.msgpack.encode(TcpDescription(VERSION, "127.0.0.1", 9, bytes(16), "b", "n"))
GLOO = msgspec.msgpack.encode(Description(1, "gloo", "127.0.0.1", 9, bytes(16), []))
WANT = collective.frame(collective.Want(1, bytes(8)))


@given(st.binary(min_size=HELLO.size, max_size=HELLO.size))
def test_hello_is_read_or_refused(frame: bytes) -> None:
    for each in (frame, pack_hello(frame[:16], 1)[:8] + frame[8:]):
        try:
            token, unit_bytes = parse_hello(each)
        except WireError:
            continue
        assert len(token) == 16
        assert unit_bytes >= 0


@given(st.binary(min_size=WELCOME.size, max_size=WELCOME.size))
def test_welcome_is_read_or_refused(frame: bytes) -> None:
    for each in (frame, b"TKVW" + frame[4:]):
        try:
            _, reason_bytes = parse_welcome(each)
        except WireError:
            continue
        assert reason_bytes <= 512


@given(st.binary(min_size=REQUEST.size, max_size=REQUEST.size), st.binary(max_size=256))
def test_request_never_asks_for_more_than_is_allowed(frame: bytes, body: bytes) -> None:
    for each in (frame, b"TKVQ" + frame[4:8] + struct.pack("!II", frame[8] % 3, frame[9])):
        try:
            _, form, size = parse_request(each)
            assert size <= 4 * UNITS_MAX
            units = parse_units(form, (body + bytes(size))[:size])
        except WireError:
            continue
        assert len(units) <= UNITS_MAX


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=50))
def test_request_comes_back_as_it_was(units: list[int]) -> None:
    frame = pack_request(7, np.asarray(units, dtype=np.int32))
    number, form, size = parse_request(frame[: REQUEST.size])
    assert (number, len(frame)) == (7, REQUEST.size + size)
    assert parse_units(form, frame[REQUEST.size :]).tolist() == units


@pytest.mark.parametrize(
    ("transport", "real"),
    [(TcpTransport(), TCP), (CollectiveTransport(), GLOO)],
    ids=["tcp", "collective"],
)
def test_hostile_description_reaches_nobody(transport: Any, real: bytes) -> None:
    frames = [*hostile(heads_of([real]))[::3], *mutated([real], 1, 200)]
    for frame in frames:
        assert transport.reaches(frame) in (True, False)
    with pytest.raises(TransferError):
        transport.connect(MEMORY, b"\x91" * 100_000, 64)


@pytest.mark.parametrize("kind", [collective.ToOffer, collective.ToPeer], ids=["offer", "peer"])
def test_hostile_collective_frame_is_read_or_refused(kind: Any) -> None:
    bodies = [*hostile(heads_of([WANT[4:]]))[::3], *mutated([WANT[4:]], 2, 200)]
    for body in bodies:
        buffer = bytearray(struct.pack("<I", len(body)) + body)
        try:
            collective.decode(buffer, kind)
        except TransferError:
            continue
    with pytest.raises(TransferError, match="allowed"):
        collective.decode(bytearray(b"\xff\xff\xff\xff"), kind)
