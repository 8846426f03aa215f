"""Who leads, by a Lease object: one contender's part, as (state, event, now) to (state, request).

1. Whoever holds the Lease writes it anew every `retry_s`. It believes that it leads for `led_s`
   from when it *sent* the last such write that was answered well, and no longer, by its own clock.
2. Whoever does not hold it looks every `retry_s`. It takes the Lease when it has seen the same
   version for the `duration_s` that the holder wrote, by its own clock, or when nobody holds it.
3. Every write names the version that it is based on, so of two at once one gets a 409.

`led_s` is less than `duration_s`: by the time that somebody else may write, the holder has stopped
to believe, however long it was stopped and whatever was lost on the way, while the clocks' *rates*
differ by less than a fifth. What they show is never compared: the times in the object are for
people.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

_API: Final = "/apis/coordination.k8s.io/v1/namespaces"
RETRY_AFTER_S_MAX: Final = 60.0


@dataclass(frozen=True, slots=True)
class Terms:
    """Whose Lease it is, and its times. `identity` is of one life of one process."""

    identity: str
    name: str
    namespace: str
    duration_s: int = 15
    """Without a new version for so long, others may take it."""

    @property
    def led_s(self) -> float:
        return self.duration_s * 2 / 3

    @property
    def retry_s(self) -> float:
        """Between two requests at most, and at least half of it."""
        return self.duration_s * 2 / 15

    @property
    def answer_s(self) -> float:
        """How long an answer may take."""
        return self.duration_s / 5

    @property
    def vacant_s_max(self) -> float:
        """While all requests are answered, somebody leads after so long at the latest.

        A request whose answer is lost, a pause, a look, a holder that is gone, and a write.
        """
        return self.duration_s + self.retry_s + 3 * self.answer_s


@dataclass(frozen=True, slots=True)
class Request:
    """To the API server."""

    method: str
    path: str
    body: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Due:
    """`next_at` has come. `wall` is the time for people, as the API writes it."""

    wall: str


@dataclass(frozen=True, slots=True)
class Answered:
    """The request under way has an answer."""

    status: int
    body: bytes
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """It has none, and whether it was carried out nobody knows."""

    reason: str


@dataclass(frozen=True, slots=True)
class Leave:
    """The process ends: give the Lease away. A request under way is to be ended first."""


Event = Due | Answered | NoAnswer | Leave


@dataclass(frozen=True, slots=True)
class Seen:
    """The Lease as it was last read or written; without a version there is none."""

    version: str
    since: float
    """When this contender first knew of this version."""
    holder: str = ""
    lasts_s: float = 0.0
    metadata: dict[str, Any] = field(default_factory=dict, compare=False)
    spec: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def free_at(self) -> float:
        """When somebody else may write it."""
        return self.since + self.lasts_s if self.holder or not self.version else -inf


@dataclass(frozen=True, slots=True)
class Asked:
    """The request under way."""

    method: str
    sent_at: float
    releases: bool = False


@dataclass(frozen=True, slots=True)
class State:
    """Of one contender; it begins with none of it."""

    seen: Seen | None = None
    certain: bool = False
    """No write of ours may have come after what was `seen`."""
    lead_until: float = -inf
    asked: Asked | None = None
    next_at: float = -inf
    give_up_at: float = inf
    """When the request under way has no answer."""
    leaving: bool = False
    done: bool = False
    """It has left."""
    trouble: str | None = None
    """Why the last request came to nothing."""

    def leads(self, now: float) -> bool:
        """It may act as the leader, now."""
        return now < self.lead_until


class Election:
    """One contender's decisions. It keeps nothing: that is all in the state."""

    def __init__(self, terms: Terms, uniform: Callable[[float, float], float]) -> None:
        """`uniform` draws a number between two, that contenders do not come at one moment."""
        self.terms = terms
        self._uniform = uniform
        self._path = f"{_API}/{terms.namespace}/leases"

    def step(self, state: State, event: Event, now: float) -> tuple[State, Request | None]:
        """Only `Due` brings a request, and none before `next_at` or while one is under way."""
        match event:
            case Due(wall):
                if state.asked or state.done or now < state.next_at:
                    return state, None
                return self._ask(state, wall, now)
            case Answered():
                assert state.asked is not None, "nothing was asked"
                return self._answered(state, state.asked, event, now), None
            case NoAnswer(reason):
                assert state.asked is not None, "nothing was asked"
                return self._failed(state, reason, now), None
            case Leave():
                assert state.asked is None, "one request at a time"
                # Before anybody may know that it is free.
                return replace(state, lead_until=-inf, leaving=True, next_at=now), None

    # ------------------------------------------------------------ what to ask

    def _ask(self, state: State, wall: str, now: float) -> tuple[State, Request | None]:
        seen, me = state.seen, self.terms.identity
        if state.leaving and (seen is None or (state.certain and seen.holder != me)):
            return replace(state, done=True), None
        if seen is None or not state.certain:
            return self._send(state, self._look(), now)
        if state.leaving:
            return self._send(state, self._write(seen, "", wall), now, releases=True)
        if seen.holder == me or now >= seen.free_at:
            return self._send(state, self._write(seen, me, wall), now)
        return self._send(state, self._look(), now)

    def _send(
        self, state: State, request: Request, now: float, *, releases: bool = False
    ) -> tuple[State, Request]:
        asked = Asked(request.method, now, releases)
        return replace(state, asked=asked, give_up_at=now + self.terms.answer_s), request

    def _look(self) -> Request:
        return Request("GET", f"{self._path}/{self.terms.name}")

    def _write(self, seen: Seen, holder: str, wall: str) -> Request:
        before, changes = seen.spec, holder != seen.holder
        spec = before | {
            "holderIdentity": holder,
            # A free one need not be waited for even by who does not know what free means.
            "leaseDurationSeconds": self.terms.duration_s if holder else 1,
            "renewTime": wall,
        }
        if changes or "acquireTime" not in spec:
            spec["acquireTime"] = wall
        transitions = before.get("leaseTransitions") or 0
        spec["leaseTransitions"] = transitions + int(bool(changes and holder and seen.version))
        about = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease"}
        if not seen.version:
            return Request(
                "POST", self._path, about | {"metadata": {"name": self.terms.name}, "spec": spec}
            )
        body = about | {"metadata": seen.metadata, "spec": spec}
        return Request("PUT", f"{self._path}/{self.terms.name}", body)

    # ------------------------------------------------------------ what came of it

    def _answered(self, state: State, asked: Asked, answer: Answered, now: float) -> State:
        looked = asked.method == "GET"
        if answer.status in (200, 201):
            seen = self._read(answer.body, state.seen, now)
            if seen is None:
                return self._failed(state, "the answer is no Lease", now)
            if asked.releases:
                return replace(state, asked=None, seen=seen, done=True, trouble=None)
            if looked:
                return self._looked(state, seen, now)
            if seen.holder != self.terms.identity:
                return self._failed(state, "the answer is another's Lease", now)
            led_until = asked.sent_at + self.terms.led_s
            leads = replace(state, seen=seen, certain=True, lead_until=led_until, trouble=None)
            return self._waits(leads, now)
        said = f"HTTP {answer.status} {_message(answer.body)}".strip()
        if answer.status == 404 and looked:
            return self._looked(state, self._missing(state.seen, now), now)
        if answer.status in (404, 409) and not looked:
            # Lost. Or it was a write of our own, of which we were never told: a look will tell.
            return replace(self._failed(state, said, now), lead_until=-inf)
        return self._failed(state, said, now, answer.retry_after_s)

    def _looked(self, state: State, seen: Seen, now: float) -> State:
        state = replace(state, seen=seen, certain=True, trouble=None)
        if seen.holder == self.terms.identity:
            return replace(state, asked=None, give_up_at=inf, next_at=now)
        state = self._waits(replace(state, lead_until=-inf), now)
        if state.leaving:
            return replace(state, next_at=now)
        return replace(state, next_at=max(now, min(state.next_at, seen.free_at)))

    def _failed(
        self, state: State, reason: str, now: float, retry_after_s: float | None = None
    ) -> State:
        assert state.asked is not None
        certain = state.certain and state.asked.method == "GET"
        state = self._waits(replace(state, certain=certain, trouble=reason), now)
        if retry_after_s is None:
            return state
        at = now + min(retry_after_s, RETRY_AFTER_S_MAX) + self._uniform(0.0, self.terms.retry_s)
        return replace(state, next_at=max(at, state.next_at))

    def _waits(self, state: State, now: float) -> State:
        pause_s = self._uniform(self.terms.retry_s / 2, self.terms.retry_s)
        return replace(state, asked=None, give_up_at=inf, next_at=now + pause_s)

    def _missing(self, before: Seen | None, now: float) -> Seen:
        """There is no Lease. Who deleted it did not ask its holder, who may still believe."""
        if before is None:
            return Seen("", -inf)
        if not before.version:
            return before
        return Seen("", now, lasts_s=max(before.lasts_s, self.terms.duration_s))

    def _read(self, body: bytes, before: Seen | None, now: float) -> Seen | None:
        try:
            lease = _LEASE.decode(body)
        except msgspec.DecodeError:
            return None
        version = lease.metadata.get("resourceVersion")
        if not isinstance(version, str) or not version:
            return None
        holder, lasts_s = (lease.spec.get(n) for n in ("holderIdentity", "leaseDurationSeconds"))
        same = before is not None and before.version == version
        return Seen(
            version,
            before.since if before and same else now,
            holder if isinstance(holder, str) else "",
            lasts_s if isinstance(lasts_s, int) and lasts_s > 0 else self.terms.duration_s,
            lease.metadata,
            lease.spec,
        )


class _Lease(msgspec.Struct):
    metadata: dict[str, Any]
    spec: dict[str, Any] = msgspec.field(default_factory=dict)


class _Status(msgspec.Struct):
    message: str = ""


_LEASE: Final = msgspec.json.Decoder(_Lease)
_STATUS: Final = msgspec.json.Decoder(_Status)


def _message(body: bytes) -> str:
    try:
        return _STATUS.decode(body).message
    except msgspec.DecodeError:
        return ""
