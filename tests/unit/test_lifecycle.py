"""Every event in every state that can be reached."""

from __future__ import annotations

from itertools import product

from router.core import effects
from router.core import lifecycle as life
from router.core.errors import NoWorkers, WaitedTooLong
from router.core.tries import REFUSALS_MAX, TRIES_MAX, Tries

_ERROR = NoWorkers("decode", known=0)
_EVENTS: list[life.Event] = [
    life.Turn(), life.NoRoom(), life.Refused(WaitedTooLong(waited_s=1, retry_s=1)),
    life.Placed(None, "d"), life.Placed("p", "d"), life.Placed("p", "d", b"t"),
    life.Placed("p", "d", b"t", reserve=True), life.NotPlaced(_ERROR),
    life.LastStep(), life.PrefillDone(b"t"), life.PrefillDone(b"t", 7), life.PrefillWasAll(),
    life.Tokens(1, finished=False), life.Tokens(1, finished=True),
    *(life.Failed(w, "no", elsewhere=e) for w, e in product("pd", (True, False))),
    *(life.Failed(w, "it drains", elsewhere=True, refused=True) for w in "pd"),
    *(life.Lost(w, "gone") for w in "pdx"),
    life.ClientGone(), life.Enough(), life.Stuck(9.0),
]  # fmt: skip
_ALWAYS = (life.Lost, life.ClientGone, life.Enough, life.Stuck)
"""What may happen at any time."""


def reached() -> dict[life.State, list[tuple[life.Event, life.State, tuple[effects.Effect, ...]]]]:
    """All states from `Waiting` on, each with what every event that it allows does."""
    found: dict[life.State, list[tuple[life.Event, life.State, tuple[effects.Effect, ...]]]] = {}
    todo: list[life.State] = [life.Waiting()]
    while todo:
        state = todo.pop()
        if state in found or (isinstance(state, life.Decoding) and state.said > 3):
            continue
        found[state] = []
        for event in _EVENTS:
            try:
                after, asked = life.advance(state, event)
            except AssertionError:
                assert not isinstance(event, _ALWAYS), f"{event} while {state}"
                continue
            found[state].append((event, after, asked))
            todo.append(after)
    return found


REACHED = reached()


def test_every_kind_of_state_is_reached() -> None:
    kinds = {type(s) for s in REACHED}
    assert kinds == {life.Waiting, life.Placing, life.Prefilling, life.Decoding, life.Ended}


def test_what_waits_has_asked_nothing_of_any_worker() -> None:
    for state, steps in REACHED.items():
        if isinstance(state, life.Waiting):
            for _, after, asked in steps:
                assert all(isinstance(e, effects.Place | effects.FailClient) for e in asked)
                assert isinstance(after, life.Waiting | life.Placing | life.Ended)


def test_a_request_is_queued_where_there_is_no_room_and_only_there() -> None:
    for steps in REACHED.values():
        for event, after, asked in steps:
            queued = any(isinstance(e, effects.Enqueue) for e in asked)
            assert queued == (isinstance(event, life.NoRoom) and isinstance(after, life.Waiting))


def test_the_tries_and_whom_to_avoid_outlast_the_queue() -> None:
    for number, avoid in product((1, 2, 3), (None, "d")):
        tries = Tries(number, refused=number - 1)
        waiting, _ = life.advance(life.Placing(tries, avoid), life.NoRoom())
        placing, asked = life.advance(waiting, life.Turn())
        assert placing == life.Placing(tries, avoid)
        assert asked == (effects.Place(avoid),)


def failing(*, refused: bool) -> int:
    """After how many tries it ends, when every worker says no."""
    state: life.State = life.Placing()
    tries = 0
    while not isinstance(state, life.Ended):
        tries += 1
        state, _ = life.advance(state, life.Placed(None, "d"))
        state, _ = life.advance(state, life.Failed("d", "no", elsewhere=True, refused=refused))
    return tries


def test_who_refuses_has_tried_nothing_but_not_without_end() -> None:
    assert failing(refused=False) == TRIES_MAX
    assert failing(refused=True) == TRIES_MAX + REFUSALS_MAX


def test_who_has_ended_stays_so_and_tells_the_client_once() -> None:
    for state, steps in REACHED.items():
        for _, after, asked in steps:
            told = [e for e in asked if isinstance(e, effects.FailClient)]
            failed = isinstance(after, life.Ended) and after.outcome is life.Outcome.FAILED
            assert len(told) == int(failed and not isinstance(state, life.Ended))
            if isinstance(state, life.Ended):
                assert (after, asked) == (state, ())


def test_a_client_that_leaves_ends_it_whatever_happened() -> None:
    for state in REACHED:
        after, _ = life.advance(state, life.ClientGone())
        assert isinstance(after, life.Ended)
