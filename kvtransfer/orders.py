"""What a receiver is asked for, what it has to work with, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvtransfer.checksums import Checksums, Mode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtransfer.core.items import Item
    from kvtransfer.curve import Pair
    from kvtransfer.protocol import Layout
    from kvtransfer.transports.api import Memory, Transport


@dataclass(frozen=True, slots=True)
class Mine:
    """The receiving rank's own memory."""

    memory: Memory
    layout: Layout
    rank: int
    transports: Sequence[Transport]
    keys: Pair | None = None
    """The key pair that proves to a sender that we are one of its group; None without keys."""
    checksums: Checksums = field(init=False)
    """The receiver thread's."""

    def __post_init__(self) -> None:
        # Frozen: this is how a dataclass sets what it derives.
        made = Checksums(self.memory, self.layout.slots, Mode.OFF)
        object.__setattr__(self, "checksums", made)


@dataclass(frozen=True, slots=True)
class Order:
    """One prompt's KV to fetch, and where to put it."""

    request_id: str
    handle: str
    epoch: str
    endpoint: str
    token_ids: list[int]
    """The tokens whose KV is handed over, from the prompt's first."""
    salt: str | None
    lora: str | None
    model_digest: str
    tokenizer_digest: str
    cached_tokens: int
    """Whole columns of ours that hold the prompt's beginning already."""
    local_blocks: list[list[int]]
    """Ours, by column from the prompt's first; those that are cached are not looked at."""
    items: tuple[Item, ...] = ()
    """Images and the like in the prompt."""


@dataclass(frozen=True, slots=True)
class Pulled:
    """How one pull ended. With `error`, none of its blocks may be used, and none is in flight."""

    request_id: str
    error: str | None
    mismatched: bool = False
    """The error is of content: another prompt's blocks, or damaged ones."""
    transport: str = ""
    bytes: int = 0
    read_s: float = 0.0
    """Time with a read in flight."""
    hidden_s: float = 0.0
    """The part of it while the sender still computed."""
    first_token: int | None = None
