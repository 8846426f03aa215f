"""Reads inside one process, for tests and the simulator, with a sender that can be stopped."""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from weakref import WeakValueDictionary

from kvtransfer.transports.api import Abilities, Memory, Progress, TransferError
from kvtransfer.transports.unit_views import Views, check_range

if TYPE_CHECKING:
    from kvtransfer.transports.api import Units

NAME: Final = "memory"

_offers: WeakValueDictionary[bytes, MemoryOffer] = WeakValueDictionary()
"""Both sides live here: a description is the key to the sender's."""


class MemoryTransport:
    """Copies when it is polled. While paused, its offers are like those of a stopped process."""

    name = NAME
    abilities = Abilities(one_sided=True, cuda=False, needs="both sides in one process")

    def __init__(self) -> None:
        self.paused = False
        self._peers: list[MemoryPeer] = []

    def missing(self, memory: Memory) -> str | None:
        if memory.device == "cpu":
            return None
        return f"memory moves cpu memory only, and this is on {memory.device}"

    def offer(self, memory: Memory) -> MemoryOffer:
        if reason := self.missing(memory):
            raise TransferError(reason)
        return MemoryOffer(memory, self)

    def reaches(self, description: bytes) -> bool:
        return description in _offers

    def connect(self, memory: Memory, description: bytes, unit_bytes: int) -> MemoryPeer:
        if reason := self.missing(memory):
            raise TransferError(reason)
        offer = _offers.get(description)
        if offer is None or offer.closed:
            raise TransferError("memory can't connect: no such offer in this process")
        if offer.transport.paused:
            raise TransferError("memory can't connect: no answer")
        return offer.connected(Views(memory, unit_bytes))

    def pause(self) -> None:
        """Stop the senders of this transport's offers: their reads stay pending."""
        self.paused = True

    def resume(self) -> None:
        """Wake them: what is pending lands, also where nobody polls for it any more."""
        self.paused = False
        for peer in self._peers:
            peer.land()

    def serve(self, peer: MemoryPeer) -> None:
        self._peers = [p for p in self._peers if not p.fenced] + [peer]


class MemoryOffer:
    """Memory of this process, until `close`: which is also what a killed sender looks like."""

    def __init__(self, memory: Memory, transport: MemoryTransport) -> None:
        self.memory = memory
        self.transport = transport
        self.closed = False
        self.description = secrets.token_bytes(16)
        _offers[self.description] = self

    def connected(self, local: Views) -> MemoryPeer:
        peer = MemoryPeer(local, Views(self.memory, local.unit_bytes), self)
        self.transport.serve(peer)
        return peer

    def close(self) -> None:
        self.closed = True


@dataclass(eq=False, slots=True)
class _Read:
    local: Units
    remote: Units
    progress: Progress = Progress.PENDING


class MemoryPeer:
    """Reads land in the order they were started in, at the next poll of any."""

    def __init__(self, local: Views, remote: Views, offer: MemoryOffer) -> None:
        self._local = local
        self._remote = remote
        self._offer = offer
        self._pending: list[_Read] = []
        self._lock = threading.Lock()  # A test's thread may resume while the peer's own polls.
        self.fenced = False

    def read(self, local: Units, remote: Units) -> _Read:
        if len(local) != len(remote):
            raise TransferError(f"{len(local)} local units for {len(remote)} remote ones")
        self._local.check(local, "the receiver")
        check_range(remote, self._remote.units, "the sender")
        if self.fenced:
            raise TransferError("the peer is fenced")
        if self._offer.closed:
            raise TransferError("the sender is gone: it closed its offer")
        read = _Read(local.copy(), remote.copy())
        with self._lock:
            self._pending.append(read)
        if not len(local):
            read.progress = Progress.DONE
        return read

    def poll(self, handle: _Read) -> Progress:
        if handle.progress is Progress.PENDING:
            self.land()
        return handle.progress

    def descriptors(self) -> list[int]:
        return []

    def fence(self) -> None:
        with self._lock:
            self.fenced = True
            self._settle(Progress.FAILED)

    def land(self) -> None:
        """What the sender would do now, with all that is pending."""
        with self._lock:
            if self._offer.closed:
                self._settle(Progress.FAILED)
            elif not self._offer.transport.paused:
                for read in self._pending:
                    pairs = zip(self._local.each(read.local), self._remote.each(read.remote),
                                strict=True)  # fmt: skip
                    for ours, theirs in pairs:
                        ours[:] = theirs
                self._settle(Progress.DONE)

    def _settle(self, progress: Progress) -> None:
        for read in self._pending:
            read.progress = progress
        self._pending.clear()
