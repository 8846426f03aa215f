"""Items of a prompt (images, clips, recordings) as a part of the prompt's identity.

Such an item stands in a prompt as a row of equal placeholder tokens, so tokens don't say which item
it is. Its content hash does: vLLM computes one for each (`mm_features`), and puts it, with the
place where the item begins, into the hash of each block that the item overlaps. So do we, in every
chain of ours.
"""

from __future__ import annotations

from collections import deque
from itertools import count, repeat
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


class Item(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One item, and the placeholder tokens that it takes up."""

    identifier: str
    """vLLM's: a hash of the content and of how it is processed. The same one is the same
    embeddings."""
    offset: int
    """Tokens before it, from the prompt's first one, or from the first one of a change in a cache:
    below 0 for an item that begins before what has changed."""
    length: int
    """Tokens."""


class Feature(Protocol):
    """As much of vLLM's `MultiModalFeatureSpec` as is read here."""

    identifier: str
    mm_position: Any


def items_of(features: Sequence[Feature] | None) -> tuple[Item, ...]:
    """The items of a vLLM request: of its `mm_features`, which is None for text."""
    return tuple(
        Item(f.identifier, f.mm_position.offset, f.mm_position.length) for f in features or ()
    )


def marks(items: Sequence[Item], block_tokens: int) -> Iterator[bytes]:
    """For one block after another, without end: which items overlap it, and where they begin.

    Canonical, and empty for a block of text alone. Items before the block are not in its mark: the
    block before has them. Nor are lengths: an item's content says how long it is, and a block's KV
    depends on none of what comes after it.
    """
    return _marks(items, block_tokens) if items else repeat(b"")


def _marks(items: Sequence[Item], block_tokens: int) -> Iterator[bytes]:
    ahead = deque(sorted(items, key=lambda item: item.offset))
    under: list[Item] = []
    for start in count(0, block_tokens):
        while ahead and ahead[0].offset < start + block_tokens:
            under.append(ahead.popleft())
        under = [item for item in under if start < item.offset + item.length]
        begun = sorted((item.offset - start, item.identifier) for item in under)
        yield msgspec.msgpack.encode(begun) if begun else b""


def within(items: Iterable[Item], start: int, end: int) -> tuple[Item, ...]:
    """The items that tokens `start` to `end` show: counted from `start`, and cut off at `end`."""
    return tuple(
        Item(i.identifier, i.offset - start, min(i.offset + i.length, end) - i.offset)
        for i in items
        if i.offset < end and start < i.offset + i.length
    )


def joined(blocks: Iterable[Sequence[Item]], block_tokens: int) -> tuple[Item, ...]:
    """The items that blocks in a row show, counted from the first one: `within` undone."""
    ends: dict[tuple[str, int], int] = {}
    for start, items in zip(count(0, block_tokens), blocks, strict=False):
        for item in items:
            ends[item.identifier, start + item.offset] = start + item.offset + item.length
    return tuple(Item(name, offset, end - offset) for (name, offset), end in ends.items())
