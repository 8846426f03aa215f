"""Which units of a sender's rank go into which of a receiver's, whatever their splits."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kvtransfer.protocol import Layout

    Units = NDArray[np.int32]


class Unlike(Exception):
    """Two layouts that no route joins; the message names both."""


@dataclass(frozen=True, slots=True)
class Heads:
    """KV heads `[first, first + count)` that one rank holds."""

    first: int
    count: int


def heads_of(layout: Layout, rank: int) -> Heads:
    """As vLLM deals them out: evenly, or one to several ranks where ranks outnumber heads."""
    if layout.ranks <= layout.kv_heads:
        count = layout.kv_heads // layout.ranks
        return Heads(rank * count, count)
    return Heads(rank * layout.kv_heads // layout.ranks, 1)


def refusal(sender: Layout, receiver: Layout) -> str | None:
    """Why blocks of the one can't become blocks of the other, naming both; None when they can."""
    for what in ("content", "dtype", "layers", "kv_heads", "head_token_bytes"):
        theirs, ours = getattr(sender, what), getattr(receiver, what)
        if theirs != ours:
            return f"KV {what} differs: sender has {theirs}, receiver {ours}"
    for side, layout in (("sender", sender), ("receiver", receiver)):
        if min(layout.kv_heads, layout.ranks, layout.block_tokens) < 1:
            return f"the {side}'s layout is none: {layout}"
        if max(layout.kv_heads, layout.ranks) % min(layout.kv_heads, layout.ranks):
            return f"{layout.kv_heads} KV heads don't divide over the {side}'s {layout.ranks} ranks"
    if sender.ranks != receiver.ranks and not sender.by_head:
        return (
            f"this KV layout does not keep heads apart, so ranks must be equal: "
            f"sender has {sender.ranks}, receiver {receiver.ranks}"
        )
    a, b = sender.block_tokens, receiver.block_tokens
    if a != b and not sender.by_token:
        return (
            "this KV layout does not keep tokens apart, so blocks must be equal: "
            f"sender has {a} tokens, receiver {b}"
        )
    if max(a, b) % min(a, b):
        return f"blocks don't divide: sender has {a} tokens, receiver {b}"
    return None


@dataclass(frozen=True, slots=True)
class Route:
    """From one sender rank to one receiver rank.

    Positions in the prompt are counted in *strides* of `stride_tokens`, the smaller block. A
    stride is so many units a layer on either side: one, or one a head where heads are kept apart
    and anything is split.
    """

    sender_rank: int
    stride_tokens: int
    unit_bytes: int
    local: _Side
    remote: _Side

    def units(self, strides: range, local: Sequence[int], remote: Sequence[int]) -> _Pairs:
        """Units of these strides: the receiver's blocks are `local`, the sender's `remote`.

        Both lists start at the prompt's first block, those that are not needed included.
        """
        return self.local.units(strides, local), self.remote.units(strides, remote)

    def bound(self, local_blocks: int, remote_blocks: int) -> Route:
        """With the number of blocks each side has, without which units can't be counted."""
        return Route(
            self.sender_rank,
            self.stride_tokens,
            self.unit_bytes,
            self.local.of(local_blocks),
            self.remote.of(remote_blocks),
        )


@dataclass(frozen=True, slots=True)
class _Side:
    layers: int
    heads: tuple[int, ...]
    """Of those that this rank holds, counted from its own first; (0,) for a block kept whole."""
    heads_held: int
    strides_a_block: int
    blocks: int = 0

    def of(self, blocks: int) -> _Side:
        return _Side(self.layers, self.heads, self.heads_held, self.strides_a_block, blocks)

    def units(self, strides: range, blocks: Sequence[int]) -> Units:
        """In the order stride, layer, head: the same on both sides."""
        at = np.arange(strides.start, strides.stop)
        block = np.asarray(blocks, dtype=np.int64)[at // self.strides_a_block]
        a_block = self.heads_held * self.strides_a_block
        head = np.asarray(self.heads, dtype=np.int64) * self.strides_a_block
        layer = np.arange(self.layers, dtype=np.int64) * (self.blocks * a_block)
        first = block * a_block + at % self.strides_a_block
        found = first[:, None, None] + layer[None, :, None] + head[None, None, :]
        units: Units = found.reshape(-1).astype(np.int32)
        return units


_Pairs = tuple["Units", "Units"]


def routes(sender: Layout, receiver: Layout, rank: int) -> list[Route]:
    """What receiver rank `rank` reads, and from whom. Raises `Unlike` where `refusal` says why."""
    if reason := refusal(sender, receiver):
        raise Unlike(reason)
    stride = gcd(sender.block_tokens, receiver.block_tokens)
    split = sender.ranks != receiver.ranks or sender.block_tokens != receiver.block_tokens
    mine = heads_of(receiver, rank)
    if not split:
        whole = mine.count * stride * sender.head_token_bytes
        side = _Side(sender.layers, (0,), 1, 1)
        return [Route(rank, stride, whole, side, side)]
    found, wanted = [], set(range(mine.first, mine.first + mine.count))
    for theirs_rank in range(sender.ranks):
        theirs = heads_of(sender, theirs_rank)
        shared = sorted(wanted & set(range(theirs.first, theirs.first + theirs.count)))
        if not shared:
            continue
        wanted -= set(shared)  # Ranks that hold the same head are read from once.
        local = _Side(
            receiver.layers,
            tuple(h - mine.first for h in shared),
            mine.count,
            receiver.block_tokens // stride,
        )
        remote = _Side(
            sender.layers,
            tuple(h - theirs.first for h in shared),
            theirs.count,
            sender.block_tokens // stride,
        )
        found.append(Route(theirs_rank, stride, stride * sender.head_token_bytes, local, remote))
    return found
