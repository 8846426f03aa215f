"""How many prefill and decode workers there should be: looks in, decisions out."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import ceil, inf
from typing import TYPE_CHECKING, Final

from controller.core.capacity import Capacity, Prior
from controller.core.demand import Decision, Size
from controller.core.forecast import Forecast

if TYPE_CHECKING:
    from controller.core.demand import Observed

STALE_LOOKS: Final = 3.0
"""Observations further apart than so many looks say nothing of what came between."""
WARM_LOOKS: Final = 2
"""So many intervals are seen before anything is asked for."""
STARTUP_MAX: Final = 4.0
"""Times what was given: a worker's start is not learnt to be longer."""
KV_TIGHT: Final = 0.92
"""Of the decode workers' KV blocks: with more in use, it is they that new requests wait for."""
SPARE_STEP: Final = 0.01
"""Of a role's spare, in standard deviations of its load: what a request too late adds. One in time
takes away so much that the share that may be late balances it."""
SPARE: Final = 0.0, 0.3
"""Least and most."""
SPARE_LOOK_MAX: Final = 0.05
"""One bad look is one piece of news."""
FALL, FALLING = 0.25, 0.5
"""Where arrivals are foreseen to fall by so many standard deviations or more, so much of the
caution is left out: what is misjudged then, the fall itself soon mends."""
STAY: Final = 0.15
"""Of a worker: one goes only when there is this much more room than its absence needs."""


@dataclass(frozen=True, slots=True)
class SizingPolicy:
    """What whoever runs the group has to say. Seconds."""

    least: Size = field(default_factory=lambda: Size(1, 1))
    most: Size = field(default_factory=lambda: Size(8, 8))
    attainment: float = 0.99
    """Share of requests that should meet both objectives."""
    ttft_s: float = 2.0
    itl_s: float = 0.1
    """The objectives by which requests are judged."""
    look_s: float = 15.0
    startup_s: float = 90.0
    """From asking for a worker until it serves: believed until it has been seen."""
    up_cooldown_s: float = 15.0
    down_cooldown_s: float = 30.0
    """After any change of a role it is not made smaller for so long."""
    down_window_s: float = 90.0
    """A role is made smaller only to what sufficed at every look of so long."""
    up_step: int = 4
    down_step: int = 2
    """Most workers of a role that come or go with one decision; as many more as there are may
    come."""
    caution: float = 1.5
    """Standard deviations of the forecast on top of it, besides the spare that is learnt."""
    prior: Prior = field(default_factory=Prior)


@dataclass(slots=True)
class _Role:
    """What is remembered of one."""

    spare: float = 0.1
    """In standard deviations of its load: what attainment has taught."""
    load: float = 0.0
    """In workers, as last foreseen."""
    ready: int = -1
    settling_at: float = -inf
    """When they last were too few, or not as many."""
    changed_at: float = -inf
    asked: tuple[float, int] | None = None
    """When more were asked for, and how many there would be."""
    needs: deque[tuple[float, float]] = field(default_factory=deque)
    """What each look of the window said: when, and how many workers, not rounded."""


class Sizer:
    """Of one group. `look` at it about every `look_s`; a restarted one begins with what is there.

    1. Forecast arrivals over a worker's start-up, and by them both halves' work (docs/scaling.md).
    2. Each role needs its load in workers, a spare in standard deviations of it, and what works
       off the queue.
    3. More than there are: ask at once. Fewer, at every look of the window: let one go.
    """

    def __init__(self, policy: SizingPolicy) -> None:
        self.policy = policy
        self.capacity = Capacity(policy.prior, policy.ttft_s, policy.itl_s)
        self.startup_s = policy.startup_s
        self._forecast = Forecast()
        self._before: Observed | None = None
        self._began_at = 0.0
        """Since when there is no gap."""
        self._looks = 0
        self._prefill, self._decode = _Role(), _Role()

    def look(self, seen: Observed) -> Decision:
        """What to ask for now. An observation that can't be one changes nothing, and is said."""
        before, self._before = self._before, seen
        if before is None or seen.at - before.at > STALE_LOOKS * self.policy.look_s:
            gap = f"nothing seen for {seen.at - before.at:.0f} s" if before else "the first look"
            return self._begin(seen, gap)
        if seen.at <= before.at:
            self._before = before
            return self._hold(seen, "this has been seen before")
        if went_back(before, seen):
            return self._begin(seen, "a counter went back")
        if frozen(before, seen):
            return self._hold(seen, "requests run and nothing is counted: nobody tells")
        self._learn(before, seen)
        self._looks += 1
        return self._decide(seen)

    # ------------------------------------------------------------ when not to

    def _begin(self, seen: Observed, why: str) -> Decision:
        """History of before a gap is none; what a worker does is still true."""
        self._forecast = Forecast()
        self._began_at, self._looks = seen.at, 0
        self._prefill.needs.clear()
        self._decode.needs.clear()
        return self._hold(seen, why)

    def _hold(self, seen: Observed, why: str) -> Decision:
        facts = {"wanted_prefill": seen.wanted.prefill, "wanted_decode": seen.wanted.decode}
        return Decision(
            seen.at, seen.wanted, f"hold: {why}", {k: float(v) for k, v in facts.items()}
        )

    # ------------------------------------------------------------ learning

    def _learn(self, before: Observed, seen: Observed) -> None:
        self._forecast.count(seen.requests - before.requests, seen.at - before.at)
        self.capacity.learn(before, seen)
        self._learn_startup(self._prefill, seen.at, seen.ready.prefill)
        self._learn_startup(self._decode, seen.at, seen.ready.decode)
        judged = seen.judged - before.judged
        slow_first = judged - (seen.first_in_time - before.first_in_time)
        slow_after = judged - slow_first - (seen.met - before.met)
        # Where KV blocks are what is waited for, the first token is late for want of decode.
        full = seen.kv_share > KV_TIGHT
        if self._settled(self._prefill, seen.at, seen.ready.prefill):
            self._learn_spare(self._prefill, judged, 0.0 if full else slow_first)
        if self._settled(self._decode, seen.at, seen.ready.decode):
            late = slow_after + (slow_first if full else 0.0)
            self._learn_spare(self._decode, judged, late)

    def _settled(self, role: _Role, at: float, ready: int) -> bool:
        """Its workers have been enough, and as many, for a while: who is late now is late for want
        of a spare, and not of a worker that was still to come."""
        if ready < role.load or role.ready != ready:
            role.ready, role.settling_at = ready, at
        return at - role.settling_at > self.policy.down_window_s

    def _learn_startup(self, role: _Role, at: float, ready: int) -> None:
        if role.asked is not None and ready >= role.asked[1]:
            took_s, role.asked = at - role.asked[0], None
            # One that waited an hour for a node is no reason to look an hour ahead.
            took_s = min(took_s, STARTUP_MAX * self.policy.startup_s)
            self.startup_s += 0.3 * (took_s - self.startup_s)

    def _learn_spare(self, role: _Role, judged: float, late: float) -> None:
        """Until the share that is late is the one that may be: half of it for each role."""
        may = (1 - self.policy.attainment) / 2
        change = SPARE_STEP * (late - may * judged)
        change = max(-SPARE_LOOK_MAX, min(SPARE_LOOK_MAX, change))
        role.spare = max(SPARE[0], min(SPARE[1], role.spare + change))

    # ------------------------------------------------------------ deciding

    def _decide(self, seen: Observed) -> Decision:
        facts = self._needs(seen)
        least, most = self.policy.least, self.policy.most
        prefill, why_p = self._of_role(
            self._prefill, seen.at, facts["need_prefill"], seen.wanted.prefill,
            (least.prefill, most.prefill),
        )  # fmt: skip
        decode, why_d = self._of_role(
            self._decode, seen.at, facts["need_decode"], seen.wanted.decode,
            (least.decode, most.decode),
        )  # fmt: skip
        return Decision(seen.at, Size(prefill, decode), f"prefill {why_p}; decode {why_d}", facts)

    def _needs(self, seen: Observed) -> dict[str, float]:
        """Each role's workers, not rounded, and all that they follow from."""
        policy, capacity = self.policy, self.capacity
        horizon_s = self.startup_s + policy.look_s
        ahead, now = self._forecast.ahead(horizon_s), self._forecast.level
        falls = (now - ahead.per_s) / (FALL * ahead.deviation + 1e-9)
        caution = policy.caution * (1 - FALLING * max(0.0, min(1.0, falls)))
        per_s = max(ahead.per_s + caution * ahead.deviation, now)
        tokens_per_s = per_s * capacity.prompt_tokens
        prefill, decode = self._prefill, self._decode
        prefill.load = tokens_per_s / capacity.prefill_tokens_per_s
        decode.load = tokens_per_s * capacity.output_share / capacity.decode_tokens_per_s
        queue_s = capacity.queue_s(seen)
        late_s = max(0.0, queue_s - policy.ttft_s / 2)
        backlog = late_s * seen.ready.prefill / self.startup_s
        return {
            "arrivals_per_s": now,
            "forecast_per_s": ahead.per_s,
            "forecast_deviation": ahead.deviation,
            "sized_for_per_s": per_s,
            "horizon_s": horizon_s,
            "prompt_tokens": capacity.prompt_tokens,
            "output_share": capacity.output_share,
            "prefill_tokens_per_s": capacity.prefill_tokens_per_s,
            "decode_tokens_per_s": capacity.decode_tokens_per_s,
            "streams": capacity.streams,
            "load_prefill": prefill.load,
            "load_decode": decode.load,
            "spare_prefill": prefill.spare,
            "spare_decode": decode.spare,
            "queue_s": queue_s,
            "backlog_prefill": backlog,
            "need_prefill": prefill.load + prefill.spare * prefill.load**0.5 + backlog,
            "need_decode": decode.load + decode.spare * decode.load**0.5,
            "wanted_prefill": float(seen.wanted.prefill),
            "wanted_decode": float(seen.wanted.decode),
            "ready_prefill": float(seen.ready.prefill),
            "ready_decode": float(seen.ready.decode),
        }

    def _of_role(
        self, role: _Role, at: float, need: float, wanted: int, bounds: tuple[int, int]
    ) -> tuple[int, str]:
        policy, (least, most) = self.policy, bounds
        role.needs.append((at, need))
        while role.needs[0][0] < at - policy.down_window_s:
            role.needs.popleft()
        held = max(n for _, n in role.needs)
        count, why = wanted, f"stays {wanted}: it needs {need:.2f}"
        if self._looks < WARM_LOOKS:
            why = f"stays {wanted}: {self._looks} looks so far"
        elif (more := ceil(need)) > wanted:
            if at - role.changed_at < policy.up_cooldown_s:
                why = f"stays {wanted}: it needs {need:.2f} and has just changed"
            else:
                count = min(more, wanted + max(policy.up_step, wanted))
                why = f"{wanted} to {count}: it needs {need:.2f}"
        elif (fewer := ceil(held + STAY)) < wanted:
            if at - self._began_at < policy.down_window_s:
                why = f"stays {wanted}: {held:.2f} would do, but too little has been seen"
            elif at - role.changed_at < policy.down_cooldown_s:
                why = f"stays {wanted}: {held:.2f} would do, and it has just changed"
            else:
                count = max(fewer, wanted - policy.down_step)
                why = f"{wanted} to {count}: {held:.2f} did for {policy.down_window_s:.0f} s"
        bounded = max(least, min(most, count))
        if bounded != count:
            count, why = bounded, f"{why}, bounded to {bounded}"
        if count != wanted:
            role.changed_at = at
            role.asked = (at, count) if count > wanted else None
        return count, why


def went_back(before: Observed, seen: Observed) -> bool:
    """A counter shrank: whoever observes did not hide a restart."""
    names = (
        "requests", "prompt_tokens", "computed_tokens", "output_tokens", "judged",
        "first_in_time", "met",
    )  # fmt: skip
    return any(getattr(seen, name) < getattr(before, name) for name in names)


def frozen(before: Observed, seen: Observed) -> bool:
    """Requests run, and yet none came, none ended and no token was generated."""
    names = ("requests", "output_tokens", "judged")
    same = all(getattr(seen, name) == getattr(before, name) for name in names)
    return same and seen.running > 0 and seen.ready.decode > 0
