"""Which handoffs don't work, by what workers say of themselves and by what came of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from router.core.compat import Unlike, unpaired

if TYPE_CHECKING:
    from collections.abc import Iterable

    from router.core.fleet import Fleet, WorkerView

FAILED_MAX: Final = 5
"""Handoffs of one pair that fail in a row before prompts are kept from it."""
RETRIED_S: Final = 30.0
"""After so long one more is tried: what failed may have been mended."""


@dataclass(frozen=True, slots=True)
class Warned:
    """A warning that an operator is told once: the workers that it is of, and why."""

    message: str
    workers: tuple[str, ...]
    reason: str


@dataclass(slots=True)
class _Pair:
    """Handoffs from one worker to another that failed, without one that succeeded since."""

    failed: int = 0
    reason: str = ""
    kept_from_until: float = 0.0


class Handoffs:
    """Over the fleet's workers; it tells their views from whom they can't read."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._pairs: dict[tuple[str, str], _Pair] = {}
        """By sender and receiver."""
        self._unpaired: dict[str, tuple[Unlike, str]] = {}
        """By worker that can hand off with nobody of the other role."""
        self._told: set[str] = set()
        """Workers of those that the operator has been told of; one is forgotten when it leaves."""

    @property
    def unpaired(self) -> dict[Unlike, int]:
        """How many workers can hand off with nobody of the other role, by what keeps them."""
        found = [what for what, _ in self._unpaired.values()]
        return {what: found.count(what) for what in Unlike}

    @property
    def failing(self) -> int:
        """How many pairs' handoffs have failed `FAILED_MAX` times in a row or more."""
        return sum(pair.failed >= FAILED_MAX for pair in self._pairs.values())

    @property
    def degraded(self) -> str | None:
        """Handoffs that don't work, a line each with its reason; None while none is known."""
        told = [
            f"{', '.join(workers)}: no handoff: {reason}"
            for reason, workers in self._by_reason(self._unpaired).items()
        ]
        told += [
            f"{sender}, {receiver}: handoffs fail: {pair.reason}"
            for (sender, receiver), pair in self._pairs.items()
            if pair.failed >= FAILED_MAX
        ]
        return "\n".join(told) or None

    def _by_reason(self, workers: Iterable[str]) -> dict[str, list[str]]:
        """All that are alike have one reason, and one cure."""
        found: dict[str, list[str]] = {}
        for worker in workers:
            found.setdefault(self._unpaired[worker][1], []).append(worker)
        return found

    # ------------------------------------------------------------ who can by their hellos

    def changed(self) -> list[Warned]:
        """Workers have joined or left. Whom to tell of, each worker once while it stays."""
        self._unpaired = self._look()
        here = {view.id for view in self._fleet}
        self._told &= here
        for gone in [pair for pair in self._pairs if not here >= set(pair)]:
            self._keep(*gone, apart=False)
            del self._pairs[gone]
        news = [worker for worker in self._unpaired if worker not in self._told]
        self._told.update(news)
        return [Warned("no handoff", tuple(w), why) for why, w in self._by_reason(news).items()]

    def _look(self) -> dict[str, tuple[Unlike, str]]:
        """Kinds are compared and not workers: a fleet of hundreds has a handful."""
        kinds: dict[tuple[str, int], list[WorkerView]] = {}
        for view in self._fleet:
            kinds.setdefault((view.hello.role, view.family), []).append(view)
        found = {}
        for kind, views in kinds.items():
            others = [some[0].hello for other, some in kinds.items() if other != kind]
            if len(views) > 1:
                others.append(views[1].hello)
            if trouble := unpaired(views[0].hello, others):
                found.update(dict.fromkeys((v.id for v in views), trouble))
        return found

    # ------------------------------------------------------------ what came of them

    def came(self, sender: str, receiver: str, failed: str | None, now: float) -> Warned | None:
        """A handoff ended. `failed`: why its KV was not used, None when it was.

        What to tell the operator: that the pair's handoffs fail, once until one succeeds.
        """
        if failed is None:
            if self._pairs.pop((sender, receiver), None):
                self._keep(sender, receiver, apart=False)
            return None
        pair = self._pairs.setdefault((sender, receiver), _Pair())
        pair.failed, pair.reason = pair.failed + 1, failed
        if pair.failed < FAILED_MAX:
            return None
        pair.kept_from_until = now + RETRIED_S
        self._keep(sender, receiver, apart=True)
        if pair.failed > FAILED_MAX:
            return None
        return Warned("handoffs fail", (sender, receiver), failed)

    def retry(self, now: float) -> None:
        """Let pairs be tried again whose time has come. Call it about once a second."""
        for (sender, receiver), pair in self._pairs.items():
            if pair.failed >= FAILED_MAX and now >= pair.kept_from_until:
                self._keep(sender, receiver, apart=False)

    def _keep(self, sender: str, receiver: str, *, apart: bool) -> None:
        if view := self._fleet.get(receiver):
            view.unreadable = (view.unreadable - {sender}) | ({sender} if apart else set())
