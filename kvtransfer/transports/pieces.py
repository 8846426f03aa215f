"""A memory's units as rows of tensors: gathered into a staging buffer, scattered out of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvtransfer import views

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from kvtransfer.transports.api import Memory, Segment, Units

WORD_BYTES = 8
"""What torch copies at a time: rows of single bytes are copied three times slower on a CPU."""


class Pieces:
    """Units of one memory, by number. Raises `TransferError` where blocks are no whole units."""

    def __init__(self, memory: Memory, unit_bytes: int) -> None:
        self.count = memory.units(unit_bytes)
        self.unit_bytes = unit_bytes
        per_block = [s.block_bytes // unit_bytes for s in memory.segments]
        sizes = [s.blocks * n for s, n in zip(memory.segments, per_block, strict=True)]
        self._first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._per_block = np.array(per_block, dtype=np.int64)
        self._word = _word(memory, unit_bytes)
        rows: list[Any] = []
        first_view, step = [], []
        for segment in memory.segments:
            even = segment.stride % unit_bytes == 0
            first_view.append(len(rows))
            step.append(segment.stride // unit_bytes if even else 0)
            rows += self._views(memory.device, segment)
        self._views_of, self._step = np.array(first_view), np.array(step, dtype=np.int64)
        self._rows = rows

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

        for at, view, rows in self._runs(units):
            out = staging[at : at + len(rows)]
            torch.index_select(self._rows[view], 0, _index(rows, staging.device), out=out)

    def scatter(self, units: Units, staging: Any) -> None:
        """Copy the first rows of `staging` into the units, in order."""
        for at, view, rows in self._runs(units):
            index = _index(rows, staging.device)
            self._rows[view].index_copy_(0, index, staging[at : at + len(rows)])

    def _runs(self, units: Units) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
        """Neighbours in the list that are rows of one view: where, which, and their rows."""
        segments = self.segments_of(units)
        block, piece = np.divmod(units - self._first[segments], self._per_block[segments])
        step = self._step[segments]
        views = self._views_of[segments] + np.where(step, 0, piece)
        rows = np.where(step, block * step + piece, block)
        starts = np.concatenate([[0], np.flatnonzero(np.diff(views)) + 1, [len(units)]])
        for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            yield start, int(views[start]), rows[start:end]

    def _views(self, device: str, segment: Segment) -> list[Any]:
        """One whose rows are units, end to end; at odd strides, one for each piece of a block."""
        flat = views.tensor(device, segment.base, views.span_bytes(segment))
        if segment.stride % self.unit_bytes == 0:
            return [self.staging(flat)]
        words = flat.view(self._word)
        size = self._word.itemsize
        width, step = self.unit_bytes // size, segment.stride // size
        pieces = segment.block_bytes // self.unit_bytes
        shape = (segment.blocks, width)
        return [words.as_strided(shape, (step, 1), piece * width) for piece in range(pieces)]


def _word(memory: Memory, unit_bytes: int) -> Any:
    """The widest type that every row can be seen as."""
    import torch

    numbers = [unit_bytes, *(n for s in memory.segments for n in (s.base, s.stride))]
    return torch.uint8 if any(n % WORD_BYTES for n in numbers) else torch.int64


def _index(rows: NDArray[np.int64], device: Any) -> Any:
    import torch

    return torch.from_numpy(rows).to(device)
