"""The attacks by name, and what each brings home."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from loadtests.attack.scene import Scene

    Run = Callable[[Scene, "Tally"], Awaitable[None]]


@dataclass(slots=True)
class Tally:
    """One attack's observations."""

    statuses: Counter[str] = field(default_factory=Counter)
    """HTTP's, or a word: `closed`, `timeout`."""
    broken: list[str] = field(default_factory=list)
    """Expectations that did not hold: one sentence each."""
    notes: list[str] = field(default_factory=list)

    def saw(self, status: int | str) -> None:
        self.statuses[str(status)] += 1

    def expect(self, held: bool, otherwise: str) -> None:
        """Note a breach unless it held."""
        if not held and otherwise not in self.broken:
            self.broken.append(otherwise)

    def shown(self) -> str:
        return " ".join(f"{status}x{count}" for status, count in sorted(self.statuses.items()))


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack. It must end by itself within `limit_s`."""

    name: str
    what: str
    """One line for the list."""
    run: Run
    limit_s: float
    short: bool
    """It is quick, and needs no quiet machine to be judged: the tests run it."""
    last: bool
    """The router does not survive it, by intent."""
    judged_by_time: bool
    """Nobody should have to wait for long."""


FEW = "-few"
"""Ends the names of attacks that are a short form of another."""
ATTACKS: dict[str, Attack] = {}


def attack(
    name: str,
    what: str,
    *,
    limit_s: float = 30.0,
    short: bool = False,
    last: bool = False,
    stops: bool = False,
    busy: bool = False,
) -> Callable[[Run], Run]:
    """Register a coroutine function under `name`.

    `stops`: it stops a process itself, so nobody is judged by time. `busy`: it works so hard
    itself that the clients beside it are late.
    """

    def register(run: Run) -> Run:
        assert name not in ATTACKS, name
        ATTACKS[name] = Attack(name, what, run, limit_s, short, last, not (stops or busy))
        return run

    return register


def chosen(only: str, *, short: bool) -> list[Attack]:
    """Attacks named in `only`, commas between; all, or all short ones, without names.

    Raises ValueError for a name that no attack has.
    """
    names = [name for name in only.split(",") if name]
    if unknown := [name for name in names if name not in ATTACKS]:
        raise ValueError(f"no attack is called {unknown[0]!r}; there are: {', '.join(ATTACKS)}")
    found = [ATTACKS[n] for n in names] or [
        a for a in ATTACKS.values() if (a.short if short else not a.name.endswith(FEW))
    ]
    return sorted(found, key=lambda a: a.last)
