"""What other routers' policies choose, and what the oracle is told."""

from __future__ import annotations

from collections import Counter
from zlib import crc32

import pytest

from router.core.errors import NoWorkers
from router.core.fleet import WorkerView
from router.core.placement import Prompt
from router.twin.fleet import CPU, FleetPlan, WorkerPlan
from router.twin.generate import generate
from router.twin.oracle import true_rates
from router.twin.outcomes import REQUESTS_MAX, name_of, number_of
from router.twin.policies import (
    BALANCE_ABS_THRESHOLD,
    Asked,
    Pools,
    PowerOfTwo,
    PrefixTree,
    RoundRobin,
    SessionHash,
    peers,
)
from router.twin.traces import Request, Trace
from router.twin.worker import SimWorker
from workers.api import Load, Role
from workers.engines.sim_blocks import Handoffs


def view(name: str, role: Role = Role.DECODE, requests: int = 0) -> WorkerView:
    hello = SimWorker(WorkerPlan(name, role, CPU), Handoffs(only_here=True), 0.0).hello
    load = Load(1, requests > 0, requests, 0, 0, 100, 100, 0)
    return WorkerView(hello, load, heard_at=0.0, stepped_at=0.0)


FOUR = [view(f"w{n}") for n in range(4)]


def trace_of(*blocks: tuple[int, ...]) -> Trace:
    return Trace("t", [Request(0.0, 512 * len(b), 5, b) for b in blocks])


def prompt(number: int) -> Prompt:
    return Prompt(tokens=100, output_tokens_max=5, tie=crc32(name_of(number).encode()))


def test_names_tell_requests_apart_by_their_hash() -> None:
    numbers = [*range(50_000), *range(REQUESTS_MAX - 1000, REQUESTS_MAX)]
    assert [number_of(name_of(n)) for n in numbers] == numbers
    assert len({crc32(name_of(n).encode()) for n in numbers}) == len(numbers)


def test_round_robin_takes_each_in_turn() -> None:
    pick = RoundRobin()
    assert [pick(prompt(0), FOUR).id for _ in range(6)] == ["w0", "w1", "w2", "w3", "w0", "w1"]


def test_power_of_two_never_takes_the_busiest() -> None:
    pick, workers = PowerOfTwo("seed"), [*FOUR[:3], view("busy", requests=9)]
    chosen = Counter(pick(prompt(0), workers).id for _ in range(300))
    assert set(chosen) == {"w0", "w1", "w2"}


def test_a_session_stays_where_it_is_and_sessions_spread() -> None:
    trace = trace_of(*[(0, session, n) for session in range(1, 200) for n in (1000, 1001)])
    pick = SessionHash(Asked(trace))
    chosen = [pick(prompt(n), FOUR).id for n in range(len(trace.requests))]
    assert chosen[::2] == chosen[1::2]
    assert min(Counter(chosen).values()) > len(chosen) / 8
    # With one worker gone, only its sessions move.
    after = [pick(prompt(n), FOUR[:3]).id for n in range(len(trace.requests))]
    assert all(a == b for a, b in zip(chosen, after, strict=True) if a != "w3")


def test_a_prefix_goes_where_it_was_and_strangers_where_least_was_sent() -> None:
    pick = PrefixTree(Asked(trace_of((0, 1, 2), (0, 7, 8, 9), (0, 1, 2, 3), (5, 6))))
    assert pick(prompt(0), FOUR).id == "w0"
    assert pick(prompt(1), FOUR).id == "w1"  # A quarter matches, which is not enough.
    assert pick(prompt(2), FOUR).id == "w0"
    assert pick(prompt(3), FOUR).id == "w2"


def test_a_prefix_goes_elsewhere_when_loads_are_apart() -> None:
    pick = PrefixTree(Asked(trace_of((0, 1, 2), (0, 1, 2))))
    busy = view("w0", requests=BALANCE_ABS_THRESHOLD)
    assert pick(prompt(0), [busy, *FOUR[1:]]).id == "w0"
    assert pick(prompt(1), [busy, *FOUR[1:]]).id == "w0"  # Not more than the threshold.
    busier = view("w0", requests=BALANCE_ABS_THRESHOLD + 1)
    assert pick(prompt(1), [busier, *FOUR[1:]]).id == "w1"


def test_pools_disaggregate_where_there_are_prefill_workers() -> None:
    pools = Pools(lambda _: RoundRobin())
    both = [view("p", Role.PREFILL), view("d")]
    assert (pools.place(prompt(0), both).prefill, pools.place(prompt(0), both).decode) == ("p", "d")
    placed = pools.place(prompt(0), both, frozenset({"p"}))
    assert (placed.prefill, placed.decode) == (None, "d")
    assert pools.place(prompt(0), [view("m", Role.MIXED)]).prefill is None
    with pytest.raises(NoWorkers):
        pools.place(prompt(0), [view("p", Role.PREFILL)])


def test_every_peer_can_be_made() -> None:
    asked = Asked(generate("mooncake-tool", 0, 5))
    for make in peers(asked, 0).values():
        assert make().place(prompt(4), FOUR).decode.startswith("w")


def test_the_oracle_s_rates_are_those_of_full_steps() -> None:
    engine = FleetPlan((WorkerPlan("w", Role.MIXED, CPU),)).workers[0].settings
    rates = true_rates(engine)
    assert rates.chunk_tokens == engine.chunk_tokens
    assert rates.step.predict((1, 0, 0, 4, 1000)) == pytest.approx(
        engine.step_s + 4 * engine.stream_s + 1000 * engine.context_token_s
    )
