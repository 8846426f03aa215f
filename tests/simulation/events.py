"""What happened in a run, in order: a fingerprint of all of it, and the last of it to read."""

from __future__ import annotations

import hashlib
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

KEPT = 400


class Events:
    def __init__(self, clock: Callable[[], float]) -> None:
        self.count = 0
        self._clock = clock
        self._hash = hashlib.blake2b(digest_size=16)
        self._last: deque[str] = deque(maxlen=KEPT)

    @property
    def now(self) -> float:
        return self._clock()

    def note(self, what: str, *facts: object) -> None:
        """Values must print alike in every process: no ids of objects, no sets."""
        line = f"{self._clock():.9f} {what} {' '.join(map(str, facts))}"
        self.count += 1
        self._hash.update(line.encode())
        self._last.append(line)

    @property
    def fingerprint(self) -> str:
        return self._hash.hexdigest()

    def tail(self, lines: int, without: str = "sent") -> list[str]:
        return [line for line in self._last if line.split()[1] != without][-lines:]
