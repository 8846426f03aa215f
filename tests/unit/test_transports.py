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
from kvtransfer.transports.choose import available, candidates, connect, load
from kvtransfer.transports.memory import MemoryTransport
from kvtransfer.transports.spans import spans
from kvtransfer.transports.tcp import TcpTransport
from kvtransfer.transports.ucx_agents import Options, rows, settings
from kvtransfer.transports.ucx_proof import Cookie
from kvtransfer.transports.unit_views import Views, advance, numbers_of, runs_of
from kvtransfer.views import span_bytes

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


LARGE = 139 << 30


def test_a_whole_gpus_memory_is_counted_in_small_units_and_listed_in_few_rows() -> None:
    layers, unit = 64, 8 << 10
    block = 32 * unit
    blocks = LARGE // layers // block
    apart = [Segment(i * blocks * block, block, block, blocks) for i in range(layers)]
    outermost = [Segment(i * block, layers * block, block, blocks) for i in range(layers)]
    for segments, per_layer in ((apart, 1), (outermost, blocks)):
        memory = Memory(tuple(segments), "cuda:0")
        assert memory.units(unit) == layers * blocks * 32
        table = rows(memory, unit)
        assert len(table) == layers * per_layer
        assert int(table[:, 4].sum()) == memory.units(unit)


def test_more_units_than_can_be_numbered_or_listed_are_refused_with_both_figures() -> None:
    huge = Memory((Segment(0, 1 << 20, 1 << 20, 1 << 22),))
    with pytest.raises(TransferError, match=r"4294967296 units of 1024 bytes.* 2147483647"):
        huge.units(1024)
    gaps = Memory((Segment(0, 96, 64, 5 << 20),))
    with pytest.raises(TransferError, match=r"5242880 rows or more for units of 32.* 4194304"):
        rows(gaps, 32)
    with pytest.raises(TransferError, match=r"20971520 units of 16 bytes.* 16777216"):
        Views(gaps, 16)


@given(st.lists(SEGMENTS, min_size=1, max_size=4))
def test_rows_expand_to_every_unit_in_order(segments: list[Segment]) -> None:
    memory = Memory(tuple(segments))
    expanded = [
        int(start + i * stride)
        for start, _, _, stride, count in rows(memory, UNIT)
        for i in range(int(count))
    ]
    assert expanded == memory.addresses(UNIT).tolist()


# ------------------------------------------------------------ spans

NEAR = st.builds(
    lambda base, blocks, pieces, gap: Segment(base, pieces * UNIT + gap, pieces * UNIT, blocks),
    st.integers(0, 400), st.integers(1, 5), st.integers(1, 3), st.integers(0, 60),
)  # fmt: skip


@given(st.lists(NEAR, min_size=1, max_size=6), st.sampled_from(["cpu", "cuda:1"]))
def test_spans_hold_each_segments_bytes_once_and_nothing_beside_them(
    segments: list[Segment], on: str
) -> None:
    found = spans(Memory(tuple(segments), on))
    covered = [byte for low, size in found for byte in range(low, low + size)]
    assert len(covered) == len(set(covered)), "no byte is in two of them"
    wanted = {b for s in segments for b in range(s.base, s.base + span_bytes(s))}
    assert set(covered) == wanted
    for s in segments:  # What is registered as one must be whole: a unit lies in one of them.
        assert any(low <= s.base and s.base + span_bytes(s) <= low + n for low, n in found)


def test_layers_that_interleave_or_share_their_bytes_are_one_span_and_neighbours_on_the_host() -> (
    None
):
    interleaved = tuple(Segment(4096 + 64 * layer, 256, 64, 10) for layer in range(4))
    beside = (Segment(4096, 64, 64, 10), Segment(4096 + 640, 64, 64, 10))
    assert spans(Memory(interleaved + interleaved, "cuda:0")) == [(4096, 2560)]
    assert spans(Memory(beside)) == [(4096, 1280)]
    # On a device they may be two allocations, which no registration can span.
    assert spans(Memory(beside, "cuda:0")) == [(4096, 640), (4096 + 640, 640)]


def test_ucx_is_told_to_read_by_cuda_ipc_on_devices_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert settings(CPU, Options()) == {"CMA_SEG_SIZE": "8m"}
    assert settings(CUDA, Options(tls="rc"))["CUDA_IPC_ENABLE_GET_ZCOPY"] == "on"
    assert settings(CUDA, Options(tls="rc"))["TLS"] == "rc"
    monkeypatch.setenv("UCX_CUDA_IPC_ENABLE_GET_ZCOPY", "off")
    assert "CUDA_IPC_ENABLE_GET_ZCOPY" not in settings(CUDA, Options())


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
_held = np.zeros(16, dtype=np.uint8)
HELD = Memory((Segment(_held.ctypes.data, 16, 16, 1),))
CUDA = Memory((Segment(4096, 16, 16, 1),), "cuda:0")


def test_those_of_ours_that_the_sender_offers_and_that_reach_are_tried_in_our_order() -> None:
    memory, tcp = MemoryTransport(), TcpTransport()
    near, far = memory.offer(CPU), tcp.offer(CPU)
    try:
        offered = [("tcp", far.description), ("memory", near.description)]
        both = [(memory, near.description), (tcp, far.description)]
        assert candidates(CPU, offered, [memory, tcp]) == both
        assert candidates(CPU, offered, [tcp, memory]) == both[::-1]
        assert candidates(CPU, offered[:1], [memory, tcp]) == both[1:]
        unreachable = [("memory", b"of another process"), offered[0]]
        assert candidates(CPU, unreachable, [memory, tcp]) == both[1:]
    finally:
        near.close()
        far.close()


def test_where_none_reaches_the_message_names_both_sides() -> None:
    with pytest.raises(TransferError, match=r"offers ucx, memory.*receiver has memory, tcp"):
        candidates(CPU, [("ucx", b""), ("memory", b"")], [MemoryTransport(), TcpTransport()])
    with pytest.raises(TransferError, match=r"offers none.*receiver has none"):
        candidates(CPU, [], [])


def test_a_transport_that_can_not_connect_is_passed_over_and_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    memory, tcp = MemoryTransport(), TcpTransport()
    near, far = memory.offer(HELD), tcp.offer(HELD)
    near.close()  # It seems to reach still; connecting shows that it does not.
    offered = [("memory", near.description), ("tcp", far.description)]
    try:
        taken, peer = connect(HELD, offered, [memory, tcp], 16)
        peer.fence()
        assert taken == "tcp"
        assert [r.getMessage() for r in caplog.records] == ["KV transport passed over"]
        assert "memory can't connect" in str(vars(caplog.records[0])["reasons"])
    finally:
        far.close()
    with pytest.raises(TransferError, match=r"memory: .*; tcp: "):
        connect(HELD, offered, [memory, tcp], 16)


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
    cookie = Cookie("cpu")
    (there,) = cookie.memory.segments
    assert place.can_read(os.getpid(), there.base, cookie.value)
    assert not place.can_read(os.getpid(), there.base, os.urandom(16))
    assert not place.can_read(os.getpid(), 8, cookie.value)
