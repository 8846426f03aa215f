"""Which stretches of memory hold a KV cache: each byte in one of them, and none twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtransfer.views import span_bytes

if TYPE_CHECKING:
    from kvtransfer.transports.api import Memory


def spans(memory: Memory) -> list[tuple[int, int]]:
    """(address, bytes) of each stretch, ascending: the union of all segments.

    Layers may interleave (blocks outermost), and layers of several KV groups may share the same
    bytes: what overlaps is one stretch, registered once. On the host so is what adjoins. On a
    device it is not: two allocations may lie next to each other by chance, and a registration
    across their border is none that CUDA IPC can open. Bytes that overlap are of one allocation.
    """
    joins = memory.device == "cpu"
    found: list[tuple[int, int]] = []
    ends = sorted((s.base, s.base + span_bytes(s)) for s in memory.segments if s.blocks)
    for low, high in ends:
        if found and (low < found[-1][1] or (joins and low == found[-1][1])):
            found[-1] = found[-1][0], max(found[-1][1], high)
        else:
            found.append((low, high))
    return [(low, high - low) for low, high in found]
