"""Blocks of KV memory copied to the host for their checksums, beside the engine's own work.

On a device: a gather kernel and one copy to pinned memory, on a stream of its own. No thread waits,
and the compute stream does not either: an event says when the bytes are there. The engine shares
the device with it: 2 x bytes of its memory bandwidth, and bytes of the way to the host (tens of
GB/s over PCIe). At a 16,000-token prompt of a Llama 8B (2 GiB of KV) `sampled` copies two layers of
32: 128 MiB. `full` would copy all of it, which takes longer than sending it.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

from kvtransfer import views

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from kvtransfer.transports.api import Memory, Segment

    Blocks = Sequence[tuple[int, Sequence[int]]]

SLOT_BYTES: Final = 16 << 20
SLOTS: Final = 4
"""Each is pinned memory and as much of the device's; made when first used."""


class Copy:
    """One batch on its way to the host."""

    def __init__(self, slot: _Slot, parts: list[tuple[int, int]]) -> None:
        self._slot: _Slot | None = slot
        self._parts = parts
        """For each entry: blocks, and bytes of one."""

    def ready(self) -> bool:
        """Whether its bytes are there. Never waits."""
        assert self._slot is not None, "the copy was taken"
        return self._slot.ready()

    def take(self) -> list[NDArray[np.uint8]]:
        """The bytes, in the order asked for; one array of shape (blocks, block bytes) an entry.

        Once, when `ready`. The arrays are views, good until the next `start` of the copier.
        """
        assert self.ready(), "the copy is under way"
        assert self._slot is not None
        found, host = [], self._slot.host
        for at, (blocks, size) in zip(_starts(self._parts), self._parts, strict=False):
            found.append(host[at : at + blocks * size].reshape(blocks, size))
        self._slot.taken = True
        self._slot = None
        return found


class DevicePieces:
    """Copies of blocks of one memory, for one thread: `SLOTS` batches at a time.

    On host memory the same, done when `start` returns.
    """

    def __init__(self, memory: Memory, slot_bytes: int = SLOT_BYTES) -> None:
        """`slot_bytes`: of one batch at most; at least one block of each segment must fit."""
        largest = max((s.block_bytes for s in memory.segments), default=0)
        if largest > slot_bytes:
            raise ValueError(f"a block of {largest} bytes does not fit a slot of {slot_bytes}")
        self._memory = memory
        self.slot_bytes = slot_bytes
        self._rows = [_rows(memory.device, s) for s in memory.segments]
        self._slots: deque[_Slot] = deque()

    def start(self, blocks: Blocks, after: Any = None) -> Copy | None:
        """Begin to copy `blocks`: entries of a segment's number and its blocks' numbers.

        `after`: a `torch.cuda.Event` that the copy must come behind, on the device; None where the
        blocks are known to be written. Returns None while every slot is in use: ask again later.
        Raises ValueError for more than `slot_bytes`.
        """
        segments = self._memory.segments
        parts = [(len(ids), segments[number].block_bytes) for number, ids in blocks]
        *starts, total = _starts(parts)
        if total > self.slot_bytes:
            raise ValueError(f"{total} bytes in one batch; a slot has {self.slot_bytes}")
        slot = self._free_slot()
        if slot is None:
            return None
        with slot.filling(after):
            for (number, ids), at in zip(blocks, starts, strict=True):
                if ids:
                    slot.gather(self._rows[number], ids, at)
            slot.fetch(total)
        return Copy(slot, parts)

    def blocks_at_once(self, segment: int) -> int:
        """How many of a segment's blocks one batch may have."""
        return self.slot_bytes // self._memory.segments[segment].block_bytes

    def _free_slot(self) -> _Slot | None:
        for slot in self._slots:
            if slot.taken:
                slot.taken = False
                return slot
        if len(self._slots) == SLOTS:
            return None
        self._slots.append(_Slot(self._memory.device, self.slot_bytes))
        return self._slots[-1]


class _Slot:
    def __init__(self, device: str, size: int) -> None:
        import torch

        self._device = device
        self.taken = False
        self._event: Any = None
        self._stream: Any = None
        pinned = torch.empty(size, dtype=torch.uint8, pin_memory=device != "cpu")
        self.host: NDArray[np.uint8] = pinned.numpy()
        self._pinned = self._staging = pinned
        if device != "cpu":
            with torch.cuda.device(device):
                self._event, self._stream = torch.cuda.Event(), torch.cuda.Stream()
            # Made on the stream that uses it: another's may still be at work on what was freed.
            with torch.cuda.stream(self._stream):
                self._staging = torch.empty(size, dtype=torch.uint8, device=device)

    def ready(self) -> bool:
        return self._event is None or bool(self._event.query())

    def filling(self, after: Any) -> Any:
        """Inside, what is started goes to this slot's stream, behind `after`."""
        import contextlib

        import torch

        if self._stream is None:
            return contextlib.nullcontext()
        if after is not None:
            self._stream.wait_event(after)
        return torch.cuda.stream(self._stream)

    def gather(self, rows: Any, ids: Sequence[int], at: int) -> None:
        """Copy the rows `ids` to the staging buffer's bytes from `at` on."""
        import torch

        index = torch.tensor(ids, dtype=torch.int64, pin_memory=self._stream is not None)
        width = rows.shape[1]
        size = len(ids) * width * rows.dtype.itemsize
        out = self._staging[at : at + size].view(rows.dtype).view(len(ids), width)
        torch.index_select(rows, 0, index.to(self._device, non_blocking=True), out=out)

    def fetch(self, size: int) -> None:
        """Bring the staging buffer to the host, and mark the end of it."""
        if self._stream is None:
            return
        self._pinned[:size].copy_(self._staging[:size], non_blocking=True)
        self._event.record(self._stream)


def _starts(parts: list[tuple[int, int]]) -> list[int]:
    """Where each entry begins in a slot, in whole words, and where the last one ends."""
    starts = [0]
    for count, size in parts:
        starts.append(starts[-1] + -(-count * size // 8) * 8)
    return starts


def _rows(device: str, segment: Segment) -> Any:
    """A segment's blocks as a tensor, a row each, in the widest words that fit."""
    import torch

    flat = views.tensor(device, segment.base, views.span_bytes(segment))
    numbers = (segment.base, segment.stride, segment.block_bytes)
    word = torch.uint8 if any(n % 8 for n in numbers) else torch.int64
    shape = segment.blocks, segment.block_bytes // word.itemsize
    return (
        flat[: flat.numel() // word.itemsize * word.itemsize]
        .view(word)
        .as_strided(shape, (segment.stride // word.itemsize, 1))
    )
