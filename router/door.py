"""Who is let in, who waits, and who is told to come again."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, Final

from router.core.admission import Entry, Queue
from router.core.errors import (
    NoCapacity,
    ObjectiveOutOfReach,
    Overloaded,
    QueueFull,
    RequestTooLarge,
    RouterError,
    TenantOverRate,
    WaitedTooLong,
)
from router.core.limits import Buckets, Limits
from router.demand import Demand

if TYPE_CHECKING:
    from collections.abc import Iterator

    from router.ask import Ask
    from router.core.fleet import Fleet, WorkerView
    from router.core.placement import Placement, Policy, Prompt
    from router.journal import Record


PUMP_S: Final = 0.005
"""At most so often does a worker's step make the queue look for room."""
CONTENTS_MAX: Final = 4 << 30
"""Bytes of images and their like that are held for requests which may have to begin anew."""
TURNS_MAX: Final = 64
"""As many are let in at once, some 10 ms of placing; the next step of any worker lets in more."""
PASSED_MAX: Final = 8
"""How many are passed over, for want of room, before nobody is looked at any more."""


class Door:
    """The queue and the tenants' accounts of one router."""

    def __init__(self, fleet: Fleet, limits: Limits | None = None) -> None:
        self._fleet = fleet
        self.busy = False
        """Somebody's turn it is just now."""
        self._looked_at = -inf
        self._kept: tuple[str, str] | None = None
        """Whose the next room on which worker is."""
        self.limits = limits or Limits()
        self.queue = Queue(self.limits.shares)
        self.refused: Counter[str] = Counter()
        """By error code, since the start."""
        self.demand = Demand()
        self._contents = 0
        self._buckets = Buckets(self.limits)

    # ------------------------------------------------------------ in

    def trouble(self, tenant: str, now: float) -> RouterError | None:
        """Why nobody, or nobody of this tenant, is let in now."""
        if len(self.queue) >= self.limits.queue_max:
            return QueueFull(waiting=len(self.queue), retry_s=self.queue.wait_s(0, now))
        if wait_s := self._buckets.wait_s(tenant, now):
            return TenantOverRate(retry_s=wait_s)
        return None

    def check_objective(self, ask: Ask, prompt: Prompt, policy: Policy) -> None:
        """Raise `ObjectiveOutOfReach` where placed at once it would still be late."""
        if self._objective_s(ask) == inf:
            return
        try:
            placement = policy.place(prompt, list(self._fleet))
        except NoCapacity:
            return  # How long it will wait, the queue will tell.
        if late := self.late(ask, placement, waited_s=0.0):
            raise self.turned_away(late, _uncached(prompt))

    def enter(self, ask: Ask, prompt: Prompt, now: float) -> Entry:
        """Queue it. Raises `trouble`, and `ObjectiveOutOfReach`, and charges nothing."""
        if error := self.trouble(ask.tenant, now) or self._too_large(ask):
            raise self.turned_away(error)
        uncached = _uncached(prompt)
        expected_s, objective_s = self.queue.wait_s(ask.priority, now), self._objective_s(ask)
        if expected_s > objective_s:
            late = ObjectiveOutOfReach(expected_s=expected_s, objective_s=objective_s)
            raise self.turned_away(late, uncached)
        expires_at = now + self.limits.queue_s
        entry = Entry(
            min(expires_at, now + objective_s), now, ask.request_id, ask.tenant, ask.priority,
            tokens=uncached + prompt.output_tokens, uncached=uncached, expires_at=expires_at,
        )  # fmt: skip
        self.demand.arrived(uncached)
        self._buckets.charge(ask.tenant, entry.tokens, now)
        self.queue.push(entry, now)
        self._contents += len(ask.contents)
        return entry

    def _too_large(self, ask: Ask) -> RouterError | None:
        if (size := ask.message_bytes) > self.limits.message_bytes:
            return RequestTooLarge(bytes_=size, bytes_max=self.limits.message_bytes)
        if not ask.contents or self._contents + len(ask.contents) <= CONTENTS_MAX:
            return None
        return Overloaded(holds=f"{self._contents >> 20} MiB of images and their like")

    def emptied(self, ask: Ask) -> Ask:
        """The same without its items' contents, which nobody will need again."""
        self._contents -= len(ask.contents)
        return replace(ask, contents=b"")

    # ------------------------------------------------------------ turns

    def due(self, now: float) -> bool:
        return now - self._looked_at >= PUMP_S

    def turns(self, now: float) -> Iterator[str]:
        """Whose turn it is, one after the other. Who is still in the queue then had no room."""
        queue, passed, let_in = self.queue, set[str](), 0
        self.busy, self._looked_at = True, now
        self._kept = None
        if first := queue.kept_for(now):
            able = [w for w in self._fleet if w.generates]
            roomiest = max(able, key=_room, default=None)
            self._kept = (first.request_id, roomiest.id) if roomiest else None
        try:
            while len(passed) < PASSED_MAX and (entry := queue.next(passed, now)):
                yield entry.request_id
                if entry.request_id in queue:
                    queue.no_room(entry.request_id, now)
                    passed.add(entry.request_id)
                    continue
                let_in += 1
                if self._kept and self._kept[0] == entry.request_id:
                    self._kept = None
                if let_in == TURNS_MAX:
                    self._looked_at = -inf
                    break
        finally:
            self.busy = False

    def free_for(self, request_id: str) -> list[WorkerView]:
        """All workers, but for one that is kept for another. Raises `NoCapacity`."""
        if self._kept is None or request_id == self._kept[0] or self._kept[0] not in self.queue:
            return list(self._fleet)
        others = [w for w in self._fleet if w.id != self._kept[1]]
        if any(w.generates for w in others) or not any(w.generates for w in self._fleet):
            return others
        raise NoCapacity(tokens=0)

    def enter_again(self, entry: Entry, now: float) -> None:
        """A new try for which there is no room: it has a turn of its own to wait for."""
        self.queue.push(replace(entry, expires_at=now + self.limits.queue_s), now)

    # ------------------------------------------------------------ refusals

    def late(self, ask: Ask, placement: Placement, waited_s: float) -> RouterError | None:
        """Why it is no use to begin now."""
        if placement.estimate is None:
            return None
        expected_s, objective_s = waited_s + placement.estimate.ttft_s, self._objective_s(ask)
        if expected_s <= objective_s:
            return None
        return ObjectiveOutOfReach(expected_s=expected_s, objective_s=objective_s)

    def expired(self, now: float) -> list[tuple[Entry, RouterError]]:
        """Who has waited for too long, and what to tell them."""
        retry_s = self.queue.wait_s(0, now)
        return [
            (e, WaitedTooLong(waited_s=now - e.arrived_at, retry_s=retry_s))
            for e in self.queue.expired(now)
        ]

    def refuse(self, entry: Entry, error: RouterError, now: float) -> None:
        """It was let in, and nothing was done for it: its tenant has the tokens back."""
        self.counted(error)
        self._buckets.charge(entry.tenant, -entry.tokens, now)

    def turned_away(self, error: RouterError, uncached: int | None = None) -> RouterError:
        """It is not let in. `uncached`: prompt tokens, where the prompt was looked at."""
        self.demand.turned_away(error, uncached)
        return self.counted(error)

    def judge(self, ask: Ask, record: Record | None) -> None:
        """It was let in, and is over."""
        self._contents -= len(ask.contents)
        if record is not None:
            self.demand.ended(record, self._objective_s(ask), self.limits.itl_s)

    def counted(self, error: RouterError) -> RouterError:
        self.refused[error.code] += 1
        return error

    def _objective_s(self, ask: Ask) -> float:
        return self.limits.ttft_s if ask.ttft_s is None else ask.ttft_s


def _room(w: WorkerView) -> tuple[bool, int, str]:
    return w.sequences_left > 0, w.tokens_left, w.id


def _uncached(prompt: Prompt) -> int:
    return max(1, prompt.tokens - max(prompt.cached_tokens.values(), default=0))
