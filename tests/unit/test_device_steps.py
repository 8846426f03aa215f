"""Steps that are over on a device, and blocks copied from it: what never waits, and what comes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.device_pieces import SLOTS, DevicePieces
from kvtransfer.step_events import STEPS_MAX, StepEvents
from kvtransfer.transports.api import Memory, Segment


class Stream:
    """A device that runs in order, as far as the test lets it."""

    def __init__(self) -> None:
        self.handed = 0
        self.done = 0
        self.events = 0

    def event(self) -> Mark:
        self.events += 1
        return Mark(self)


class Mark:
    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._at: int | None = None

    def record(self) -> None:
        self._stream.handed += 1
        self._at = self._stream.handed

    def query(self) -> bool:
        assert self._at is not None, "CUDA says that an event that was never recorded is over"
        return self._stream.done >= self._at


@given(st.lists(st.sampled_from(["step", "run", "ask"]), max_size=60))
def test_a_step_comes_back_once_in_order_and_not_before_the_device_has_run_it(
    what: list[str],
) -> None:
    stream = Stream()
    steps: StepEvents[int] = StepEvents("cuda:0", stream.event)
    recorded, came = itertools.count(1), []
    for word in what:
        match word:
            case "step":
                steps.record(next(recorded))
            case "run":
                stream.done = min(stream.done + 1, stream.handed)
            case "ask":
                came += steps.over()
                assert came == list(range(1, stream.done + 1))
                assert len(steps) == stream.handed - stream.done


def test_events_are_used_again() -> None:
    stream = Stream()
    steps: StepEvents[str] = StepEvents("cuda:0", stream.event)
    for _ in range(100):
        steps.record("a")
        steps.record("b")
        stream.done = stream.handed
        assert steps.over() == ["a", "b"]
    assert stream.events == 2


def test_a_device_that_has_hung_is_an_error_and_no_growing_queue() -> None:
    steps: StepEvents[int] = StepEvents("cuda:0", Stream().event)
    for n in range(STEPS_MAX):
        steps.record(n)
    with pytest.raises(RuntimeError, match="64 steps are not over"):
        steps.record(STEPS_MAX)


def test_on_a_cpu_a_step_is_over_when_it_is_recorded() -> None:
    steps: StepEvents[str] = StepEvents("cpu")
    steps.record("a")
    steps.record("b")
    assert steps.over() == ["a", "b"]
    assert steps.over() == []


# ------------------------------------------------------------ blocks


SHAPES = [(6, 512, 512), (4, 640, 512), (5, 96, 40), (3, 33, 33)]
"""Blocks, stride, block bytes: the last two are no whole words."""


@pytest.fixture
def held() -> tuple[list[Any], Memory]:
    draw = np.random.default_rng(3)
    arrays = [draw.integers(0, 256, (n, stride), np.uint8) for n, stride, _ in SHAPES]
    segments = [
        Segment(a.ctypes.data, stride, size, n)
        for a, (n, stride, size) in zip(arrays, SHAPES, strict=True)
    ]
    return arrays, Memory(tuple(segments))


def test_the_blocks_asked_for_come_in_their_order(held: Any) -> None:
    arrays, memory = held
    asked = [(1, [3, 0, 3]), (0, [5]), (2, []), (3, [2, 1]), (2, [4, 4, 0])]
    copy = DevicePieces(memory).start(asked)
    assert copy is not None
    assert copy.ready()
    for (number, ids), found in zip(asked, copy.take(), strict=True):
        size = SHAPES[number][2]
        assert found.shape == (len(ids), size)
        assert np.array_equal(found, arrays[number][ids][:, :size])


def test_copies_hold_the_blocks_bytes(held: Any) -> None:
    arrays, memory = held
    copy = DevicePieces(memory).start([(0, [1])])
    assert copy is not None
    before = arrays[0][1].copy()
    arrays[0][1] ^= 255
    assert np.array_equal(copy.take()[0][0], before)


def test_no_more_batches_than_slots_are_under_way_and_a_taken_one_makes_room(held: Any) -> None:
    _, memory = held
    pieces = DevicePieces(memory)
    copies = [pieces.start([(0, [n % 6])]) for n in range(SLOTS)]
    assert None not in copies
    assert pieces.start([(0, [0])]) is None
    assert copies[2] is not None
    copies[2].take()
    assert pieces.start([(0, [0])]) is not None
    assert pieces.start([(0, [0])]) is None


def test_a_batch_larger_than_a_slot_is_refused_with_both_figures(held: Any) -> None:
    _, memory = held
    pieces = DevicePieces(memory, slot_bytes=1024)
    with pytest.raises(ValueError, match=r"1536 bytes .* 1024"):
        pieces.start([(0, [0, 1, 2])])
    with pytest.raises(ValueError, match=r"512 bytes .* 256"):
        DevicePieces(memory, slot_bytes=256)
