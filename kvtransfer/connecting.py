"""Connects to a sender's memory in a thread of its own: seconds, at a sender that is stopped."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvtransfer.core.geometry import Unlike, routes
from kvtransfer.core.manifest import Expectation, chain
from kvtransfer.core.pulling import Wanted
from kvtransfer.protocol import NULL_BLOCK
from kvtransfer.transports.api import TransferError
from kvtransfer.transports.choose import connect

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtransfer.core.geometry import Route
    from kvtransfer.orders import Mine, Order
    from kvtransfer.protocol import Opened
    from kvtransfer.transports.api import Peer


@dataclass(slots=True)
class Reach:
    """A sender's memory, every rank of it that we read from."""

    opened: Opened
    """What it said of itself."""
    peers: list[tuple[Route, Peer]] = field(default_factory=list)
    transport: str = ""
    stride_bytes: int = 0
    stride_tokens: int = 1
    alike: int | None = None
    """The sender's rank whose blocks are cut as ours are; else checksums can't be compared."""
    same_columns: bool = False
    """Both sides' columns have the same tokens and groups."""

    def wanted(self, order: Order) -> Wanted:
        column_tokens, tokens = self.opened.layout.column_tokens, len(order.token_ids)
        links = chain(
            order.token_ids, column_tokens, salt=order.salt, lora=order.lora, items=order.items
        )
        return Wanted(
            Expectation(tokens, links, order.model_digest, order.tokenizer_digest),
            per_column=column_tokens // self.stride_tokens,
            begin=self._first_needed(order),
            end=-(-tokens // self.stride_tokens),
            lease_s=self.opened.lease_s,
            sender_rank=self.alike,
            local=order.local_blocks if self.same_columns else None,
        )

    def _first_needed(self, order: Order) -> int:
        """The first stride that is not cached, nor before every group's window."""
        begin = order.cached_tokens // self.stride_tokens
        if not self.same_columns:
            return begin
        needed = (
            number
            for number, column in enumerate(order.local_blocks[begin:], begin)
            if any(block != NULL_BLOCK for block in column)
        )
        return next(needed, begin)

    def descriptors(self) -> list[int] | None:
        """What wakes a reader while reads are in flight; None when only the clock does."""
        found: list[int] = []
        for _, peer in self.peers:
            if not (these := peer.descriptors()):
                return None
            found += these
        return found

    def fence(self) -> None:
        for _, peer in self.peers:
            peer.fence()


class Connecting:
    """One attempt. Whoever began it takes its `result` or abandons it; both from one thread."""

    def __init__(self, mine: Mine, opened: Opened, wake: Callable[[], None]) -> None:
        """`wake` is called, from the other thread, when there is a result."""
        self._mine, self._opened, self._wake = mine, opened, wake
        self._lock = threading.Lock()
        self._abandoned = False
        self._reach: Reach | None = None
        self._error: Exception | None = None
        # It ends by its transport's own timeout, and a process need not wait for it to leave.
        threading.Thread(target=self._run, name="kv-connecting", daemon=True).start()

    def result(self) -> Reach | None:
        """None as long as it goes on. Raises `TransferError` or `Unlike` when it has failed."""
        with self._lock:
            if self._error is not None:
                raise self._error
            return self._reach

    def abandon(self) -> None:
        """Nobody will take the result."""
        with self._lock:
            self._abandoned = True
            if self._reach is not None:
                self._reach.fence()

    def _run(self) -> None:
        reach, error = Reach(self._opened), None
        try:
            _connect(reach, self._mine)
        except (TransferError, Unlike) as failed:
            error = failed
        except Exception as bug:  # noqa: BLE001  # A thread's edge; its starter raises it again.
            error = TransferError(f"internal error: {bug!r}")
        with self._lock:
            if error is not None or self._abandoned:
                reach.fence()
            self._reach, self._error = (None, error) if error else (reach, None)
        self._wake()


def _connect(reach: Reach, mine: Mine) -> None:
    opened = reach.opened
    for route in routes(opened.layout, mine.layout, mine.rank):
        if route.sender_rank >= len(opened.regions):
            raise TransferError(f"the sender has no rank {route.sender_rank}")
        regions = opened.regions[route.sender_rank]
        offered = [(r.transport, r.description) for r in regions]
        name, peer = connect(mine.memory, offered, mine.transports, route.unit_bytes)
        blocks = next(r.blocks for r in regions if r.transport == name)
        bound = route.bound(mine.memory.segments[0].blocks, blocks)
        reach.peers.append((bound, peer))
        reach.transport = name
        reach.stride_tokens = route.stride_tokens
        theirs, ours = opened.layout, mine.layout
        reach.same_columns = theirs.groups == ours.groups
        if reach.same_columns and theirs.ranks == ours.ranks:
            reach.alike = route.sender_rank
        reach.stride_bytes += route.stride_bytes
