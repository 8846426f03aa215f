"""Sums of many processes' counters, that no restart makes smaller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class _Last:
    born: float | None
    values: dict[str, float]


class Totals:
    """What processes have counted since each was first seen.

    What one had counted by then is history, of which nobody knows when it was. A process that has
    begun anew, which a counter that fell or another start time tells, counts from zero.
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._last: dict[str, _Last] = {}

    def __getitem__(self, name: str) -> float:
        """0 for what nobody counts."""
        return self._sums.get(name, 0.0)

    def add(self, who: str, values: Mapping[str, float], born: float | None = None) -> None:
        """What a process says now, and when it says that it was started."""
        last = self._last.get(who)
        self._last[who] = _Last(born, dict(values))
        if last is None:
            return
        anew = born != last.born or any(
            values.get(name, 0.0) < before for name, before in last.values.items()
        )
        for name, value in values.items():
            more = value - (0.0 if anew else last.values.get(name, 0.0))
            self._sums[name] = self[name] + more

    def forget(self, who: str) -> None:
        """It is gone; what it counted stays."""
        self._last.pop(who, None)
