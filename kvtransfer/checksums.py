"""Payload checksums: 64-bit numbers that both sides of a handoff compute over what was copied.

xxh3_64, chained through its seed from one piece to the next. Two sides agree where they hash equal
bytes cut into equal pieces in the same order, wherever these lie in memory. It guards against
accidents, not against a peer that lies: the seed is no secret.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from xxhash import xxh3_64_intdigest

from kvtransfer import views
from kvtransfer.protocol import NULL_BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvtransfer.transports.api import Memory

LAYERS_SAMPLED: Final = 2
HOST_BYTES_MAX: Final = 16 << 20
"""Of device memory, copied to the host at a time."""


class Mode(Enum):
    """What is hashed of each block.

    A wrong or stale block is caught by either: it differs in every layer, up to a collision of
    64 bits. One flipped byte in a block of `n` layers is caught by FULL, and by SAMPLED with
    probability `min(1, LAYERS_SAMPLED / n)`: 1 in 15 at 30 layers.
    """

    OFF = "off"
    SAMPLED = "sampled"
    FULL = "full"


def sums(
    memory: Memory,
    slots: Sequence[Sequence[int]],
    columns: Sequence[Sequence[int]],
    mode: Mode,
    seed: bytes,
    *,
    first: int = 0,
) -> list[int]:
    """One number a column, `columns` in prompt order from its column `first`; none when OFF.

    `slots`: the segments that each block of a column is in (`Layout.slots`). Null blocks are left
    out. `seed` and a block's place in the prompt decide which layers are sampled, so both sides
    must pass the same ones. Blocks must exist.
    """
    if mode is Mode.OFF:
        return []
    found = [0] * len(columns)
    for slot, segments in enumerate(slots):
        held = [c for c, column in enumerate(columns) if column[slot] != NULL_BLOCK]
        places = [(first + c) * len(slots) + slot for c in held]
        for number, at in zip(segments, _sampled(places, len(segments), mode, seed), strict=True):
            segment = memory.segments[number]
            here = [held[i] for i in at]
            starts = [segment.base + columns[c][slot] * segment.stride for c in here]
            pieces = _pieces(memory.device, starts, segment.block_bytes)
            for c, piece in zip(here, pieces, strict=True):
                found[c] = xxh3_64_intdigest(piece, found[c])
    return found


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


def _pieces(device: str, starts: list[int], size: int) -> Iterable[Any]:
    """The bytes at these addresses, on the host: copied there only from a device."""
    if not starts:
        return []
    low = min(starts)
    span = max(starts) - low + size
    if device == "cpu":
        # One view from the first piece to the last; what lies between is not touched.
        whole = views.array(low, span).data
        return (whole[start - low : start - low + size] for start in starts)
    return _from_device(device, starts, size)


def _from_device(device: str, starts: list[int], size: int) -> Iterable[Any]:
    import torch

    at_once = max(1, HOST_BYTES_MAX // size)
    for i in range(0, len(starts), at_once):
        group = [views.tensor(device, start, size) for start in starts[i : i + at_once]]
        yield from torch.stack(group).cpu().numpy()
