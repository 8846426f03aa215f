"""A request's life as (state, event) -> (state, effects); the shell carries effects out.

    Waiting -> Placing -> Prefilling -> Decoding -> Ended
       ^          |  |         |            ^
       +-no room--+  +-- one worker does both      any failure before the decode worker's first
                                                   token -> Placing again

Only `Waiting` is anything that no worker knows of; what is refused is refused there.

While `Prefilling`, the decode worker may have been asked already (`reserved`): it has set blocks
aside and reads what is computed. The prefill worker may say the first token itself (`relayed`); the
decode worker repeats it, so that either may be heard first, and a request whose client has that one
token can still begin anew elsewhere, from there.

An attempt that was given up may still answer: its prefill may finish after our abort. There is no
state for that. The law is kept without one: a ticket that nobody awaits is released (`stray`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from router.core.effects import (
    AbortOn,
    Deliver,
    Effect,
    Enqueue,
    FailClient,
    Place,
    ReleaseKV,
    SendBoth,
    SendDecode,
    SendPrefill,
)
from router.core.errors import (
    RequestInvalid,
    RouterError,
    TimedOut,
    WorkerFailed,
    WorkerLost,
)
from router.core.tries import FIRST, Tries


class Outcome(StrEnum):
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


# ------------------------------------------------------------------------- states


@dataclass(frozen=True, slots=True)
class Waiting:
    """In the queue, until it is its turn and there is room."""

    tries: Tries = FIRST
    avoid: str | None = None


@dataclass(frozen=True, slots=True)
class Placing:
    tries: Tries = FIRST
    avoid: str | None = None


@dataclass(frozen=True, slots=True)
class Prefilling:
    """`ticket`: None when the prefill worker will make one."""

    prefill: str
    decode: str
    tries: Tries
    ticket: bytes | None = None
    reserved: bool = False
    """The decode worker has been asked."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """`ticket` is kept until the decode worker's first token: the KV may still be at `prefill`."""

    decode: str
    tries: Tries
    prefill: str | None = None
    ticket: bytes | None = None
    said: int = 0
    """Tokens that the decode worker has said, the relayed one included."""
    relayed: int | None = None
    """The first token, where the client has it from the prefill worker."""

    @property
    def tokens_sent(self) -> int:
        return self.said or int(self.relayed is not None)

    @property
    def can_begin_anew(self) -> bool:
        """The client has nothing but what a new try's prompt can take in."""
        return self.tokens_sent <= int(self.relayed is not None)


@dataclass(frozen=True, slots=True)
class Ended:
    outcome: Outcome


State = Waiting | Placing | Prefilling | Decoding | Ended


def sender(state: State) -> str | None:
    """The worker that computes the prompt for another one, while that one has not answered."""
    return state.prefill if isinstance(state, (Prefilling, Decoding)) else None


def awaited(state: State) -> str | None:
    """The worker from which the next tokens are to come, or what they need; None once the decode
    worker has begun: nobody else can go on then."""
    match state:
        case Prefilling():
            return state.prefill
        case Decoding(said=0):
            return state.decode
    return None


def is_on(state: State, worker: str) -> bool:
    """It would be touched by the worker's going: it computes or decodes there, or has KV there."""
    match state:
        case Prefilling():
            return worker in (state.prefill, state.decode)
        case Decoding():
            return worker == state.decode or (worker == state.prefill and state.ticket is not None)
    return False


# ------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Turn:
    """It is this request's."""


@dataclass(frozen=True, slots=True)
class NoRoom:
    """Workers are there, and none has room for it now."""


@dataclass(frozen=True, slots=True)
class Refused:
    """It may wait no longer, or to no avail."""

    error: RouterError


@dataclass(frozen=True, slots=True)
class Placed:
    prefill: str | None
    decode: str
    ticket: bytes | None = None
    """Of the handoff; None when the prefill worker will make it."""
    reserve: bool = False
    """Ask the decode worker at once."""


@dataclass(frozen=True, slots=True)
class NotPlaced:
    error: RouterError


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """`ticket`: the prefill worker's own, if it makes them. `relayed`: the first token came too."""

    ticket: bytes | None = None
    relayed: int | None = None


@dataclass(frozen=True, slots=True)
class LastStep:
    """The prefill worker is about to be done."""


@dataclass(frozen=True, slots=True)
class PrefillWasAll:
    """The first token was the last."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The decode worker said `count` tokens; `finished` with its last delta."""

    count: int
    finished: bool


@dataclass(frozen=True, slots=True)
class Failed:
    """A worker gave the request up. `elsewhere`: another may succeed."""

    worker: str
    reason: str
    elsewhere: bool
    refused: bool = False
    """It did not take it on."""


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


Event = (
    Turn | NoRoom | Refused | Placed | NotPlaced | LastStep | PrefillDone | PrefillWasAll | Tokens
    | Failed | Lost | ClientGone | Enough | Stuck
)  # fmt: skip

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
    if isinstance(state, Waiting):
        return _waiting(state, event)
    return state, ()  # What comes after the end changes nothing.


def can_begin_anew(state: State) -> bool:
    """Another worker may yet be asked all of it."""
    return state.can_begin_anew if isinstance(state, Decoding) else not isinstance(state, Ended)


def stray(worker: str, ticket: bytes) -> tuple[Effect, ...]:
    """A ticket arrived that nobody awaits: its request ended or went elsewhere meanwhile."""
    return (ReleaseKV(worker, ticket),)


def unsaid(state: State, token_ids: list[int]) -> list[int] | None:
    """What the decode worker says that the client has not got from the prefill worker.

    None when it contradicts it: it computed the prompt itself, and fell on another first token.
    """
    if not isinstance(state, Decoding) or state.relayed is None or state.said or not token_ids:
        return token_ids
    return token_ids[1:] if token_ids[0] == state.relayed else None


def _waiting(state: Waiting, event: Event) -> Step:
    match event:
        case Turn():
            return Placing(state.tries, state.avoid), (Place(state.avoid),)
        case Refused(error):
            return Ended(Outcome.FAILED), (FailClient(error),)
        case ClientGone() | Enough():
            return Ended(Outcome.CANCELLED), ()
        case Stuck(waited_s):
            return Ended(Outcome.FAILED), (FailClient(TimedOut(waited_s=waited_s)),)
        case Lost():
            return state, ()
    raise AssertionError(f"{event} while {state}")


def _placing(state: Placing, event: Event) -> Step:
    match event:
        case NoRoom():
            return Waiting(state.tries, state.avoid), (Enqueue(),)
        case Placed(prefill=None, decode=decode):
            return Decoding(decode, state.tries), (SendBoth(decode),)
        case Placed(str(prefill), decode, ticket, reserve):
            after = Prefilling(prefill, decode, state.tries, ticket, reserve)
            if reserve and ticket is not None:
                return after, (SendDecode(decode, ticket), SendPrefill(prefill, ticket))
            return after, (SendPrefill(prefill, ticket),)
        case NotPlaced(error) | Refused(error):
            return Ended(Outcome.FAILED), (FailClient(error),)
        case ClientGone() | Enough():
            return Ended(Outcome.CANCELLED), ()
        case Lost() | Stuck():
            return state, ()
    raise AssertionError(f"{event} while {state}")


def _prefilling(state: Prefilling, event: Event) -> Step:
    match event:
        case PrefillDone(ticket, relayed):
            ticket = state.ticket or ticket
            assert ticket is not None, "a finished prefill has a ticket"
            after = Decoding(state.decode, state.tries, state.prefill, ticket, relayed=relayed)
            told = () if relayed is None else _DELIVER
            return after, told if state.reserved else (*told, SendDecode(state.decode, ticket))
        case LastStep():
            if state.reserved or state.ticket is None:
                return state, ()
            return replace(state, reserved=True), (SendDecode(state.decode, state.ticket),)
        case PrefillWasAll():
            return Ended(Outcome.FINISHED), (*_unreserve(state), *_DELIVER)
        case Tokens(count, finished):
            # The decode worker has everything, and was heard before the prefill worker.
            if finished:
                return Ended(Outcome.FINISHED), _DELIVER
            return Decoding(state.decode, state.tries, said=count), _DELIVER
        case Failed(worker, refused=refused):
            return _anew(state, worker, _failure(event), refused)
        case Lost(worker, reason) if worker in (state.prefill, state.decode):
            # If the decode worker: the prefill worker's cache makes the new try cheap.
            return _anew(state, worker, WorkerLost(worker, reason=reason, tokens_sent=0))
        case ClientGone() | Enough():
            return Ended(Outcome.CANCELLED), _call_off(state)
        case Stuck(waited_s):
            return _anew(state, state.prefill, TimedOut(waited_s=waited_s))
        case Lost():
            return state, ()
    raise AssertionError(f"{event} while {state}")


def _anew(state: Prefilling, avoid: str, error: RouterError, refused: bool = False) -> Step:
    after, effects = _again(state.tries.next(refused=refused), avoid, error)
    # Whoever failed has forgotten it; to be told so again is harmless.
    return after, (*_call_off(state), *effects)


def _call_off(state: Prefilling) -> tuple[Effect, ...]:
    release = (ReleaseKV(state.prefill, state.ticket),) if state.ticket is not None else ()
    return (AbortOn(state.prefill), *_unreserve(state), *release)


def _unreserve(state: Prefilling) -> tuple[Effect, ...]:
    return (AbortOn(state.decode),) if state.reserved else ()


def _decoding(state: Decoding, event: Event) -> Step:
    match event:
        case Tokens(count, finished):
            if finished:
                return Ended(Outcome.FINISHED), _DELIVER
            return _told(state, count), _DELIVER
        case Failed(worker, refused=refused) if worker == state.decode:
            error = _failure(event)
            if not state.can_begin_anew:
                return Ended(Outcome.FAILED), (FailClient(error),)
            after, effects = _again(state.tries.next(refused=refused), worker, error, state.relayed)
            return after, (AbortOn(state.decode), *_give_up_kv(state), *effects)
        case Lost(worker, reason) if worker == state.decode:
            lost = WorkerLost(worker, reason=reason, tokens_sent=state.tokens_sent)
            if not state.can_begin_anew:
                return Ended(Outcome.FAILED), (FailClient(lost),)
            after, effects = _again(state.tries.next(refused=False), worker, lost, state.relayed)
            return after, (*_give_up_kv(state), *effects)
        case Lost() | Failed() | LastStep() | PrefillDone() | PrefillWasAll():
            return state, ()  # Whatever was not pulled yet, the decode worker computes itself.
        case ClientGone():
            return Ended(Outcome.CANCELLED), (AbortOn(state.decode), *_give_up_kv(state))
        case Enough():
            return Ended(Outcome.FINISHED), (AbortOn(state.decode), *_give_up_kv(state))
        case Stuck(waited_s):
            called_off = (AbortOn(state.decode), *_give_up_kv(state))
            late = TimedOut(waited_s=waited_s)
            if not state.can_begin_anew:
                return Ended(Outcome.FAILED), (*called_off, FailClient(late))
            tries = state.tries.next(refused=False)
            after, effects = _again(tries, state.decode, late, state.relayed)
            return after, (*called_off, *effects)
    raise AssertionError(f"{event} while {state}")


def _told(state: Decoding, count: int) -> Decoding:
    if not count:
        return state
    # The first token proves that the pull is over, so the ticket is spent.
    said, relayed = state.said + count, state.relayed
    return Decoding(state.decode, state.tries, state.prefill, None, said, relayed)


def _again(tries: Tries | None, avoid: str, error: RouterError, after: int | None = None) -> Step:
    if isinstance(error, RequestInvalid) or tries is None:
        return Ended(Outcome.FAILED), (FailClient(error),)
    return Placing(tries, avoid), (Place(avoid, after),)


def _failure(failed: Failed) -> RouterError:
    if failed.elsewhere:
        return WorkerFailed(failed.worker, reason=failed.reason)
    return RequestInvalid(reason=failed.reason)


def _give_up_kv(state: Decoding) -> tuple[Effect, ...]:
    if state.prefill is None or state.ticket is None:
        return ()
    return (ReleaseKV(state.prefill, state.ticket),)
