"""No frame, however made, ends a thread of the handoff: senders, receivers and tickets."""

from __future__ import annotations

import random
import socket
import time
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.protocol import (
    MALFORMED,
    VERSION,
    Blocks,
    Gone,
    Held,
    Layout,
    Manifest,
    Open,
    Opened,
    Region,
    Rejected,
    Release,
    Renew,
    Sealed,
    TicketUnreadable,
    ToReceiver,
    ToSender,
    decode_ticket,
    encode_ticket,
)
from kvtransfer.receiver import Timeouts
from kvtransfer.serving_thread import FAILURES_MAX, ServingThread
from kvtransfer.transports.memory import MemoryTransport
from tests.contract.handoff_rig import Decode, Prefill, Receives, Sends
from tests.contract.numpy_kv import Cut, Prompt
from tests.hostile import heads_of, hostile, mutated

MUTATIONS = 300
TIMES = Timeouts(answer_s=0.5, read_s=1.0, beat_s=0.05)


def real_to_sender(layout: Layout) -> list[Any]:
    return [
        Open(1, VERSION, layout, 0),
        Open(1, VERSION + 1, layout, 0),
        Renew(2, "first", "h"),
        Release("first", "h", 0),
    ]


def real_to_receiver(layout: Layout) -> list[Any]:
    manifest = Manifest(40, 5, bytes(16), "model", "tok", None)
    regions = [[Region("memory", b"\x93\x01\x02\x03", 120)]]
    return [
        Opened(1, "first", layout, 0.6, "off", regions),
        Held(2, "h"),
        Blocks("h", 0, 0, [[1], [2]], bytes(32), []),
        Sealed("h", 0, manifest),
        Gone(3, "h", "no"),
        Rejected(4, "no"),
    ]


LAYOUT = Cut(blocks=120).layout()
TO_SENDER = [msgspec.msgpack.encode(m) for m in real_to_sender(LAYOUT)]
TO_RECEIVER = [msgspec.msgpack.encode(m) for m in real_to_receiver(LAYOUT)]
TICKET = encode_ticket("e", "h", "tcp://a:1")
HOSTILE = hostile(heads_of([*TO_SENDER, *TO_RECEIVER, TICKET]))
SOME = HOSTILE[:: len(HOSTILE) // 200]


def decoded(frame: bytes, kind: Any) -> None:
    """It is read, or is malformed; nothing else is raised."""
    try:
        msgspec.msgpack.decode(frame, type=kind)
    except MALFORMED:
        return


@pytest.mark.parametrize("kind", [ToSender, ToReceiver], ids=["to sender", "to receiver"])
def test_hostile_frame_is_read_or_malformed(kind: Any) -> None:
    for frame in HOSTILE:
        decoded(frame, kind)


@pytest.mark.parametrize("frame", HOSTILE[:: len(HOSTILE) // 40])
def test_hostile_bytes_are_no_ticket(frame: bytes) -> None:
    with pytest.raises(TicketUnreadable):
        decode_ticket(frame)


@given(st.binary(max_size=200), st.integers(0, 2000))
@settings(max_examples=200, deadline=None)
def test_ticket_with_a_tail_is_read_or_unreadable(tail: bytes, depth: int) -> None:
    good = encode_ticket("e", "h", "tcp://a:1")
    for content in (good + tail, bytes([good[0] + 1]) + good[1:] + b"\x91" * depth + tail, tail):
        try:
            decode_ticket(content)
        except TicketUnreadable:
            continue


def test_ticket_with_overlong_fields_is_unreadable() -> None:
    for fields in (("e" * 10_000, "h", "tcp://a:1"), ("e", "h" * 10_000, "tcp://a:1")):
        with pytest.raises(TicketUnreadable):
            decode_ticket(encode_ticket(*fields))


@pytest.mark.parametrize("seed", range(4))
def test_sender_answers_and_stays_alive_after_hostile_frames(seed: int) -> None:
    cut = Cut(blocks=120)
    prefill = Prefill(Sends(("memory",), cut=cut), MemoryTransport())
    endpoint, _ = prefill.address()
    frames = [*SOME, *mutated(TO_SENDER, seed, MUTATIONS)]
    random.Random(seed).shuffle(frames)
    try:
        with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
            stranger.setsockopt(zmq.LINGER, 0)
            stranger.connect(endpoint)
            for frame in frames:
                stranger.send(frame)
            seq = 77_777 + seed
            stranger.send(msgspec.msgpack.encode(Open(seq, VERSION, cut.layout(), 0)))
            until = time.monotonic() + 20
            answer: Any = None
            while getattr(answer, "seq", None) != seq:
                assert stranger.poll(1000 * max(0, until - time.monotonic())), "no answer"
                answer = msgspec.msgpack.decode(stranger.recv(), type=ToReceiver)
            assert isinstance(answer, Opened)
        assert prefill.dead() is None
        assert prefill.malformed() > 50, "most of them can't be read"
    finally:
        prefill.close()


class FalseSender:
    """A ROUTER socket that answers whoever opens it with whatever it is told to."""

    def __init__(self, frames: list[bytes]) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind("tcp://127.0.0.1:*")
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._frames = frames

    def answer(self) -> None:
        assert self._socket.poll(5000), "nobody asks"
        who, _ = self._socket.recv_multipart()
        for frame in self._frames:
            self._socket.send_multipart([who, frame])

    def close(self) -> None:
        self._socket.close()
        self._context.term()


@pytest.mark.parametrize("seed", range(4))
def test_receiver_pulls_from_another_sender_after_hostile_answers(seed: int) -> None:
    cut, transport = Cut(blocks=120), MemoryTransport()
    frames = [*SOME, *mutated(TO_RECEIVER, seed, MUTATIONS)]
    random.Random(seed).shuffle(frames)
    false = FalseSender(frames)
    decode = Decode(Receives(("memory",), cut=cut, timeouts=TIMES), transport)
    prefill = Prefill(Sends(("memory",), cut=cut), transport)
    try:
        decode.follow(Prompt("h", tokens=40), (false.endpoint, "first"))
        false.answer()
        assert not decode.outcome("h", 20).right
        prompt = Prompt("good", tokens=40)
        prefill.send(prompt)
        decode.follow(prompt, prefill.address())
        outcome = decode.outcome("good", 20)
        assert outcome.pulled.error is None, outcome.pulled.error
        assert outcome.right
        assert decode.dead() is None
    finally:
        decode.close()
        prefill.close()
        false.close()


@pytest.mark.parametrize("number", [2**62, 2**31, 2**20])
def test_receiver_refuses_a_layout_of_absurd_size_at_once(number: int) -> None:
    cut = Cut(blocks=120)
    layout = msgspec.structs.replace(cut.layout(), ranks=number, kv_heads=number)
    opened = Opened(1, "first", layout, 0.6, "off", [])
    false = FalseSender([msgspec.msgpack.encode(opened)])
    decode = Decode(Receives(("memory",), cut=cut, timeouts=TIMES), MemoryTransport())
    try:
        decode.follow(Prompt("h", tokens=40), (false.endpoint, "first"))
        false.answer()
        error = decode.outcome("h", 20).pulled.error
        assert error is not None
        assert "more than" in error
    finally:
        decode.close()
        false.close()


def test_noise_before_the_handshake_leaves_a_sender_well() -> None:
    prefill = Prefill(Sends(("memory",)), MemoryTransport())
    host, _, port = prefill.address()[0].removeprefix("tcp://").rpartition(":")
    try:
        for noise in (b"\x91" * 1000, b"\xff" + b"\0" * 8 + b"\x7f\x03" + b"\xff" * 500):
            with socket.create_connection((host, int(port))) as stranger:
                stranger.sendall(noise)
        assert prefill.dead() is None
        with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
            peer.setsockopt(zmq.LINGER, 0)
            peer.connect(prefill.address()[0])
            peer.send(msgspec.msgpack.encode(Renew(1, "first", "h")))
            assert peer.poll(10_000), "no answer"
    finally:
        prefill.close()


# ------------------------------------------------------------------------- the thread itself


def test_thread_goes_on_after_a_turn_that_failed() -> None:
    turns: list[int] = []

    def turn() -> None:
        turns.append(len(turns))
        if len(turns) % 2:
            raise RecursionError("one of them")
        time.sleep(0.001)

    thread = ServingThread("t", turn, end=lambda: None)
    thread.start()
    until = time.monotonic() + 20
    while len(turns) < 6:
        assert time.monotonic() < until
        time.sleep(0.005)
    assert thread.dead is None
    thread.closing()
    thread.join(5)
    assert thread.dead is None, "it was closed"


def test_thread_that_always_fails_is_dead_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.serving_thread.PAUSE_S", 0.0)
    turns, ended = [], []

    def turn() -> None:
        turns.append(1)
        raise KeyError("always")

    thread = ServingThread("t", turn, end=lambda: ended.append(1))
    thread.start()
    thread.join(20)
    assert len(turns) == FAILURES_MAX
    assert ended == [1]
    assert "KeyError('always')" in (thread.dead or "")
