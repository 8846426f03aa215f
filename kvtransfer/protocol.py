"""What crosses the wire in a KV handoff, between who has the KV and who wants it.

The prefill side (*sender*) computes a prompt under a *handle* that the router made up. The decode
side (*receiver*) knows handle and address from the router, and follows it: the sender announces
blocks as they are computed, and seals the handle with a `Manifest` when the prompt is. From then on
a *lease* keeps the blocks. The receiver reads them one-sidedly into blocks of its own, and uses
them only if the manifest matches its own request and the lease outlived the reads.

An engine keeps a prompt's KV in *groups* of layers that share block ids: full attention, sliding
window, chunked attention, state. A prompt is counted in *columns*: the tokens that a whole number
of blocks of every group covers. A column's block ids are listed group after group. Block 0 is the
engines' null block: where it stands, nothing is kept (the tokens have left the group's window), so
nothing is sent, read or checked of it.

Frames are msgpack, one a message, over a ZeroMQ DEALER (receiver) to ROUTER (sender) pair. A frame
that answers has the question's `seq`; `Blocks`, `Sealed` and `Gone` also come unasked. Late,
repeated and reordered frames are harmless: `seq`, `generation` and `first` tell them apart.
Version 3.
"""

from __future__ import annotations

from math import lcm
from typing import Annotated

import msgspec

VERSION = 3
LINK_BYTES = 16
NULL_BLOCK = 0
"""vLLM's: no tokens of a prompt are in it."""
STATE = "mamba"
"""The kind of a group whose one block is the state after the last token, not tokens."""

MALFORMED = (msgspec.MsgspecError, ValueError, OverflowError, RecursionError, MemoryError)
"""Everything that decoding a peer's bytes may raise. msgspec lets bad UTF-8 through as Python's own
error, and nested arrays exhaust the stack even where a type forbids them: fields that the type does
not know are skipped, one level a call."""

FRAME_BYTES_MAX = 8 << 20
"""Largest control frame. A prompt of a million tokens in blocks of 16 is announced with 2.5 MB."""
ID_LENGTH_MAX = 512

Id = Annotated[str, msgspec.Meta(max_length=ID_LENGTH_MAX)]
Word = Annotated[str, msgspec.Meta(max_length=4096)]
"""A word or a sentence for people."""


class Group(msgspec.Struct, frozen=True, array_like=True):
    """Layers that share block ids."""

    kind: str
    """The engine's word for how blocks are kept: `full_attention`, `sliding_window`, …"""
    window: int
    """Tokens that the next one attends to; 0 for all."""
    block_tokens: int
    segments: list[int]
    """Numbers of the memory's segments, one a layer. Groups may share segments, never blocks."""


class Layout(msgspec.Struct, frozen=True, array_like=True):
    """How one side's KV memory is cut: what must fit for a block's bytes to mean the same."""

    content: str
    """Digest of everything that must simply be equal: layer names, attention backends, kernel
    blocks."""
    dtype: str
    kv_heads: int
    """Of the whole model, over all ranks."""
    head_token_bytes: int
    """One head's K and V of one token in one layer; 0 where layers are unlike."""
    ranks: int
    """Tensor-parallel size."""
    by_head: bool
    """A block is its heads one after the other, so that ranks may be split otherwise."""
    by_token: bool
    """A head's part of a block is its tokens one after the other, so that blocks may be too."""
    groups: list[Group]
    segments: list[int]
    """Bytes of one block in each segment of one rank's memory."""

    @property
    def column_tokens(self) -> int:
        """Tokens of one column: whole blocks of every group that is counted in tokens."""
        counted = [g.block_tokens for g in self.groups if g.kind != STATE]
        return lcm(*(counted or [g.block_tokens for g in self.groups]))

    @property
    def slots(self) -> list[list[int]]:
        """The segments that each block id of a column is in."""
        column = self.column_tokens
        return [
            group.segments
            for group in self.groups
            for _ in range(1 if group.kind == STATE else column // group.block_tokens)
        ]


class Manifest(msgspec.Struct, frozen=True, array_like=True):
    """Whose KV a sealed handle holds."""

    num_tokens: int
    """Prompt tokens covered."""
    columns: int
    """Columns they fill, the sender's."""
    chain: bytes
    """Last link of the prompt's chain (`kvtransfer.core.manifest`): tokens, salt, adapter."""
    model_digest: str
    tokenizer_digest: str
    first_token: int | None
    """The first generated token, where the sender sampled it for the client; else None."""


class Region(msgspec.Struct, frozen=True, array_like=True):
    """One rank's memory, as one transport offers it."""

    transport: str
    description: bytes
    blocks: int


# ---------------------------------------------------------------- receiver to sender


class Open(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Who are you, and where is your memory?"""

    seq: int
    version: int
    layout: Layout
    rank: int


class Follow(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Tell me of this handle from its beginning, whether you have heard of it yet or not."""

    seq: int
    epoch: Id
    handle: Id
    rank: int
    ranks: int
    """How many receivers there will be; the handle ends when each has released it."""


class Renew(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """I still follow, or am still reading."""

    seq: int
    epoch: Id
    handle: Id


class Release(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """I am done with this handle, or never wanted it. Unanswered. `rank` None: all of us."""

    epoch: Id
    handle: Id
    rank: int | None = None


# ---------------------------------------------------------------- sender to receiver


class Opened(msgspec.Struct, frozen=True, array_like=True, tag=True):
    seq: int
    epoch: Id
    layout: Layout
    lease_s: float
    checksums: str
    """`kvtransfer.checksums.Mode` of the sums in `Blocks`."""
    regions: list[list[Region]]
    """By rank: what it offers, best first."""


class Held(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """To `Follow` and `Renew`: known or expected, and if sealed, leased anew from now on."""

    seq: int
    handle: Id


class Blocks(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Columns `first`, `first + 1`, … of the prompt are computed and may be read."""

    handle: Id
    generation: int
    """Rises when the sender begins again (a preemption); what was read before is worthless."""
    first: int
    block_ids: list[list[int]]
    """The sender's, by column; `NULL_BLOCK` for what the prompt's next token does not attend to."""
    links: bytes
    """Links of the chain, `LINK_BYTES` a column."""
    sums: list[list[int]]
    """By column, a checksum of each rank's part (`kvtransfer.checksums`); empty when off."""


class Sealed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The prompt is computed, `generation` is its last, and the lease runs."""

    handle: Id
    generation: int
    manifest: Manifest


class Gone(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """No such handle, or no longer; what was not yet vouched for is worthless."""

    seq: int
    handle: Id
    reason: Word


class Rejected(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """To anything: the two can't speak; `reason` names both sides."""

    seq: int
    reason: Word


ToSender = Open | Follow | Renew | Release
ToReceiver = Opened | Held | Blocks | Sealed | Gone | Rejected

# ---------------------------------------------------------------- told by the router


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """Where a handle is followed. The router makes it up; both workers get the same."""

    version: int
    epoch: Id
    """Of the sending process; a restart at the same address has another."""
    handle: Id
    """Single use; unique within the epoch."""
    endpoint: str
    """The sender's control channel, `tcp://host:port`."""


class TicketUnreadable(Exception):
    """The bytes are no ticket of our version; the message names both sides."""


def encode_ticket(epoch: str, handle: str, endpoint: str) -> bytes:
    return msgspec.msgpack.encode(Ticket(VERSION, epoch, handle, endpoint))


class _Versioned(msgspec.Struct, frozen=True, array_like=True):
    """As much of any version's ticket as this version can read."""

    version: int


_decode_version = msgspec.msgpack.Decoder(_Versioned).decode
_decode_ticket = msgspec.msgpack.Decoder(Ticket).decode


def decode_ticket(content: bytes) -> Ticket:
    """A ticket of our own version. Raises `TicketUnreadable`."""
    try:
        # The version first: of another one's fields nothing is known.
        version = _decode_version(content).version
        if version != VERSION:
            raise TicketUnreadable(f"ticket is of version {version}, this receiver of {VERSION}")
        return _decode_ticket(content)
    except MALFORMED as e:
        raise TicketUnreadable(f"ticket is not readable: {e}") from None
