"""Dispatch where both workers are asked at once: reservations, relayed tokens, and every race."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.protocol import decode_ticket
from router.ask import Ask, Reserve
from router.dispatch import Dispatch
from tests.unit.test_dispatch import APART, Fakes, hello
from workers.api import Abort, Delta, Finish, Generate, Phase, Release, Role, WorkerHello


def streaming(worker_id: str, role: Role, epoch: str = "1") -> WorkerHello:
    return msgspec.structs.replace(
        hello(worker_id, role, epoch=epoch), handoff_endpoint=f"tcp://{worker_id}:1"
    )


def pair(reserve: Reserve = Reserve.AT_DISPATCH) -> Fakes:
    f = Fakes()
    f.dispatch = Dispatch(
        lambda w, m: f.sent.append((w, m)), f, lambda: f.now, None, reserve, policy=APART
    )  # fmt: skip
    for worker in (streaming("p", Role.PREFILL), streaming("d", Role.DECODE)):
        f.dispatch.on_hello(worker)
    return f


def generates(f: Fakes) -> list[tuple[str, Generate]]:
    return [(w, m) for w, m in f.sent if isinstance(m, Generate)]


def test_both_workers_are_asked_at_once_and_get_the_same_ticket() -> None:
    f = pair()
    f.dispatch.submit(Ask("r", [1, 2], 4, relay=True))
    asked = dict(generates(f))
    assert {w: m.phase for w, m in asked.items()} == {"p": Phase.PREFILL, "d": Phase.DECODE}
    assert asked["p"].ticket == asked["d"].ticket
    ticket = decode_ticket(asked["p"].ticket or b"")
    assert (ticket.epoch, ticket.endpoint) == ("1", "tcp://p:1")
    assert asked["p"].relay


def test_handles_are_long_random_and_no_two_are_equal() -> None:
    f = pair()
    for number in range(20):
        f.dispatch.submit(Ask(f"r{number}", [1, 2], 4, relay=True))
    tickets = [decode_ticket(m.ticket or b"") for w, m in generates(f) if w == "p"]
    handles = {t.handle for t in tickets}
    assert len(handles) == len(tickets) > 1
    for request, handle in enumerate(handles):
        assert len(bytes.fromhex(handle)) * 8 >= 128
        assert f"r{request}" not in handle
    shown = repr([msgspec.to_builtins(r) for r in f.dispatch.journal.find("r0")])
    assert not [h for h in handles if h in shown]


def test_with_reservation_at_the_end_decode_is_asked_when_the_prefill_is_done() -> None:
    f = pair(Reserve.AT_PREFILL_DONE)
    f.dispatch.submit(Ask("r", [1, 2], 4))
    assert [w for w, _ in generates(f)] == ["p"]
    f.say("p", Delta("r/p", [], Finish.PREFILLED))
    asked = generates(f)
    assert [w for w, _ in asked] == ["p", "d"]
    assert asked[0][1].ticket == asked[1][1].ticket


def test_with_reservation_at_the_last_step_decode_is_asked_when_that_begins() -> None:
    f = pair(Reserve.AT_LAST_STEP)
    f.dispatch.submit(Ask("r", [1, 2], 4, relay=True))
    assert [w for w, _ in generates(f)] == ["p"]
    f.say("p", Delta("r/p", [], last_step=True))
    assert [w for w, _ in generates(f)] == ["p", "d"]
    f.say("p", Delta("r/p", [7], Finish.PREFILLED))
    f.say("d", Delta("r", [7, 8], Finish.STOP))
    assert [w for w, _ in generates(f)] == ["p", "d"], "asked once"
    assert f.got == {"r": [7, 8]}


def test_a_prompt_of_one_step_is_handed_off_when_it_is_done() -> None:
    f = pair(Reserve.AT_LAST_STEP)
    f.dispatch.submit(Ask("r", [1, 2], 4))
    f.say("p", Delta("r/p", [], Finish.PREFILLED))
    assert [w for w, _ in generates(f)] == ["p", "d"]


def test_the_relayed_token_is_told_once_and_first() -> None:
    f = pair()
    f.dispatch.submit(Ask("r", [1, 2], 4, relay=True))
    f.say("p", Delta("r/p", [7], Finish.PREFILLED))
    assert f.got == {"r": [7]}
    f.say("d", Delta("r", [7, 8]))
    f.say("d", Delta("r", [9], Finish.STOP))
    assert f.got == {"r": [7, 8, 9]}
    assert len(f.dispatch) == 0


def test_a_decode_worker_that_is_heard_first_says_it_all() -> None:
    f = pair()
    f.dispatch.submit(Ask("r", [1, 2], 4, relay=True))
    f.say("d", Delta("r", [7, 8]))
    f.say("p", Delta("r/p", [7], Finish.PREFILLED))
    f.say("d", Delta("r", [9], Finish.STOP))
    assert f.got == {"r": [7, 8, 9]}


def test_a_first_token_that_is_the_last_ends_it_and_frees_the_reservation() -> None:
    f = pair()
    f.dispatch.submit(Ask("r", [1, 2], 4, relay=True))
    f.say("p", Delta("r/p", [7], Finish.STOP))
    assert f.got == {"r": [7]}
    assert len(f.dispatch) == 0
    assert ("d", Abort(["r", "r/p"])) in f.sent


def test_one_token_needs_no_reservation() -> None:
    f = pair()
    f.dispatch.submit(Ask("r", [1, 2], 1, relay=True))
    assert [w for w, _ in generates(f)] == ["p"]
    f.say("p", Delta("r/p", [7], Finish.LENGTH))
    assert f.got == {"r": [7]}
    assert len(f.dispatch) == 0


@pytest.mark.parametrize("how", ["lost", "failed", "other token"])
def test_a_request_whose_client_has_one_token_goes_on_elsewhere(how: str) -> None:
    f = pair()
    f.dispatch.on_hello(streaming("d2", Role.DECODE))
    f.dispatch.submit(Ask("r", [1, 2], 4, relay=True))
    f.say("p", Delta("r/p", [7], Finish.PREFILLED))
    (first,) = {w for w, _ in generates(f)} - {"p"}
    (other,) = {"d", "d2"} - {first}
    if how == "lost":
        f.dispatch.on_lost(first, "killed")
    elif how == "failed":
        f.say(first, Delta("r", [], Finish.ERROR, error="no"))
    else:
        f.say(first, Delta("r", [6, 5]))
    asked = generates(f)[-2:]
    assert {w for w, _ in asked} == {"p", other}
    for _, message in asked:
        assert message.prompt_token_ids == [1, 2, 7]
        assert (message.max_tokens, message.generated) == (3, 1)
    f.say(other, Delta("r/2", [8, 9, 10], Finish.LENGTH))
    assert f.got == {"r": [7, 8, 9, 10]}
    assert f.failed == {}


def test_a_client_that_leaves_frees_both_sides() -> None:
    f = pair()
    f.dispatch.submit(Ask("r", [1], 4))
    ticket = generates(f)[0][1].ticket
    f.dispatch.cancel(["r"])
    told = f.sent[-3:]
    assert ("p", Abort(["r", "r/p"])) in told
    assert ("d", Abort(["r", "r/p"])) in told
    assert ("p", Release([ticket or b""])) in told


def after(tokens: list[int]) -> int:
    """What any engine says next: a function of all tokens so far."""
    return (sum((i + 1) * t for i, t in enumerate(tokens)) * 31 + 7) % 97


_EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "prefill",
                "decode",
                "decode",
                "prefill fails",
                "decode fails",
                "recompute",
                "prefill is in its last step",
            ]
        ),
        st.sampled_from(["p1", "p2", "d1", "d2", "none", "none", "none", "none"]),
        st.integers(1, 3),
    ),
    max_size=25,
)


@settings(max_examples=300)
@given(_EVENTS, st.integers(1, 6), st.sampled_from(list(Reserve)), st.booleans())
def test_whatever_happens_the_client_gets_what_one_engine_would_have_said(
    events: list[tuple[str, str, int]], length: int, reserve: Reserve, relay: bool
) -> None:
    f = pair(reserve)
    for name in ("p1", "p2"):
        f.dispatch.on_hello(streaming(name, Role.PREFILL))
    for name in ("d1", "d2"):
        f.dispatch.on_hello(streaming(name, Role.DECODE))
    prompt, expected = [3, 1, 4], []
    while len(expected) < length:
        expected.append(after([*prompt, *expected]))
    f.dispatch.submit(Ask("r", prompt, length, relay=relay))
    said: dict[str, list[int]] = {}
    done: set[str] = set()
    for kind, lost, count in events:
        if lost != "none":
            f.dispatch.on_lost(lost, "killed")
            f.dispatch.on_hello(
                streaming(lost, Role.PREFILL if lost[0] == "p" else Role.DECODE, epoch="2")
            )
            continue
        phase = Phase.PREFILL if kind.startswith("prefill") else Phase.DECODE
        able = [
            (w, m) for w, m in generates(f)
            if (m.phase is Phase.PREFILL) == (phase is Phase.PREFILL) and m.request_id not in done
        ]  # fmt: skip
        if not able:
            continue
        worker, m = able[-1]
        if kind.endswith("fails"):
            done.add(m.request_id)
            f.say(worker, Delta(m.request_id, [], Finish.ERROR, error="no"))
        elif kind.endswith("last step"):
            f.say(worker, Delta(m.request_id, [], last_step=True))
        elif phase is Phase.PREFILL:
            done.add(m.request_id)
            first = [after(m.prompt_token_ids)] if m.relay else []
            whole = m.relay and m.max_tokens == 1
            f.say(worker, Delta(m.request_id, first, Finish.LENGTH if whole else Finish.PREFILLED))
        else:
            if f"{m.request_id}/p" not in done and kind != "recompute" and m.ticket:
                continue  # Its KV is not there yet.
            own = said.setdefault(m.request_id, [])
            new: list[int] = []
            while len(new) < count and len(own) < m.max_tokens:
                new.append(after([*m.prompt_token_ids, *own]))
                own.append(new[-1])
            ended = len(own) == m.max_tokens
            if ended:
                done.add(m.request_id)
            f.say(worker, Delta(m.request_id, new, Finish.LENGTH if ended else None))
    got = f.got.get("r", [])
    assert got == expected[: len(got)]
    if len(f.dispatch) == 0 and not f.failed:
        assert got == expected
    f.dispatch.cancel(["r"])
    assert len(f.dispatch) == 0
    assert not f.dispatch._by_wire
    assert all(not w.promised and not w.unheard for w in f.dispatch.fleet)
