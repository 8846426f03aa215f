"""A transport of the tests' own around a real one: seen, held up, and damaging what it brings."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from kvtransfer import views
from kvtransfer.transports.api import Progress

if TYPE_CHECKING:
    from kvtransfer.transports.api import Memory, Offer, Peer, Transport, Units


class Watched:
    """Reads stay in flight while `open` is not set."""

    def __init__(self, inner: Transport, memory: Memory) -> None:
        self.name, self.abilities = inner.name, inner.abilities
        self._inner, self.memory = inner, memory
        self.open = threading.Event()
        self.open.set()
        self.begun = 0
        self.connects = 0
        """Those that are fenced by now included."""
        self.connect_s = 0.0
        """What it takes to connect, besides."""
        self.flying = 0
        self.most = 0
        """Bytes in flight at once."""
        self.next_is_late = False
        """The next read's bytes come only when `due` is set."""
        self.due = threading.Event()
        self.damage_at: int | None = None
        """Where in its first unit the next read that ends is to be damaged, once."""

    def missing(self, memory: Memory) -> str | None:
        return self._inner.missing(memory)

    def offer(self, memory: Memory) -> Offer:
        return self._inner.offer(memory)

    def reaches(self, description: bytes) -> bool:
        return self._inner.reaches(description)

    def connect(self, memory: Memory, description: bytes, unit_bytes: int) -> WatchedPeer:
        time.sleep(self.connect_s)
        peer = WatchedPeer(self, self._inner.connect(memory, description, unit_bytes), unit_bytes)
        self.connects += 1
        return peer


class WatchedPeer:
    def __init__(self, watched: Watched, inner: Peer, unit_bytes: int) -> None:
        self._watched, self._inner, self._unit_bytes = watched, inner, unit_bytes
        self._flying: dict[int, int] = {}

    def read(self, local: Units, remote: Units) -> Any:
        late, self._watched.next_is_late = self._watched.next_is_late, False
        handle = None if late else self._inner.read(local, remote)
        watched, size = self._watched, len(local) * self._unit_bytes
        watched.flying += size
        watched.most = max(watched.most, watched.flying)
        watched.begun += 1
        found = [handle, local.copy(), remote.copy()]
        self._flying[id(found)] = size
        return found

    def poll(self, handle: Any) -> Progress:
        late = handle[0] is None
        if not self._watched.open.is_set() or (late and not self._watched.due.is_set()):
            return Progress.PENDING
        if late:
            handle[0] = self._inner.read(handle[1], handle[2])
        progress = self._inner.poll(handle[0])
        if progress is not Progress.PENDING:
            self._watched.flying -= self._flying.pop(id(handle), 0)
        if progress is Progress.DONE and self._watched.damage_at is not None:
            self._damage(int(handle[1][0]), self._watched.damage_at)
            self._watched.damage_at = None
        return progress

    def descriptors(self) -> list[int]:
        return self._inner.descriptors() if self._watched.open.is_set() else []

    def fence(self) -> None:
        self._inner.fence()
        self._watched.flying -= sum(self._flying.values())
        self._flying.clear()

    def _damage(self, unit: int, at: int) -> None:
        memory = self._watched.memory
        address = int(memory.addresses(self._unit_bytes)[unit])
        views.array(address, self._unit_bytes)[at] ^= 1
