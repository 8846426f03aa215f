"""Which units of a sender's rank go into which of a receiver's, whatever their splits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import TYPE_CHECKING, Final

import numpy as np

from kvtransfer.protocol import NULL_BLOCK, STATE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kvtransfer.protocol import Layout

    Units = NDArray[np.int32]
    Columns = Sequence[Sequence[int]]

UNITS_MAX: Final = 2**31 - 1
"""Units of one rank's memory: they are counted in 32 bits."""
TOKENS_MAX: Final = 1 << 24
SLOTS_MAX: Final = 4096
"""Block ids of one column."""
HEADS_MAX: Final = 1 << 16
RANKS_MAX: Final = 1024
GROUPS_MAX: Final = 1024
SEGMENTS_MAX: Final = 1 << 16
BLOCK_SIZES_MAX: Final = 16
"""Different ones: columns are their least common multiple."""
BYTES_MAX: Final = 1 << 40
"""Most bytes of a block in one segment, and of one head's token; more is refused."""


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


def described(layout: Layout) -> str:
    """The groups of a layout, for messages: what is kept of how many layers, in which blocks."""
    return ", ".join(
        f"{len(g.segments)} x {g.kind}"
        + (f" of window {g.window}" if g.window else "")
        + f" in blocks of {g.block_tokens}"
        for g in layout.groups
    )


def unsound(layout: Layout) -> str | None:
    """Why these numbers describe no memory at all; None when they do."""
    if not layout.groups or min(layout.kv_heads, layout.ranks) < 1:
        return "it has no groups, heads or ranks"
    if layout.kv_heads > HEADS_MAX or layout.ranks > RANKS_MAX:
        return f"it has more than {HEADS_MAX} heads or {RANKS_MAX} ranks"
    if len(layout.groups) > GROUPS_MAX or len(layout.segments) > SEGMENTS_MAX:
        return f"it has more than {GROUPS_MAX} groups or {SEGMENTS_MAX} segments"
    if not all(1 <= size <= BYTES_MAX for size in (*layout.segments, layout.head_token_bytes or 1)):
        return "it has segments without bytes, or with too many"
    numbers = [n for g in layout.groups for n in g.segments]
    if not numbers or not all(0 <= n < len(layout.segments) for n in numbers):
        return "its groups name segments that it has not"
    if not all(1 <= g.block_tokens <= TOKENS_MAX for g in layout.groups):
        return "its blocks have no tokens, or too many"
    counted = [g.block_tokens for g in layout.groups if g.kind != STATE]
    if len({g.block_tokens for g in layout.groups}) > BLOCK_SIZES_MAX:
        return f"its blocks have more than {BLOCK_SIZES_MAX} different sizes"
    if counted and (column := layout.column_tokens) > min(counted) * SLOTS_MAX:
        return f"its blocks of {counted} tokens make columns of {column}"
    return None


def refusal(sender: Layout, receiver: Layout) -> str | None:
    """Why blocks of the one can't become blocks of the other, naming both; None when they can."""
    for side, layout in (("sender", sender), ("receiver", receiver)):
        if reason := unsound(layout):
            return f"the {side}'s layout is none: {reason}"
    for what in ("content", "dtype", "kv_heads", "head_token_bytes"):
        theirs, ours = getattr(sender, what), getattr(receiver, what)
        if theirs != ours:
            return f"KV {what} differs: sender has {theirs}, receiver {ours}"
    if _kinds(sender) != _kinds(receiver):
        return f"KV groups differ: sender has {described(sender)}, receiver {described(receiver)}"
    if not _split(sender, receiver):
        if _segments(sender) != _segments(receiver):
            return (
                f"KV blocks differ: sender's layers have {sorted(set(sender.segments))} bytes, "
                f"receiver's {sorted(set(receiver.segments))}"
            )
        return None
    return _split_refusal(sender, receiver)


def _kinds(layout: Layout) -> list[tuple[str, int, int]]:
    return [(g.kind, g.window, len(g.segments)) for g in layout.groups]


def _segments(layout: Layout) -> list[list[int]]:
    return [[layout.segments[n] for n in group.segments] for group in layout.groups]


def _blocks(layout: Layout) -> list[int]:
    return [g.block_tokens for g in layout.groups]


def _split(sender: Layout, receiver: Layout) -> bool:
    """Blocks of the one are not whole blocks of the other."""
    return sender.ranks != receiver.ranks or _blocks(sender) != _blocks(receiver)


def _split_refusal(sender: Layout, receiver: Layout) -> str | None:
    unlike_blocks = _blocks(sender) != _blocks(receiver)
    sides = (
        f"sender has {sender.ranks} ranks and {described(sender)}, "
        f"receiver {receiver.ranks} and {described(receiver)}"
    )
    if len(sender.groups) > 1 or not sender.head_token_bytes:
        return f"with unlike layers, ranks and blocks must be equal: {sides}"
    if unlike_blocks and sender.groups[0].window:
        return f"with a window, blocks must be equal: {sides}"
    for side, layout in (("sender", sender), ("receiver", receiver)):
        if max(layout.kv_heads, layout.ranks) % min(layout.kv_heads, layout.ranks):
            return f"{layout.kv_heads} KV heads don't divide over the {side}'s {layout.ranks} ranks"
        whole = heads_of(layout, 0).count * _blocks(layout)[0] * layout.head_token_bytes
        if any(size != whole for size in layout.segments):
            return f"the {side}'s blocks of {layout.segments[0]} bytes are not heads of {whole}"
    if sender.ranks != receiver.ranks and not sender.by_head:
        return f"this KV layout does not keep heads apart, so ranks must be equal: {sides}"
    if unlike_blocks and not sender.by_token:
        return f"this KV layout does not keep tokens apart, so blocks must be equal: {sides}"
    a, b = _blocks(sender)[0], _blocks(receiver)[0]
    if max(a, b) % min(a, b):
        return f"blocks don't divide: sender has {a} tokens, receiver {b}"
    return None


@dataclass(frozen=True, slots=True)
class Route:
    """From one sender rank to one receiver rank.

    Positions in the prompt are counted in *strides* of `stride_tokens`: a column, or where blocks
    are split the smaller block. A unit is the largest piece that every block on the way is a whole
    number of.
    """

    sender_rank: int
    stride_tokens: int
    unit_bytes: int
    local: _Side
    remote: _Side

    @property
    def stride_bytes(self) -> int:
        """Bytes of a stride none of whose blocks is null."""
        return self.unit_bytes * self.local.units_a_stride

    def units(self, strides: range, local: Columns, remote: Columns) -> tuple[Units, Units]:
        """Units of these strides: the receiver's blocks are `local`, the sender's `remote`.

        Both lists start at the prompt's first column, those that are not needed included. Where
        the receiver has the null block, nothing is read. Raises IndexError for strides that
        either has no blocks for.
        """
        ours, theirs = self.local.rows(strides, local), self.remote.rows(strides, remote)
        kept = ours != NULL_BLOCK
        return self.local.units(strides, ours, kept), self.remote.units(strides, theirs, kept)

    def bound(self, local_blocks: int, remote_blocks: int) -> Route:
        """With the number of blocks each side has, without which units can't be counted.

        Raises `Unlike` where there are more units than can be.
        """
        return replace(
            self, local=self.local.of(local_blocks), remote=self.remote.of(remote_blocks)
        )


@dataclass(frozen=True, slots=True)
class _Side:
    sizes: tuple[int, ...]
    """Units of one block, by segment."""
    slots: tuple[tuple[int, ...], ...]
    """The segments that each block id of a column is in."""
    heads: tuple[int, ...] | None = None
    """KV heads that this rank holds, counted from its own first; None for blocks kept whole."""
    strides_a_block: int = 1
    firsts: tuple[int, ...] = ()
    """The first unit of each segment."""

    @property
    def units_a_stride(self) -> int:
        return sum(len(self._pieces(n)) for segments in self.slots for n in segments)

    def of(self, blocks: int) -> _Side:
        firsts, total = [], 0
        for size in self.sizes:
            firsts.append(total)
            total += size * blocks
        if total > UNITS_MAX:
            raise Unlike(f"this KV memory is cut into {total} units, more than {UNITS_MAX}")
        return replace(self, firsts=tuple(firsts))

    def rows(self, strides: range, columns: Columns) -> NDArray[np.int64]:
        """Block ids; shape (strides, slots)."""
        at = np.arange(strides.start, strides.stop) // self.strides_a_block
        table = np.asarray(columns[: int(at[-1]) + 1] if len(at) else [], dtype=np.int64)
        rows: NDArray[np.int64] = table.reshape(-1, len(self.slots))[at]
        return rows

    def units(self, strides: range, rows: NDArray[np.int64], kept: NDArray[np.bool_]) -> Units:
        """In the order slot, segment, stride, piece: the same on both sides."""
        within = np.arange(strides.start, strides.stop) % self.strides_a_block
        found = []
        for slot, segments in enumerate(self.slots):
            at = kept[:, slot]
            blocks, inside = rows[at, slot], within[at]
            for n in segments:
                starts = self.firsts[n] + blocks * self.sizes[n] + inside
                found.append((starts[:, None] + self._pieces(n)[None, :]).reshape(-1))
        units: Units = np.concatenate(found).astype(np.int32)
        return units

    def _pieces(self, segment: int) -> NDArray[np.int64]:
        """Units of a block on this side, from its first unit."""
        if self.heads is None:
            return np.arange(self.sizes[segment], dtype=np.int64)
        return np.asarray(self.heads, dtype=np.int64) * self.strides_a_block


def routes(sender: Layout, receiver: Layout, rank: int) -> list[Route]:
    """What receiver rank `rank` reads, and from whom. Raises `Unlike` where `refusal` says why."""
    if reason := refusal(sender, receiver):
        raise Unlike(reason)
    if not _split(sender, receiver):
        unit = gcd(*receiver.segments)
        sides = [
            _Side(
                tuple(size // unit for size in layout.segments),
                tuple(tuple(segments) for segments in layout.slots),
            )
            for layout in (receiver, sender)
        ]
        return [Route(rank, receiver.column_tokens, unit, *sides)]
    stride = gcd(*_blocks(sender), *_blocks(receiver))
    mine = heads_of(receiver, rank)
    found, wanted = [], set(range(mine.first, mine.first + mine.count))
    for theirs_rank in range(sender.ranks):
        theirs = heads_of(sender, theirs_rank)
        shared = sorted(wanted & set(range(theirs.first, theirs.first + theirs.count)))
        if not shared:
            continue
        wanted -= set(shared)  # Ranks that hold the same head are read from once.
        local = _part(receiver, mine, shared, stride)
        remote = _part(sender, theirs, shared, stride)
        found.append(Route(theirs_rank, stride, stride * sender.head_token_bytes, local, remote))
    return found


def _part(layout: Layout, held: Heads, heads: Sequence[int], stride: int) -> _Side:
    """These heads of a rank that holds `held`."""
    (block_tokens,) = _blocks(layout)
    strides = block_tokens // stride
    return _Side(
        tuple(held.count * strides for _ in layout.segments),
        tuple(tuple(segments) for segments in layout.slots),
        tuple(h - held.first for h in heads),
        strides,
    )
