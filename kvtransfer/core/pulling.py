"""One pull as the receiver sees it: what to ask, what to read, and when the blocks are good.

Pure: it receives `now` and answers with effects, which `kvtransfer.receiver` carries out. A pull
ends once. It ends well only when the sealed manifest and every announced column matched the
request's own chain, every read was over, every checksum that came agreed, and the lease is known to
have outlived the last read. It never ends while a read is in flight: a read that failed its
deadline leaves its blocks in quarantine until the transport says that it is over, or the peer is
fenced.

Positions are counted in strides (`kvtransfer.core.geometry`): `per_column` to a column of the
sender's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvtransfer.core.manifest import mismatch, other_column
from kvtransfer.protocol import LINK_BYTES, NULL_BLOCK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtransfer.core.manifest import Expectation
    from kvtransfer.protocol import Blocks, Sealed


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds."""

    answer_s: float = 5.0
    """For each question to a sender."""
    read_s: float = 30.0
    """For each read."""
    beat_s: float = 2.0
    """Between two signs of life of a sender that computes."""


# ------------------------------------------------------------------------- effects


@dataclass(frozen=True, slots=True)
class AskFollow:
    """Send `Follow`; its answer is `held` or `gone`."""


@dataclass(frozen=True, slots=True)
class AskRenew:
    """Send `Renew`; its answer is `held` or `gone`."""


@dataclass(frozen=True, slots=True)
class TellRelease:
    """Send `Release`."""


@dataclass(frozen=True, slots=True)
class FencePeer:
    """Nothing less ends what is in flight: fence, then tell every pull of that peer."""

    reason: str


@dataclass(frozen=True, slots=True)
class End:
    """It is over. With `error` none of its blocks may be used; nothing is in flight."""

    error: str | None


Effect = AskFollow | AskRenew | TellRelease | FencePeer | End
Effects = list[Effect]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the request needs, once the sender's layout is known."""

    expectation: Expectation
    per_column: int
    """Strides in one column of the sender's."""
    begin: int
    """First stride that the receiver has not got."""
    end: int
    """One past the prompt's last stride."""
    lease_s: float
    sender_rank: int | None = None
    """Whose checksums are comparable with ours; None: nobody's."""
    local: Sequence[Sequence[int]] | None = None
    """Our own blocks, by column, where the sender's columns are cut alike: null blocks must stand
    in the same places. None: every column is one block, and none is null."""


@dataclass(slots=True)
class _Read:
    strides: range
    deadline: float
    stale: bool = False


@dataclass(slots=True)
class Pull:
    """`opened` comes first; until then nothing is known of the sender."""

    timeouts: Timeouts
    asked_at: float | None
    """When the open question was asked; the shell opens the sender first. None: it has answered."""
    wanted: Wanted | None = None
    generation: int = -1
    remote: list[list[int]] = field(default_factory=list)
    """The sender's blocks, by column from the prompt's first."""
    sums: list[list[int]] = field(default_factory=list)
    sealed: Sealed | None = None
    error: str | None = None
    ended: bool = False
    mismatched: bool = False
    """The error is of content: another prompt's blocks, or damaged ones."""
    _taken: int = 0
    _reads: dict[int, _Read] = field(default_factory=dict)
    _next_read: int = 0
    _beat_at: float = 0.0
    _vouched_until: float = float("-inf")
    _damage: str | None = None
    """Of this generation. A preempted one's blocks are another's by now: only a seal tells."""

    # ------------------------------------------------------------ the sender speaks

    def answered(self) -> None:
        """The sender is there. Connecting to its memory comes next, with a bound of its own."""
        self.asked_at = None

    def opened(self, wanted: Wanted, now: float) -> Effects:
        """The sender's layout is known, and fits."""
        self.asked_at = None
        if self.error is not None or self.ended:
            return []
        self.wanted, self._taken = wanted, wanted.begin
        return self._ask(AskFollow(), now)

    def held(self, asked_at: float, now: float) -> Effects:
        """The answer to the question asked at `asked_at`: it is there, and not about to go."""
        assert self.wanted is not None
        self.asked_at = None
        # A lease is renewed well before it ends, however short the sender keeps it.
        self._beat_at = now + min(self.timeouts.beat_s, self.wanted.lease_s / 3)
        self._vouched_until = max(self._vouched_until, asked_at + self.wanted.lease_s)
        return self._settle(now)

    def gone(self, reason: str, now: float) -> Effects:
        return self.fail(reason, now)

    def blocks(self, news: Blocks, now: float) -> Effects:
        """More blocks may be read, or the same from the beginning."""
        if self.ended or self.error is not None or self.wanted is None:
            return []
        if news.generation < self.generation or not news.block_ids:
            return []
        if len(news.links) != len(news.block_ids) * LINK_BYTES:
            count = len(news.block_ids)
            return self.fail(
                f"{count} columns announced with {len(news.links)} bytes of links", now
            )
        if news.generation > self.generation:
            if news.first:
                return self._again(now)
            self._begin(news.generation)
        have = len(self.remote)
        if news.first > have:
            return self._again(now)  # Something in between was lost.
        if reason := other_column(news.links, news.first, self.wanted.expectation):
            self.mismatched = True
            return self.fail(reason, now)
        for number, column in enumerate(news.block_ids[have - news.first :], have):
            if unfit := self._unfit(number, column):
                return self.fail(unfit, now)
            self.remote.append(column)
        if news.sums:
            self.sums += news.sums[have - news.first :]
        rank = self.wanted.sender_rank or 0
        if self.sums and (len(self.sums) != len(self.remote) or len(self.sums[-1]) <= rank):
            return self.fail("the sender announces fewer checksums than columns", now)
        return self._settle(now)

    def _unfit(self, number: int, column: list[int]) -> str | None:
        """Why the sender's blocks of a column are not those that ours need."""
        assert self.wanted is not None
        local = self.wanted.local
        if local is None:
            if len(column) == 1 and NULL_BLOCK not in column:
                return None
            return f"column {number} is one block here, the sender announces {column}"
        ours = local[number]
        if len(ours) != len(column):
            return f"column {number} has {len(ours)} blocks here, the sender announces {column}"
        if number < self.wanted.begin // self.wanted.per_column:
            return None  # Cached, or before every window: nothing of it is read.
        needed = [slot for slot, block in enumerate(ours) if block != NULL_BLOCK]
        if needed == [slot for slot, block in enumerate(column) if block != NULL_BLOCK]:
            return None
        return (
            f"column {number} keeps other blocks: sender has {column}, receiver needs {needed} "
            f"of {len(ours)}"
        )

    def seal(self, news: Sealed, now: float) -> Effects:
        """The prompt is computed and leased."""
        if self.ended or self.error is not None or self.wanted is None:
            return []
        if news.generation < self.generation:
            return []
        if news.generation > self.generation or news.manifest.columns > len(self.remote):
            return self._again(now)
        if reason := mismatch(news.manifest, self.wanted.expectation):
            self.mismatched = True
            return self.fail(reason, now)
        self.sealed = news
        return self._settle(now)

    # ------------------------------------------------------------ reading

    def next_read(self, strides_max: int, now: float) -> tuple[int, range] | None:
        """A read to start now: its number and its strides; None when there is nothing to read."""
        if self.ended or self.error is not None or self.wanted is None:
            return None
        if self._damage is not None or any(r.stale for r in self._reads.values()):
            return None  # Stale ones' bytes would land on top of the new ones.
        until = min(len(self.remote) * self.wanted.per_column, self.wanted.end)
        until = min(until, self._taken + strides_max)
        if until <= self._taken:
            return None
        self._next_read += 1
        strides = range(self._taken, until)
        self._reads[self._next_read] = _Read(strides, now + self.timeouts.read_s)
        self._taken = until
        return self._next_read, strides

    def read_done(self, number: int, now: float, sums: Sequence[int] = ()) -> Effects:
        """A read is over. `sums`: of the sender's columns in it, as they are here now."""
        read = self._reads.pop(number)
        if not read.stale:
            self._damage = self._damage or self._damaged(read, sums)
        return self._settle(now)

    def _damaged(self, read: _Read, sums: Sequence[int]) -> str | None:
        if self.wanted is None or self.wanted.sender_rank is None or not self.sums:
            return None
        first = read.strides.start // self.wanted.per_column
        for column, ours in enumerate(sums, first):
            theirs = self.sums[column][self.wanted.sender_rank]
            if ours != theirs:
                return (
                    f"checksum of column {column} differs: "
                    f"sender has {theirs:016x}, receiver {ours:016x}"
                )
        return None

    # ------------------------------------------------------------ time and trouble

    def tick(self, now: float) -> Effects:
        """Call it a few times a second, and before sleeping longer than that."""
        if self.ended:
            return []
        if any(now > r.deadline for r in self._reads.values()):
            return [FencePeer(f"a read took longer than {self.timeouts.read_s:g} s")]
        if self.asked_at is not None and now > self.asked_at + self.timeouts.answer_s:
            return [FencePeer(f"the sender did not answer within {self.timeouts.answer_s:g} s")]
        if self.wanted is None or self.asked_at is not None or self.error is not None:
            return []
        return self._ask(AskRenew(), now) if now >= self._beat_at else []

    def cancel(self, now: float) -> Effects:
        """Nobody wants it any more."""
        return self.fail("cancelled", now)

    def fail(self, reason: str, now: float) -> Effects:
        if self.ended or self.error is not None:
            return self._settle(now)
        self.error = reason
        return self._settle(now)

    def fenced(self, reason: str) -> Effects:
        """Nothing of this peer can land any more."""
        if self.ended:
            return []
        self._reads.clear()
        self.ended = True
        return [TellRelease(), End(self.error or reason)]

    # ------------------------------------------------------------ inside

    def _begin(self, generation: int) -> None:
        assert self.wanted is not None
        self.generation = generation
        self.remote, self.sums, self.sealed, self._damage = [], [], None, None
        self._taken = self.wanted.begin
        for read in self._reads.values():
            read.stale = True

    def _ask(self, question: AskFollow | AskRenew, now: float) -> Effects:
        self.asked_at = now
        return [question]

    def _again(self, now: float) -> Effects:
        """Something was missed: have it told from its beginning."""
        return self._ask(AskFollow(), now)

    def _settle(self, now: float) -> Effects:
        if self.ended or self._reads:
            return []
        if self.error is not None:
            self.ended = True
            return [TellRelease(), End(self.error)]
        if self.sealed is None or self.wanted is None:
            return []
        if self._damage is not None:
            self.mismatched = True
            return self.fail(self._damage, now)
        if self._taken < self.wanted.end:
            return []
        if now <= self._vouched_until:
            self.ended = True
            return [TellRelease(), End(None)]
        return [] if self.asked_at is not None else self._ask(AskRenew(), now)
