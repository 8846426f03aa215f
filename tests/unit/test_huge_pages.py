"""Huge pages under KV memory: what `advise` does, and what it leaves alone."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvtransfer.huge_pages import HUGE_BYTES, advise, huge_bytes
from kvtransfer.transports.api import Memory, Segment

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 8 * HUGE_BYTES
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def allowed() -> bool:
    return SWITCH.exists() and "[never]" not in SWITCH.read_text(encoding="ascii")


@pytest.fixture
def small_pages() -> Iterator[np.ndarray]:
    """Touched memory on pages of 4 KiB."""
    area = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        area.madvise(mmap.MADV_NOHUGEPAGE)
    array = np.frombuffer(area, np.uint8)
    array[:] = np.arange(SIZE, dtype=np.uint8)
    yield array
    del array


def memory(array: np.ndarray, block: int = 32768) -> Memory:
    """Two layers, one behind the other, in one allocation."""
    half = len(array) // 2
    base = array.ctypes.data
    return Memory(tuple(Segment(base + i * half, block, block, half // block) for i in (0, 1)))


def range_of(array: np.ndarray) -> list[tuple[int, int]]:
    return [(array.ctypes.data, array.ctypes.data + len(array))]


@pytest.mark.skipif(not allowed(), reason="this kernel gives no transparent huge pages")
def test_touched_memory_gets_huge_pages_and_keeps_its_content(small_pages: np.ndarray) -> None:
    assert huge_bytes(range_of(small_pages)) == 0
    got = advise(memory(small_pages))
    assert got == huge_bytes(range_of(small_pages))
    assert SIZE - 2 * HUGE_BYTES <= got <= SIZE
    assert (small_pages == np.arange(SIZE, dtype=np.uint8)).all()


@pytest.mark.skipif(not allowed(), reason="this kernel gives no transparent huge pages")
def test_memory_never_touched_gets_them_when_it_is(small_pages: np.ndarray) -> None:
    fresh = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(fresh, np.uint8)
    assert advise(memory(array)) == 0
    array[:] = 1
    assert huge_bytes(range_of(array)) >= SIZE - 2 * HUGE_BYTES
    assert huge_bytes(range_of(small_pages)) == 0, "another mapping's pages are not counted"


def test_memory_smaller_than_a_huge_page_and_none_at_all_are_left_alone() -> None:
    array = np.ones(64 * 1024, np.uint8)
    assert advise(memory(array)) == 0
    assert advise(Memory(())) == 0


def test_a_devices_memory_is_left_alone(small_pages: np.ndarray) -> None:
    there = Memory(memory(small_pages).segments, device="cuda:0")
    assert advise(there) == 0
    assert huge_bytes(range_of(small_pages)) == 0
