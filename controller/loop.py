"""Look, decide, and ask for replicas if we lead: the same loop in every replica."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from math import inf
from typing import TYPE_CHECKING, Final

from controller.records import Kind, Record, Records
from controller.scale import ScaleFailed

if TYPE_CHECKING:
    from controller.core.demand import Decision, Observed, Size
    from controller.core.sizing import Sizer
    from controller.leader import Leadership
    from controller.observe import Observer, RoleNames
    from controller.scale import Scales

log = logging.getLogger(__name__)

TELL_S: Final = 60.0
"""At rest the log has a line so often."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a loop works with."""

    observer: Observer
    sizer: Sizer
    leadership: Leadership
    scales: Scales
    roles: RoleNames


class Loop:
    """`look` every `look_s`. A follower decides as a leader does, and so is warm when it is one.

    A dry run has no leader: it takes part in no election and writes nothing at all.
    """

    def __init__(self, parts: Parts, look_s: float, *, dry_run: bool) -> None:
        self.records = Records()
        self.failures: Counter[str] = Counter()
        """By reason: scales that could not be written."""
        self.looked_at: float | None = None
        """On the loop's clock, when the last look that saw everything was over."""
        self.ended_at = -inf
        """The last one of any kind."""
        self.seen: Observed | None = None
        self.decided: Size | None = None
        self.look_s = look_s
        self._parts = parts
        self.dry_run = dry_run
        self._told: tuple[object, ...] = ()
        self._told_at = -inf

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            await self.look()
            # One that was stopped, or late, has missed looks and does not make up for them.
            due = max(due + self.look_s, loop.time())
            await asyncio.sleep(due - loop.time())

    async def look(self) -> None:
        now = asyncio.get_running_loop().time
        seen = await self._parts.observer.look()
        if seen.observed is None:
            record = Record(_wall(), now(), Kind.HELD, f"hold: {seen.missing}")
        else:
            self.looked_at, self.seen = now(), seen.observed
            decision = self._parts.sizer.look(seen.observed)
            self.decided = decision.size
            record = await self._act(seen.observed.wanted, decision)
        self.ended_at = now()
        self.records.add(record)
        self._tell(record)

    async def _act(self, wanted: Size, decision: Decision) -> Record:
        kind, trouble = Kind.KEPT, ""
        if self.dry_run:
            kind = Kind.KEPT if decision.size == wanted else Kind.DRY_RUN
        elif not self._parts.leadership.leads:
            kind = Kind.FOLLOWED
        elif decision.size != wanted:
            trouble = await self._scale(wanted, decision.size)
            kind = Kind.FAILED if trouble else Kind.SCALED
        return Record(
            _wall(),
            asyncio.get_running_loop().time(),
            kind,
            decision.reason,
            (wanted.prefill, decision.size.prefill),
            (wanted.decode, decision.size.decode),
            decision.facts,
            trouble,
        )

    async def _scale(self, wanted: Size, size: Size) -> str:
        """What went wrong. One role's failure does not keep the other from what it needs."""
        roles, trouble = self._parts.roles, []
        for role, before, after in (
            (roles.prefill, wanted.prefill, size.prefill),
            (roles.decode, wanted.decode, size.decode),
        ):
            if before == after:
                continue
            try:
                await self._parts.scales.write(role, after, lambda: self._parts.leadership.left_s)
            except ScaleFailed as error:
                self.failures[error.failure] += 1
                trouble.append(str(error))
        return "; ".join(trouble)

    def _tell(self, record: Record) -> None:
        """What changes something or is new, and at rest a line a minute."""
        held = record.reason if record.kind is Kind.HELD else ""
        about = record.kind, record.prefill, record.decode, record.trouble, held
        acts = record.kind in (Kind.SCALED, Kind.FAILED)
        if not acts and about == self._told and record.at_s < self._told_at + TELL_S:
            return
        self._told, self._told_at = about, record.at_s
        level = logging.WARNING if record.kind in (Kind.HELD, Kind.FAILED) else logging.INFO
        facts = {name: round(value, 3) for name, value in record.facts.items()}
        sizes = {"prefill": record.prefill, "decode": record.decode}
        said = {"kind": record.kind, "reason": record.reason, **sizes, "facts": facts}
        log.log(
            level, "decided", extra=said | ({"trouble": record.trouble} if record.trouble else {})
        )


def _wall() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
