"""Every event in every pair of states that two tries at one request can be in."""

from __future__ import annotations

from itertools import product

from router.core import effects, race
from router.core import lifecycle as life
from tests.unit.test_lifecycle import _EVENTS, REACHED

_WORKERS = {"p": "p2", "d": "d2"}
_CLIENT = (effects.Deliver, effects.FailClient)


def tries_of_one() -> list[life.State]:
    """States of a first try whose decode worker has said nothing yet."""
    running = [s for s in REACHED if isinstance(s, life.Prefilling | life.Decoding)]
    return [s for s in running if life.awaited(s) is not None and s.tries == life.FIRST]


def elsewhere(state: life.State) -> life.State:
    """The same on other workers, one try later."""
    if isinstance(state, life.Prefilling):
        return life.Prefilling("p2", "d2", life.Tries(2), b"t2" if state.ticket else None)
    assert isinstance(state, life.Decoding)
    sender = _WORKERS.get(state.prefill or "")
    return life.Decoding("d2", life.Tries(2), sender, b"t2" if sender else None)


PAIRS = list(product(tries_of_one(), map(elsewhere, tries_of_one())))


def steps() -> list[tuple[life.State, life.State, life.Event, race.Raced]]:
    """Every allowed event's effect on each pair, whichever of the two it happens to."""
    found = []
    for first, second in PAIRS:
        for (state, rival), event in product(((first, second), (second, first)), _EVENTS):
            try:
                found.append((state, rival, event, race.advance(state, rival, event)))
            except AssertionError:
                continue
    return found


STEPS = steps()


def asks(state: life.State) -> set[str]:
    """Workers that were asked for this try, and have not said that they are done."""
    if isinstance(state, life.Prefilling):
        return {state.prefill, *([state.decode] if state.reserved else [])}
    assert isinstance(state, life.Decoding)
    return {state.decode}


def tickets(state: life.State) -> set[bytes]:
    ticket = getattr(state, "ticket", None)
    return {ticket} if ticket else set()


def test_pairs_and_outcomes_of_every_kind_are_reached() -> None:
    assert len(PAIRS) > 20
    assert {raced.left for *_, raced in STEPS} == set(race.Left)


def test_client_gets_something_of_one_try_only() -> None:
    for state, _, event, raced in STEPS:
        told = [e for e in raced.effects if isinstance(e, _CLIENT)]
        assert not [e for e in raced.rival_effects if isinstance(e, _CLIENT)]
        if told:
            assert raced.left is race.Left.THIS, (state, event)
            assert isinstance(raced.rival, life.Ended)


def test_try_that_is_over_is_aborted_wherever_it_was_asked_and_keeps_no_kv() -> None:
    for state, rival, event, raced in STEPS:
        if raced.left is race.Left.BOTH:
            continue
        this = raced.left is race.Left.THIS
        over, called_off = (rival, raced.rival_effects) if this else (state, raced.effects)
        aborted = {e.worker for e in called_off if isinstance(e, effects.AbortOn)}
        gone = {event.worker} if isinstance(event, life.Lost) and not this else set()
        assert asks(over) <= aborted | gone, (state, rival, event)
        released = {e.ticket for e in called_off if isinstance(e, effects.ReleaseKV)}
        assert tickets(over) <= released


def test_failure_of_one_try_is_not_the_request_s() -> None:
    for _, rival, event, raced in STEPS:
        if isinstance(event, life.Failed) and event.elsewhere and raced.left is race.Left.RIVAL:
            assert not [e for e in raced.effects if isinstance(e, life.FailClient | effects.Place)]
            assert type(raced.rival) is type(rival)


def test_failure_of_the_request_itself_ends_both_tries() -> None:
    for state, _, event, raced in STEPS:
        invalid = isinstance(event, life.Failed) and not event.elsewhere
        if invalid and raced.state != state:
            assert isinstance(raced.state, life.Ended)
            assert isinstance(raced.rival, life.Ended)
            assert [e for e in raced.effects if isinstance(e, effects.FailClient)]


def test_client_that_leaves_ends_both_tries() -> None:
    for *_, event, raced in STEPS:
        if isinstance(event, life.ClientGone | life.Enough):
            assert isinstance(raced.state, life.Ended)
            assert isinstance(raced.rival, life.Ended)


def test_surviving_try_counts_both_and_nothing_is_placed_meanwhile() -> None:
    for state, rival, event, raced in STEPS:
        every = (*raced.effects, *raced.rival_effects)
        assert not [e for e in every if isinstance(e, effects.Place | effects.Enqueue)], event
        for left in (raced.state, raced.rival):
            if raced.left is not race.Left.BOTH and not isinstance(left, life.Ended):
                most = max(s.tries.number for s in (state, rival) if not isinstance(s, life.Ended))
                assert left.tries.number == most
