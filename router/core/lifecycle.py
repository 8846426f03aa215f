"""A request's life as (state, event) -> (state, effects); the shell carries effects out.

    Placing -> Prefilling -> Decoding -> Ended
       |            |            ^
       +--- one worker does both-+      any failure before the first token -> Placing again

An attempt that was given up may still answer: its prefill may finish after our abort. There is no
state for that. The law is kept without one: a ticket that nobody awaits is released (`stray`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from router.core.errors import (
    NoWorkers,
    RequestInvalid,
    RouterError,
    TimedOut,
    WorkerFailed,
    WorkerLost,
)

ATTEMPTS_MAX = 3


class Outcome(StrEnum):
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


# ------------------------------------------------------------------------- states


@dataclass(frozen=True, slots=True)
class Placing:
    attempt: int = 1


@dataclass(frozen=True, slots=True)
class Prefilling:
    prefill: str
    decode: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Decoding:
    """`ticket` is kept until the first token: until then the KV may still be at `prefill`."""

    decode: str
    attempt: int
    prefill: str | None = None
    ticket: bytes | None = None
    tokens_sent: int = 0


@dataclass(frozen=True, slots=True)
class Ended:
    outcome: Outcome


State = Placing | Prefilling | Decoding | Ended

# ------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Placed:
    prefill: str | None
    decode: str


@dataclass(frozen=True, slots=True)
class NotPlaced:
    error: NoWorkers


@dataclass(frozen=True, slots=True)
class PrefillDone:
    ticket: bytes


@dataclass(frozen=True, slots=True)
class Tokens:
    """`count` new tokens; `finished` with the engine's last delta."""

    count: int
    finished: bool


@dataclass(frozen=True, slots=True)
class Failed:
    """The worker gave the request up. `elsewhere`: another may succeed."""

    reason: str
    elsewhere: bool


@dataclass(frozen=True, slots=True)
class Lost:
    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class ClientGone:
    pass


@dataclass(frozen=True, slots=True)
class Enough:
    """The router itself found the end (a stop string); the worker would go on."""


@dataclass(frozen=True, slots=True)
class Stuck:
    waited_s: float


Event = Placed | NotPlaced | PrefillDone | Tokens | Failed | Lost | ClientGone | Enough | Stuck

# ------------------------------------------------------------------------- effects


@dataclass(frozen=True, slots=True)
class Place:
    """Find workers again, rather not `avoid`; answer with `Placed` or `NotPlaced`."""

    avoid: str | None = None


@dataclass(frozen=True, slots=True)
class SendPrefill:
    worker: str


@dataclass(frozen=True, slots=True)
class SendDecode:
    worker: str
    ticket: bytes


@dataclass(frozen=True, slots=True)
class SendBoth:
    worker: str


@dataclass(frozen=True, slots=True)
class AbortOn:
    worker: str


@dataclass(frozen=True, slots=True)
class ReleaseKV:
    worker: str
    ticket: bytes


@dataclass(frozen=True, slots=True)
class Deliver:
    """Hand the delta that caused this to the client."""


@dataclass(frozen=True, slots=True)
class FailClient:
    error: RouterError


Effect = Place | SendPrefill | SendDecode | SendBoth | AbortOn | ReleaseKV | Deliver | FailClient
Step = tuple[State, tuple[Effect, ...]]

_DELIVER = (Deliver(),)


def advance(state: State, event: Event) -> Step:
    """One transition. Raises AssertionError for an event that the shell may never send."""
    if isinstance(state, Decoding):  # The path of every token comes first.
        return _decoding(state, event)
    if isinstance(state, Prefilling):
        return _prefilling(state, event)
    if isinstance(state, Placing):
        return _placing(state, event)
    return state, ()  # What comes after the end changes nothing.


def stray(worker: str, ticket: bytes) -> tuple[Effect, ...]:
    """A ticket arrived that nobody awaits: its request ended or went elsewhere meanwhile."""
    return (ReleaseKV(worker, ticket),)


def _placing(state: Placing, event: Event) -> Step:
    match event:
        case Placed(prefill=None, decode=decode):
            return Decoding(decode, state.attempt), (SendBoth(decode),)
        case Placed(prefill=str(prefill), decode=decode):
            return Prefilling(prefill, decode, state.attempt), (SendPrefill(prefill),)
        case NotPlaced(error):
            return Ended(Outcome.FAILED), (FailClient(error),)
        case ClientGone() | Enough():
            return Ended(Outcome.CANCELLED), ()
        case Lost() | Stuck():
            return state, ()
    raise AssertionError(f"{event} while {state}")


def _prefilling(state: Prefilling, event: Event) -> Step:
    match event:
        case PrefillDone(ticket):
            after = Decoding(state.decode, state.attempt, state.prefill, ticket)
            return after, (SendDecode(state.decode, ticket),)
        case Failed(reason, elsewhere):
            return _again(state.attempt, state.prefill, _failure(state.prefill, reason, elsewhere))
        case Lost(worker, reason) if worker == state.prefill:
            error = WorkerLost(worker, reason=reason, tokens_sent=0)
            return _again(state.attempt, worker, error)
        case Lost(worker, reason) if worker == state.decode:
            # Its blocks were to come here. The prefill worker's cache makes the new try cheap.
            error = WorkerLost(worker, reason=reason, tokens_sent=0)
            placing, effects = _again(state.attempt, worker, error)
            return placing, (AbortOn(state.prefill), *effects)
        case ClientGone() | Enough():
            return Ended(Outcome.CANCELLED), (AbortOn(state.prefill),)
        case Stuck(waited_s):
            late = TimedOut(waited_s=waited_s)
            return Ended(Outcome.FAILED), (AbortOn(state.prefill), FailClient(late))
        case Lost():
            return state, ()
    raise AssertionError(f"{event} while {state}")


def _decoding(state: Decoding, event: Event) -> Step:
    match event:
        case Tokens(count, finished):
            if finished:
                return Ended(Outcome.FINISHED), _DELIVER
            return _told(state, count), _DELIVER
        case Failed(reason, elsewhere):
            error = _failure(state.decode, reason, elsewhere)
            if state.tokens_sent:
                return Ended(Outcome.FAILED), (FailClient(error),)
            after, effects = _again(state.attempt, state.decode, error)
            return after, (*_give_up_kv(state), *effects)
        case Lost(worker, reason) if worker == state.decode:
            lost = WorkerLost(worker, reason=reason, tokens_sent=state.tokens_sent)
            if state.tokens_sent:
                return Ended(Outcome.FAILED), (FailClient(lost),)
            after, effects = _again(state.attempt, worker, lost)
            return after, (*_give_up_kv(state), *effects)
        case Lost():
            return state, ()  # Whatever was not pulled yet, the decode worker computes itself.
        case ClientGone():
            return Ended(Outcome.CANCELLED), (AbortOn(state.decode), *_give_up_kv(state))
        case Enough():
            return Ended(Outcome.FINISHED), (AbortOn(state.decode),)
        case Stuck(waited_s):
            effects = (AbortOn(state.decode), *_give_up_kv(state))
            return Ended(Outcome.FAILED), (*effects, FailClient(TimedOut(waited_s=waited_s)))
    raise AssertionError(f"{event} while {state}")


def _told(state: Decoding, count: int) -> Decoding:
    if not count:
        return state
    # The first token proves that the pull is over, so the ticket is spent.
    return Decoding(state.decode, state.attempt, state.prefill, None, state.tokens_sent + count)


def _again(attempt: int, avoid: str, error: RouterError) -> Step:
    if isinstance(error, RequestInvalid) or attempt >= ATTEMPTS_MAX:
        return Ended(Outcome.FAILED), (FailClient(error),)
    return Placing(attempt + 1), (Place(avoid),)


def _failure(worker: str, reason: str, elsewhere: bool) -> RouterError:
    return WorkerFailed(worker, reason=reason) if elsewhere else RequestInvalid(reason=reason)


def _give_up_kv(state: Decoding) -> tuple[Effect, ...]:
    if state.prefill is None or state.ticket is None:
        return ()
    return (ReleaseKV(state.prefill, state.ticket),)
