"""What every transport stands on: units, views of them, frames, and which one is taken."""

from __future__ import annotations

import contextlib
import itertools
import os
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.transports import place
from kvtransfer.transports import tcp_wire as wire
from kvtransfer.transports.api import Memory, Segment, TransferError
from kvtransfer.transports.choose import available, choose, load
from kvtransfer.transports.memory import MemoryTransport
from kvtransfer.transports.tcp import TcpTransport
from kvtransfer.transports.unit_views import Views, advance, numbers_of, runs_of

if TYPE_CHECKING:
    import random

UNIT = 16
SEGMENTS = st.builds(
    lambda base, blocks, pieces, gap: Segment(base, pieces * UNIT + gap, pieces * UNIT, blocks),
    st.integers(0, 2**40), st.integers(1, 9), st.integers(1, 5), st.integers(0, 40),
)  # fmt: skip
NUMBERS = st.lists(st.integers(0, 500), min_size=1, max_size=60) | st.builds(
    lambda first, count: list(range(first, first + count)), st.integers(0, 500), st.integers(1, 60)
)


def units(numbers: list[int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(numbers, dtype=np.int32)


# ------------------------------------------------------------ units


@given(st.lists(SEGMENTS, min_size=1, max_size=4))
def test_units_count_pieces_before_blocks_before_segments(segments: list[Segment]) -> None:
    memory = Memory(tuple(segments))
    spelt_out = [
        s.base + block * s.stride + piece * UNIT
        for s in segments
        for block in range(s.blocks)
        for piece in range(s.block_bytes // UNIT)
    ]
    assert memory.addresses(UNIT).tolist() == spelt_out
    assert memory.units(UNIT) == len(spelt_out)


def test_blocks_that_are_no_whole_units_are_refused() -> None:
    memory = Memory((Segment(0, 64, 64, 4), Segment(0, 40, 40, 4)))
    assert memory.units(8) == 4 * 8 + 4 * 5
    with pytest.raises(TransferError, match="40, 64"):
        memory.units(16)
    with pytest.raises(TransferError):
        memory.addresses(16)


@given(NUMBERS)
def test_views_are_the_units_in_order_in_as_few_pieces_as_can_be(numbers: list[int]) -> None:
    numbers = [n % 500 for n in numbers]
    content = np.random.default_rng(1).integers(0, 256, 3 * 200 * UNIT, dtype=np.uint8)
    whole = Segment(content.ctypes.data, 4 * UNIT, 3 * UNIT, 100)  # A quarter is nobody's.
    memory = Memory((whole, Segment(content.ctypes.data + 400 * UNIT, UNIT, UNIT, 200)))
    views = Views(memory, UNIT)
    addresses = memory.addresses(UNIT) - content.ctypes.data
    expected = [content[addresses[n] : addresses[n] + UNIT].tobytes() for n in numbers]
    pieces = views.of(units(numbers))
    assert b"".join(pieces) == b"".join(expected)
    starts = [addresses[n] for n in numbers]
    breaks = sum(b - a != UNIT for a, b in itertools.pairwise(starts))
    assert len(pieces) == 1 + breaks
    assert [bytes(p) for p in views.each(units(numbers))] == expected


@pytest.mark.parametrize("unit_bytes", [0, -16, 1, 24])
def test_units_that_no_memory_can_be_counted_in_are_refused(unit_bytes: int) -> None:
    memory = Memory((Segment(4096, 1 << 14, 1 << 14, 1 << 11),))
    with pytest.raises(TransferError):
        Views(memory, unit_bytes)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.randoms())
def test_pieces_advance_by_exactly_what_was_moved(sizes: list[int], rng: random.Random) -> None:
    whole = os.urandom(sum(sizes))
    pieces, at = [], 0
    for size in sizes:
        pieces.append(memoryview(whole)[at : at + size])
        at += size
    index, moved = 0, 0
    while index < len(pieces):
        step = rng.randint(1, len(whole) - moved)
        index, moved = advance(pieces, index, step), moved + step
        assert b"".join(pieces[index:]) == whole[moved:]


# ------------------------------------------------------------ frames


@given(NUMBERS)
def test_a_request_says_which_units_in_their_order(numbers: list[int]) -> None:
    frame = wire.pack_request(7, units(numbers))
    head, body = frame[: wire.REQUEST.size], frame[wire.REQUEST.size :]
    number, form, size = wire.parse_request(head)
    assert (number, size) == (7, len(body))
    assert wire.parse_units(form, body).tolist() == numbers
    assert len(body) <= 4 * len(numbers)
    assert numbers_of(runs_of(units(numbers))).tolist() == numbers


@given(st.binary(min_size=wire.REQUEST.size, max_size=wire.REQUEST.size), st.binary(max_size=64))
def test_what_is_no_frame_is_a_wire_error_and_nothing_worse(head: bytes, body: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.parse_request(head)
    for form in (0, 1):
        values = np.frombuffer(body[: len(body) // 8 * 8], dtype="<i4")
        if not len(values):
            continue
        with contextlib.suppress(wire.WireError):
            assert len(wire.parse_units(form, values.tobytes())) <= wire.UNITS_MAX


def test_hello_and_welcome_come_out_as_they_went_in() -> None:
    token = os.urandom(16)
    assert wire.parse_hello(wire.pack_hello(token, 4096)) == (token, 4096)
    frame = wire.pack_welcome(-1, "no " * 1000)
    units_, reason_bytes = wire.parse_welcome(frame[: wire.WELCOME.size])
    assert (units_, reason_bytes) == (-1, len(frame) - wire.WELCOME.size)
    assert reason_bytes <= wire.REASON_BYTES_MAX


# ------------------------------------------------------------ which one

CPU = Memory((Segment(4096, 16, 16, 1),))
CUDA = Memory((Segment(4096, 16, 16, 1),), "cuda:0")


def test_the_first_of_ours_that_the_sender_offers_and_that_reaches_is_taken() -> None:
    memory, tcp = MemoryTransport(), TcpTransport()
    near, far = memory.offer(CPU), tcp.offer(CPU)
    try:
        offered = [("tcp", far.description), ("memory", near.description)]
        assert choose(CPU, offered, [memory, tcp]) == (memory, near.description)
        assert choose(CPU, offered, [tcp, memory]) == (tcp, far.description)
        assert choose(CPU, offered[:1], [memory, tcp])[0] is tcp
        unreachable = [("memory", b"of another process"), offered[0]]
        assert choose(CPU, unreachable, [memory, tcp])[0] is tcp
    finally:
        near.close()
        far.close()


def test_where_none_reaches_the_message_names_both_sides() -> None:
    with pytest.raises(TransferError, match=r"offers ucx, memory.*receiver has memory, tcp"):
        choose(CPU, [("ucx", b""), ("memory", b"")], [MemoryTransport(), TcpTransport()])
    with pytest.raises(TransferError, match=r"offers none.*receiver has none"):
        choose(CPU, [], [])


def test_what_can_not_serve_this_memory_is_left_out_with_a_reason() -> None:
    able, reasons = available(CPU, ("memory", "tcp"))
    assert [t.name for t in able] == ["memory", "tcp"]
    assert reasons == {}
    able, reasons = available(CUDA, ("memory", "pigeon", "tcp"))
    assert able == []
    assert "cuda:0" in reasons["memory"]
    assert "cuda:0" in reasons["tcp"]
    assert "pigeon" in reasons["pigeon"]
    with pytest.raises(TransferError):
        load("pigeon")


def test_a_loopback_address_reaches_only_its_own_machine() -> None:
    offer = TcpTransport().offer(CPU)
    try:
        theirs = wire.TcpDescription(*msgspec.msgpack.decode(offer.description))
        elsewhere = msgspec.structs.replace(theirs, boot="another")
        routed = msgspec.structs.replace(elsewhere, host="192.0.2.1")
        encode = msgspec.msgpack.encode
        reaches = [TcpTransport().reaches(encode(d)) for d in (theirs, elsewhere, routed)]
        assert reaches == [True, False, True]
    finally:
        offer.close()


def test_a_process_can_read_its_own_cookie_and_no_other_value_there() -> None:
    cookie = place.Cookie()
    assert place.can_read(os.getpid(), cookie.address, cookie.value)
    assert not place.can_read(os.getpid(), cookie.address, os.urandom(16))
    assert not place.can_read(os.getpid(), 8, cookie.value)
