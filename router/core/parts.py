"""Large messages of workers in parts, none of which takes long to handle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from workers.api import Batch, KvStored

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workers.api import KvEvent

DELTAS_MAX: Final = 64
"""About 3 ms of detokenizing."""
BLOCKS_MAX: Final = 1024
"""As many as a part of a cache's snapshot tells of, at 16 tokens a block."""


def parts(batch: Batch) -> Iterator[Batch]:
    """The same in the same order; all of them say the same load.

    What the cache stored and removed comes first: it counts one event after the other, so each part
    has the number of its first.
    """
    if len(batch.deltas) <= DELTAS_MAX and len(batch.kv) <= 1:
        yield batch
        return
    load, heard, seq = batch.load, batch.heard, batch.kv_seq
    for events in _small(batch.kv):
        yield Batch(load, [], heard, seq, events)
        seq += len(events)
    for at in range(0, len(batch.deltas), DELTAS_MAX):
        yield Batch(load, batch.deltas[at : at + DELTAS_MAX], heard)


def _small(events: list[KvEvent]) -> Iterator[list[KvEvent]]:
    some: list[KvEvent] = []
    blocks = 0
    for event in events:
        some.append(event)
        blocks += len(event.ids) if isinstance(event, KvStored) else 1
        if blocks >= BLOCKS_MAX:
            yield some
            some, blocks = [], 0
    if some:
        yield some
