"""Whose KV a ticket describes: the prompt's chain of block hashes, compared before any use."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from kvtransfer.protocol import MALFORMED, VERSION, Ticket

if TYPE_CHECKING:
    from collections.abc import Sequence

CHAIN_BYTES = 16


@dataclass(frozen=True, slots=True)
class Expectation:
    """What the receiver knows by itself of the KV that it wants."""

    kv_digest: str
    model_digest: str
    block_tokens: int
    num_tokens: int
    chain: bytes


def chain_tail(
    token_ids: Sequence[int], block_tokens: int, *, salt: str | None, lora: str | None
) -> bytes:
    """The last link, 16 bytes, of the chain over a prompt's blocks, its partial last one included.

    Each link hashes the one before, so equal tails mean equal prompts, salts and adapters. Fixed
    width and length prefixes make the encoding canonical.
    """
    seed = msgspec.msgpack.encode(["tandem chain 1", block_tokens, salt, lora])
    link = hashlib.blake2b(seed, digest_size=CHAIN_BYTES).digest()
    for start in range(0, len(token_ids), block_tokens):
        block = token_ids[start : start + block_tokens]
        content = b"".join(t.to_bytes(4, "little") for t in block)
        link = hashlib.blake2b(link + content, digest_size=CHAIN_BYTES).digest()
    return link


class TicketUnreadable(Exception):
    """The bytes are no ticket of our version; the message names both sides."""


def decode_ticket(content: bytes) -> Ticket:
    """A ticket of our own version. Raises `TicketUnreadable`."""
    try:
        fields = msgspec.msgpack.decode(content, type=list)
        version = fields[0] if fields else None
        # The version first: of another one's fields nothing is known.
        if version != VERSION:
            raise TicketUnreadable(f"ticket is of version {version}, this receiver of {VERSION}")
        return msgspec.convert(fields, Ticket)
    except MALFORMED as e:
        raise TicketUnreadable(f"ticket is not readable: {e}") from None


def mismatch(ticket: Ticket, wanted: Expectation) -> str | None:
    """Why this ticket's KV must not be used, naming both sides; None when it may."""
    pairs = [
        ("KV layout", ticket.kv_digest, wanted.kv_digest),
        ("model digest", ticket.model_digest, wanted.model_digest),
        ("token count", ticket.num_tokens, wanted.num_tokens),
        ("block count", len(ticket.block_ids), -(-wanted.num_tokens // wanted.block_tokens)),
        ("prompt chain", ticket.chain.hex(), wanted.chain.hex()),
        ("rank count", len(ticket.endpoints), 1),
    ]
    for what, theirs, ours in pairs:
        if theirs != ours:
            return f"{what} differs: sender has {theirs}, receiver {ours}"
    return None
