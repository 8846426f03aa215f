"""One suite over every transport: what a reader gets, what is refused, what a fence keeps out."""

from __future__ import annotations

import os
import random
import socket
import time
import zlib
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from kvtransfer.transports import tcp_wire as wire
from kvtransfer.transports.api import TransferError
from kvtransfer.transports.ucx import UcxDescription
from tests.contract.transport_rig import Pair, Shape, Subject, pairs_of

if TYPE_CHECKING:
    from collections.abc import Iterator

SUBJECTS = {
    "memory": Subject("memory:MemoryTransport"),
    "tcp": Subject("tcp:TcpTransport"),
    "tcp-4-streams": Subject("tcp:TcpTransport", {"streams": 4}),
    "ucx": Subject("ucx:UcxTransport", stalls=False),
    "collective": Subject("collective:CollectiveTransport"),
    "ucx-over-tcp": Subject("ucx:UcxTransport", {"tls": "tcp", "reaches": True}),
    # As on devices: one agent for all peers of a process.
    "ucx-shared": Subject("ucx:UcxTransport", {"shared": True}, stalls=False),
    "ucx-shared-over-tcp": Subject(
        "ucx:UcxTransport", {"shared": True, "tls": "tcp", "reaches": True}
    ),
}
STALLING = [name for name, subject in SUBJECTS.items() if subject.stalls]
# NIXL's own thread moves a read on when nobody polls: the fence alone keeps its bytes out.
WITH_THREAD = Subject("ucx:UcxTransport", {"tls": "tcp", "progress_thread": True, "reaches": True})
# UCX's own TCP ends a sender's process ("Fatal: unexpected error: Endpoint timeout", SIGABRT)
# when a reader fences in mid-read: six times of six. So a `UcxTransport` takes no path that leads
# over it, unless told, and of it only what a reader must be sure of is tested.
SURVIVING = [name for name in STALLING if "ucx" not in name]
SEED = 1
SMALL = Shape()
UNIT = SMALL.block_bytes
EVERY = list(range(SMALL.units(UNIT)))


@pytest.fixture(params=SUBJECTS, scope="module")
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Processes that serve many tests, one after another: each test's `hold` is a new start."""
    yield from pairs_of(SUBJECTS[request.param])


@pytest.fixture(params=SUBJECTS)
def mortal(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A connected pair of its own, after a first read."""
    for running in pairs_of(SUBJECTS[request.param]):
        running.hold(SMALL, SMALL)
        running.connect(UNIT)
        read(running, [0], [0])
        yield running


@pytest.fixture(params=STALLING)
def stalling(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """As `mortal`, where the sender is needed for each read."""
    subject = WITH_THREAD if request.param == "ucx-thread" else SUBJECTS[request.param]
    for running in pairs_of(subject):
        running.hold(SMALL, SMALL)
        running.connect(UNIT)
        read(running, [0], [0])
        yield running


def read(pair: Pair, local: list[int], remote: list[int], peer: str = "peer") -> None:
    pair.reader.ask("read", peer, "handle", local, remote)
    assert pair.reader.ask("finish", peer, "handle", 20) == "done"


# ------------------------------------------------------------ what arrives

SHAPES = {
    "alike": (SMALL, SMALL, UNIT),
    "fewer-blocks-here": (SMALL, Shape(blocks=9), UNIT),
    "other-block-sizes": (Shape(block_bytes=64 * 1024, blocks=20), SMALL, 8 * 1024),
    "gaps": (Shape(gap=4096, blocks=30), Shape(gap=512, blocks=11, layers=2), 16 * 1024),
    "tiny-units": (Shape(block_bytes=4096), Shape(block_bytes=4096, layers=5), 64),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_exactly_the_units_asked_for_arrive_and_nothing_else_changes(
    pair: Pair, shapes: tuple[Shape, Shape, int]
) -> None:
    sends, reads, unit = shapes
    pair.hold(sends, reads, seed=5)
    pair.connect(unit)
    theirs, expected = sends.content(5), np.zeros_like(reads.content(0))
    rng = random.Random(7)
    for round_ in range(6):
        count = rng.randint(1, reads.units(unit))
        local = rng.sample(range(reads.units(unit)), count)
        remote = [rng.randrange(sends.units(unit)) for _ in local]  # Some of them twice.
        if round_ % 2:  # Runs, as whole blocks of neighbours are.
            local.sort()
            remote = [(remote[0] + i) % sends.units(unit) for i in range(count)]
        read(pair, local, remote)
        for here, there in zip(local, remote, strict=True):
            reads.unit(expected, here, unit)[:] = sends.unit(theirs, there, unit)
        assert np.array_equal(pair.reader.ask("content"), expected)


def test_a_read_of_64_mib_arrives_whole(pair: Pair) -> None:
    shape = Shape(layers=2, blocks=1024)
    pair.hold(shape, shape)
    pair.connect(UNIT)
    everything = list(range(shape.units(UNIT)))
    read(pair, everything, everything)
    assert pair.reader.ask("crc") == pair.sender.ask("crc")


def test_reads_at_once_all_arrive(pair: Pair) -> None:
    pair.hold(SMALL, SMALL)
    pair.connect(UNIT)
    for start in range(8):
        part = EVERY[start::8]
        pair.reader.ask("read", "peer", f"part {start}", part, part)
    for start in reversed(range(8)):
        assert pair.reader.ask("finish", "peer", f"part {start}", 20) == "done"
    assert pair.reader.ask("crc") == pair.sender.ask("crc")


def test_a_read_of_nothing_is_done(pair: Pair) -> None:
    pair.hold(SMALL, SMALL)
    pair.connect(UNIT)
    pair.reader.ask("read", "peer", "handle", [], [])
    assert pair.reader.ask("poll", "peer", "handle") == "done"


def test_two_processes_on_one_machine_reach_each_other(pair: Pair) -> None:
    pair.hold(SMALL, SMALL)
    assert pair.reader.ask("reaches", pair.description)


# ------------------------------------------------------------ what is refused


def test_a_unit_that_does_not_exist_is_refused_and_the_peer_stays_good(pair: Pair) -> None:
    pair.hold(SMALL, Shape(blocks=9))
    pair.connect(UNIT)
    ours, theirs = Shape(blocks=9).units(UNIT), len(EVERY)
    for local, remote in (([ours], [0]), ([-1], [0]), ([0], [theirs]), ([0], [-1]),
                          ([0, 1], [0])):  # fmt: skip
        with pytest.raises(TransferError):
            pair.reader.ask("read", "peer", "handle", local, remote)
    assert not pair.reader.ask("content").any()
    read(pair, [0], [theirs - 1])


def test_memory_that_is_no_whole_number_of_units_is_refused(pair: Pair) -> None:
    pair.hold(Shape(block_bytes=24 * 1024), SMALL)
    with pytest.raises(TransferError):
        pair.connect(UNIT)


def test_a_description_of_nothing_is_refused(pair: Pair) -> None:
    pair.hold(SMALL, SMALL)
    for description in (b"", b"\xc1", os.urandom(64), pair.description[:-3]):
        assert not pair.reader.ask("reaches", description)
        with pytest.raises(TransferError):
            pair.reader.ask("connect", "peer", description, UNIT)


# ------------------------------------------------------------ dead, stopped, closed


def test_a_killed_sender_fails_the_next_read(mortal: Pair) -> None:
    mortal.sender.kill()
    time.sleep(0.1)
    assert ends_without_bytes(mortal, 2)


def test_a_killed_sender_fails_the_read_under_way(stalling: Pair) -> None:
    stalling.sender.stop()
    stalling.reader.ask("read", "peer", "handle", EVERY, EVERY)
    assert stalling.reader.ask("finish", "peer", "handle", 0.2) == "pending"
    stalling.sender.kill()
    assert stalling.reader.ask("finish", "peer", "handle", 2) == "failed"


@pytest.mark.parametrize("stalling", [*STALLING, "ucx-thread"], indirect=True)
def test_after_a_fence_nothing_lands_when_a_stopped_sender_wakes(stalling: Pair) -> None:
    stalling.sender.stop()
    stalling.reader.ask("read", "peer", "handle", EVERY, EVERY)
    assert stalling.reader.ask("finish", "peer", "handle", 0.3) == "pending", (
        "a stopped sender must stall the read, or this shows nothing"
    )
    assert stalling.reader.ask("fence", "peer") < 1
    assert stalling.reader.ask("poll", "peer", "handle") == "failed"
    before = stalling.reader.ask("content")
    stalling.sender.wake()
    # What brings a stalled read in, if anything does: asking the same peer again.
    with pytest.raises(TransferError):
        stalling.reader.ask("read", "peer", "again", [0], [0])
    time.sleep(1)
    assert np.array_equal(stalling.reader.ask("content"), before)
    assert stalling.reader.ask("fence", "peer") < 1, "again is harmless"


@pytest.mark.parametrize("stalling", SURVIVING, indirect=True)
def test_one_peers_fence_does_not_disturb_another_of_the_same_offer(stalling: Pair) -> None:
    stalling.connect(UNIT, "other")
    read(stalling, [0], [0], "other")
    stalling.sender.stop()
    half = len(EVERY) // 2
    stalling.reader.ask("read", "peer", "fenced", EVERY[1:half], EVERY[1:half])
    stalling.reader.ask("read", "other", "kept", EVERY[half:], EVERY[half:])
    stalling.reader.ask("fence", "peer")
    expected = stalling.reader.ask("content")
    stalling.sender.wake()
    assert stalling.reader.ask("finish", "other", "kept", 20) == "done"
    theirs = SMALL.content(SEED)
    for number in EVERY[half:]:
        SMALL.unit(expected, number, UNIT)[:] = SMALL.unit(theirs, number, UNIT)
    assert np.array_equal(stalling.reader.ask("content"), expected)


@pytest.mark.parametrize("mortal", [*SURVIVING, "ucx"], indirect=True)
def test_a_reader_that_dies_in_mid_read_leaves_the_sender_whole(mortal: Pair) -> None:
    mortal.sender.stop()
    mortal.reader.ask("read", "peer", "handle", EVERY, EVERY)
    mortal.reader.kill()
    mortal.sender.wake()
    time.sleep(0.3)
    assert mortal.sender.ask("crc") == zlib.crc32(SMALL.content(SEED))


@pytest.mark.parametrize("stalling", ["memory", "tcp", "ucx-over-tcp"], indirect=True)
def test_connecting_to_a_stopped_sender_fails_within_seconds(stalling: Pair) -> None:
    stalling.sender.stop()
    began = time.monotonic()
    with pytest.raises(TransferError):
        stalling.connect(UNIT, "late")
    assert time.monotonic() - began < 5


def test_an_offer_closed_while_it_is_read_fails_the_read(stalling: Pair) -> None:
    large = Shape(layers=2, blocks=1024)
    stalling.hold(large, large)
    stalling.connect(UNIT)
    everything = list(range(large.units(UNIT)))
    stalling.reader.ask("read", "peer", "handle", everything, everything)
    stalling.sender.ask("close")  # Nobody polls: the read can't be over.
    assert stalling.reader.ask("finish", "peer", "handle", 2) == "failed"


@pytest.mark.parametrize("stalling", SURVIVING, indirect=True)
def test_a_closed_offer_is_read_no_more(stalling: Pair) -> None:
    stalling.sender.ask("close")
    assert ends_without_bytes(stalling, 2)
    with pytest.raises(TransferError):
        stalling.connect(UNIT, "late")


def test_descriptors_wake_whoever_waits_when_the_sender_does_something(stalling: Pair) -> None:
    stalling.sender.stop()
    stalling.reader.ask("read", "peer", "handle", EVERY, EVERY)
    stalling.reader.ask("poll", "peer", "handle")
    if stalling.reader.ask("wait", "peer", 0.2) is None:
        return  # It is polled by the clock.
    assert not stalling.reader.ask("wait", "peer", 0.2)
    stalling.sender.wake()
    assert stalling.reader.ask("wait", "peer", 5)
    assert stalling.reader.ask("finish", "peer", "handle", 5) == "done"


def test_what_is_fenced_and_closed_leaves_no_descriptors_or_threads(pair: Pair) -> None:
    def use() -> Any:
        pair.hold(SMALL, SMALL)
        pair.connect(UNIT)
        read(pair, EVERY, EVERY)
        pair.reader.ask("end")
        pair.sender.ask("end")
        return pair.sender.ask("resources"), pair.reader.ask("resources")

    first = settled(pair, use())
    for _ in range(3):
        assert settled(pair, use(), first) == first


def settled(pair: Pair, now: Any, wanted: Any = None) -> Any:
    """What is left, once what ends by itself (gloo's threads) has had time to."""
    until = time.monotonic() + 5
    while time.monotonic() < until and now != wanted:
        time.sleep(0.1)
        before, now = now, (pair.sender.ask("resources"), pair.reader.ask("resources"))
        if wanted is None and before == now:
            break
    return now


def ends_without_bytes(pair: Pair, within_s: float) -> bool:
    before = pair.reader.ask("content")
    try:
        pair.reader.ask("read", "peer", "handle", EVERY[1:], EVERY[1:])
    except TransferError:
        return np.array_equal(pair.reader.ask("content"), before)
    failed = pair.reader.ask("finish", "peer", "handle", within_s) == "failed"
    return failed and np.array_equal(pair.reader.ask("content"), before)


# ------------------------------------------------------------ of one transport


PROVING = {
    "ucx": {"tls": None},
    "ucx-shared": {"tls": None, "shared": True},
    "ucx-over-tcp": {"tls": "tcp"},
    "ucx-shared-over-tcp": {"tls": "tcp", "shared": True},
}


@pytest.fixture(params=PROVING)
def proving(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A pair whose reader takes nobody's word for the path between them."""
    for running in pairs_of(Subject("ucx:UcxTransport", PROVING[request.param])):
        running.hold(SMALL, SMALL)
        yield running


@pytest.mark.parametrize("proving", ["ucx", "ucx-shared"], indirect=True)
def test_ucx_takes_a_path_on_which_reads_need_nothing_of_the_sender(proving: Pair) -> None:
    proving.connect(UNIT)
    read(proving, EVERY, EVERY)


@pytest.mark.parametrize("proving", ["ucx-over-tcp", "ucx-shared-over-tcp"], indirect=True)
def test_ucx_refuses_a_path_on_which_each_read_waits_for_the_sender(proving: Pair) -> None:
    with pytest.raises(TransferError, match="wait for the sender's thread"):
        proving.connect(UNIT)
    proving.sender.stop()
    began = time.monotonic()
    with pytest.raises(TransferError, match="no answer"):
        proving.connect(UNIT)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("proving", ["ucx", "ucx-shared"], indirect=True)
@pytest.mark.parametrize("lie", ["cookie", "cookie_address", "name", "segments"])
def test_ucx_refuses_a_sender_that_is_not_as_its_description_says(proving: Pair, lie: str) -> None:
    theirs = msgspec.msgpack.decode(proving.description, type=UcxDescription)
    first = theirs.segments[0]
    wrong: dict[str, Any] = {
        "cookie": os.urandom(16),
        "cookie_address": first.base,
        "name": "another",
        "segments": (msgspec.structs.replace(first, base=first.base + (1 << 40)),),
    }
    told = msgspec.structs.replace(theirs, **{lie: wrong[lie]})
    before = proving.reader.ask("content")
    with pytest.raises(TransferError):
        proving.reader.ask("connect", "peer", msgspec.msgpack.encode(told), UNIT)
    assert np.array_equal(proving.reader.ask("content"), before)
    proving.connect(UNIT)
    read(proving, EVERY, EVERY)


@pytest.mark.parametrize("proving", ["ucx-shared"], indirect=True)
def test_a_peer_that_leaves_between_its_reads_disturbs_none_that_shares_its_agent(
    proving: Pair,
) -> None:
    for name in ("peer", "other", "third"):
        proving.connect(UNIT, name)
        read(proving, [0], [0], name)
    proving.reader.ask("fence", "peer")
    with pytest.raises(TransferError, match="fenced"):
        proving.reader.ask("read", "peer", "handle", [0], [0])
    read(proving, EVERY, EVERY, "other")
    proving.reader.ask("fence", "other")
    proving.connect(UNIT, "late")
    for name in ("third", "late"):
        read(proving, EVERY, EVERY, name)


@pytest.mark.parametrize("stalling", ["ucx-shared-over-tcp"], indirect=True)
def test_a_fence_in_mid_read_fails_all_that_share_the_agent_and_the_next_have_a_new_one(
    stalling: Pair,
) -> None:
    stalling.connect(UNIT, "other")
    read(stalling, [0], [0], "other")
    stalling.sender.stop()
    half = len(EVERY) // 2
    stalling.reader.ask("read", "peer", "fenced", EVERY[1:half], EVERY[1:half])
    stalling.reader.ask("read", "other", "lost", EVERY[half:], EVERY[half:])
    stalling.reader.ask("fence", "peer")
    before = stalling.reader.ask("content")
    for name, handle in (("peer", "fenced"), ("other", "lost")):
        assert stalling.reader.ask("poll", name, handle) == "failed"
    with pytest.raises(TransferError, match="was fenced while it was under way"):
        stalling.reader.ask("read", "other", "again", [0], [0])
    stalling.sender.kill()
    assert np.array_equal(stalling.reader.ask("content"), before)


@pytest.mark.parametrize("mortal", ["ucx"], indirect=True)
def test_a_waiting_ucx_sender_leaves_its_core_to_the_engine(mortal: Pair) -> None:
    assert mortal.sender.ask("processor_share", 1) < 0.25


@pytest.mark.parametrize("stalling", ["ucx-over-tcp"], indirect=True)
def test_without_a_fence_a_ucx_read_that_was_let_go_lands_late(stalling: Pair) -> None:
    """Why there is a fence: if this ever fails, the library has learnt to cancel."""
    most = EVERY[1:-1]
    stalling.sender.stop()
    stalling.reader.ask("read", "peer", "lost", most, most)
    assert stalling.reader.ask("finish", "peer", "lost", 0.5) == "pending"
    before = stalling.reader.ask("content")
    stalling.reader.ask("let_go", "lost")
    stalling.sender.wake()
    read(stalling, [EVERY[-1]], [EVERY[-1]])
    after = stalling.reader.ask("content")
    landed = [n for n in most if not np.array_equal(
        SMALL.unit(after, n, UNIT), SMALL.unit(before, n, UNIT))]  # fmt: skip
    assert landed


@pytest.mark.parametrize("stalling", ["memory", "tcp"], indirect=True)
def test_without_a_fence_any_read_that_was_let_go_lands_late(stalling: Pair) -> None:
    stalling.sender.stop()
    stalling.reader.ask("read", "peer", "lost", EVERY[1:], EVERY[1:])
    stalling.reader.ask("let_go", "lost")
    stalling.sender.wake()
    read(stalling, [0], [0])
    assert stalling.reader.ask("crc") == stalling.sender.ask("crc")


def strangers(token: bytes) -> dict[str, bytes]:
    """What a client may send that is no receiver of ours, or one gone mad."""
    hello = wire.pack_hello(token, UNIT)
    one = np.array([0], dtype=np.int32)

    def request(number: int, form: int, values: list[int]) -> bytes:
        body = np.array(values, dtype="<i4").tobytes()
        return hello + wire.REQUEST.pack(b"TKVQ", number, form, len(values)) + body

    return {
        "noise": os.urandom(4096),
        "http": b"GET / HTTP/1.1\r\n\r\n" + b" " * 64,
        "another's token": wire.pack_hello(os.urandom(16), UNIT) + wire.pack_request(1, one),
        "units of nothing": wire.pack_hello(token, 0),
        "units of one byte": wire.pack_hello(token, 1) + os.urandom(64),
        "huge units": wire.pack_hello(token, 2**64 - 1),
        "noise for a request": hello + os.urandom(4096),
        "a unit beyond the last": request(1, 0, [len(EVERY)]),
        "a unit before the first": request(1, 0, [-1]),
        "a run beyond the last": request(1, 1, [0, len(EVERY) + 1]),
        "a run of nothing": request(1, 1, [0, 0]),
        "a run the wrong way": request(1, 1, [5, -3]),
        "a run without its length": request(1, 1, [5]),
        "runs of billions": request(1, 1, [0, 2**31 - 1] * 4),
        "a form that is none": request(1, 7, [0]),
        "too many values": hello + wire.REQUEST.pack(b"TKVQ", 1, 0, 2**32 - 1),
    }


@pytest.mark.parametrize("mortal", ["tcp"], indirect=True)
def test_a_stranger_at_the_tcp_port_gets_no_payload_and_harms_nobody(mortal: Pair) -> None:
    theirs = msgspec.msgpack.decode(mortal.description, type=wire.TcpDescription)
    payload = SMALL.unit(SMALL.content(SEED), 0, UNIT)[:64].tobytes()
    for what, sent in strangers(theirs.token).items():
        with socket.create_connection((theirs.host, theirs.port), timeout=5) as stranger:
            stranger.sendall(sent)
            assert payload not in until_closed(stranger), what
        read(mortal, EVERY[-3:], EVERY[:3])


@pytest.mark.parametrize("mortal", ["tcp"], indirect=True)
def test_a_cut_off_frame_closes_its_connection_and_no_other(mortal: Pair) -> None:
    theirs = msgspec.msgpack.decode(mortal.description, type=wire.TcpDescription)
    frames = wire.pack_hello(theirs.token, UNIT) + wire.pack_request(
        1, np.arange(9, dtype=np.int32)
    )
    for cut in (0, 1, wire.HELLO.size - 1, wire.HELLO.size + 1, len(frames) - 1):
        with socket.create_connection((theirs.host, theirs.port), timeout=5) as stranger:
            stranger.sendall(frames[:cut])
            stranger.shutdown(socket.SHUT_WR)
            assert len(until_closed(stranger)) <= wire.WELCOME.size
    read(mortal, EVERY, EVERY)


def until_closed(connection: socket.socket) -> bytes:
    """All that comes before the other side closes, which it must do within the timeout."""
    got = b""
    try:
        while some := connection.recv(1 << 16):
            got += some
    except ConnectionResetError:
        pass
    return got
