"""The sender's side of every handoff: what was announced, who follows, and which leases run.

Pure: it receives `now`, and answers with the messages to send. A handle's life:

    (awaited) -> computing -> sealed -> ended        awaited: followed before its prompt arrived
        |            |           |
        +------------+-----------+--> gone           restart: generation + 1, blocks forgotten

Every handle that was sealed comes out of `ended` exactly once, when all its receivers have released
it or its lease is over, whichever is first: its blocks may then be freed. Single use: a handle that
ended never comes back.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from kvtransfer.protocol import LINK_BYTES, Blocks, Gone, Held, Sealed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtransfer.protocol import Follow, Manifest, Release, Renew, ToReceiver

    Messages = list[tuple[bytes, ToReceiver]]

REMEMBERED_MAX: Final = 4096
"""Ended handles that are told apart from unknown ones."""
RANKS_MAX: Final = 1024
"""Of one engine."""
FOLLOWED_MAX: Final = 16_384
"""Handles that receivers may wait for; more are refused."""


@dataclass(slots=True)
class _Handoff:
    links: bytes = b""
    ids: list[list[int]] = field(default_factory=list)
    """By column."""
    sums: list[list[int]] = field(default_factory=list)
    generation: int = 0
    manifest: Manifest | None = None
    expected: bool = False
    """Its prompt is here; else somebody follows what may never come."""
    until: float | None = None
    """While awaited or sealed: when it ends by itself."""
    followers: dict[int, bytes] = field(default_factory=dict)
    """Address by receiver rank."""
    ranks: int = 1
    released: set[int] = field(default_factory=set)

    @property
    def all_released(self) -> bool:
        return len(self.released) >= self.ranks


class Book:
    """All handoffs of one sending engine."""

    def __init__(self, epoch: str, lease_s: float) -> None:
        self._epoch = epoch
        self._lease_s = lease_s
        self._live: dict[str, _Handoff] = {}
        self._past: OrderedDict[str, str] = OrderedDict()
        self._ended: list[str] = []
        self.expired_total = 0

    def __len__(self) -> int:
        """Leases that run."""
        return sum(h.manifest is not None for h in self._live.values())

    # ------------------------------------------------------------ the engine

    def expect(self, handle: str, links: bytes) -> bool:
        """Its prompt is here and will be computed. `links`: the chain, known beforehand.

        False: the handle is in use, or has ended (its receivers left before its prompt came); then
        nothing may be kept under it.
        """
        if handle in self._past:
            return False
        handoff = self._live.setdefault(handle, _Handoff())
        if handoff.expected:
            return False
        handoff.expected, handoff.links, handoff.until = True, links, None
        return True

    def computed(
        self, handle: str, generation: int, ids: Sequence[list[int]], sums: Sequence[list[int]]
    ) -> Messages:
        """More columns of this generation, next in order. A stale generation's are ignored.

        `ids`: by column. `sums`: by column, by rank; none at all when off.
        """
        handoff = self._live.get(handle)
        if handoff is None or handoff.generation != generation or not ids:
            return []
        first = len(handoff.ids)
        handoff.ids += ids
        handoff.sums += sums
        return [(to, self._blocks(handle, handoff, first)) for to in handoff.followers.values()]

    def announced(self, handle: str) -> int:
        """Columns of the present generation so far."""
        handoff = self._live.get(handle)
        return 0 if handoff is None else len(handoff.ids)

    def restart(self, handle: str, generation: int) -> None:
        """The engine lost the blocks and will compute them again: what was announced is void."""
        handoff = self._live.get(handle)
        if handoff is not None and handoff.manifest is None:
            handoff.generation = generation
            handoff.ids, handoff.sums = [], []

    def seal(self, handle: str, manifest: Manifest, now: float) -> Messages:
        """The prompt is computed and its blocks are kept from now on, for one lease."""
        handoff = self._live[handle]
        assert handoff.expected
        assert handoff.manifest is None, f"handle {handle} was sealed twice"
        assert len(handoff.ids) == manifest.columns, "sealed before every column was announced"
        handoff.manifest = manifest
        handoff.until = now + self._lease_s
        if handoff.all_released:  # Whoever wanted it has left meanwhile.
            self._end(handle, "released")
            return []
        return [(to, self._sealed(handle, handoff)) for to in handoff.followers.values()]

    def cancel(self, handle: str, reason: str) -> Messages:
        """It will not be sealed: its request ended otherwise. Nothing is kept for it."""
        handoff = self._live.get(handle)
        if handoff is None or handoff.manifest is not None:
            return []
        return self._end(handle, reason)

    def ended(self) -> list[str]:
        """Sealed handles that ended since the last call: their blocks may be freed."""
        ended, self._ended = self._ended, []
        return ended

    # ------------------------------------------------------------ receivers

    def follow(self, follower: bytes, message: Follow, now: float) -> Messages:
        """Everything known so far, and from now on every piece of news."""
        reason = self._unknown(message.epoch, message.handle)
        if not 0 <= message.rank < message.ranks <= RANKS_MAX:
            reason = f"there is no rank {message.rank} of {message.ranks}"
        if reason:
            return [(follower, Gone(message.seq, message.handle, reason))]
        handoff = self._live.get(message.handle)
        if handoff is None:
            if len(self._live) >= FOLLOWED_MAX:
                reason = f"the sender already has {FOLLOWED_MAX} handles"
                return [(follower, Gone(message.seq, message.handle, reason))]
            handoff = self._live[message.handle] = _Handoff(until=now + self._lease_s)
        if reason := self._taken(handoff, follower, message.rank):
            return [(follower, Gone(message.seq, message.handle, reason))]
        handoff.ranks = message.ranks
        handoff.followers[message.rank] = follower
        self._renew(handoff, now)
        news: Messages = [(follower, Held(message.seq, message.handle))]
        if handoff.ids:
            news.append((follower, self._blocks(message.handle, handoff, 0)))
        if handoff.manifest is not None:
            news.append((follower, self._sealed(message.handle, handoff)))
        return news

    def renew(self, follower: bytes, message: Renew, now: float) -> Messages:
        reason = self._unknown(message.epoch, message.handle)
        handoff = self._live.get(message.handle)
        if reason or handoff is None:
            reason = reason or "no such handle"
            return [(follower, Gone(message.seq, message.handle, reason))]
        self._renew(handoff, now)
        answer: Messages = [(follower, Held(message.seq, message.handle))]
        if handoff.manifest is not None:  # It may not know: what was sent once can be lost.
            answer.append((follower, self._sealed(message.handle, handoff)))
        return answer

    def release(self, of: bytes, message: Release) -> None:
        """One receiver is done, or (rank None) nobody else will come. Again is harmless.

        Whoever follows may be reading, and trusts that the blocks stay until it says otherwise: a
        third party's word ends a handle only for those who never followed.
        """
        handoff = self._live.get(message.handle)
        if handoff is None or message.epoch != self._epoch:
            return
        if message.rank is not None and handoff.followers.get(message.rank, of) != of:
            return
        if message.rank is not None and not 0 <= message.rank < handoff.ranks:
            return
        if message.rank is None:
            handoff.released.update(set(range(handoff.ranks)) - set(handoff.followers))
        else:
            handoff.released.add(message.rank)
            handoff.followers.pop(message.rank, None)
        if handoff.all_released and (handoff.manifest is not None or not handoff.expected):
            self._end(message.handle, "released")

    def expire(self, now: float) -> Messages:
        """Leases that are over, and handles awaited in vain. Call it about once a second."""
        over = [h for h, o in self._live.items() if o.until is not None and o.until <= now]
        messages: Messages = []
        for handle in over:
            sealed = self._live[handle].manifest is not None
            self.expired_total += sealed
            reason = "the lease has ended" if sealed else "its prompt never came"
            messages += self._end(handle, reason)
        return messages

    # ------------------------------------------------------------ shared

    def _renew(self, handoff: _Handoff, now: float) -> None:
        # One that is awaited keeps its first deadline: asking does not bring the prompt nearer.
        if handoff.manifest is not None:
            handoff.until = now + self._lease_s

    def _taken(self, handoff: _Handoff, follower: bytes, rank: int) -> str | None:
        """Why it may not follow. Two of one rank would free the blocks under each other."""
        if rank in handoff.released:
            return "released"
        if handoff.followers.get(rank, follower) != follower:
            return f"another receiver follows it as rank {rank}"
        return None

    def _unknown(self, epoch: str, handle: str) -> str | None:
        if epoch != self._epoch:
            return f"sender is of epoch {self._epoch}, the handle of {epoch}"
        return self._past.get(handle)

    def _end(self, handle: str, reason: str) -> Messages:
        handoff = self._live.pop(handle)
        if handoff.manifest is not None:
            self._ended.append(handle)
        self._past[handle] = reason
        if len(self._past) > REMEMBERED_MAX:
            self._past.popitem(last=False)
        return [(to, Gone(0, handle, reason)) for to in handoff.followers.values()]

    def _blocks(self, handle: str, handoff: _Handoff, first: int) -> Blocks:
        count = len(handoff.ids)
        links = handoff.links[first * LINK_BYTES : count * LINK_BYTES]
        return Blocks(
            handle, handoff.generation, first, handoff.ids[first:], links, handoff.sums[first:]
        )

    def _sealed(self, handle: str, handoff: _Handoff) -> Sealed:
        assert handoff.manifest is not None
        return Sealed(handle, handoff.generation, handoff.manifest)
