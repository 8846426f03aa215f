"""The simulated engine's KV blocks, and who holds which lease on them."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from kvtransfer.core.sending import Book
from workers.engines.sim_leases import Leases

if TYPE_CHECKING:
    from collections.abc import Sequence


class BlockPool:
    """Counts blocks; only those with a hash (full blocks of a prompt) have an identity.

    A block is *fresh* (one owner, no hash yet), *shared* (hashed, one owner or more) or idle
    (hashed, no owner, evicted when room is needed). Idle blocks count as free, as in vLLM.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._fresh = 0
        self._owners: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self.evicted: list[int] = []
        """Since somebody last took them; nobody's loss when they are forgotten."""

    @property
    def free(self) -> int:
        return self.total - self._fresh - len(self._owners)

    def cached(self, hashes: Sequence[int]) -> int:
        """How many of these, from the first on without a gap, are here."""
        for count, block in enumerate(hashes):
            if block not in self._owners and block not in self._idle:
                return count
        return len(hashes)

    def take(self, shared: Sequence[int], fresh: int) -> bool:
        """Own these cached blocks and so many fresh ones; False, and nothing done, without room."""
        woken = sum(block in self._idle for block in shared)
        if woken + fresh > self.free:
            return False
        for block in shared:
            self._idle.pop(block, None)
            self._owners[block] = self._owners.get(block, 0) + 1
        self._fresh += fresh
        while len(self._idle) > self.free:
            self.evicted.append(self._idle.popitem(last=False)[0])
        return True

    def publish(self, block: int) -> bool:
        """A fresh block is full and now has a hash; False when the pool has its like already."""
        if block in self._owners or block in self._idle:
            return False
        self._fresh -= 1
        self._owners[block] = 1
        return True

    def give_back(self, shared: Sequence[int], fresh: int) -> None:
        """Backwards, so that a prompt's tail is evicted before its head."""
        self._fresh -= fresh
        for block in reversed(shared):
            self._owners[block] -= 1
            if not self._owners[block]:
                del self._owners[block]
                self._idle[block] = None


class Handoffs:
    """Leases of all simulated engines in one process, by epoch.

    Engines in several processes can't see each other's: an epoch that never joined is taken at
    its word, unless `only_here`.
    """

    def __init__(self, *, only_here: bool = False) -> None:
        self._only_here = only_here
        self._leases: dict[str, Leases] = {}
        self._ended: dict[str, list[str]] = {}
        self._left: set[str] = set()
        self._books: dict[str, Book] = {}
        """Of handles that routers made up."""

    def join(self, epoch: str, lease_s: float) -> None:
        self._leases[epoch] = Leases(lease_s)
        self._books[epoch] = Book(epoch, lease_s)
        self._ended[epoch] = []

    def leave(self, epoch: str) -> None:
        """The engine is gone: its tickets are worthless."""
        if self._leases.pop(epoch, None) is not None:
            self._ended.pop(epoch)
            self._books.pop(epoch)
            self._left.add(epoch)

    def book(self, epoch: str) -> Book | None:
        """None when the engine is gone, or in another process."""
        return self._books.get(epoch)

    def grant(self, epoch: str, handle: str, now: float) -> None:
        self._leases[epoch].grant(handle, now)

    def hold(self, epoch: str, handle: str, now: float) -> str | None:
        """Keep it for another lease; why that can't be, or None."""
        if (leases := self._leases.get(epoch)) is None:
            return self._stranger(epoch)
        return None if leases.renew(handle, now) is not None else "the lease has ended"

    def release(self, epoch: str, handle: str, now: float) -> str | None:
        """End it; why it was over before, or None: what was read until now is good."""
        if (leases := self._leases.get(epoch)) is None:
            return self._stranger(epoch)
        if leases.release(handle, now) is None:
            return "the lease has ended"
        self._ended[epoch].append(handle)
        return None

    def ended(self, epoch: str, now: float) -> list[str]:
        """Handles released or expired since the last call, each once."""
        if (book := self._books.get(epoch)) is None:
            return []
        book.expire(now)
        ended = self._ended[epoch] + self._leases[epoch].expire(now) + book.ended()
        self._ended[epoch] = []
        return ended

    def _stranger(self, epoch: str) -> str | None:
        if epoch in self._left or self._only_here:
            return f"sender of epoch {epoch} is gone"
        return None
