"""Patience with workers, as the dispatch has it."""

from __future__ import annotations

import pytest

from router.ask import Ask
from router.core.fleet import DOUBT_S, UNMEASURED_S
from router.core.hedging import BURST, STUCK_FLOOR_S
from router.core.limits import Limits
from router.dispatch import Dispatch
from tests.unit.test_dispatch import Fakes, hello, load
from workers.api import SILENCE_S, Abort, Batch, Delta, Finish, Generate, Role

AFTER_S = Limits().hedge_after_s
LATE_S = 4.5
"""Later than any estimate of these tests allows."""


class Group(Fakes):
    """Workers that do all of a request; time passes second by second, and who is well beats."""

    def __init__(self, *names: str, **limits: float) -> None:
        super().__init__()
        self.dispatch = Dispatch(
            lambda w, m: self.sent.append((w, m)),
            self,
            lambda: self.now,
            limits=Limits(**limits),  # type: ignore[arg-type]
        )
        self.frozen: set[str] = set()
        for name in names:
            self.dispatch.on_hello(hello(name, Role.MIXED))

    def ask(self, name: str, tokens: int = 8) -> str:
        """The worker that it is sent to."""
        self.dispatch.submit(Ask(name, [1, 2, 3], tokens))
        return self.last_generate()[0]

    def asked(self, name: str) -> list[tuple[str, str]]:
        """Worker and wire id of each try."""
        return [
            (w, m.request_id)
            for w, m in self.sent
            if isinstance(m, Generate) and m.request_id.split("/")[0] == name
        ]

    def passes(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + 0.5)
            for view in list(self.dispatch.fleet):
                if view.id not in self.frozen:
                    self.dispatch.on_batch(view.id, Batch(load(), [], view.sent))
            self.dispatch.tick()

    def aborted(self) -> list[tuple[str, str]]:
        return [(w, m.request_ids[0]) for w, m in self.sent if isinstance(m, Abort)]


def hedged(*names: str) -> tuple[Group, tuple[str, str], tuple[str, str]]:
    """A group with one request that runs twice: the first try's worker and id, and the second's."""
    f = Group(*names)
    f.ask("r")
    f.passes(LATE_S)
    first, second = f.asked("r")
    assert first[0] != second[0]
    return f, first, second


@pytest.mark.parametrize("winner", [0, 1])
def test_overdue_first_token_is_asked_of_another_worker_and_the_first_to_speak_wins(
    winner: int,
) -> None:
    f, *tries = hedged("a", "b")
    (worker, wire), (loser, lost) = tries[winner], tries[1 - winner]
    f.say(worker, Delta(wire, [5]))
    assert f.aborted() == [(loser, lost)]
    f.say(loser, Delta(lost, [6]))
    f.say(worker, Delta(wire, [7], Finish.STOP))
    assert f.got == {"r": [5, 7]}
    assert len(f.dispatch) == 0
    (record,) = f.dispatch.journal.find("r")
    assert (record.hedged, record.decode_worker, record.attempts) == (True, worker, 2)
    assert f.dispatch.patience.hedges.ended == {("first", "second")[winner]: 1}
    assert all(not w.promised and not w.unheard for w in f.dispatch.fleet)


def test_request_that_is_answered_in_time_is_asked_once() -> None:
    f = Group("a", "b")
    worker = f.ask("r")
    f.passes(AFTER_S / 2)
    f.say(worker, Delta("r", [5]))
    f.passes(LATE_S)
    assert len(f.asked("r")) == 1


@pytest.mark.parametrize("fails", [0, 1])
def test_try_that_fails_leaves_the_request_to_the_other(fails: int) -> None:
    f, *tries = hedged("a", "b", "c")
    (failing, wire), (worker, other) = tries[fails], tries[1 - fails]
    f.say(failing, Delta(wire, [], Finish.ERROR, error="no"))
    assert len(f.asked("r")) == 2
    f.say(worker, Delta(other, [5], Finish.STOP))
    assert f.got == {"r": [5]}
    assert not f.failed


def test_failure_of_both_tries_is_tried_once_more_under_an_id_of_its_own() -> None:
    f, *tries = hedged("a", "b", "c")
    for worker, wire in tries:
        f.say(worker, Delta(wire, [], Finish.ERROR, error="no"))
    third = f.asked("r")[2:]
    assert [wire for _, wire in third] == ["r/3"]
    f.say(third[0][0], Delta("r/3", [], Finish.ERROR, error="no"))
    assert f.failed["r"].code == "worker_failed"
    assert len(f.dispatch) == 0


def test_loss_of_either_worker_leaves_the_other_try() -> None:
    f, (first, _), (second, wire) = hedged("a", "b")
    f.dispatch.on_lost(first, "killed")
    f.say(second, Delta(wire, [5], Finish.STOP))
    assert f.got == {"r": [5]}


def test_client_that_leaves_ends_both_tries() -> None:
    f, *tries = hedged("a", "b")
    f.dispatch.cancel(["r"])
    assert set(f.aborted()) == set(tries)
    assert len(f.dispatch) == 0
    assert f.dispatch.patience.hedges.ended == {"called_off": 1}


def test_hedges_are_a_small_share_of_requests_however_many_are_overdue() -> None:
    f = Group("a", "b", "c")
    for n in range(400):
        f.ask(f"r{n}")
    f.passes(LATE_S)
    twice = [n for n in range(400) if len(f.asked(f"r{n}")) > 1]
    assert 1 <= len(twice) <= BURST + 0.05 * 400
    assert f.dispatch.patience.hedges.ended["over_budget"]


def test_no_hedge_without_a_budget_or_another_worker() -> None:
    for f in (Group("a", "b", hedge_ratio=0.0), Group("a")):
        f.ask("r")
        f.passes(LATE_S)
        assert len(f.asked("r")) == 1


def test_worker_that_answers_nothing_gets_no_new_requests_for_a_while() -> None:
    f, (slow, _), (other, wire) = hedged("a", "b")
    f.say(other, Delta(wire, [5], Finish.STOP))
    assert [f.ask(f"n{n}") for n in range(6)] == [other] * 6
    f.passes(1)
    for n in range(6):
        f.say(other, Delta(f"n{n}", [5], Finish.STOP))
    f.passes(UNMEASURED_S + 1)
    view = f.dispatch.fleet.get(slow)
    assert view is not None
    assert not view.doubted, "it may be tried again"


def test_frozen_worker_costs_no_five_seconds_and_gets_nothing_new() -> None:
    f = Group("a", "b")
    first = f.ask("r")
    f.frozen.add(first)
    f.passes(DOUBT_S + 1)
    assert f.now < SILENCE_S
    (_, _), (other, wire) = f.asked("r")
    f.say(other, Delta(wire, [5], Finish.STOP))
    assert f.got == {"r": [5]}
    assert [f.ask(f"n{n}") for n in range(4)] == [other] * 4


def test_doubted_worker_is_asked_where_there_is_no_other() -> None:
    f = Group("a")
    f.frozen.add("a")
    f.passes(DOUBT_S + 1)
    assert f.ask("r") == "a"


def test_try_without_a_first_token_is_given_up_and_the_request_tried_elsewhere() -> None:
    f = Group("a", "b", hedge_ratio=0.0)
    first = f.ask("r")
    f.passes(STUCK_FLOOR_S + LATE_S + 10)
    (_, _), (second, wire) = f.asked("r")
    assert (first, "r") in f.aborted()
    f.say(second, Delta(wire, [5], Finish.STOP))
    assert f.got == {"r": [5]}


@pytest.mark.parametrize("winner", ["first", "second"])
def test_hedge_after_a_relayed_token_goes_on_from_it(winner: str) -> None:
    f = Fakes(
        hello("p1", Role.PREFILL), hello("p2", Role.PREFILL),
        hello("d1", Role.DECODE), hello("d2", Role.DECODE),
    )  # fmt: skip
    f.dispatch.submit(Ask("r", [1, 2, 3], 8, relay=True))
    f.say(f.last_generate()[0], Delta("r/p", [7], Finish.PREFILLED, ticket=b"t"))
    slow, _ = f.last_generate()
    f.now = LATE_S
    for view in list(f.dispatch.fleet):
        f.say(view.id)
    f.dispatch.tick()
    sender, prefill = f.last_generate()
    assert (prefill.request_id, prefill.prompt_token_ids) == ("r/2/p", [1, 2, 3, 7])
    assert (prefill.generated, prefill.max_tokens) == (1, 7)
    f.say(sender, Delta("r/2/p", [], Finish.PREFILLED, ticket=b"u"))
    other, _ = f.last_generate()
    assert other != slow
    if winner == "first":
        f.say(slow, Delta("r", [7, 8], Finish.STOP))
        f.say(other, Delta("r/2", [8], Finish.STOP))
    else:
        f.say(other, Delta("r/2", [8], Finish.STOP))
        f.say(slow, Delta("r", [7, 8], Finish.STOP))
    assert f.got == {"r": [7, 8]}
    (record,) = f.dispatch.journal.find("r")
    assert record.output_tokens == 2
