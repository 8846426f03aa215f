"""What a router takes on, and from whom how much."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Final

from workers.api import MESSAGE_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Mapping

TENANTS_MAX: Final = 10_000
"""Whose accounts are kept; whoever has asked for nothing for longest is forgotten first."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The defaults refuse nothing that a small group could serve."""

    queue_max: int = 10_000
    """Requests that wait."""
    queue_s: float = 300.0
    """None waits longer: it is refused then."""
    prefill_s: float = 30.0
    """A worker with more seconds of prompts queued gets no more."""
    ttft_s: float = inf
    """Objective of requests that bring none: what can't meet it is refused."""
    itl_s: float = inf
    """Objective for the mean time between a stream's tokens: only counted."""
    tenant_tokens_per_s: float = inf
    """Prompt and expected output, for each tenant."""
    tenant_burst_s: float = 10.0
    """A tenant that was quiet may ask for so many seconds of its rate at once."""
    hedge_after_s: float = 2.0
    """A first token so late, and by three times its estimate, is asked of another worker too."""
    hedge_ratio: float = 0.05
    """Most such second tries, as a share of requests; 0 for none."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Of those tenants that have one; others have 1."""
    message_bytes: int = MESSAGE_BYTES_MAX
    """The largest request in bytes, as workers get it. They would not take a larger one."""


class Buckets:
    """A token bucket for each tenant, that a request may leave in debt.

    So the last one is never too large, whatever its size, and whether a tenant may ask is known
    before what it asks for is. Over any time t it is charged for no more than burst + rate * t,
    and one request.
    """

    def __init__(self, limits: Limits) -> None:
        self._rate = limits.tenant_tokens_per_s
        self._burst = self._rate * limits.tenant_burst_s
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """Tokens left, and when they were counted."""

    def wait_s(self, tenant: str, now: float) -> float:
        """Until it may ask; 0 when it may."""
        level = self._level(tenant, now)
        return 0.0 if level > 0 else max(1e-3, -level / self._rate)

    def charge(self, tenant: str, tokens: int, now: float) -> None:
        """Below zero: what was charged for nothing is given back."""
        if self._rate == inf:
            return
        self._levels[tenant] = min(self._burst, self._level(tenant, now) - tokens), now
        self._levels.move_to_end(tenant)
        if len(self._levels) > TENANTS_MAX:
            self._levels.popitem(last=False)

    def _level(self, tenant: str, now: float) -> float:
        if tenant not in self._levels:
            return self._burst
        level, counted_at = self._levels[tenant]
        return min(self._burst, level + (now - counted_at) * self._rate)
