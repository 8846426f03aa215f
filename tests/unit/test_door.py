"""Admission as the dispatch carries it out: who waits, who is refused, and what is left at rest."""

from __future__ import annotations

import os
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.ask import Ask
from router.core.admission import PATIENCE_S
from router.core.errors import ObjectiveOutOfReach, Overloaded, QueueFull, TenantOverRate
from router.core.limits import Limits
from router.dispatch import Dispatch
from router.door import PUMP_S, TURNS_MAX
from tests.unit.test_admission import at_rest
from tests.unit.test_dispatch import Fakes, hello
from workers.api import SILENCE_S, Batch, Delta, Finish, Generate, Load, Role, WorkerHello

BLOCKS = 100
"""Of 16 tokens, on each worker."""


def small(worker_id: str) -> WorkerHello:
    return msgspec.structs.replace(hello(worker_id, Role.DECODE), blocks_total=BLOCKS)


class Small(Fakes):
    """Workers that do both, with little room; their own accounts are kept here."""

    def __init__(self, *workers: str, limits: Limits | None = None) -> None:
        super().__init__()
        self.dispatch = Dispatch(
            lambda w, m: self.sent.append((w, m)), self, lambda: self.now, limits=limits
        )
        self.dispatch.accounts.output_tokens_mean = 16.0
        self.held: dict[str, dict[str, int]] = {w: {} for w in workers}
        for worker in workers:
            self.dispatch.on_hello(small(worker))

    def ask(self, name: str, blocks: int, **more: object) -> None:
        """One that takes so many blocks, its output included."""
        self.dispatch.submit(Ask(name, [1] * (blocks - 1) * 16, 16, **more))  # type: ignore[arg-type]

    def begun(self) -> list[str]:
        return [m.request_id for _, m in self.sent if isinstance(m, Generate)]

    def where(self, name: str) -> str:
        return next(w for w, m in self.sent if isinstance(m, Generate) and m.request_id == name)

    def step(self, worker: str, *deltas: Delta) -> None:
        held = self.held[worker]
        heard = [m for w, m in self.sent if isinstance(m, Generate) and w == worker]
        for delta in deltas:
            if delta.finish is not None:
                held.pop(delta.request_id, None)
            else:
                prompt = next(m for m in heard if m.request_id == delta.request_id)
                held[delta.request_id] = len(prompt.prompt_token_ids) // 16 + 1
        load = Load(1, bool(held), len(held), 0, 0, BLOCKS - sum(held.values()), BLOCKS, 0)
        self.dispatch.on_batch(worker, Batch(load, list(deltas), len(heard)))

    def end(self, name: str) -> None:
        self.step(self.where(name), Delta(name, [7], Finish.STOP))


def rests(f: Small) -> bool:
    return at_rest(f.dispatch.door.queue) and all(
        not (w.promised or w.unheard or w._promised_blocks or w._unheard_tokens)
        for w in f.dispatch.fleet
    )


def test_contents_are_held_up_to_a_bound_and_until_the_first_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Images for workers that may yet have to be asked: nobody has to be asked after a token."""
    monkeypatch.setattr("router.door.CONTENTS_MAX", 100)
    f = Small("d")
    f.ask("one", 5, contents=b"x" * 60)
    with pytest.raises(Overloaded):
        f.ask("two", 5, contents=b"x" * 60)
    f.ask("three", 5, contents=b"x" * 40)
    f.step("d", Delta("one", [7]))
    f.ask("four", 5, contents=b"x" * 60)
    f.dispatch.cancel(["three"])
    f.ask("five", 5, contents=b"x" * 40)
    for name in ("one", "four", "five"):
        f.end(name)
    f.ask("six", 5, contents=b"x" * 100)
    assert f.begun() == ["one", "three", "four", "five", "six"]
    assert f.dispatch.door.refused["overloaded"] == 1


def test_a_new_try_has_the_contents_again() -> None:
    f = Small("d", "e")
    f.ask("one", 5, contents=b"x")
    first = f.where("one")
    f.step(first, Delta("one", [], Finish.ERROR, error="no"))
    again = [m for w, m in f.sent if isinstance(m, Generate) and w != first]
    assert [m.contents for m in again] == [b"x"]


def test_what_has_no_room_waits_and_begins_when_there_is() -> None:
    f = Small("d")
    f.ask("one", 60)
    f.ask("two", 60)
    assert f.begun() == ["one"]
    f.step("d", Delta("one", [7]))
    assert f.begun() == ["one"]
    f.now = 1.5
    f.end("one")
    assert f.begun() == ["one", "two"]
    (record,) = f.dispatch.journal.find("two")
    assert record.waited_s == 1.5
    f.end("two")
    assert rests(f)
    assert not f.failed


def test_a_client_that_leaves_the_queue_has_asked_nothing_of_anybody() -> None:
    f = Small("d")
    f.ask("one", 60)
    f.ask("two", 60)
    f.dispatch.cancel(["two", "one"])
    assert f.begun() == ["one"]
    assert rests(f)


def test_a_small_one_passes_and_a_large_one_is_not_starved() -> None:
    """It begins within its patience and the time that what runs then takes to end."""
    f = Small("d1", "d2")
    for name in ("a", "b"):
        f.ask(name, 40)
    f.ask("large", 90)
    f.now += PUMP_S
    f.ask("small", 40)
    assert f.begun() == ["a", "b", "small"]
    running, number = ["a", "b", "small"], 0
    while "large" not in f.begun():
        f.now += 0.5
        f.end(running.pop(0))
        assert f.now <= PATIENCE_S + 3
        if f.begun()[-1] == "large":
            break
        f.ask(f"more{number}", 40)
        running += [n for n in f.begun() if n not in running and n == f"more{number}"]
        number += 1
    assert f.begun()[-1] == "large"


def test_the_decode_worker_s_room_is_promised_before_any_prefill_starts() -> None:
    f = Small("d")
    f.dispatch.on_hello(hello("p", Role.PREFILL))
    for n in range(4):
        f.ask(f"r{n}", 30)
    assert len(f.begun()) == 3, "the fourth's prefill would only wait for a place"


def test_a_tenant_over_its_rate_is_refused_and_told_when_to_come_again() -> None:
    f = Small("d", limits=Limits(tenant_tokens_per_s=10, tenant_burst_s=2))
    f.ask("one", 5, tenant="t")
    f.ask("other", 5, tenant="u")
    with pytest.raises(TenantOverRate) as refused:
        f.ask("two", 5, tenant="t")
    assert (refused.value.status, refused.value.retry_after_s) == (429, 6)
    with pytest.raises(TenantOverRate):
        f.dispatch.check("t")
    f.now = 6.1
    f.ask("two", 5, tenant="t")
    assert f.begun() == ["one", "other", "two"]
    assert f.dispatch.door.refused == {"tenant_over_rate": 2}


def test_what_can_t_meet_its_objective_is_refused_before_any_work() -> None:
    f = Small("d")
    f.ask("in time", 60, ttft_s=10.0)
    f.dispatch.cancel(["in time"])
    sent = len(f.sent)
    with pytest.raises(ObjectiveOutOfReach) as refused:
        f.ask("late", 60, ttft_s=0.001)
    assert (refused.value.status, refused.value.retry_after_s) == (503, 1)
    assert len(f.sent) == sent
    assert f.dispatch.journal.find("late") == []
    assert rests(f)


def test_a_queue_is_bounded_in_length_and_in_time() -> None:
    f = Small("d", limits=Limits(queue_max=2, queue_s=5.0))
    for name in ("runs", "waits", "waits too"):
        f.ask(name, 90)
    with pytest.raises(QueueFull):
        f.ask("too many", 90)
    f.now = 4.9
    f.step("d")
    assert not f.failed
    f.now = 5.0
    f.dispatch.tick()
    assert {n: e.code for n, e in f.failed.items()} == dict.fromkeys(
        ("waits", "waits too"), "queue_timeout"
    )
    f.end("runs")
    assert rests(f)


def test_a_worker_with_many_seconds_of_prompts_queued_gets_no_more() -> None:
    f = Small("d", limits=Limits(prefill_s=0.05))
    for n in range(3):
        f.ask(f"r{n}", 30)
    assert f.begun() == ["r0"], "at some 10,000 tokens a second: 48 ms and the step"
    f.now = 1.0
    f.step("d", Delta("r0", [7]))
    assert f.begun() == ["r0", "r1"]


def test_what_is_too_large_for_any_worker_is_sent_so_that_one_says_so() -> None:
    f = Small("d")
    f.ask("huge", 200)
    assert f.begun() == ["huge"]


def test_what_a_lost_try_still_says_is_nobody_s_while_the_next_waits() -> None:
    f = Small("d1", "d2")
    f.ask("a", 90)
    f.ask("b", 90)
    first, other = f.where("a"), f.where("b")
    f.step(first, Delta("a", [], Finish.ERROR, error="no"))
    assert "a" in f.dispatch.door.queue, "the other has no room, and this one just failed it"
    f.step(first, Delta("a", [7], Finish.STOP))
    assert f.got.get("a") is None
    f.now = SILENCE_S / 2
    f.step(other, Delta("b", [7], Finish.STOP))
    assert f.begun()[-1] == "a/2"


@settings(max_examples=int(os.environ.get("SEEDS", "60")), deadline=None)
@given(st.integers(0, 2**32))
def test_whatever_comes_and_goes_budgets_return_to_zero_and_none_waits_past_the_bound(
    seed: int,
) -> None:
    rng = random.Random(seed)
    limits = Limits(queue_s=20.0, queue_max=30, shares={"a": 2.0})
    f = Small("d1", "d2", limits=limits)
    for n in range(80):
        f.now += rng.expovariate(3)
        kind, busy = rng.random(), [n for n in f.begun() if f.dispatch._live.get(n)]
        if kind < 0.55 or not busy:
            try:
                f.ask(
                    f"r{n}", rng.randint(2, 95), tenant=rng.choice("abc"),
                    priority=rng.choice((0, 0, 1, -1)),
                )  # fmt: skip
            except QueueFull:
                assert len(f.dispatch.door.queue) == 30
        elif kind < 0.9:
            f.end(rng.choice(busy))
        else:
            f.dispatch.cancel([name := rng.choice(list(f.dispatch._live))])
            for held in f.held.values():
                held.pop(name, None)
        for worker in ("d1", "d2"):
            f.step(worker)
        if rng.random() < 0.3:
            f.dispatch.tick()
        for view in f.dispatch.fleet:
            assert view._promised_blocks == sum(view.promised.values())
    f.now += 25
    for worker in ("d1", "d2"):
        f.step(worker)
    f.dispatch.tick()
    assert not len(f.dispatch.door.queue)
    waited = [r.waited_s for n in range(80) for r in f.dispatch.journal.find(f"r{n}")]
    assert max(waited, default=0) <= 20.0 + 1.0
    for name in list(f.dispatch._live):
        f.end(name)
    assert rests(f)


def test_many_for_whom_there_is_room_are_let_in_a_part_at_a_time() -> None:
    """All of them at once would hold up every stream for as long as they take to place."""
    f = Small("d")
    for name in ("one", "two"):
        f.ask(name, BLOCKS // 2)
    for n in range(90):
        f.dispatch.submit(Ask(f"r{n}", [1], 1))
    assert f.begun() == ["one", "two"]
    f.now = 1.0
    f.step("d", *(Delta(name, [7], Finish.STOP) for name in ("one", "two")))
    assert len(f.begun()) == 2 + TURNS_MAX
    f.step("d")  # At once: those who are left wait for no interval.
    assert len(f.begun()) == 2 + 90
