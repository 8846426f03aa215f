"""A simulated engine's ends of its handoffs: what it keeps for others, where its pulls come from.

There are two kinds of ticket. An engine in a process of its own makes one when a prompt is done.
Engines that share a process also know the router's, as real ones do: the prompt is followed and
kept under the router's handle in the production sender's book, without wire or reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from kvtransfer.protocol import (
    Follow,
    Gone,
    Manifest,
    Release,
    Sealed,
    Ticket,
    TicketUnreadable,
    decode_ticket,
)
from workers.api import MALFORMED, Phase

if TYPE_CHECKING:
    from workers.api import Generate
    from workers.engines.sim_blocks import Handoffs

PULL_NAP_S: Final = 0.001
"""With nothing but pulls to wait for, look again this soon, as vLLM does."""
LOOK_S: Final = 0.01
"""The same, while their prompts are awaited."""
OTHER_PROMPT: Final = "the ticket is of another prompt"

Content = tuple[int, int]
"""A prompt: its tokens' number, and a checksum over them."""
Blocks = tuple[list[int], int]
"""A prompt's: those with a hash, and how many without."""


class SimTicket(msgspec.Struct, frozen=True, array_like=True, tag="tandem-sim"):
    """Of an engine that makes its tickets itself, when the prompt is done."""

    epoch: str
    handle: str
    num_tokens: int
    checksum: int


_encode = msgspec.msgpack.Encoder().encode
_decode_sim_ticket = msgspec.msgpack.Decoder(SimTicket).decode


def read_ticket(content: bytes) -> SimTicket | Ticket | None:
    """The engine's own kind or the router's; None when it is neither."""
    try:
        return _decode_sim_ticket(content)
    except MALFORMED:
        pass
    try:
        return decode_ticket(content)
    except TicketUnreadable:
        return None


class Keeper:
    """The finished prompts that one engine keeps, until somebody has read them or time is over."""

    def __init__(self, epoch: str, handoffs: Handoffs) -> None:
        self._epoch = epoch
        self._handoffs = handoffs
        self._kept: dict[str, Blocks] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def expect(self, generate: Generate) -> str | None:
        """The router's handle for this prompt; None without, or when all who wanted it left."""
        if generate.phase is not Phase.PREFILL or generate.ticket is None:
            return None
        ticket, book = read_ticket(generate.ticket), self._handoffs.book(self._epoch)
        if not isinstance(ticket, Ticket) or book is None:
            return None
        return ticket.handle if book.expect(ticket.handle, b"") else None

    def cancel(self, handle: str | None, reason: str) -> None:
        """Nothing will be kept: whoever follows learns it."""
        book = self._handoffs.book(self._epoch)
        if handle is not None and book is not None:
            book.cancel(handle, reason)

    def seal(self, handle: str, prompt: Content, blocks: Blocks, now: float) -> None:
        """Keep them under the router's handle."""
        if (book := self._handoffs.book(self._epoch)) is not None:
            self._kept[handle] = blocks
            count = len(blocks[0]) + blocks[1]
            book.computed(handle, 0, [[number] for number in range(count)], [])
            book.seal(handle, manifest_of(prompt, count), now)

    def make_ticket(self, handle: str, prompt: Content, blocks: Blocks | None, now: float) -> bytes:
        """Keep them under a ticket of our own. Without blocks it keeps nothing and nobody asks."""
        if blocks is None:
            return _encode(SimTicket("", handle, *prompt))
        self._handoffs.grant(self._epoch, handle, now)
        self._kept[handle] = blocks
        return _encode(SimTicket(self._epoch, handle, *prompt))

    def over(self, now: float) -> list[Blocks]:
        """What need not be kept any longer."""
        return [self._kept.pop(handle) for handle in self._handoffs.ended(self._epoch, now)]


class Done:
    """A prompt that was done when its ticket was made."""

    def __init__(self, handoffs: Handoffs, ticket: SimTicket, prompt: Content) -> None:
        self._handoffs = handoffs
        self._ticket = ticket
        self._prompt = prompt

    def look(self, now: float) -> str | None:
        """Hold it; why that can't be, or None."""
        if (self._ticket.num_tokens, self._ticket.checksum) != self._prompt:
            return OTHER_PROMPT
        return self._handoffs.hold(self._ticket.epoch, self._ticket.handle, now)

    def let_go(self, now: float) -> str | None:
        """The read is over; why it is worth nothing, or None."""
        return self._handoffs.release(self._ticket.epoch, self._ticket.handle, now)

    def abandon(self) -> None:
        """The router, which has the ticket too, releases it."""


class Awaited(Exception):
    """Not yet: the prompt is still being computed, or has not come."""


class Followed:
    """A handle that the router made up, followed in the sender's own book as over the wire."""

    def __init__(self, handoffs: Handoffs, ticket: Ticket, prompt: Content, me: bytes) -> None:
        self._handoffs = handoffs
        self._ticket = ticket
        self._prompt = prompt
        self._me = me

    def look(self, now: float) -> str | None:
        """Follow, and if it is sealed hold it; why that can't be, or None. Raises `Awaited`."""
        epoch, handle = self._ticket.epoch, self._ticket.handle
        book = self._handoffs.book(epoch)
        if book is None:
            return f"sender of epoch {epoch} is gone"
        book.expire(now)
        for _, news in book.follow(self._me, Follow(0, epoch, handle, 0, 1), now):
            if isinstance(news, Gone):
                return news.reason
            if isinstance(news, Sealed):
                if news.manifest == manifest_of(self._prompt, news.manifest.columns):
                    return None
                self.abandon()
                return OTHER_PROMPT
        raise Awaited

    def let_go(self, now: float) -> str | None:
        """The read is over; why it is worth nothing, or None."""
        reason = self.look(now)
        self.abandon()
        return reason

    def abandon(self) -> None:
        """Nobody will read here any more; what is kept for us may go."""
        if (book := self._handoffs.book(self._ticket.epoch)) is not None:
            book.release(self._me, Release(self._ticket.epoch, self._ticket.handle, 0))


@dataclass(slots=True)
class Pull:
    """One request's, from its reservation on."""

    source: Done | Followed
    early: bool = False
    """Its blocks were there before the prompt was done: only the end remains to be read then."""
    ready_at: float | None = None
    """None while the prompt is awaited."""
    seconds: float = 0.0

    def look_again_s(self, now: float, told_s: float = 0.0) -> float:
        """`told_s`: whoever drives the engine says when the prompt is there, within so long."""
        if self.ready_at is None:
            return max(LOOK_S, told_s)
        return self.ready_at - now if told_s else min(PULL_NAP_S, self.ready_at - now)


def source_of(
    content: bytes, handoffs: Handoffs, prompt: Content, me: bytes
) -> Done | Followed | None:
    """None when the ticket can't be read."""
    match read_ticket(content):
        case SimTicket() as ticket:
            return Done(handoffs, ticket, prompt)
        case Ticket() as ticket:
            return Followed(handoffs, ticket, prompt, me)
    return None


def release(content: bytes, handoffs: Handoffs, now: float) -> None:
    """A router gives a ticket up. Whoever follows a handle keeps it: it may be reading."""
    match read_ticket(content):
        case SimTicket(epoch, handle):
            handoffs.release(epoch, handle, now)
        case Ticket(_, epoch, handle):
            if (book := handoffs.book(epoch)) is not None:
                book.release(b"", Release(epoch, handle))


def manifest_of(prompt: Content, blocks: int) -> Manifest:
    num_tokens, checksum = prompt
    return Manifest(num_tokens, blocks, checksum.to_bytes(4, "little"), "", "", None)
