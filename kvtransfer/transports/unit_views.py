"""KV memory as byte views that sockets can send from, and receive into."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final

import numpy as np

from kvtransfer.transports.api import TransferError
from kvtransfer.views import span_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvtransfer.transports.api import Memory, Units

    Numbers = NDArray[np.int32] | NDArray[np.int64]

UNITS_MAX: Final = 1 << 24
"""A table of addresses, eight bytes a unit, is kept for each connection's unit size."""


class Views:
    """Units of one memory, by their numbers, in as few pieces as they lie in."""

    def __init__(self, memory: Memory, unit_bytes: int) -> None:
        """Raises `TransferError` where blocks are no whole number of units, or too many."""
        self.unit_bytes = unit_bytes
        self.units = memory.units(unit_bytes)
        if self.units > UNITS_MAX:
            raise TransferError(
                f"this memory has {self.units} units of {unit_bytes} bytes, and views are kept of "
                f"{UNITS_MAX} at most"
            )
        self._base = min((s.base for s in memory.segments), default=0)
        end = max((s.base + span_bytes(s) for s in memory.segments), default=0)
        self._offsets = memory.addresses(unit_bytes) - self._base
        # One view from the first segment's first byte to the last's last: slices of it are cheap,
        # and what lies between the segments is never touched.
        size = end - self._base
        self._view = memoryview((ctypes.c_char * size).from_address(self._base)).cast("B")

    def check(self, numbers: Numbers, whose: str) -> None:
        """Raises `TransferError` for a unit that does not exist."""
        check_range(numbers, self.units, whose)

    def of(self, numbers: Numbers) -> list[memoryview]:
        """The units' bytes in order; neighbours in memory come as one piece."""
        starts = self._offsets[numbers]
        first = np.flatnonzero(np.diff(starts) != self.unit_bytes) + 1
        bounds = np.concatenate(([0], first, [len(starts)]))
        begin = starts[bounds[:-1]]
        end = begin + np.diff(bounds) * self.unit_bytes
        view = self._view
        return [view[a:b] for a, b in zip(begin.tolist(), end.tolist(), strict=True)]

    def each(self, numbers: Numbers) -> list[memoryview]:
        """As `of`, but a piece for each unit."""
        view, size = self._view, self.unit_bytes
        return [view[a : a + size] for a in self._offsets[numbers].tolist()]


def check_range(numbers: Numbers, units: int, whose: str) -> None:
    """Raises `TransferError` for a number that is none of `whose` units."""
    # Seen without its sign, a negative number is a large one: one look instead of two.
    unsigned = numbers.view(np.uint32 if numbers.dtype.itemsize == 4 else np.uint64)
    if len(numbers) and unsigned.max() >= units:
        raise TransferError(f"a unit is out of range: {whose} has {units}")


def advance(pieces: list[memoryview], index: int, moved: int) -> int:
    """The first piece that is not whole yet, cut to what it lacks, after `moved` bytes."""
    while moved:
        size = len(pieces[index])
        if moved < size:
            pieces[index] = pieces[index][moved:]
            break
        moved -= size
        index += 1
    return index


def runs_of(numbers: Units) -> NDArray[np.int32]:
    """Pairs of (first, how many) that count up by one; shape (runs, 2)."""
    first = np.flatnonzero(np.diff(numbers) != 1) + 1
    bounds = np.concatenate(([0], first, [len(numbers)]))
    pairs = np.stack((numbers[bounds[:-1]], np.diff(bounds)), axis=1)
    return pairs.astype(np.int32)


def numbers_of(runs: NDArray[np.int32]) -> NDArray[np.int64]:
    """What `runs_of` was given."""
    first, lengths = runs[:, 0].astype(np.int64), runs[:, 1].astype(np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    shifts: NDArray[np.int64] = np.repeat(first - (ends - lengths), lengths)
    return np.arange(total, dtype=np.int64) + shifts
