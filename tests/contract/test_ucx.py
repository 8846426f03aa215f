"""The `ucx` transport between two processes: what a reader gets, and what a fence keeps out."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvtransfer.transports.ucx import Progress, Segment, UcxMemory, UcxOffer, UcxPeer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

BLOCK_BYTES = 32 * 1024
BLOCKS = 64
LAYERS = 3
FILL = 7


def memory(fill: int | None) -> tuple[list[Any], UcxMemory]:
    """Layers of blocks; with `fill`, byte `b` of each block is the block's own number."""
    layers = [np.zeros((BLOCKS, BLOCK_BYTES), dtype=np.uint8) for _ in range(LAYERS)]
    if fill is not None:
        for number, layer in enumerate(layers):
            layer[:] = (np.arange(BLOCKS) + number * fill)[:, None]
    return layers, UcxMemory(
        [Segment(a.ctypes.data, BLOCK_BYTES, BLOCK_BYTES, BLOCKS) for a in layers]
    )


def sender(pipe: Connection) -> None:
    _layers, own = memory(FILL)
    offer = UcxOffer(own)
    pipe.send(offer.description)
    before, began = time.process_time(), time.monotonic()
    pipe.recv()
    pipe.send((time.process_time() - before) / (time.monotonic() - began))
    offer.close()


def reader(pipe: Connection, description: bytes) -> None:
    """Does as it is told, one word at a time, and answers each with one value."""
    layers, own = memory(None)
    peer = UcxPeer(own, description)
    handle = None
    while (word := pipe.recv()) != "end":
        answer: Any = None
        if word in ("fence", "let go"):
            handle = None
            if word == "fence":
                peer.fence()
        elif word == "sum":
            answer = [int(a.sum()) for a in layers]
        elif word == "blocks":
            answer = [a[:, 0].tolist() for a in layers]
        elif word == "poll":
            assert handle is not None
            answer = peer.poll(handle).value
        else:
            local, remote = word
            try:
                handle = peer.read(local, remote)
            except Exception as error:  # noqa: BLE001  # After a fence, whatever it is.
                answer = str(error)
        pipe.send(answer)


class Pair:
    """A sender's and a reader's process."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.to_sender, theirs = spawn.Pipe()
        self.sender = spawn.Process(target=sender, args=(theirs,), daemon=True)
        self.sender.start()
        assert self.to_sender.poll(60)
        description = self.to_sender.recv()
        self.to_reader, theirs = spawn.Pipe()
        self.reader = spawn.Process(target=reader, args=(theirs, description), daemon=True)
        self.reader.start()

    def ask(self, word: Any) -> Any:
        self.to_reader.send(word)
        assert self.to_reader.poll(60), f"no answer to {word}"
        return self.to_reader.recv()

    def ended(self, seconds: float) -> str:
        until = time.monotonic() + seconds
        while (progress := self.ask("poll")) == Progress.PENDING.value:
            if time.monotonic() > until:
                break
            time.sleep(0.001)
        return str(progress)

    def signal(self, number: int) -> None:
        assert self.sender.pid is not None
        os.kill(self.sender.pid, number)


@pytest.fixture
def pair() -> Iterator[Pair]:
    running = Pair()
    yield running
    for process in (running.sender, running.reader):
        process.kill()
        process.join()


@pytest.fixture
def over_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that needs the sender's help, so that it stalls when the sender stops."""
    monkeypatch.setenv("UCX_TLS", "tcp")


def test_a_read_brings_the_blocks_that_were_asked_for_and_no_others(pair: Pair) -> None:
    pair.ask(([0, 5, 63], [10, 11, 2]))
    assert pair.ended(20) == "done"
    for layer, got in enumerate(pair.ask("blocks")):
        expected = [0] * BLOCKS
        for local, remote in ((0, 10), (5, 11), (63, 2)):
            expected[local] = remote + layer * FILL
        assert got == expected


def test_a_block_that_does_not_exist_is_refused(pair: Pair) -> None:
    assert "out of range" in pair.ask(([0], [BLOCKS]))
    assert "out of range" in pair.ask(([-1], [0]))
    assert pair.ask("sum") == [0] * LAYERS


def test_a_waiting_sender_leaves_its_core_to_the_engine(pair: Pair) -> None:
    pair.ask(([0], [1]))
    assert pair.ended(20) == "done"
    time.sleep(2)
    pair.to_sender.send("end")
    assert pair.to_sender.poll(20)
    assert pair.to_sender.recv() < 0.25


def test_a_killed_sender_fails_the_read(over_tcp: None, pair: Pair) -> None:
    pair.ask(([0], [1]))
    assert pair.ended(20) == "done"
    pair.signal(signal.SIGKILL)
    pair.ask((list(range(BLOCKS)), list(range(BLOCKS))))
    assert pair.ended(20) == "failed"


def test_without_a_fence_a_read_that_was_let_go_lands_late(over_tcp: None, pair: Pair) -> None:
    """Why there is a fence: if this ever fails, the library has learnt to cancel."""
    pair.ask(([0], [1]))
    assert pair.ended(20) == "done"
    pair.signal(signal.SIGSTOP)
    most = list(range(1, BLOCKS - 1))
    pair.ask((most, most))
    assert pair.ended(0.5) == "pending"
    pair.ask("let go")
    before = pair.ask("sum")
    pair.ask(([BLOCKS - 1], [0]))  # Block 0 of the first layer is all zero.
    pair.signal(signal.SIGCONT)
    assert pair.ended(20) == "done"
    assert pair.ask("sum")[0] > before[0]


def test_after_a_fence_nothing_lands_when_a_stopped_sender_wakes(
    over_tcp: None, pair: Pair
) -> None:
    pair.ask(([0], [1]))
    assert pair.ended(20) == "done"
    pair.signal(signal.SIGSTOP)
    every = list(range(BLOCKS))
    pair.ask((every, every))
    assert pair.ended(0.5) == "pending", (
        "a stopped sender must stall the read, or this shows nothing"
    )
    pair.ask("fence")
    before = pair.ask("sum")
    pair.signal(signal.SIGCONT)
    # What would bring the stalled bytes in, as the test above shows: another read of this peer.
    if pair.ask(([BLOCKS - 1], [0])) is None:
        pair.ended(20)
    time.sleep(2)
    assert pair.ask("sum") == before
