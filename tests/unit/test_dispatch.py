"""The lifecycle and its dispatch, driven by events in every order."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.ask import Ask
from router.core.errors import NoWorkers, RouterError
from router.core.placement import Disaggregate, EstimatePolicy, Prompt
from router.dispatch import Dispatch
from workers.api import (
    PROTOCOL,
    SILENCE_S,
    Abort,
    Batch,
    Delta,
    Finish,
    Generate,
    KvAsk,
    KvSnapshot,
    KvStored,
    Load,
    Phase,
    Release,
    Role,
    WorkerHello,
)

if TYPE_CHECKING:
    from workers.api import ToWorker


def hello(worker_id: str, role: Role, kv: str = "kv", epoch: str = "1") -> WorkerHello:
    return WorkerHello(
        PROTOCOL, worker_id, epoch, role, "sim", "1", "m", "md", "td", kv, ["ucx"],
        block_tokens=16, block_bytes=1024, blocks_total=10_000, max_model_len=1024, lease_s=30.0,
    )  # fmt: skip


def load(queued: int = 0, *, draining: bool = False) -> Load:
    return Load(1, False, 0, 0, queued, 10_000, 10_000, 0, draining)


APART = EstimatePolicy(Disaggregate.ALWAYS)
"""What is tested is the way through two workers, however cheap one would be."""
place = APART.place


class Fakes:
    """A fleet's wires and a client, both as lists."""

    def __init__(self, *workers: WorkerHello) -> None:
        self.now = 0.0
        self.sent: list[tuple[str, ToWorker]] = []
        self.got: dict[str, list[int]] = {}
        self.cached: dict[str, int | None] = {}
        """What first deltas said of cached tokens."""
        self.failed: dict[str, RouterError] = {}
        self.dispatch = Dispatch(
            lambda w, m: self.sent.append((w, m)), self, lambda: self.now, policy=APART
        )
        for worker in workers:
            self.dispatch.on_hello(worker)

    def deliver(self, deltas: list[Delta], prompt_extras: dict[str, bytes]) -> None:
        for delta in deltas:
            self.cached.setdefault(delta.request_id, delta.cached_tokens)
            self.got.setdefault(delta.request_id, []).extend(delta.token_ids)

    def fail(self, request_id: str, error: RouterError) -> None:
        self.failed[request_id] = error

    def last_generate(self) -> tuple[str, Generate]:
        return next((w, m) for w, m in reversed(self.sent) if isinstance(m, Generate))

    def say(self, worker: str, *deltas: Delta) -> None:
        self.dispatch.on_batch(worker, Batch(load(), list(deltas)))


def pair() -> Fakes:
    return Fakes(hello("p", Role.PREFILL), hello("d", Role.DECODE))


def test_a_request_is_prefilled_on_one_worker_and_decoded_on_the_other() -> None:
    f = pair()
    f.dispatch.submit(Ask("r", [1, 2, 3], 4))
    worker, message = f.last_generate()
    assert (worker, message.phase, message.request_id) == ("p", Phase.PREFILL, "r/p")
    f.say("p", Delta("r/p", [], Finish.PREFILLED, ticket=b"t", extras=b"x"))
    worker, message = f.last_generate()
    assert (worker, message.phase, message.ticket) == ("d", Phase.DECODE, b"t")
    f.say("d", Delta("r", [7, 8]))
    f.say("d", Delta("r", [9], Finish.STOP))
    assert f.got == {"r": [7, 8, 9]}
    assert len(f.dispatch) == 0


def test_a_ticket_that_nobody_awaits_is_released() -> None:
    f = pair()
    f.dispatch.submit(Ask("r", [1], 4))
    f.dispatch.cancel(["r"])
    f.say("p", Delta("r/p", [], Finish.PREFILLED, ticket=b"t"))
    assert f.sent[-1] == ("p", Release([b"t"]))


def test_a_client_that_leaves_is_aborted_where_it_runs() -> None:
    f = pair()
    f.dispatch.submit(Ask("r", [1], 4))
    f.say("p", Delta("r/p", [], Finish.PREFILLED, ticket=b"t"))
    f.dispatch.cancel(["r"])
    assert f.sent[-2:] == [("d", Abort(["r", "r/p"])), ("p", Release([b"t"]))]


def told_of_losses(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(r.levelname, r.message) for r in caplog.records if r.message.startswith("worker l")]


@pytest.mark.parametrize("by", ["its own word", "discovery"])
def test_who_said_that_it_goes_and_has_nothing_left_is_no_loss(
    by: str, caplog: pytest.LogCaptureFixture
) -> None:
    f = pair()
    with caplog.at_level(logging.INFO):
        if by == "discovery":
            f.dispatch.fleet.rest("d", True)
        else:
            f.dispatch.on_batch("d", Batch(load(draining=True)))
        f.dispatch.on_lost("d", "connection closed")
    assert told_of_losses(caplog) == [("INFO", "worker left")]


def test_a_stream_is_on_its_prefill_worker_until_its_kv_has_been_read() -> None:
    f = pair()
    f.dispatch.submit(Ask("r", [1], 4))
    assert f.dispatch.is_on("p")
    f.say("p", Delta("r/p", [7], Finish.PREFILLED, ticket=b"t"))
    assert f.dispatch.is_on("p")
    f.say("d", Delta("r", [7]))
    assert not f.dispatch.is_on("p")
    assert f.dispatch.is_on("d")
    f.say("d", Delta("r", [8], Finish.STOP))
    assert not f.dispatch.is_on("d")


@pytest.mark.parametrize("expected", [True, False])
def test_who_goes_with_a_request_on_it_or_unforeseen_is_lost(
    expected: bool, caplog: pytest.LogCaptureFixture
) -> None:
    f = pair()
    with caplog.at_level(logging.INFO):
        if expected:
            f.dispatch.submit(Ask("r", [1], 4))
            f.say("p", Delta("r/p", [], Finish.PREFILLED, ticket=b"t"))
            f.dispatch.fleet.rest("d", True)
        f.dispatch.on_lost("d", "connection closed")
    assert told_of_losses(caplog) == [("WARNING", "worker lost")]


def test_a_loss_before_the_first_token_is_tried_elsewhere() -> None:
    f = Fakes(hello("p", Role.PREFILL), hello("d1", Role.DECODE), hello("d2", Role.DECODE))
    f.dispatch.submit(Ask("r", [1], 4))
    f.say("p", Delta("r/p", [], Finish.PREFILLED, ticket=b"t"))
    first, _ = f.last_generate()
    f.dispatch.on_lost(first, "killed")
    f.say("p", Delta("r/2/p", [], Finish.PREFILLED, ticket=b"u"))
    second, message = f.last_generate()
    assert {first, second} == {"d1", "d2"}
    assert message.request_id == "r/2"
    f.say(second, Delta("r/2", [5], Finish.LENGTH))
    assert f.got == {"r": [5]}


def test_a_loss_after_the_first_token_fails_the_stream_clearly() -> None:
    f = pair()
    f.dispatch.submit(Ask("r", [1], 4))
    f.say("p", Delta("r/p", [], Finish.PREFILLED, ticket=b"t"))
    f.say("d", Delta("r", [5]))
    f.dispatch.on_lost("d", "killed")
    assert f.failed["r"].code == "worker_lost"
    assert len(f.dispatch) == 0


@pytest.mark.parametrize(
    ("prefill", "decode", "failed", "cached"),
    [(32, 0, None, 32), (0, 32, None, 0), (16, 32, None, 16), (32, 16, "no", 16), (0, 16, "no", 0)],
)
def test_cached_tokens_are_those_that_no_worker_computed(
    prefill: int, decode: int, failed: str | None, cached: int
) -> None:
    f = pair()
    f.dispatch.submit(Ask("r", [1] * 40, 4))
    f.say("p", Delta("r/p", [], Finish.PREFILLED, ticket=b"t", cached_tokens=prefill))
    f.say("d", Delta("r", [5], cached_tokens=decode, kv_failed=failed))
    f.say("d", Delta("r", [6], Finish.STOP))
    assert f.cached == {"r": cached}
    assert f.dispatch.journal.find("r")[0].cached_tokens == cached


def test_a_former_try_s_cached_tokens_are_forgotten() -> None:
    f = pair()
    f.dispatch.submit(Ask("r", [1] * 40, 4))
    f.say("p", Delta("r/p", [], Finish.PREFILLED, ticket=b"t", cached_tokens=32))
    f.dispatch.on_lost("p", "killed")
    f.say("d", Delta("r", [], Finish.ERROR, error="no"))
    _, again = f.last_generate()
    assert (again.request_id, again.phase) == ("r/2", Phase.BOTH)
    f.say("d", Delta("r/2", [5], cached_tokens=16))
    assert f.cached == {"r": 16}


def test_a_silent_worker_is_lost() -> None:
    f = pair()
    f.now = SILENCE_S + 1
    f.say("d")
    f.dispatch.tick()
    assert [w.id for w in f.dispatch.fleet] == ["d"]


def test_nobody_to_serve_is_refused_before_any_work() -> None:
    f = Fakes(hello("p", Role.PREFILL))
    with pytest.raises(NoWorkers):
        f.dispatch.submit(Ask("r", [1], 4))
    assert f.sent == [("p", KvAsk())]


def test_workers_of_other_kv_layouts_are_never_paired(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", logger="router")  # The twin's command turns it off.
    f = Fakes(hello("p", Role.PREFILL, kv="a"), hello("d", Role.DECODE, kv="b"))
    [logged] = [record for record in caplog.records if record.message == "no handoff"]
    assert "p (prefill) keeps a" in logged.__dict__["reason"]
    assert "d (decode) keeps b" in logged.__dict__["reason"]
    placement = place(Prompt(10, 10), list(f.dispatch.fleet))
    assert (placement.prefill, placement.decode) == (None, "d")
    f.dispatch.on_hello(hello("d2", Role.DECODE, kv="a"))
    f.dispatch.on_hello(hello("p2", Role.PREFILL, kv="b"))
    assert len([r for r in caplog.records if r.message == "no handoff"]) == 1


def test_the_prefill_worker_with_the_fewest_queued_tokens_is_chosen() -> None:
    f = Fakes(hello("p1", Role.PREFILL), hello("p2", Role.PREFILL), hello("d", Role.DECODE))
    f.dispatch.on_batch("p1", Batch(load(queued=500)))
    assert place(Prompt(10, 10), list(f.dispatch.fleet)).prefill == "p2"


def knowing(f: Fakes, worker: str, prompt: list[int], blocks: int) -> None:
    """The worker has told that it has the prompt's first blocks."""
    stored = KvStored(list(range(blocks)), -1, prompt[: blocks * 16])
    f.dispatch.on_snapshot(worker, KvSnapshot(0, 0, True, [stored] if blocks else []))


def test_a_prompt_goes_where_the_least_of_it_is_left_to_compute() -> None:
    f = Fakes(hello("p1", Role.PREFILL), hello("p2", Role.PREFILL), hello("d", Role.DECODE))
    prompt = list(range(1000))
    knowing(f, "p2", prompt, 40)
    f.dispatch.on_batch("p2", Batch(load(queued=300)))
    f.dispatch.submit(Ask("r", prompt, 4))
    assert f.last_generate()[0] == "p2"
    f.dispatch.submit(Ask("again", prompt, 4))
    assert f.last_generate()[0] == "p1", "360 tokens more are on their way to p2, and 300 queued"
    f.dispatch.submit(Ask("another's", prompt, 4, cache_salt="x"))
    assert f.last_generate()[0] == "p2", "the salt is another's: 660 and 1000 against 1000 and 1000"


def test_what_a_worker_has_not_heard_of_yet_counts_and_nothing_counts_twice() -> None:
    f = Fakes(hello("p1", Role.PREFILL), hello("p2", Role.PREFILL), hello("d", Role.DECODE))
    view = f.dispatch.fleet.get("p1")
    assert view is not None
    for name in ("a", "b"):  # One each.
        f.dispatch.submit(Ask(name, list(range(100)), 4))
    assert view.prefill_tokens_queued == 100
    f.dispatch.on_batch("p1", Batch(load(queued=30), heard=0))
    assert view.prefill_tokens_queued == 130, "30 are another router's"
    f.dispatch.on_batch("p1", Batch(load(queued=130), heard=1))
    assert view.prefill_tokens_queued == 130
    f.dispatch.on_batch("p1", Batch(load(queued=70), heard=1))
    assert view.prefill_tokens_queued == 70


def test_what_was_foretold_is_noted_beside_what_came_true() -> None:
    f = pair()
    prompt = list(range(40))
    knowing(f, "p", prompt, 2)
    f.dispatch.submit(Ask("r", prompt, 4))
    f.say("p", Delta("r/p", [], Finish.PREFILLED, ticket=b"t", cached_tokens=16))
    f.say("d", Delta("r", [7], Finish.STOP, cached_tokens=0))
    (record,) = f.dispatch.journal.find("r")
    assert (record.predicted_tokens, record.cached_tokens) == (32, 16)
    caches = f.dispatch.caches
    assert (caches.predicted_tokens_total, caches.actual_tokens_total) == (32, 16)
    assert caches.error_tokens_total == 16


def test_a_lost_worker_s_cache_is_forgotten_and_a_new_one_s_asked_for() -> None:
    f = pair()
    knowing(f, "p", list(range(40)), 2)
    assert f.dispatch.caches.blocks == 2
    f.dispatch.on_lost("p", "gone")
    assert f.dispatch.caches.blocks == 0
    f.dispatch.on_hello(hello("p", Role.PREFILL, epoch="2"))
    assert f.sent[-1] == ("p", KvAsk())
    f.dispatch.on_batch("p", Batch(load(), [], 0, 7, [KvStored([9], 3, [0] * 16)]))
    assert f.dispatch.caches.blocks == 0, "the answer is under way"


_EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["prefilled", "token", "finish", "error", "refused", "cancel", "enough"]),
        st.sampled_from(["p1", "p2", "d1", "d2"]),
        st.booleans(),
    ),
    max_size=30,
)


@given(_EVENTS)
def test_whatever_happens_every_ticket_is_used_or_released(
    events: list[tuple[str, str, bool]],
) -> None:
    f = Fakes(
        hello("p1", Role.PREFILL), hello("p2", Role.PREFILL),
        hello("d1", Role.DECODE), hello("d2", Role.DECODE),
    )  # fmt: skip
    f.dispatch.submit(Ask("r", [1, 2], 8))
    granted: set[bytes] = set()
    for number, (kind, worker, lose) in enumerate(events):
        target, last = f.last_generate()
        wire = last.request_id
        if lose:
            f.dispatch.on_lost(worker, "killed")
            continue
        match kind:
            case "prefilled" if last.phase is Phase.PREFILL:
                granted.add(ticket := b"%d" % number)
                f.say(target, Delta(wire, [], Finish.PREFILLED, ticket=ticket))
            case "token" if last.phase is not Phase.PREFILL:
                f.say(target, Delta(wire, [number]))
            case "finish" if last.phase is not Phase.PREFILL:
                f.say(target, Delta(wire, [number], Finish.STOP))
            case "error" | "refused":
                f.say(target, Delta(wire, [], Finish(kind), error="no"))
            case "cancel":
                f.dispatch.cancel(["r"])
            case "enough":
                f.dispatch.enough(["r"])
    f.dispatch.cancel(["r"])
    assert len(f.dispatch) == 0
    released = {t for _, m in f.sent if isinstance(m, Release) for t in m.tickets}
    given_on = {m.ticket for _, m in f.sent if isinstance(m, Generate) and m.ticket}
    assert granted <= released | given_on
    assert all(not w.promised and not w.unheard for w in f.dispatch.fleet)
