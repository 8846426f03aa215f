"""Never two leaders at a time, whatever is lost, late or stopped; and soon one when all is well."""

from __future__ import annotations

import json
from dataclasses import replace
from math import inf
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from controller.core.lease import (
    Answered,
    Due,
    Election,
    Leave,
    NoAnswer,
    Request,
    State,
    Terms,
)
from tests.unit.lease_world import WALL, Contender, World

RECORDINGS = Path(__file__).parents[1] / "data" / "k8s"
TERMS = Terms("a", "tandem-controller", "default")
SKEW = 0.1
"""Of clocks' rates, either way."""


def recorded(name: str) -> Any:
    return json.loads((RECORDINGS / name).read_text())


def answer(record: Any) -> Answered:
    return Answered(record["status"], json.dumps(record["body"]).encode())


def sent(request: Request) -> Any:
    return {"method": request.method, "path": request.path, "body": request.body}


def an_election(identity: str = "a") -> Election:
    return Election(replace(TERMS, identity=identity), max)


def after_look(election: Election, found: Answered, now: float) -> State:
    state, request = election.step(State(), Due(WALL), now)
    assert request is not None
    assert request.method == "GET"
    return election.step(state, found, now)[0]


def lease(holder: str, version: int = 5, **spec: Any) -> Answered:
    content = {"holderIdentity": holder, "leaseDurationSeconds": 15, "leaseTransitions": 3} | spec
    meta = {"name": "tandem-controller", "resourceVersion": str(version)}
    return Answered(200, json.dumps({"metadata": meta, "spec": content}).encode())


# ------------------------------------------------------------------------- as recorded


def test_a_missing_lease_is_created_as_recorded() -> None:
    wanted, election = recorded("lease-create.json"), an_election()
    state = after_look(election, Answered(404, b"{}"), 0.0)
    state, request = election.step(state, Due(WALL), 0.0)
    assert request is not None
    assert sent(request) == {k: v for k, v in wanted["request"].items() if k != "params"}
    state, _ = election.step(state, answer(wanted), 0.1)
    assert state.leads(9.9)
    assert not state.leads(10.1)


def test_one_that_was_quicker_leads() -> None:
    election = an_election()
    state = after_look(election, Answered(404, b"{}"), 0.0)
    state, _ = election.step(state, Due(WALL), 0.0)
    state, _ = election.step(state, answer(recorded("lease-create-again-409.json")), 0.1)
    assert not state.leads(0.1)
    state, request = election.step(state, Due(WALL), state.next_at)
    assert request is not None
    assert request.method == "GET"


def test_what_is_not_renewed_is_taken_as_recorded() -> None:
    wanted, election = recorded("lease-put.json"), an_election("b")
    found = Answered(200, json.dumps(recorded("lease-create.json")["body"]).encode())
    state = after_look(election, found, 100.0)
    asked: list[Request] = []
    while not asked or asked[-1].method == "GET":
        state, request = election.step(state, Due(WALL), now := state.next_at)
        assert request is not None
        asked.append(request)
        if request.method == "GET":
            state, _ = election.step(state, found, now)
    assert now == 115.0
    got, body = sent(asked[-1]), wanted["request"]["body"]
    assert got["body"]["spec"].pop("leaseTransitions") == 1
    assert got["body"]["spec"].pop("acquireTime") == WALL
    assert got["body"]["metadata"] == body["metadata"]
    del body["spec"]["leaseTransitions"], body["spec"]["acquireTime"]
    assert got == {k: v for k, v in wanted["request"].items() if k != "params"}
    state, _ = election.step(state, answer(wanted), now)
    assert state.leads(now + 9.9)


def test_a_stale_write_means_lost() -> None:
    election = an_election()
    state = after_look(election, lease("a"), 0.0)
    state, _ = election.step(state, Due(WALL), 0.0)
    state, _ = election.step(state, lease("a", 6), 0.1)
    assert state.leads(1.0)
    state, request = election.step(state, Due(WALL), state.next_at)
    assert request is not None
    assert request.method == "PUT"
    state, _ = election.step(state, answer(recorded("lease-put-stale-409.json")), 2.2)
    assert not state.leads(2.2)
    assert state.next_at > 2.2


# ------------------------------------------------------------------------- one by one


def test_an_unanswered_write_is_looked_up_and_gone_on_from() -> None:
    election = an_election()
    state = after_look(election, lease("a"), 0.0)
    state, _ = election.step(state, Due(WALL), 0.0)
    state, _ = election.step(state, NoAnswer("timed out"), 3.0)
    assert not state.leads(3.0)
    state, request = election.step(state, Due(WALL), now := state.next_at)
    assert request is not None
    assert request.method == "GET"
    state, _ = election.step(state, lease("a", 6), now)
    state, request = election.step(state, Due(WALL), now)
    assert request is not None
    assert request.body is not None
    assert request.body["metadata"]["resourceVersion"] == "6"


def test_the_times_in_the_object_say_nothing() -> None:
    election = an_election()
    old = {"renewTime": "1970-01-01T00:00:00.000000Z", "acquireTime": "1970-01-01T00:00:00.000000Z"}
    state = after_look(election, lease("b", **old), 0.0)
    while state.next_at < 15.0:
        state, request = election.step(state, Due(WALL), now := state.next_at)
        assert request is not None
        assert request.method == "GET"
        state, _ = election.step(state, lease("b", **old), now)


def test_what_nobody_holds_is_taken_at_once() -> None:
    election = an_election()
    state = after_look(election, lease(""), 5.0)
    state, request = election.step(state, Due(WALL), 5.0)
    assert request is not None
    assert request.method == "PUT"


def test_whoever_leaves_gives_it_away_and_does_not_lead_meanwhile() -> None:
    election = an_election()
    state = after_look(election, lease("a"), 0.0)
    state, _ = election.step(state, Due(WALL), 0.0)
    state, _ = election.step(state, lease("a", 6), 0.1)
    state, _ = election.step(state, Leave(), 1.0)
    assert not state.leads(1.0)
    state, request = election.step(state, Due(WALL), 1.0)
    assert request is not None
    assert request.body is not None
    assert request.body["spec"]["holderIdentity"] == ""
    state, _ = election.step(state, lease("", 7), 1.1)
    assert state.done


def test_whoever_holds_nothing_leaves_without_a_word() -> None:
    election = an_election()
    for before in (State(), after_look(election, lease("b"), 0.0)):
        state, _ = election.step(before, Leave(), 1.0)
        assert election.step(state, Due(WALL), 1.0)[1] is None
        assert election.step(state, Due(WALL), 1.0)[0].done


def test_a_servers_retry_after_is_kept() -> None:
    election = Election(TERMS, min)
    state, _ = election.step(State(), Due(WALL), 0.0)
    state, _ = election.step(state, Answered(429, b"", 30.0), 0.0)
    assert state.next_at == 30.0


@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", b'{"metadata":{}}', b'{"metadata":3}'])
def test_an_answer_that_is_no_lease_is_no_answer(body: bytes) -> None:
    state = after_look(an_election(), Answered(200, body), 0.0)
    assert state.trouble
    assert state.seen is None
    assert state.next_at >= 1.0


def test_after_a_deletion_whoever_saw_the_lease_waits_for_its_holder_to_know() -> None:
    election = an_election("b")
    state = after_look(election, lease("a"), 0.0)
    state, _ = election.step(state, Due(WALL), now := state.next_at)
    state, _ = election.step(state, Answered(404, b"{}"), now)
    while True:
        state, request = election.step(state, Due(WALL), at := state.next_at)
        assert request is not None
        if request.method == "POST":
            break
        state, _ = election.step(state, Answered(404, b"{}"), at)
    assert at == now + 15.0


# ------------------------------------------------------------------------- whatever happens


class Contention(RuleBasedStateMachine):
    """Hypothesis chooses what happens next."""

    world: World

    @initialize(
        rates=st.lists(st.floats(1 - SKEW, 1 + SKEW), min_size=2, max_size=3),
        offsets=st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3),
        jitter=st.randoms(use_true_random=False),
    )
    def begin(self, rates: list[float], offsets: list[float], jitter: Random) -> None:
        self.lives = len(rates)
        self.world = World(
            [
                Contender(replace(TERMS, identity=str(i)), rate, offset, jitter.uniform)
                for i, (rate, offset) in enumerate(zip(rates, offsets, strict=False))
            ]
        )

    def pick(self, number: int) -> Contender:
        return self.world.contenders[number % len(self.world.contenders)]

    @rule(seconds=st.sampled_from([0.01, 0.5, 1.5, 4.0, 8.0, 14.0, 20.0]))
    def passes(self, seconds: float) -> None:
        self.world.time += seconds

    @rule(n=st.integers(0, 2))
    def wakes(self, n: int) -> None:
        self.world.wake(self.pick(n))

    @rule(n=st.integers(0, 2))
    def is_served(self, n: int) -> None:
        c = self.pick(n)
        self.world.wake(c)
        self.world.carry_out(c)
        self.world.deliver(c)

    @rule(n=st.integers(0, 2))
    def is_carried_out(self, n: int) -> None:
        self.world.carry_out(self.pick(n))

    @rule(n=st.integers(0, 2))
    def is_answered(self, n: int) -> None:
        self.world.deliver(self.pick(n))

    @rule(n=st.integers(0, 2))
    def is_cut(self, n: int) -> None:
        self.world.lose(self.pick(n))

    @rule()
    def arrives_late(self) -> None:
        self.world.carry_out_late()

    @rule(n=st.integers(0, 2), stopped=st.booleans())
    def is_stopped(self, n: int, stopped: bool) -> None:
        self.pick(n).stopped = stopped

    @rule(n=st.integers(0, 2))
    def leaves(self, n: int) -> None:
        self.world.leave(self.pick(n))

    @rule(n=st.integers(0, 2))
    def is_killed_and_begins_anew(self, n: int) -> None:
        c = self.pick(n)
        if c.sent:
            self.world.late.append(c.sent)
        self.lives += 1
        terms = replace(TERMS, identity=str(self.lives))
        fresh = Contender(terms, c.rate, c.offset, c.uniform)
        self.world.contenders[n % len(self.world.contenders)] = fresh

    @precondition(lambda self: hasattr(self, "world"))
    @invariant()
    def one_leads_at_most(self) -> None:
        self.world.check()


Contention.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestContention = Contention.TestCase


def chaos(random: Random, *, deletions: bool) -> World:
    """Some minutes of everything; or, among contenders that all know the Lease, its deletion.

    Whoever begins just then creates it anew, and can't know that its holder still believes.
    """
    world = World(
        [
            Contender(
                replace(TERMS, identity=str(i)),
                random.uniform(1 - SKEW, 1 + SKEW),
                random.uniform(-1e5, 1e5),
                random.uniform,
            )
            for i in range(random.choice([2, 3]))
        ]
    )
    while deletions and not all(c.state.seen and c.state.seen.version for c in world.contenders):
        world.time += 0.5
        for c in world.contenders:
            world.wake(c), world.carry_out(c), world.deliver(c)
    deleted_at = random.randint(0, 50)
    for life in range(random.randint(50, 400)):
        c = random.choice(world.contenders)
        what = random.random()
        if what < 0.3:
            world.time += random.choice([0.05, 0.3, 1.0, 3.0])
        elif what < 0.7:
            world.wake(c)
            if random.random() < 0.9:
                world.carry_out(c)
            if random.random() < 0.8:
                world.deliver(c)
        elif what < 0.78:
            world.lose(c)
        elif what < 0.84:
            c.stopped = random.random() < 0.3
        elif what < 0.88:
            world.carry_out_late()
        elif what < 0.92 and c.stopped:
            world.time += random.uniform(5.0, 20.0)
        elif what < 0.94 and not deletions and c.terms.identity in world.led:
            number = world.contenders.index(c)
            terms = replace(TERMS, identity=f"{number}-{life}")
            world.contenders[number] = Contender(terms, c.rate, c.offset, c.uniform)
        if deletions and life == deleted_at:
            world.server.delete()
        world.check()
    return world


@pytest.mark.parametrize("deletions", [False, True])
def test_after_any_chaos_somebody_leads_within_the_bound_and_goes_on(deletions: bool) -> None:
    led = 0
    for seed in range(200):
        random = Random(seed)
        world = chaos(random, deletions=deletions)
        led += len(world.led)
        bound_s = TERMS.vacant_s_max / (1 - SKEW) + 0.5
        from_here = world.time
        since = world.well(3 * bound_s, 0.1, random.uniform(0.0, TERMS.answer_s * 0.9))
        assert since is not None, seed
        assert since - from_here <= bound_s, seed
    assert led > 300


def test_every_order_of_a_dozen_steps_has_one_leader_at_most() -> None:
    """All of them, of two contenders: a second passes, one acts, is served, answered or cut.

    Whoever does nothing for long is one that is stopped.
    """
    terms = Terms("", "l", "n", duration_s=3)
    begin = World([Contender(replace(terms, identity=i)) for i in "ab"])
    for c in [*begin.contenders[:1] * 2, *begin.contenders]:  # One leads, and the other knows.
        begin.wake(c), begin.carry_out(c), begin.deliver(c)
    seen, todo, led = {_key(begin)}, [begin], set[str]()
    for _ in range(12):
        found = []
        for world in todo:
            for act in range(9):
                after = _copy(world)
                if act == 8:
                    after.time += 1.0
                else:
                    c = after.contenders[act % 2]
                    (after.wake, after.carry_out, after.deliver, after.lose)[act // 2](c)
                key = _key(after)
                if key not in seen:
                    after.check()
                    led |= after.led
                    seen.add(key)
                    found.append(after)
        todo = found
    assert len(seen) > 5_000
    assert led == {"a", "b"}


def _copy(world: World) -> World:
    after = World([replace(c) for c in world.contenders])
    after.time, after.late = world.time, world.late.copy()
    after.server.version, after.server.spec = world.server.version, world.server.spec
    return after


def _key(world: World) -> Any:
    now, version = world.time, world.server.version
    return (
        world.server.spec and world.server.spec["holderIdentity"],
        *(
            (
                c.state.certain,
                c.state.seen and (
                    int(c.state.seen.version or version + 99) - version,
                    c.state.seen.holder,
                    max(-9.0, c.state.seen.free_at - now),
                ),
                max(0.0, c.state.lead_until - now),
                c.state.asked and (c.state.asked.method, max(-9.0, c.state.asked.sent_at - now)),
                max(0.0, c.state.next_at - now),
                c.sent and _about(c.sent, version),
                c.answer and (c.answer.status, c.answer.body if c.answer.status == 200 else b""),
            )
            for c in world.contenders
        ),
        *(_about(request, version) for request in world.late),
    )  # fmt: skip


def _about(request: Request, version: int) -> Any:
    if request.body is None or "resourceVersion" not in request.body["metadata"]:
        return request.method
    return int(request.body["metadata"]["resourceVersion"]) - version


@given(st.floats(0, 1e9), st.sampled_from([1, 2, 15, 60, 3600]))
def test_the_holder_stops_to_believe_before_others_may_write(at: float, duration_s: int) -> None:
    terms = Terms("a", "l", "n", duration_s)
    assert terms.led_s * (1 + SKEW) < terms.duration_s * (1 - SKEW)
    assert terms.answer_s + terms.retry_s < terms.led_s  # A lost answer alone loses no lead.
    assert not State().leads(at)
    assert State().next_at == -inf


def test_a_late_answer_is_of_a_lead_that_began_when_it_was_asked_for() -> None:
    election = an_election()
    state = after_look(election, lease("a"), 0.0)
    state, _ = election.step(state, Due(WALL), 0.0)
    state, _ = election.step(state, lease("a", 6), 9.0)
    assert state.leads(9.9)
    assert not state.leads(10.0)
