"""A memory's units as rows of tensors: gathered into a staging buffer, scattered out of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvtransfer import views
from kvtransfer.transports.api import TransferError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from kvtransfer.transports.api import Memory, Segment, Units

WORD_BYTES = 8
"""What torch copies at a time: rows of single bytes are copied three times slower on a CPU."""


class Pieces:
    """Units of one memory, by number. Raises `TransferError` where units don't fit its blocks."""

    def __init__(self, memory: Memory, unit_bytes: int) -> None:
        self.count = memory.units(unit_bytes)
        self.unit_bytes = unit_bytes
        per_block = [s.block_bytes // unit_bytes for s in memory.segments]
        sizes = [s.blocks * n for s, n in zip(memory.segments, per_block, strict=True)]
        self._first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._per_block = per_block
        self._steps = [_step(s, unit_bytes) for s in memory.segments]
        self._word = _word(memory, unit_bytes)
        self._rows = [self._view(memory.device, s) for s in memory.segments]

    def staging(self, slot: Any) -> Any:
        """A flat tensor of bytes, as rows of units."""
        whole = slot.numel() // self.unit_bytes * self.unit_bytes
        return slot[:whole].view(self._word).view(-1, self.unit_bytes // self._word.itemsize)

    def segments_of(self, units: Units) -> NDArray[np.int64]:
        """Which segment each unit is in."""
        return np.searchsorted(self._first, units, side="right") - 1

    def gather(self, units: Units, staging: Any) -> None:
        """Copy the units into the first rows of `staging`, in order."""
        import torch

        for at, segment, rows in self._runs(units):
            out = staging[at : at + len(rows)]
            torch.index_select(self._rows[segment], 0, _index(rows, staging.device), out=out)

    def scatter(self, units: Units, staging: Any) -> None:
        """Copy the first rows of `staging` into the units, in order."""
        for at, segment, rows in self._runs(units):
            index = _index(rows, staging.device)
            self._rows[segment].index_copy_(0, index, staging[at : at + len(rows)])

    def _runs(self, units: Units) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
        """Neighbours in the list that are in one segment: where, which, and their rows."""
        segments = self.segments_of(units)
        starts = np.concatenate([[0], np.flatnonzero(np.diff(segments)) + 1, [len(units)]])
        for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            segment = int(segments[start])
            inside = units[start:end].astype(np.int64) - self._first[segment]
            block, piece = np.divmod(inside, self._per_block[segment])
            yield start, segment, block * self._steps[segment] + piece

    def _view(self, device: str, segment: Segment) -> Any:
        """Row `r` starts at `r` units; for single-unit blocks of an odd stride, at `r` strides."""
        flat = views.tensor(device, segment.base, views.span_bytes(segment))
        if segment.stride % self.unit_bytes == 0:
            return self.staging(flat)
        width = self.unit_bytes // self._word.itemsize
        step = segment.stride // self._word.itemsize
        whole = flat.numel() // self._word.itemsize * self._word.itemsize
        return flat[:whole].view(self._word).as_strided((segment.blocks, width), (step, 1))


def _step(segment: Segment, unit_bytes: int) -> int:
    """Rows from one block to the next."""
    if segment.stride % unit_bytes == 0:
        return segment.stride // unit_bytes
    if segment.block_bytes == unit_bytes:
        return 1
    raise TransferError(
        f"blocks every {segment.stride} bytes can't be cut into units of {unit_bytes}:"
        " the stride must be a whole number of them"
    )


def _word(memory: Memory, unit_bytes: int) -> Any:
    """The widest type that every row can be seen as."""
    import torch

    numbers = [unit_bytes, *(n for s in memory.segments for n in (s.base, s.stride))]
    return torch.uint8 if any(n % WORD_BYTES for n in numbers) else torch.int64


def _index(rows: NDArray[np.int64], device: Any) -> Any:
    import torch

    return torch.from_numpy(rows).to(device)
