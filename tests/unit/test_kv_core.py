"""The handoff's pure core: whose KV a ticket is, and how long it is kept."""

from __future__ import annotations

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.core.lease import Leases
from kvtransfer.core.manifest import (
    Expectation,
    TicketUnreadable,
    chain_tail,
    decode_ticket,
    mismatch,
)
from kvtransfer.protocol import VERSION, Held, Release, Ticket, ToReceiver
from kvtransfer.sender import LeaseServer, Region

TOKENS = st.lists(st.integers(0, 200_000), min_size=1, max_size=40)


def ticket(**changes: object) -> Ticket:
    whole = Ticket(VERSION, "e", "h", ["tcp://a:1"], "kv", "m", 20, [7, 8], b"c" * 16)
    return msgspec.structs.replace(whole, **changes)


WANTED = Expectation("kv", "m", block_tokens=16, num_tokens=20, chain=b"c" * 16)


@given(TOKENS, TOKENS, st.sampled_from([1, 4, 16]))
def test_equal_tails_mean_equal_prompts(one: list[int], two: list[int], block: int) -> None:
    tails = [chain_tail(t, block, salt=None, lora=None) for t in (one, two)]
    assert (tails[0] == tails[1]) == (one == two)


def test_salt_adapter_and_block_size_are_part_of_the_chain() -> None:
    tails = {
        chain_tail([1, 2, 3], block, salt=salt, lora=lora)
        for block in (2, 16)
        for salt in (None, "", "a")
        for lora in (None, "", "a")
    }
    assert len(tails) == 18


def test_a_whole_match_is_used() -> None:
    assert mismatch(ticket(), WANTED) is None


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"kv_digest": "other"}, "KV layout"),
        ({"model_digest": "other"}, "model digest"),
        ({"num_tokens": 21}, "token count"),
        ({"block_ids": [7]}, "block count"),
        ({"chain": b"d" * 16}, "prompt chain"),
        ({"endpoints": ["tcp://a:1", "tcp://b:1"]}, "rank count"),
    ],
)
def test_anything_else_is_refused_by_name(change: dict[str, object], what: str) -> None:
    reason = mismatch(ticket(**change), WANTED)
    assert reason is not None
    assert reason.startswith(what)


@given(st.binary(max_size=60))
def test_no_bytes_but_a_ticket_are_read_as_one(content: bytes) -> None:
    with pytest.raises(TicketUnreadable):
        decode_ticket(content)


def test_another_version_is_refused_before_anything_else_is_read() -> None:
    with pytest.raises(TicketUnreadable, match=f"version 99, this receiver of {VERSION}"):
        decode_ticket(msgspec.msgpack.encode([99, {"nothing": "known"}]))


def test_a_ticket_comes_back_as_it_was() -> None:
    assert decode_ticket(msgspec.msgpack.encode(ticket())) == ticket()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["grant", "renew", "release", "expire"]),
            st.integers(0, 3),
            st.floats(0, 4),
        ),
        max_size=60,
    )
)
def test_every_lease_ends_exactly_once_and_within_its_time(
    events: list[tuple[str, int, float]],
) -> None:
    leases, now, granted = Leases(lease_s=5.0), 0.0, 0
    until: dict[str, float] = {}
    ended: list[str] = []
    for kind, which, wait in events:
        now += wait
        handle = sorted(until)[which % len(until)] if until else "unknown"
        alive = until.get(handle, now) > now
        match kind:
            case "grant":
                granted += 1
                until[f"h{granted}"] = now + 5.0
                leases.grant(f"h{granted}", now)
            case "renew":
                assert (leases.renew(handle, now) is not None) == alive
                if alive:
                    until[handle] = now + 5.0
            case "release":
                assert (leases.release(handle, now) is not None) == alive
                if alive:
                    ended.append(handle)
                    del until[handle]
            case "expire":
                over = leases.expire(now)
                assert set(over) == {h for h, t in until.items() if t <= now}
                ended += over
                for one in over:
                    del until[one]
    ended += leases.expire(now + 5.0)
    assert len(leases) == 0
    assert sorted(ended) == sorted(f"h{n + 1}" for n in range(granted))


def test_a_lease_server_survives_whatever_it_is_sent() -> None:
    """Over real sockets: noise first, then a receiver that must still be answered."""
    server = LeaseServer("127.0.0.1", "e", 5.0, Region("kv", "ucx", b"memory"))
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.RCVTIMEO, 5000)
    try:
        socket.connect(server.endpoint)
        for noise in (
            b"",
            b"junk",
            b"\x92\xa7Release\xa2\x00\x80",
            b"\x94\xa7Release\x01\xa1\xff\xa1h",
        ):
            socket.send(noise)
        socket.send_multipart([b"too", b"many", b"frames"])
        handle = server.grant()
        socket.send(msgspec.msgpack.encode(Release(9, "e", handle)))
        answer = msgspec.msgpack.decode(socket.recv(), type=ToReceiver)
        assert isinstance(answer, Held)
        assert answer.seq == 9
        assert server.ended() == [handle]
    finally:
        socket.close(linger=0)
        context.term()
        server.close()
