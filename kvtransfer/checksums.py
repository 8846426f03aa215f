"""Payload checksums: 64-bit numbers that both sides of a handoff compute over what was copied.

xxh3_64, chained through its seed from one piece to the next. Two sides agree where they hash equal
bytes cut into equal pieces in the same order, wherever these lie in memory. It guards against
accidents, not against a peer that lies: the seed is no secret.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from xxhash import xxh3_64_intdigest

from kvtransfer import views
from kvtransfer.device_pieces import DevicePieces
from kvtransfer.protocol import NULL_BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvtransfer.device_pieces import Copy
    from kvtransfer.transports.api import Memory

LAYERS_SAMPLED: Final = 2
POLL_S: Final = 0.0002
"""Between two looks at a copy from a device."""


class Mode(Enum):
    """What is hashed of each block.

    A wrong or stale block is caught by either: it differs in every layer, up to a collision of
    64 bits. One flipped byte in a block of `n` layers is caught by FULL, and by SAMPLED with
    probability `min(1, LAYERS_SAMPLED / n)`: 1 in 15 at 30 layers.
    """

    OFF = "off"
    SAMPLED = "sampled"
    FULL = "full"


class Checksums:
    """Checksums of one memory, for one thread. Nothing here makes an engine's step wait."""

    def __init__(self, memory: Memory, slots: Sequence[Sequence[int]], mode: Mode) -> None:
        """`slots`: the segments that each block of a column is in (`Layout.slots`)."""
        self._memory, self._slots, self._mode = memory, slots, mode
        self._copies: DevicePieces | None = None
        """Made for a device's memory, once something of it is hashed."""

    def begin(
        self, columns: Sequence[Sequence[int]], seed: bytes, first: int, mode: Mode | None = None
    ) -> Batch:
        """Begin with these columns, of a prompt from its column `first`: blocks that are written.

        Null blocks are left out. `seed` and a block's place in the prompt decide which layers are
        sampled, so both sides must pass the same ones. Blocks must exist. `mode`: the other side's,
        instead of our own.
        """
        mode = mode or self._mode
        if mode is Mode.OFF:
            return Batch(None, [])
        if self._copies is None and self._memory.device != "cpu":
            self._copies = DevicePieces(self._memory)
        batch = Batch(self._copies, [0] * len(columns))
        for slot, segments in enumerate(self._slots):
            held = [c for c, column in enumerate(columns) if column[slot] != NULL_BLOCK]
            places = [(first + c) * len(self._slots) + slot for c in held]
            sampled = _sampled(places, len(segments), mode, seed)
            for segment, at in zip(segments, sampled, strict=True):
                here = [held[i] for i in at]
                batch.add(segment, here, [columns[c][slot] for c in here])
        if self._copies is None:
            batch.hash_host(self._memory)
        return batch

    def of(
        self, columns: Sequence[Sequence[int]], seed: bytes, first: int, mode: Mode | None = None
    ) -> list[int]:
        """One number a column, none at all when OFF. Waits for what is copied from a device."""
        batch = self.begin(columns, seed, first, mode)
        while not batch.ready():
            time.sleep(POLL_S)
        return batch.sums


class Batch:
    """Checksums that are being computed."""

    def __init__(self, copies: DevicePieces | None, sums: list[int]) -> None:
        self.sums = sums
        """By column; right once `ready`."""
        self._copies = copies
        self._todo: deque[_Part] = deque()
        self._copying: deque[tuple[_Part, Copy]] = deque()

    def add(self, segment: int, columns: list[int], blocks: list[int]) -> None:
        """The blocks of one segment, in the columns of these numbers."""
        if blocks:
            self._todo.append(_Part(segment, columns, blocks))

    def hash_host(self, memory: Memory) -> None:
        """All of it now: host memory is hashed where it lies."""
        while self._todo:
            part = self._todo.popleft()
            segment = memory.segments[part.segment]
            starts = [segment.base + block * segment.stride for block in part.blocks]
            self._hash(part, _pieces(starts, segment.block_bytes))

    def ready(self) -> bool:
        """Move on, without waiting; whether nothing is left to do."""
        if self._copies is None:
            return True
        # What was copied is a view, good until the next copy begins: it is hashed before.
        while self._copying and self._copying[0][1].ready():
            part, copy = self._copying.popleft()
            (rows,) = copy.take()
            self._hash(part, rows)
        while self._todo:
            part, rest = self._todo[0].cut(self._copies.blocks_at_once(self._todo[0].segment))
            begun = self._copies.start([(part.segment, part.blocks)])
            if begun is None:
                break
            self._todo.popleft()
            if rest is not None:
                self._todo.appendleft(rest)
            self._copying.append((part, begun))
        return not self._copying and not self._todo

    def _hash(self, part: _Part, pieces: Iterable[Any]) -> None:
        for column, piece in zip(part.columns, pieces, strict=True):
            self.sums[column] = xxh3_64_intdigest(piece, self.sums[column])


@dataclass(frozen=True, slots=True)
class _Part:
    segment: int
    columns: list[int]
    blocks: list[int]

    def cut(self, count: int) -> tuple[_Part, _Part | None]:
        """The first `count` blocks, and the others."""
        if len(self.blocks) <= count:
            return self, None
        return (
            _Part(self.segment, self.columns[:count], self.blocks[:count]),
            _Part(self.segment, self.columns[count:], self.blocks[count:]),
        )


def sampled_layers(place: int, layers: int, seed: bytes) -> list[int]:
    """Which layers of the block at this place SAMPLED looks at, ascending."""
    if layers <= LAYERS_SAMPLED:
        return list(range(layers))
    drawn = xxh3_64_intdigest(seed, place)
    first = drawn % layers
    second = (first + 1 + (drawn >> 32) % (layers - 1)) % layers
    return [first, second] if first < second else [second, first]


def _sampled(places: list[int], layers: int, mode: Mode, seed: bytes) -> list[Sequence[int]]:
    """For each layer, the indexes into `places` of the blocks to hash there."""
    if mode is Mode.FULL:
        return [range(len(places))] * layers
    found: list[list[int]] = [[] for _ in range(layers)]
    for index, place in enumerate(places):
        for layer in sampled_layers(place, layers, seed):
            found[layer].append(index)
    return list(found)


def _pieces(starts: list[int], size: int) -> Iterable[Any]:
    """The bytes of host memory at these addresses."""
    low = min(starts)
    # One view from the first piece to the last; what lies between is not touched.
    whole = views.array(low, max(starts) - low + size).data
    return (whole[start - low : start - low + size] for start in starts)
