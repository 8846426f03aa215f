"""One worker's prefix cache, as the router has been told of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.core.blocks import Link, next_link, root
from workers.api import KvCleared, KvRemoved, KvStored, marks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from router.core.prefix_index import PrefixIndex
    from workers.api import KvEvent, KvSnapshot


class Unsound(Exception):
    """What was told does not follow from what was told before."""


class CacheView:
    """Keeps an index true to one worker. Out of step it has nothing there, until a snapshot."""

    def __init__(self, worker_id: str, block_tokens: int, index: PrefixIndex) -> None:
        self.worker_id, self.block_tokens = worker_id, block_tokens
        self.in_step = False
        self._index = index
        self._links: dict[int, Link] = {}
        """By the worker's own number."""
        self._next_seq = 0
        self._next_part = 0

    def __len__(self) -> int:
        """Blocks that the worker has."""
        return len(self._links)

    def events(self, seq: int, events: Sequence[KvEvent]) -> bool:
        """Changes, the first of them numbered `seq`. False when all of it must be asked for."""
        if not self.in_step:
            return True  # It is under way.
        if seq != self._next_seq:
            self.forget()
            return False
        self._next_seq += len(events)
        return self._take(events)

    def snapshot(self, news: KvSnapshot) -> bool:
        """A part of all of it. False when it must be asked for again."""
        if news.part == 0:
            self.forget()
        elif news.part != self._next_part:
            self.forget()
            return False
        self._next_part = news.part + 1
        self._next_seq = news.seq
        self.in_step = news.last
        return self._take(news.events)

    def forget(self) -> None:
        """Nothing is known until the next snapshot."""
        self._index.drop(self.worker_id, self._links.values())
        self._links.clear()
        self.in_step = False
        self._next_part = 0

    # ------------------------------------------------------------ events

    def _take(self, events: Sequence[KvEvent]) -> bool:
        try:
            for event in events:
                match event:
                    case KvStored():
                        self._store(event)
                    case KvRemoved(ids):
                        self._remove(ids)
                    case KvCleared():
                        self._remove(list(self._links))
        except Unsound:
            self.forget()
            return False
        return True

    def _store(self, event: KvStored) -> None:
        size = self.block_tokens
        if len(event.token_ids) != len(event.ids) * size:
            raise Unsound
        if event.parent < 0:
            link: Link | None = root(event.salt, event.lora)
        else:
            link = self._links.get(event.parent)
        if link is None:
            raise Unsound
        for at, (number, mark) in enumerate(zip(event.ids, marks(event.items, size), strict=False)):
            if number in self._links:
                raise Unsound
            link = next_link(link, event.token_ids[at * size : (at + 1) * size], mark)
            self._links[number] = link
            self._index.add(self.worker_id, link)

    def _remove(self, ids: Sequence[int]) -> None:
        for number in ids:
            link = self._links.pop(number, None)
            if link is None:
                raise Unsound
            self._index.remove(self.worker_id, link)
