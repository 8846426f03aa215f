"""A worker's messages are believed or not before anything is done with them."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.ask import Ask
from router.core.belief import (
    ASIDE_MAX,
    ASIDE_S,
    VIEW_FACTOR,
    VIEW_SPARE,
    Doubts,
    batch_doubt,
    hello_doubt,
)
from router.core.caches import Caches
from router.core.compat import RouterFacts, refusal
from tests.unit.test_dispatch import Fakes, hello, load
from workers.api import (
    Batch,
    Delta,
    Finish,
    Item,
    KvCleared,
    KvRemoved,
    KvSnapshot,
    KvStored,
    Load,
    Role,
    Step,
)

HELLO = hello("w", Role.MIXED)
BLOCK = HELLO.block_tokens
MOST = VIEW_FACTOR * HELLO.blocks_total + VIEW_SPARE


def batch(*deltas: Delta, **changes: Any) -> Batch:
    return Batch(msgspec.structs.replace(load(), **changes), list(deltas))


@pytest.mark.parametrize(
    "change",
    [
        {"block_tokens": 0}, {"block_tokens": -1}, {"block_tokens": 1 << 40},
        {"block_bytes": -1}, {"blocks_total": -5}, {"blocks_total": 1 << 60},
        {"max_model_len": 0}, {"lease_s": nan}, {"lease_s": inf}, {"lease_s": -1.0},
        {"step_tokens": -1}, {"dp_size": 0}, {"worker_id": ""}, {"worker_id": "w" * 100_000},
        {"epoch": "e" * 100_000}, {"model": "m" * 100_000}, {"transports": ["x"] * 1000},
        {"kv_digest": "x" * 100_000}, {"handoff_endpoint": "tcp://" + "x" * 100_000},
    ],
    ids=str,
)  # fmt: skip
def test_absurd_hello_is_refused_with_a_reason_that_is_short(change: dict[str, Any]) -> None:
    router = RouterFacts("r", "m", "td", "md", 1024)
    assert refusal(router, HELLO) is None
    reason = refusal(router, msgspec.structs.replace(HELLO, **change))
    assert reason is not None
    assert "does not believe" in reason
    assert len(reason) < 2000


@pytest.mark.parametrize(
    "change",
    [
        {"running": -1}, {"waiting": -1}, {"prefill_tokens_queued": -1},
        {"prefill_tokens_queued": 1 << 50}, {"blocks_free": -1}, {"blocks_free": 10_001},
        {"blocks_total": -1, "blocks_free": -1}, {"leases_open": -1}, {"steps": -1},
        {"step": Step(nan)}, {"step": Step(inf)}, {"step": Step(-1.0)},
        {"step": Step(0.1, prefill_tokens=-1)}, {"step": Step(0.1, context_tokens=1 << 50)},
    ],
    ids=str,
)  # fmt: skip
def test_load_that_no_worker_has_is_not_believed(change: dict[str, Any]) -> None:
    assert batch_doubt(batch(), {}) is None
    assert batch_doubt(batch(**change), {}) is not None


@pytest.mark.parametrize(
    "delta",
    [
        Delta("r", [-1]),
        Delta("r", [1 << 40]),
        Delta("r", [1], cached_tokens=-1),
        Delta("r", [1], kv_tokens=-1),
        Delta("r", [1], kv_s=nan),
        Delta("r", [1], kv_hidden_s=-1.0),
        Delta("r", [1], kv_bytes=-1),
        Delta("r", [1], kv_tokens=1, kv_transport="x" * 100_000),
        Delta("r", [], Finish.ERROR, error="x" * 100_000),
        Delta("r", [], Finish.PREFILLED, ticket=bytes(1 << 20)),
    ],
    ids=lambda delta: str(msgspec.to_builtins(delta))[:60],
)
def test_delta_that_no_request_has_is_not_believed(delta: Delta) -> None:
    assert batch_doubt(batch(delta), {}) is not None


def test_more_tokens_than_were_asked_for_are_not_believed() -> None:
    left = {"r": 3}
    assert batch_doubt(batch(Delta("r", [1, 2, 3])), left) is None
    assert batch_doubt(batch(Delta("r", [1, 2]), Delta("s", [1] * 9)), left) is None
    assert batch_doubt(batch(Delta("r", [1, 2]), Delta("r", [3, 4])), left) is not None
    reason = batch_doubt(batch(Delta("r", list(range(1_000_000)))), left)
    assert reason is not None
    assert "1000000 tokens where 3 may come" in reason


def test_dispatch_doubts_tokens_beyond_its_own_request_and_acts_on_none_of_them() -> None:
    f = Fakes(HELLO)
    f.dispatch.submit(Ask("r", [1, 2, 3], 4))
    assert f.dispatch.doubt("w", batch(Delta("r", [5, 6]))) is None
    f.say("w", Delta("r", [5, 6]))
    assert f.dispatch.doubt("w", batch(Delta("r", [7, 8]))) is None
    assert f.dispatch.doubt("w", batch(Delta("r", [7, 8, 9, 10]))) is not None
    assert f.dispatch.doubt("w", batch(Delta("nobody's", [1] * 500))) is None, "it is ignored"
    assert f.got == {"r": [5, 6]}


# ------------------------------------------------------------------------- caches


def stored(count: int, first: int = 0, **more: Any) -> KvStored:
    ids = list(range(first, first + count))
    return KvStored(ids, -1, [1] * (count * BLOCK), **more)


def test_snapshot_of_more_blocks_than_the_worker_has_is_not_believed() -> None:
    caches = Caches()
    caches.join(HELLO, 0.0)
    full = KvSnapshot(0, 0, True, [stored(HELLO.blocks_total)])
    assert caches.doubt("w", full) is None
    liar = KvSnapshot(0, 0, True, [KvStored(list(range(2_000_000)), -1, [])])
    reason = caches.doubt("w", liar)
    assert reason is not None
    assert str(HELLO.blocks_total) in reason


def test_snapshot_in_parts_is_added_up() -> None:
    caches, part, size = Caches(), 0, 1000
    caches.join(HELLO, 0.0)
    while part * size <= MOST + 2 * size:
        news = KvSnapshot(0, part, False, [stored(size, part * size)])
        if caches.doubt("w", news):
            break
        caches.snapshot("w", news, 0.0)
        part += 1
    assert MOST - size <= part * size <= MOST
    view = caches.view("w")
    assert view is not None
    assert len(view) <= MOST


def test_cache_that_turns_over_is_believed() -> None:
    caches = Caches()
    caches.join(HELLO, 0.0)
    events: list[Any] = []
    for n in range(40):
        events += [stored(5000, n * 5000), KvRemoved(list(range(n * 5000, (n + 1) * 5000)))]
    assert caches.doubt("w", Batch(load(), kv=events)) is None
    assert caches.doubt("w", Batch(load(), kv=[stored(MOST), KvCleared(), stored(MOST)])) is None


@pytest.mark.parametrize(
    "items",
    [
        tuple(Item("i", 0, 1 << 40) for _ in range(10_000)),
        (Item("i", 0, 0),),
        (Item("i", 10_000, 1),),
        (Item("i" * 100_000, 0, 1),),
    ],
    ids=["all over everything", "empty", "elsewhere", "long name"],
)
def test_items_that_blocks_cannot_have_are_not_believed(items: tuple[Item, ...]) -> None:
    caches = Caches()
    caches.join(HELLO, 0.0)
    assert caches.doubt("w", Batch(load(), kv=[stored(10, items=(Item("i", -3, 50),))])) is None
    assert caches.doubt("w", Batch(load(), kv=[stored(10, items=items)])) is not None


# ------------------------------------------------------------------------- aside


def test_worker_is_aside_for_a_while_or_until_it_restarts() -> None:
    doubts, again = Doubts(), hello("w", Role.MIXED, epoch="2")
    doubts.put_aside(HELLO, "it lied", 10.0)
    assert doubts.about(HELLO, 10.0 + ASIDE_S / 2) == "it lied"
    assert doubts.about(HELLO, 10.0 + ASIDE_S) is None
    doubts.put_aside(HELLO, "it lied", 10.0)
    assert doubts.about(again, 11.0) is None
    assert doubts.total == 2


def test_workers_that_are_aside_are_bounded() -> None:
    doubts = Doubts()
    for number in range(2 * ASIDE_MAX):
        doubts.put_aside(hello(f"w{number}", Role.MIXED), "it lied", 0.0)
    assert doubts.about(hello("w0", Role.MIXED), 0.0) is None
    assert doubts.about(hello(f"w{2 * ASIDE_MAX - 1}", Role.MIXED), 0.0) is not None


NUMBERS = st.one_of(st.integers(-5, 50), st.integers(-(2**63), 2**63 - 1))
FLOATS = st.floats(allow_nan=True, allow_infinity=True)


@given(
    st.lists(NUMBERS, min_size=8, max_size=8),
    FLOATS,
    st.lists(st.lists(NUMBERS, max_size=4), max_size=4),
)
def test_dispatch_takes_whatever_it_believes(
    numbers: list[int], seconds: float, tokens: list[list[int]]
) -> None:
    f = Fakes(HELLO)
    f.dispatch.submit(Ask("r", [1, 2, 3], 8))
    said = Batch(
        Load(*numbers[:1], True, *numbers[1:7], step=Step(seconds, numbers[7])),
        [Delta("r", ids, kv_s=seconds) for ids in tokens],
        heard=numbers[7],
    )
    if f.dispatch.doubt("w", said) is None:
        f.dispatch.on_batch("w", said)
        f.dispatch.tick()
    assert len(f.got.get("r", [])) <= 9
    assert hello_doubt(HELLO) is None
