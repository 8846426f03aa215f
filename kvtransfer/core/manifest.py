"""Whose KV a handle holds: the prompt's chain of block hashes, compared before any use."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from kvtransfer.core.items import marks
from kvtransfer.protocol import LINK_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtransfer.core.items import Item
    from kvtransfer.protocol import Manifest


@dataclass(frozen=True, slots=True)
class Expectation:
    """What the receiver knows by itself of the KV that it wants."""

    num_tokens: int
    links: bytes
    """The prompt's whole chain, in the sender's columns."""
    model_digest: str
    tokenizer_digest: str

    @property
    def columns(self) -> int:
        return len(self.links) // LINK_BYTES


def chain(
    token_ids: Sequence[int],
    block_tokens: int,
    *,
    salt: str | None,
    lora: str | None,
    items: Sequence[Item] = (),
) -> bytes:
    """Links of the prompt's columns, its partial last one included, `LINK_BYTES` each.

    Each link hashes the one before, so equal last links mean equal prompts, items, salts and
    adapters. Fixed width and a packed head make the encoding canonical. The items that overlap a
    block are its hash's key: whatever they are called, no tokens hash to the same.
    """
    head = msgspec.msgpack.encode(["tandem chain 2", block_tokens, salt, lora])
    link = hashlib.blake2b(head, digest_size=LINK_BYTES).digest()
    links = []
    content = np.asarray(token_ids, dtype="<u4").tobytes()
    starts = range(0, len(content), 4 * block_tokens)
    for start, mark in zip(starts, marks(items, block_tokens), strict=False):
        block = content[start : start + 4 * block_tokens]
        key = hashlib.blake2b(mark).digest() if mark else b""
        link = hashlib.blake2b(link + block, digest_size=LINK_BYTES, key=key).digest()
        links.append(link)
    return b"".join(links)


def other_column(links: bytes, first: int, wanted: Expectation) -> str | None:
    """Why announced columns are not the prompt's, naming both sides; None when they are."""
    start = first * LINK_BYTES
    ours = wanted.links[start : start + len(links)]
    if links == ours:
        return None
    if len(ours) < len(links):
        return f"column {wanted.columns} announced: the prompt has {wanted.columns} columns"
    for number in range(len(links) // LINK_BYTES):
        at = slice(number * LINK_BYTES, (number + 1) * LINK_BYTES)
        if links[at] != ours[at]:
            return (
                f"prompt chain differs at column {first + number}: "
                f"sender has {links[at].hex()}, receiver {ours[at].hex()}"
            )
    return f"links of {len(links)} bytes are no whole number of links"


def mismatch(manifest: Manifest, wanted: Expectation) -> str | None:
    """Why this KV must not be used, naming both sides; None when it may."""
    pairs = [
        ("model digest", manifest.model_digest, wanted.model_digest),
        ("tokenizer digest", manifest.tokenizer_digest, wanted.tokenizer_digest),
        ("token count", manifest.num_tokens, wanted.num_tokens),
        ("column count", manifest.columns, wanted.columns),
        ("prompt chain", manifest.chain.hex(), wanted.links[-LINK_BYTES:].hex()),
    ]
    for what, theirs, ours in pairs:
        if theirs != ours:
            return f"{what} differs: sender has {theirs}, receiver {ours}"
    return None
