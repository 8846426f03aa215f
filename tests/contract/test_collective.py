"""The `collective` transport between two processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from kvtransfer.transports.api import Memory, Progress, Segment, TransferError
from kvtransfer.transports.collective import CollectiveTransport
from kvtransfer.transports.collective_offer import Description

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

UNIT = 16 * 1024
PER_BLOCK = 2
"""Units of the sender's blocks; the reader's blocks are one unit, so both count alike."""
BLOCKS = 96
LAYERS = 3
GAP = 512
UNITS = LAYERS * BLOCKS * PER_BLOCK


def layers(per_block: int, *, filled: bool) -> tuple[list[Any], Memory]:
    """Layers with a gap behind each block; filled, each unit's words are its number and one."""
    blocks = BLOCKS * PER_BLOCK // per_block
    stride = per_block * UNIT + GAP
    if per_block > 1:
        stride = per_block * UNIT + UNIT
    arrays, segments = [], []
    for layer in range(LAYERS):
        array = np.zeros((blocks, stride), dtype=np.uint8)
        if filled:
            numbers = layer * blocks * per_block + np.arange(blocks * per_block, dtype=np.uint32)
            words = array[:, : per_block * UNIT].view(np.uint32)
            words[:] = np.repeat(numbers + 1, UNIT // 4).reshape(blocks, -1)
        arrays.append(array)
        segments.append(Segment(array.ctypes.data, stride, per_block * UNIT, blocks))
    return arrays, Memory(tuple(segments))


def sender(pipe: Connection) -> None:
    _arrays, memory = layers(PER_BLOCK, filled=True)
    offer = CollectiveTransport().offer(memory)
    pipe.send(offer.description)
    pipe.recv()
    offer.close()
    pipe.send("closed")


@pytest.fixture
def far() -> Iterator[tuple[Any, Connection, bytes]]:
    """A sender's process, its pipe, and what it offers."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=sender, args=(theirs,), daemon=True)
    process.start()
    assert ours.poll(120)
    yield process, ours, ours.recv()
    process.kill()
    process.join()


def units(*numbers: int) -> Any:
    return np.array(numbers, dtype=np.int32)


EVERY = np.arange(UNITS, dtype=np.int32)


def ended(peer: Any, handle: Any, seconds: float) -> Progress:
    until = time.monotonic() + seconds
    while (progress := peer.poll(handle)) is Progress.PENDING and time.monotonic() < until:
        time.sleep(0.0005)
    return progress


def first_words(arrays: list[Any]) -> list[int]:
    """What each of the reader's units begins with; all its words must be the same."""
    found = []
    for array in arrays:
        words = array[:, :UNIT].view(np.uint32)
        assert (words == words[:, :1]).all()
        assert not array[:, UNIT:].any(), "the gap behind a block was written"
        found += words[:, 0].tolist()
    return found


def test_a_read_brings_the_units_that_were_asked_for_and_no_others(far: Any) -> None:
    arrays, memory = layers(1, filled=False)
    peer = CollectiveTransport().connect(memory, far[2], UNIT)
    handle = peer.read(units(0, 200, UNITS - 1), units(10, 11, 2))
    assert ended(peer, handle, 20) is Progress.DONE
    expected = [0] * UNITS
    expected[0], expected[200], expected[UNITS - 1] = 11, 12, 3
    assert first_words(arrays) == expected
    peer.fence()


def test_a_read_of_many_chunks_in_any_order_brings_each_unit_to_its_own(far: Any) -> None:
    arrays, memory = layers(1, filled=False)
    peer = CollectiveTransport().connect(memory, far[2], UNIT)
    order = np.random.default_rng(7).permutation(UNITS).astype(np.int32)
    one, other = peer.read(EVERY[::2], order[::2]), peer.read(EVERY[1::2], order[1::2])
    assert ended(peer, other, 20) is Progress.DONE
    assert ended(peer, one, 20) is Progress.DONE
    assert first_words(arrays) == (order + 1).tolist()
    peer.fence()


def test_two_readers_read_one_offer(far: Any) -> None:
    peers = []
    for _ in range(2):
        arrays, memory = layers(1, filled=False)
        peer = CollectiveTransport().connect(memory, far[2], UNIT)
        assert ended(peer, peer.read(EVERY, EVERY), 20) is Progress.DONE
        assert first_words(arrays) == (EVERY + 1).tolist()
        peers.append(peer)
    for peer in peers:
        peer.fence()


def test_a_unit_that_does_not_exist_is_refused_and_starts_nothing(far: Any) -> None:
    arrays, memory = layers(1, filled=False)
    peer = CollectiveTransport().connect(memory, far[2], UNIT)
    for local, remote in ((0, UNITS), (UNITS, 0), (-1, 0), (0, -1)):
        with pytest.raises(TransferError, match="outside"):
            peer.read(units(0, local), units(0, remote))
    assert ended(peer, peer.read(units(5), units(5)), 20) is Progress.DONE
    assert sum(first_words(arrays)) == 6
    peer.fence()


def test_units_that_are_no_part_of_the_blocks_are_refused(far: Any) -> None:
    _arrays, memory = layers(1, filled=False)
    with pytest.raises(TransferError, match="whole units"):
        CollectiveTransport().connect(memory, far[2], UNIT * 2)


def test_who_was_not_given_the_description_reads_nothing(far: Any) -> None:
    _arrays, memory = layers(1, filled=False)
    known = msgspec.msgpack.decode(far[2], type=Description)
    guessed = msgspec.msgpack.encode(msgspec.structs.replace(known, token=bytes(16)))
    with pytest.raises(TransferError, match="token"):
        CollectiveTransport().connect(memory, guessed, UNIT)


@pytest.mark.parametrize("noise", [b"", b"\xff" * 64, b"\x04\0\0\0\xc1\xc1\xc1\xc1", b"\x03\0"])
def test_noise_on_the_port_does_not_end_the_offer(far: Any, noise: bytes) -> None:
    known = msgspec.msgpack.decode(far[2], type=Description)
    with socket.create_connection((known.host, known.port)) as connection:
        connection.sendall(noise)
    arrays, memory = layers(1, filled=False)
    peer = CollectiveTransport().connect(memory, far[2], UNIT)
    assert ended(peer, peer.read(units(1), units(1)), 20) is Progress.DONE
    assert sum(first_words(arrays)) == 2
    peer.fence()


def test_what_is_no_description_is_refused() -> None:
    _arrays, memory = layers(1, filled=False)
    for noise in (b"", b"\xc1", b"\x93\x01\x02\x03", b"\xa1\xff"):
        with pytest.raises(TransferError, match="no description"):
            CollectiveTransport().connect(memory, noise, UNIT)


def test_a_killed_sender_fails_the_read_within_two_seconds(far: Any) -> None:
    process, _pipe, description = far
    _arrays, memory = layers(1, filled=False)
    peer = CollectiveTransport().connect(memory, description, UNIT)
    os.kill(process.pid, signal.SIGSTOP)  # Or the read may be over before the death.
    handle = peer.read(EVERY, EVERY)
    assert ended(peer, handle, 0.2) is Progress.PENDING
    os.kill(process.pid, signal.SIGKILL)
    assert ended(peer, handle, 2) is Progress.FAILED
    with pytest.raises(TransferError, match="can't read"):
        peer.read(EVERY, EVERY)
    peer.fence()


def test_after_a_fence_nothing_lands_when_a_stopped_sender_wakes(far: Any) -> None:
    process, _pipe, description = far
    arrays, memory = layers(1, filled=False)
    peer = CollectiveTransport().connect(memory, description, UNIT)
    assert ended(peer, peer.read(units(0), units(0)), 20) is Progress.DONE
    os.kill(process.pid, signal.SIGSTOP)
    handle = peer.read(EVERY, EVERY)
    assert ended(peer, handle, 0.5) is Progress.PENDING, "a stopped sender must stall the read"
    began = time.monotonic()
    peer.fence()
    peer.fence()
    assert time.monotonic() - began < 1
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(1)
    assert peer.poll(handle) is Progress.FAILED
    assert sum(first_words(arrays)) == 1


def test_without_a_fence_the_same_read_lands(far: Any) -> None:
    """What the test above keeps out."""
    process, _pipe, description = far
    arrays, memory = layers(1, filled=False)
    peer = CollectiveTransport().connect(memory, description, UNIT)
    os.kill(process.pid, signal.SIGSTOP)
    handle = peer.read(EVERY, EVERY)
    assert ended(peer, handle, 0.5) is Progress.PENDING
    os.kill(process.pid, signal.SIGCONT)
    assert ended(peer, handle, 20) is Progress.DONE
    assert sum(first_words(arrays)) == int(EVERY.sum()) + UNITS
    peer.fence()


def test_a_stopped_sender_is_not_waited_for_when_connecting(far: Any) -> None:
    process, _pipe, description = far
    _arrays, memory = layers(1, filled=False)
    os.kill(process.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(TransferError):
        CollectiveTransport().connect(memory, description, UNIT)
    assert time.monotonic() - began < 10


def test_a_closed_offer_fails_its_readers(far: Any) -> None:
    _process, pipe, description = far
    _arrays, memory = layers(1, filled=False)
    peer = CollectiveTransport().connect(memory, description, UNIT)
    assert ended(peer, peer.read(units(0), units(0)), 20) is Progress.DONE
    pipe.send("close")
    assert pipe.poll(5)
    handle = peer.read(EVERY, EVERY)
    assert ended(peer, handle, 2) is Progress.FAILED
    peer.fence()


def test_its_descriptors_tell_when_to_poll(far: Any) -> None:
    import select

    arrays, memory = layers(1, filled=False)
    peer = CollectiveTransport().connect(memory, far[2], UNIT)
    handle = peer.read(EVERY, EVERY)
    while peer.poll(handle) is Progress.PENDING:
        assert select.select(peer.descriptors(), [], [], 5)[0], "nothing woke us"
    assert first_words(arrays) == (EVERY + 1).tolist()
    peer.fence()


def test_nccl_between_two_gpus() -> None:
    import torch

    if not torch.cuda.is_available() or torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs two CUDA devices: it refuses two members on one")
    _nccl_reads()


def _nccl_reads() -> None:
    import torch

    sent = torch.arange(UNIT * 8, device="cuda:0", dtype=torch.int32)
    got = torch.zeros(UNIT * 8, device="cuda:1", dtype=torch.int32)
    near, there = (
        Memory((Segment(t.data_ptr(), UNIT, UNIT, 32),), f"cuda:{i}")
        for i, t in ((1, got), (0, sent))
    )
    offer = CollectiveTransport().offer(there)
    peer = CollectiveTransport().connect(near, offer.description, UNIT)
    whole = np.arange(32, dtype=np.int32)
    assert ended(peer, peer.read(whole, whole[::-1].copy()), 20) is Progress.DONE
    assert torch.equal(got.view(32, -1).cpu(), sent.view(32, -1).flip(0).cpu())
    peer.fence()
    offer.close()
