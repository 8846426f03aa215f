"""What is in an engine's prefix cache, as routers are told: numbered changes, and all of it.

Pure. It holds what the cache holds: some 370 bytes and four a token for each block, with vLLM's
keys; and the last changes, some 50 MB at most (46 bytes a token). A block whose
parent has gone before it stays known, since it can be found again once the parent is back; so the
parent's tokens are kept as long, and a snapshot has it as stored and removed.
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final

from workers.api import KvCleared, KvRemoved, KvSnapshot, KvStored, joined, within
from workers.engines.base import Cleared, Removed, Stored

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator

    from workers.api import Item, KvEvent
    from workers.engines.base import CacheChange

EVENTS_KEPT: Final = 4096
"""Changes that a router may be behind before it has to ask for all."""
EVENT_TOKENS_KEPT: Final = 1 << 20
"""Tokens in them, at most: more than an engine stores in the half second between two batches."""
PART_TOKENS: Final = 16_384
"""Of a snapshot's part, at most about: 1.5 ms for either side, which other streams wait."""


@dataclass(slots=True)
class _Block:
    key: Hashable
    parent: int
    token_ids: array[int]
    salt: str | None
    lora: str | None
    items: tuple[Item, ...]
    here: bool = True
    children: int = 0


class CacheMirror:
    """`apply` what the engine did; then `since` and `snapshot` tell of it."""

    def __init__(self) -> None:
        self.seq = 0
        """Of the next change."""
        self._blocks: dict[int, _Block] = {}
        self._ids: dict[Hashable, int] = {}
        """Of those in the cache."""
        self._gone: dict[Hashable, int] = {}
        """Of those that are only somebody's parent."""
        self._next_id = 0
        self._events: deque[KvEvent] = deque()
        self._event_tokens = 0

    def __len__(self) -> int:
        """Blocks in the cache."""
        return len(self._ids)

    def apply(self, changes: Iterable[CacheChange]) -> None:
        for change in changes:
            match change:
                case Stored():
                    self._store(change)
                case Removed(keys):
                    self._remove(keys)
                case Cleared():
                    self._blocks.clear()
                    self._ids.clear()
                    self._gone.clear()
                    self._tell(KvCleared())

    def since(self, seq: int) -> list[KvEvent] | None:
        """Changes from `seq` on; None when they are not kept any more."""
        behind = self.seq - seq
        if behind > len(self._events):
            return None
        return list(islice(self._events, len(self._events) - behind, None)) if behind else []

    def snapshot(self) -> Iterator[KvSnapshot]:
        """All of it as it is now, in parts that may be taken while it changes."""
        numbers, blocks = list(self._blocks), list(self._blocks.values())
        gone = [number for number, block in zip(numbers, blocks, strict=True) if not block.here]
        return _parts(self.seq, numbers, blocks, gone)

    # ------------------------------------------------------------ changes

    def _store(self, change: Stored) -> None:
        parent = -1 if change.parent is None else self._ids.get(change.parent, -2)
        size = len(change.token_ids) // len(change.keys)
        told: list[int] = []
        first_parent, first_token = parent, 0
        for at, key in enumerate(change.keys):
            known = self._ids.get(key)
            if known is not None or parent == -2:
                # There already, or under a parent that is not there: nobody could find it.
                self._told(change, told, first_parent, first_token)
                parent = -2 if known is None else known
                told, first_parent, first_token = [], parent, (at + 1) * size
                continue
            number = self._gone.pop(key, None)
            if number is None:
                number, self._next_id = self._next_id, self._next_id + 1
                tokens = array("I", change.token_ids[at * size : (at + 1) * size])
                items = within(change.items, at * size, (at + 1) * size)
                block = _Block(key, parent, tokens, change.salt, change.lora, items)
                self._blocks[number] = block
                if parent >= 0:
                    self._blocks[parent].children += 1
            else:
                self._blocks[number].here = True
            self._ids[key] = number
            told.append(number)
            parent = number
        self._told(change, told, first_parent, first_token)

    def _told(self, change: Stored, ids: list[int], parent: int, first_token: int) -> None:
        if ids:
            size = len(change.token_ids) // len(change.keys)
            end = first_token + len(ids) * size
            tokens = change.token_ids[first_token:end]
            items = within(change.items, first_token, end)
            self._tell(KvStored(ids, parent, tokens, change.salt, change.lora, items))

    def _remove(self, keys: list[Hashable]) -> None:
        ids = [number for key in keys if (number := self._ids.pop(key, None)) is not None]
        for number in ids:
            block = self._blocks[number]
            block.here = False
            self._gone[block.key] = number
            self._forget(number)
        if ids:
            self._tell(KvRemoved(ids))

    def _forget(self, number: int) -> None:
        """What is neither here nor anybody's parent."""
        while number >= 0:
            block = self._blocks[number]
            if block.here or block.children:
                return
            del self._blocks[number]
            del self._gone[block.key]
            number = block.parent
            if number >= 0:
                self._blocks[number].children -= 1

    def _tell(self, event: KvEvent) -> None:
        self._events.append(event)
        self._event_tokens += _tokens(event)
        self.seq += 1
        while len(self._events) > EVENTS_KEPT or self._event_tokens > EVENT_TOKENS_KEPT:
            self._event_tokens -= _tokens(self._events.popleft())


def _tokens(event: KvEvent) -> int:
    return len(event.token_ids) if isinstance(event, KvStored) else 0


def _parts(
    seq: int, numbers: list[int], blocks: list[_Block], gone: list[int]
) -> Iterator[KvSnapshot]:
    """What it reads of a block never changes. A parent is always older, and so told before."""
    events: list[KvEvent] = []
    row: list[tuple[int, _Block]] = []
    told = part = 0
    for number, block in zip(numbers, blocks, strict=True):
        if row and (block.parent != row[-1][0] or told >= PART_TOKENS):
            events.append(_stored(row))
            row = []
        if told >= PART_TOKENS:
            yield KvSnapshot(seq, part, False, events)
            events, told, part = [], 0, part + 1
        row.append((number, block))
        told += len(block.token_ids)
    if row:
        events.append(_stored(row))
    if gone:
        events.append(KvRemoved(gone))
    yield KvSnapshot(seq, part, True, events)


def _stored(row: list[tuple[int, _Block]]) -> KvStored:
    """Blocks, each the next one's parent, as one change."""
    tokens, first = array("I"), row[0][1]
    for _, block in row:
        tokens += block.token_ids
    items = joined((block.items for _, block in row), len(first.token_ids))
    ids = [number for number, _ in row]
    return KvStored(ids, first.parent, tokens.tolist(), first.salt, first.lora, items)
