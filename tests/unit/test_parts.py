"""Batches as frames that both sides have agreed on: nothing lost, nothing too large."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workers.api import Batch, Delta, Finish, KvRemoved, Load, decode_to_router
from workers.parts import parts

LOAD = Load(1, True, 1, 0, 0, 1, 2, 0)
MOST = 1000


def told(batch: Batch) -> list[Batch]:
    frames = list(parts(batch, MOST))
    assert all(len(frame) <= MOST for frame in frames)
    found = [decode_to_router(frame) for frame in frames]
    assert all(isinstance(each, Batch) for each in found)
    return [each for each in found if isinstance(each, Batch)]


def test_batch_that_fits_is_one_frame() -> None:
    batch = Batch(LOAD, [Delta("r", [1, 2])], heard=3)
    assert told(batch) == [batch]


@given(st.lists(st.integers(0, 900), max_size=30), st.integers(0, 40))
def test_deltas_arrive_in_order_whatever_their_sizes(sizes: list[int], changes: int) -> None:
    deltas = [Delta(f"r{n}", [n], extras=bytes(size)) for n, size in enumerate(sizes)]
    kv = [KvRemoved([n]) for n in range(changes)]
    found = told(Batch(LOAD, deltas, heard=7, kv_seq=5, kv=kv))
    assert [d.request_id for b in found for d in b.deltas] == [d.request_id for d in deltas]
    assert [e for b in found for e in b.kv] == kv
    assert {b.heard for b in found} == {7}
    for batch in found:
        for delta in batch.deltas:
            whole = delta == deltas[int(delta.request_id[1:])]
            assert whole or delta.finish is Finish.INVALID


def test_delta_that_fits_no_message_fails_its_request_and_names_the_setting() -> None:
    batch = Batch(LOAD, [Delta("a", [1]), Delta("b", [2], extras=bytes(5000)), Delta("c", [3])])
    deltas = [d for b in told(batch) for d in b.deltas]
    assert [d.request_id for d in deltas] == ["a", "b", "c"]
    assert [d.finish for d in deltas] == [None, Finish.INVALID, None]
    assert "5000 bytes" in (deltas[1].error or "")
    assert "--message-bytes-max" in (deltas[1].error or "")


def test_changes_that_fit_no_message_leave_a_gap_that_the_router_sees() -> None:
    batch = Batch(LOAD, [Delta("a", [1])], kv_seq=5, kv=[KvRemoved(list(range(5000)))])
    found = told(batch)
    assert not any(b.kv for b in found)
    assert [d.request_id for b in found for d in b.deltas] == ["a"]
