"""An operator is told of handoffs that don't work, and placement keeps prompts from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.ask import Ask
from router.core.compat import Unlike, can_hand_off, unpaired
from router.core.fleet import Fleet
from router.core.handoffs import FAILED_MAX, RETRIED_S, Handoffs
from tests.unit.test_dispatch import Fakes, hello, pair
from workers.api import ACCEPTS, Delta, Finish, Generate, Phase, Role, WorkerHello

if TYPE_CHECKING:
    import logging


def told(caplog: pytest.LogCaptureFixture, message: str) -> list[logging.LogRecord]:
    return [r for r in caplog.records if r.message == message]


# ------------------------------------------------------------ by what workers say


@pytest.mark.parametrize(
    ("other", "differs", "flag"),
    [
        ({"kv_digest": "x"}, Unlike.LAYOUT, "--block-size"),
        ({"model_digest": "x"}, Unlike.MODEL, "same model"),
        ({"transports": ["tcp"]}, Unlike.TRANSPORT, "--kv-transports"),
    ],
)
def test_workers_that_can_never_hand_off_are_told_once_and_counted_and_degrade_readiness(
    caplog: pytest.LogCaptureFixture, other: dict[str, object], differs: Unlike, flag: str
) -> None:
    caplog.set_level("WARNING", logger="router")  # The twin's command turns it off.
    f = Fakes(hello("p", Role.PREFILL))
    known = f.dispatch.handoffs.known
    assert known.degraded is None
    f.dispatch.on_hello(msgspec.structs.replace(hello("d", Role.DECODE), **other))
    f.dispatch.on_hello(msgspec.structs.replace(hello("d2", Role.DECODE), **other))
    [first, second] = told(caplog, "no handoff")
    assert (first.__dict__["workers"], second.__dict__["workers"]) == (("p", "d"), ("d2",))
    reason = first.__dict__["reason"]
    assert reason.startswith(f"{differs} differs: p (prefill) keeps ")
    assert "; d (decode) keeps " in reason
    assert flag in reason
    assert known.unpaired[differs] == sum(known.unpaired.values()) == 3
    assert known.degraded is not None
    assert reason in known.degraded
    f.dispatch.on_lost("p", "killed")
    assert known.degraded is None


def test_a_worker_that_comes_again_unlike_the_others_is_told_of_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("WARNING", logger="router")
    f = Fakes(hello("p", Role.PREFILL), hello("p2", Role.PREFILL), hello("d", Role.DECODE))
    f.dispatch.on_hello(hello("d2", Role.DECODE, kv="x"))
    f.dispatch.on_hello(hello("d2", Role.DECODE, kv="x", epoch="2"))
    assert [r.__dict__["workers"] for r in told(caplog, "no handoff")] == [("d2",), ("d2",)]


def test_workers_that_were_started_to_hand_nothing_off_are_no_trouble() -> None:
    alone = msgspec.structs.replace(hello("m", Role.MIXED, kv=""), transports=[])
    other = msgspec.structs.replace(alone, worker_id="m2")
    assert Fakes(alone, other).dispatch.handoffs.known.degraded is None
    assert unpaired(hello("d", Role.DECODE), [alone]) is None


def one_by_one(worker: WorkerHello, all_of_them: list[WorkerHello]) -> bool:
    """Whether it can hand off with nobody, asked of each other worker in turn."""
    ways = [
        can_hand_off(sender, receiver)
        for other in all_of_them
        if other is not worker
        for sender, receiver in ((worker, other), (other, worker))
        if Phase.PREFILL in ACCEPTS[sender.role] and Phase.DECODE in ACCEPTS[receiver.role]
    ]
    return bool(ways) and not any(ways)


@given(
    st.lists(
        st.tuples(st.sampled_from(Role), st.sampled_from("ab"), st.sampled_from(["ucx", "tcp"])),
        max_size=8,
    )
)
def test_comparing_kinds_finds_whom_comparing_workers_finds(
    kinds: list[tuple[Role, str, str]],
) -> None:
    fleet = Fleet()
    hellos = [
        msgspec.structs.replace(hello(f"w{n}", role, kv), transports=[transport])
        for n, (role, kv, transport) in enumerate(kinds)
    ]
    for each in hellos:
        fleet.join(each, 0.0)
    handoffs = Handoffs(fleet)
    found = {worker for news in handoffs.changed() for worker in news.workers}
    assert found == {each.worker_id for each in hellos if one_by_one(each, hellos)}
    assert handoffs.changed() == []


# ------------------------------------------------------------ by what came of them


def handed_off(f: Fakes, name: str, failed: str | None) -> Phase:
    """One request through; the phase in which it began."""
    f.dispatch.submit(Ask(name, [1] * 40, 4))
    worker, asked = f.last_generate()
    if asked.phase is Phase.PREFILL:
        f.say(worker, Delta(f"{name}/p", [], Finish.PREFILLED, ticket=b"t", cached_tokens=0))
        kv_bytes = 0 if failed else 100
        f.say("d", Delta(name, [5], cached_tokens=0, kv_failed=failed, kv_bytes=kv_bytes))
    f.say("d", Delta(name, [6], Finish.STOP))
    return asked.phase


def test_a_pair_whose_handoffs_fail_in_a_row_is_told_once_and_gets_one_worker_s_requests(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("WARNING", logger="router")
    f, phases = pair(), []
    known = f.dispatch.handoffs.known
    for n in range(FAILED_MAX + 3):
        phases.append(handed_off(f, f"r{n}", "checksum of block 0 differs"))
    assert phases == [Phase.PREFILL] * FAILED_MAX + [Phase.BOTH] * 3
    [line] = told(caplog, "handoffs fail")
    assert line.__dict__["workers"] == ("p", "d")
    assert line.__dict__["reason"] == "checksum of block 0 differs"
    assert known.failing == 1
    assert known.degraded == "p, d: handoffs fail: checksum of block 0 differs"


def test_a_failing_pair_is_tried_again_after_a_while_and_told_of_no_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("WARNING", logger="router")
    f = pair()
    for n in range(FAILED_MAX):
        handed_off(f, f"r{n}", "no")
    f.now += RETRIED_S - 1
    f.dispatch.handoffs.known.retry(f.now)
    assert handed_off(f, "early", "no") is Phase.BOTH
    f.now += 1
    f.dispatch.handoffs.known.retry(f.now)
    assert handed_off(f, "again", "still no") is Phase.PREFILL
    assert handed_off(f, "after", "no") is Phase.BOTH
    assert len(told(caplog, "handoffs fail")) == 1
    f.now += RETRIED_S
    f.dispatch.handoffs.known.retry(f.now)
    assert handed_off(f, "mended", None) is Phase.PREFILL
    assert f.dispatch.handoffs.known.degraded is None
    assert handed_off(f, "then", None) is Phase.PREFILL


def test_failures_with_a_success_between_them_are_no_row() -> None:
    f = pair()
    for n in range(4 * FAILED_MAX):
        failed = None if n % FAILED_MAX == FAILED_MAX - 1 else "late"
        assert handed_off(f, f"r{n}", failed) is Phase.PREFILL
    assert f.dispatch.handoffs.known.degraded is None


def test_another_prefill_worker_is_taken_where_one_s_kv_can_t_be_read() -> None:
    f = Fakes(hello("p", Role.PREFILL), hello("p2", Role.PREFILL), hello("d", Role.DECODE))
    for _ in range(FAILED_MAX):
        f.dispatch.handoffs.known.came("p", "d", "no", f.now)
    for n in range(4):
        assert handed_off(f, f"r{n}", None) is Phase.PREFILL
    asked = {w for w, m in f.sent if isinstance(m, Generate) and m.phase is Phase.PREFILL}
    assert asked == {"p2"}


def test_a_workers_failures_go_with_it() -> None:
    f = pair()
    for n in range(FAILED_MAX):
        handed_off(f, f"r{n}", "no")
    f.dispatch.on_hello(hello("p", Role.PREFILL, epoch="2"))
    assert f.dispatch.handoffs.known.degraded is None
    assert handed_off(f, "new", None) is Phase.PREFILL
