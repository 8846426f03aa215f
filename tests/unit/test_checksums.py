"""Payload checksums: what they must tell apart, and what they must not."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer import checksums
from kvtransfer.checksums import LAYERS_SAMPLED, Mode, sampled_layers
from kvtransfer.transports.api import Memory, Segment

if TYPE_CHECKING:
    from collections.abc import Iterable

LAYERS, BLOCKS, SIZE, STRIDE = 5, 8, 512, 640
SEED = b"a ticket's handle"


def memory(seed: int = 1) -> tuple[Any, Memory]:
    """Random bytes, shape (layers, blocks, stride), and the memory over them."""
    array = np.random.default_rng(seed).integers(0, 256, (LAYERS, BLOCKS, STRIDE), np.uint8)
    return array, over(array)


def over(array: Any) -> Memory:
    """Its first block is block 1: block 0 is the null block, which nobody looks at."""
    return Memory(tuple(Segment(a.ctypes.data - STRIDE, STRIDE, SIZE, BLOCKS + 1) for a in array))


def sums(kv: Memory, blocks: Iterable[int], mode: Mode, seed: bytes) -> list[int]:
    """Checksums of columns of one block each; `blocks` as they lie in the array."""
    found = checksums.Checksums(kv, [range(len(kv.segments))], mode)
    return found.of([[b + 1] for b in blocks], seed, 0)


places = st.tuples(
    st.integers(0, LAYERS - 1), st.integers(0, BLOCKS - 1), st.integers(0, SIZE - 1),
    st.integers(1, 255),
)  # fmt: skip


@given(places)
def test_any_flipped_byte_changes_the_full_sum_of_its_block_alone(place: Any) -> None:
    array, kv = memory()
    layer, block, byte, flip = place
    before = sums(kv, range(BLOCKS), Mode.FULL, SEED)
    array[layer, block, byte] ^= flip
    after = sums(kv, range(BLOCKS), Mode.FULL, SEED)
    assert [i for i in range(BLOCKS) if before[i] != after[i]] == [block]


@given(places, st.binary(max_size=24))
def test_a_sample_sees_every_byte_of_its_layers_and_no_other(place: Any, seed: bytes) -> None:
    array, kv = memory()
    layer, block, byte, flip = place
    before = sums(kv, range(BLOCKS), Mode.SAMPLED, seed)
    array[layer, block, byte] ^= flip
    seen = sums(kv, range(BLOCKS), Mode.SAMPLED, seed) != before
    assert seen == (layer in sampled_layers(block, LAYERS, seed))


@given(st.permutations(range(BLOCKS)), st.sampled_from([Mode.FULL, Mode.SAMPLED]))
def test_every_block_in_anothers_place_is_caught(order: list[int], mode: Mode) -> None:
    _, kv = memory()
    right, wrong = sums(kv, range(BLOCKS), mode, SEED), sums(kv, order, mode, SEED)
    assert [a == b for a, b in zip(right, wrong, strict=True)] == [
        i == block for i, block in enumerate(order)
    ]


@pytest.mark.parametrize("mode", [Mode.FULL, Mode.SAMPLED])
def test_a_stale_block_is_caught(mode: Mode) -> None:
    array, kv = memory()
    before = sums(kv, range(BLOCKS), mode, SEED)
    array[:, 3] = memory(2)[0][:, 3]
    after = sums(kv, range(BLOCKS), mode, SEED)
    assert [i for i in range(BLOCKS) if before[i] != after[i]] == [3]


@pytest.mark.parametrize("mode", list(Mode))
@given(st.permutations(range(BLOCKS)))
def test_equal_content_has_equal_sums_wherever_it_lies(mode: Mode, places: list[int]) -> None:
    array, kv = memory()
    other = np.zeros_like(array)
    other[:, places] = array
    other[:, :, SIZE:] = 77  # What is between blocks is nobody's.
    assert sums(over(other), places, mode, SEED) == sums(kv, range(BLOCKS), mode, SEED)


def test_layers_in_each_others_place_are_caught_when_full() -> None:
    array, kv = memory()
    before = sums(kv, [0], Mode.FULL, SEED)
    array[[0, 1]] = array[[1, 0]]
    assert sums(kv, [0], Mode.FULL, SEED) != before


SLOTS = [[0, 1], [0, 1], [2, 3, 4]]
"""Two groups: one of two blocks a column, and one of three layers in other segments."""


def column_sum(kv: Memory, column: list[int], mode: Mode = Mode.SAMPLED) -> int:
    (found,) = checksums.Checksums(kv, SLOTS, mode).of([column], SEED, 0)
    return found


@pytest.mark.parametrize("mode", [Mode.FULL, Mode.SAMPLED])
@pytest.mark.parametrize("slot", [0, 1, 2])
def test_any_one_group_s_wrong_block_is_caught(slot: int, mode: Mode) -> None:
    _, kv = memory()
    wrong = [1, 2, 3]
    wrong[slot] = 7
    assert column_sum(kv, [1, 2, 3], mode) != column_sum(kv, wrong, mode)


def test_nothing_of_a_null_block_is_looked_at() -> None:
    array, _ = memory()
    kv = Memory(tuple(Segment(a.ctypes.data, STRIDE, SIZE, BLOCKS) for a in array))
    before = column_sum(kv, [0, 2, 3], Mode.FULL)
    array[:, 0] = 0
    assert column_sum(kv, [0, 2, 3], Mode.FULL) == before
    assert column_sum(kv, [1, 2, 3], Mode.FULL) != before


def test_off_costs_and_says_nothing() -> None:
    assert sums(Memory((Segment(0, 1, 1, 1),)), [0], Mode.OFF, SEED) == []


@given(st.integers(0, 10_000), st.integers(1, 128), st.binary(max_size=32))
def test_each_block_has_two_different_layers_in_its_sample_or_all(
    position: int, layers: int, seed: bytes
) -> None:
    found = sampled_layers(position, layers, seed)
    assert found == sorted(set(found))
    assert len(found) == min(layers, LAYERS_SAMPLED)
    assert set(found) <= set(range(layers))
    assert found == sampled_layers(position, layers, seed)


def test_samples_go_evenly_over_the_layers() -> None:
    drawn = Counter(layer for p in range(3000) for layer in sampled_layers(p, 30, SEED))
    assert set(drawn) == set(range(30))
    assert 100 < min(drawn.values()) <= max(drawn.values()) < 320  # 200 expected.


def test_another_seed_samples_other_layers() -> None:
    one, other = ([sampled_layers(p, 30, s) for p in range(20)] for s in (b"a", b"b"))
    assert one != other
