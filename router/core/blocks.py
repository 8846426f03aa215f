"""Names of a prompt's blocks that say all that is in them and before them."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from xxhash import xxh3_128_digest

from workers.api import marks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from workers.api import Item

Link = bytes
"""16 bytes of xxh3 over the link before, the block's tokens and the items that overlap it. The same
link is the same tokens and items under the same salt and adapter, from the prompt's first on. An
attacker who finds two prompts with one link gains a wrong guess of ours where a prefix is cached,
no more: what is reused, workers decide by hashes of their own. What proves whose KV it is
(`kvtransfer.core.manifest`) is another chain, cryptographic, of the last block too, and three times
as dear."""


def root(salt: str | None, lora: str | None) -> Link:
    """What comes before the first block: equal tokens under another salt are another's."""
    return xxh3_128_digest(repr((salt, lora)).encode())


def next_link(before: Link, token_ids: Sequence[int], mark: bytes = b"") -> Link:
    """`mark`: of the items that overlap the block (`workers.api.marks`)."""
    return xxh3_128_digest(before + array("I", token_ids).tobytes() + mark)


def links(
    token_ids: Sequence[int],
    block_tokens: int,
    salt: str | None = None,
    lora: str | None = None,
    items: Sequence[Item] = (),
) -> Iterator[Link]:
    """Of each full block that can be reused; computed as they are asked for.

    An engine computes at least the last token, so the block that ends with it is not among them.
    """
    content, size = array("I", token_ids).tobytes(), 4 * block_tokens
    link = root(salt, lora)
    ends = range(size, 4 * (len(token_ids) - 1) + 1, size)
    for end, mark in zip(ends, marks(items, block_tokens), strict=False):
        link = xxh3_128_digest(link + content[end - size : end] + mark)
        yield link
