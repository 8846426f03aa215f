"""Two tries at one request before its first token: (state, rival's, event) -> what becomes of both.

The second is a *hedge*: it begins elsewhere when the first is overdue, and the first goes on. The
one that has something for the client first wins, and the other is called off, so that a client
never gets two streams. One that fails leaves the request to the other, and begins nowhere again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from router.core import lifecycle as life
from router.core.effects import Deliver, Effect, FailClient, Place
from router.core.errors import RequestInvalid


class Left(StrEnum):
    """Which tries are left after an event."""

    BOTH = "both"
    THIS = "this"
    """The one to which the event happened; the rival is called off."""
    RIVAL = "rival"
    """The other: this one is over."""


@dataclass(frozen=True, slots=True)
class Raced:
    left: Left
    state: life.State
    rival: life.State
    effects: tuple[Effect, ...]
    """The try to which the event happened."""
    rival_effects: tuple[Effect, ...] = ()


_OVER = life.Ended(life.Outcome.CANCELLED)
"""A try's end that is not its request's."""


def advance(state: life.State, rival: life.State, event: life.Event) -> Raced:
    """One transition of a try that has a rival."""
    after, asked = life.advance(state, event)
    if _decides(after, asked):
        _, called_off = life.advance(rival, life.ClientGone())
        return Raced(Left.THIS, _alone(after, state, rival), _OVER, asked, called_off)
    if isinstance(after, life.Placing | life.Ended) and after is not state:
        own = tuple(e for e in asked if not isinstance(e, Place | FailClient))
        return Raced(Left.RIVAL, _OVER, _alone(rival, state, rival), own)
    return Raced(Left.BOTH, after, rival, asked)


def _alone(left: life.State, *both: life.State) -> life.State:
    """Another try would come after both: their ids are used up."""
    if not isinstance(left, life.Prefilling | life.Decoding):
        return left
    tries = [s.tries for s in both if not isinstance(s, life.Ended)]
    return replace(left, tries=max(tries, key=lambda t: t.number))


def _decides(after: life.State, asked: tuple[Effect, ...]) -> bool:
    """The client gets something, or has gone, or will get nothing wherever it is tried."""
    if any(isinstance(e, Deliver) for e in asked):
        return True
    if not isinstance(after, life.Ended):
        return False
    invalid = any(isinstance(e, FailClient) and isinstance(e.error, RequestInvalid) for e in asked)
    return invalid or after.outcome is not life.Outcome.FAILED
