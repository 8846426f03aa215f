"""What was decided lately, and what became of it: `tandem controller explain` shows it."""

from __future__ import annotations

from collections import Counter, deque
from enum import StrEnum
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator

RECORDS_MAX: Final = 480
"""Two hours of looks, four a minute."""


class Kind(StrEnum):
    """What became of a decision."""

    KEPT = "kept"
    """There are as many as there should be."""
    SCALED = "scaled"
    DRY_RUN = "dry_run"
    """It would have been scaled."""
    FOLLOWED = "followed"
    """Another one leads; this is what we would have done."""
    HELD = "held"
    """Not all could be seen, and nothing was decided."""
    FAILED = "failed"
    """It could not be written; the next look tries again."""


class Record(msgspec.Struct, frozen=True):
    """One look."""

    at: str
    """UTC, for people."""
    at_s: float
    """The event loop's clock."""
    kind: Kind
    reason: str
    prefill: tuple[int, int] | None = None
    """Replicas asked for so far, and those that there should be."""
    decode: tuple[int, int] | None = None
    facts: dict[str, float] = {}
    trouble: str = ""
    """Why it was not written."""


class Records:
    """The last of them, the oldest first, and how many there were of each kind."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._kept: deque[Record] = deque(maxlen=RECORDS_MAX)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._kept)

    @property
    def last(self) -> Record | None:
        return self._kept[-1] if self._kept else None

    def add(self, record: Record) -> None:
        self.counts[record.kind] += 1
        self._kept.append(record)

    def since(self, at_s: float, most: int) -> list[Record]:
        """The last `most` of those from then on."""
        found = [record for record in self._kept if record.at_s >= at_s]
        return found[-most:] if most else []
