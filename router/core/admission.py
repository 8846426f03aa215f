"""The one queue before placement: whose turn it is."""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Final

from router.core.limits import TENANTS_MAX

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

QUANTUM_TOKENS: Final = 8192
"""Tenants so close to each other in what they had of their shares compete by deadline, at most."""
QUANTUM_S: Final = 0.5
"""And no further apart than the queue moves in so long: on a small fleet 8,192 tokens are a long
time, in which a tenant with one request would wait for another's flood."""
PATIENCE_S: Final = 2.0
"""Whose turn it has been for so long, without room for it anywhere, has the next room kept."""
DRAIN_S: Final = 20.0
"""Over about so long it is measured how fast the queue moves."""


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """One request that waits. They sort as one tenant's take turns."""

    deadline_at: float
    """When its first token should be there; at the latest when it has waited too long."""
    arrived_at: float
    request_id: str
    tenant: str = field(compare=False)
    priority: int = field(compare=False)
    """Lower first."""
    tokens: int = field(compare=False)
    """Uncached prompt and expected output."""
    expires_at: float = field(compare=False, default=inf)
    uncached: int = field(compare=False, default=0)
    """Of `tokens`, the prompt's."""


class Queue:
    """Priority first, then deadline among tenants that are level, then fair shares in tokens.

    Shares are held by start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): a tenant's
    clock moves on by its tokens over its share, and one that comes back starts where the others
    are. Of those within a quantum of the hindmost, the earliest deadline goes: two tenants that
    both wait never differ by more than a quantum and a request, whatever deadlines they bring.
    """

    def __init__(self, shares: Mapping[str, float] | None = None) -> None:
        self._shares = shares or {}
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._waiting: dict[int, dict[str, list[Entry]]] = {}
        """By priority and tenant, in the order of their turns."""
        self._clocks: dict[str, float] = {}
        self._clock = 0.0
        """Where the tenant stood that went last."""
        self._blocked_since: dict[str, float] = {}
        """Whose turn it was when there was no room."""
        self._drain = _Drain()
        self.tokens = 0
        self.uncached_tokens = 0
        """Of `tokens`, the prompts'."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def push(self, entry: Entry, now: float) -> None:
        """A repeated one keeps its place."""
        if entry.request_id in self._entries:
            return
        if not self._entries:
            self._drain.begin(now)
        self._entries[entry.request_id] = entry
        self.tokens += entry.tokens
        self.uncached_tokens += entry.uncached
        if not any(entry.tenant in tenants for tenants in self._waiting.values()):
            self._clocks[entry.tenant] = max(self._clock, self._clocks.get(entry.tenant, 0.0))
            if len(self._clocks) > TENANTS_MAX:
                self._forget_quiet_tenants()
        tenants = self._waiting.setdefault(entry.priority, {})
        insort(tenants.setdefault(entry.tenant, []), entry)

    def remove(self, request_id: str, now: float) -> Entry | None:
        """It waits no more: its client left, or it was refused."""
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return None
        self.tokens -= entry.tokens
        self.uncached_tokens -= entry.uncached
        self._blocked_since.pop(request_id, None)
        tenants = self._waiting[entry.priority]
        tenants[entry.tenant].remove(entry)
        if not tenants[entry.tenant]:
            del tenants[entry.tenant]
            if not tenants:
                del self._waiting[entry.priority]
        if not self._entries:
            self._drain.end(now)
            # Nobody waits: nobody is behind.
            self._clocks.clear()
            self._clock = 0.0
        return entry

    def grant(self, request_id: str, now: float) -> Entry | None:
        """It has its turn, and its tenant had so many tokens more."""
        if (entry := self._entries.get(request_id)) is None:
            return None
        self._clock = max(self._clock, self._clocks[entry.tenant])
        self._clocks[entry.tenant] += entry.tokens / self._shares.get(entry.tenant, 1.0)
        if now > entry.arrived_at:  # What never waited says nothing of how long one does.
            self._drain.went(entry.tokens)
        return self.remove(request_id, now)

    def _forget_quiet_tenants(self) -> None:
        """They would start from where the others are anyway, or nearly."""
        waiting = {e.tenant for e in self._entries.values()}
        self._clocks = {t: clock for t, clock in self._clocks.items() if t in waiting}

    # ------------------------------------------------------------ whose turn

    def next(self, passed: Container[str], now: float) -> Entry | None:
        """Whose turn it is, but for those in `passed`, for whom there is no room now."""
        kept = self.kept_for(now)
        if kept is not None and kept.request_id not in passed:
            return kept
        for priority in sorted(self._waiting):
            heads = [
                entry
                for entries in self._waiting[priority].values()
                if (entry := next((e for e in entries if e.request_id not in passed), None))
            ]
            if heads:
                quantum = min(QUANTUM_TOKENS, QUANTUM_S * self._drain.tokens_per_s(now))
                level = min(self._clocks[e.tenant] for e in heads) + quantum
                return min(
                    (e for e in heads if self._clocks[e.tenant] <= level),
                    key=lambda e: (e.deadline_at, self._clocks[e.tenant], e),
                )
        return None

    def no_room(self, request_id: str, now: float) -> None:
        """It was its turn."""
        self._blocked_since.setdefault(request_id, now)

    def kept_for(self, now: float) -> Entry | None:
        """Who has waited for room long enough for the next to be kept for it."""
        for request_id, since in self._blocked_since.items():
            return self._entries[request_id] if now - since >= PATIENCE_S else None
        return None

    def expired(self, now: float) -> list[Entry]:
        return [e for e in self._entries.values() if e.expires_at <= now]

    def wait_s(self, priority: int, now: float) -> float:
        """What another of this priority may expect, as fast as the queue moves now."""
        ahead = sum(
            entry.tokens
            for each, tenants in self._waiting.items()
            if each <= priority
            for entries in tenants.values()
            for entry in entries
        )
        return self._drain.seconds(ahead, now)


class _Drain:
    """How many tokens a second leave the queue while there is one."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._tokens = 0.0
        self._busy_s = 0.0

    def begin(self, now: float) -> None:
        self._since = now

    def end(self, now: float) -> None:
        self._pass(now)
        self._since = None

    def went(self, tokens: int) -> None:
        self._tokens += tokens

    def seconds(self, tokens: int, now: float) -> float:
        """For so many; 0 until something is known."""
        pace = self.tokens_per_s(now)
        return tokens / pace if pace else 0.0

    def tokens_per_s(self, now: float) -> float:
        """0 until something is known."""
        self._pass(now)
        return self._tokens / self._busy_s if self._busy_s > 0 else 0.0

    def _pass(self, now: float) -> None:
        if self._since is not None:
            self._busy_s += now - self._since
            self._since = now
        if self._busy_s > DRAIN_S:  # What was before counts half.
            self._busy_s, self._tokens = self._busy_s / 2, self._tokens / 2
