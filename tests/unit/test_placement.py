"""Placement: what it costs, and that the cheapest is chosen."""

from __future__ import annotations

import random
from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.ask import Ask
from router.core import estimate
from router.core.columns import ColumnsKept
from router.core.compat import can_hand_off
from router.core.fleet import UNMEASURED_S, Fleet, WorkerView
from router.core.placement import Disaggregate, EstimatePolicy, Prompt, place
from router.dispatch import Dispatch
from tests.unit.test_dispatch import Fakes
from workers.api import PROTOCOL, Batch, Delta, Finish, Load, Role, Step, WorkerHello

BLOCKS = 10_000


def hello(worker_id: str, role: Role, kv: str = "kv", endpoint: str = "") -> WorkerHello:
    return WorkerHello(
        PROTOCOL, worker_id, "1", role, "sim", "1", "m", "md", "td", kv, ["ucx"],
        block_tokens=16, block_bytes=16 * 23_040, blocks_total=BLOCKS, max_model_len=131_072,
        lease_s=30.0, handoff_endpoint=endpoint,
    )  # fmt: skip


def paced(fleet: Fleet, worker_id: str, pace: float, rng: random.Random) -> None:
    """Let it be learnt: so many times as slow as a worker of ten thousand tokens a second."""
    for number in range(60):
        prefill, streams = rng.choice((0, rng.randint(1, 4000))), rng.randint(0, 60)
        seconds = pace * (0.01 + 1e-4 * prefill + 1e-4 * streams + 1e-8 * streams * 3000)
        step = Step(seconds, prefill, 0, streams, streams * 3000)
        load = Load(number + 1, True, streams, 0, 0, BLOCKS, BLOCKS, 0, step=step)
        fleet.report(worker_id, load, 0, 0.0)


def now_at(
    fleet: Fleet, worker_id: str, streams: int = 0, queued: int = 0, free: int = BLOCKS
) -> None:
    load = Load(61, bool(streams or queued), streams, 0, queued, free, BLOCKS, 0)
    fleet.report(worker_id, load, 0, 0.0)


def any_fleet(seed: int, each: int = 4) -> Fleet:
    rng, fleet = random.Random(seed), Fleet()
    for number in range(rng.randint(1, each)):
        for role in (Role.PREFILL, Role.DECODE, Role.MIXED):
            if role is Role.DECODE or rng.random() < 0.7:
                name, kv = f"{role}{number}", rng.choice(("a", "a", "b"))
                fleet.join(hello(name, role, kv, rng.choice(("", "x"))), 0.0)
                paced(fleet, name, rng.uniform(0.3, 3.0), rng)
                now_at(fleet, name, rng.randint(0, 40), rng.choice((0, rng.randint(0, 20_000))))
    return fleet


def any_prompt(seed: int, fleet: Fleet) -> Prompt:
    rng = random.Random(f"{seed}/prompt")
    tokens = rng.randint(1, 30_000)
    cached = {w.id: rng.randint(0, tokens - 1) // 16 * 16 for w in fleet if rng.random() < 0.5}
    return Prompt(tokens, rng.randint(1, 1000), cached, rng.randint(1, 400), rng.getrandbits(32))


def totals_s(prompt: Prompt, fleet: Fleet) -> list[float]:
    """Of every way to place it."""
    prefill = {w.id: estimate.prefill(prompt, w) for w in fleet}
    decode = {w.id: estimate.decode(prompt, w) for w in fleet}
    apart = [
        estimate.apart(prompt, (p, prefill[p.id]), (d, decode[d.id])).total_s
        for p, d in product(fleet, fleet)
        if p is not d and p.computes and d.generates and can_hand_off(p.hello, d.hello)
    ]
    return apart + [
        estimate.together(prefill[w.id], decode[w.id]).total_s for w in fleet if w.generates
    ]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_nothing_costs_less_than_what_is_chosen(seed: int) -> None:
    fleet = any_fleet(seed)
    prompt = any_prompt(seed, fleet)
    made = place(prompt, list(fleet)).estimate
    assert made is not None
    assert min(made.ttft_s, made.decode_s, made.damage_s) >= 0
    assert made.total_s <= min(totals_s(prompt, fleet)) + 2 * estimate.GRAIN_S


def test_in_a_large_fleet_little_is_lost_by_looking_at_few() -> None:
    lost = []
    for seed in range(100):
        fleet = any_fleet(seed, each=15)
        prompt = any_prompt(seed, fleet)
        made = place(prompt, list(fleet)).estimate
        assert made is not None
        lost.append((made.total_s - 2 * estimate.GRAIN_S) / min(totals_s(prompt, fleet)))
    assert sorted(lost)[98] <= 1.01
    assert max(lost) <= 1.05


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32))
def test_the_quick_costs_are_the_estimate_s(seed: int) -> None:
    fleet = any_fleet(seed)
    prompt = any_prompt(seed, fleet)
    columns = ColumnsKept().of(list(fleet))
    cached = columns.cached_tokens(prompt.cached_tokens)
    for cost_s, w in zip(estimate.senders_s(prompt, columns, cached), fleet, strict=True):
        made = estimate.prefill(prompt, w)
        assert cost_s == pytest.approx(made.done_s + made.stream_s)
    for cost_s, w in zip(estimate.receivers_s(prompt, columns), fleet, strict=True):
        d = estimate.decode(prompt, w)
        assert cost_s == pytest.approx(d.own_s - d.step_s + d.stream_s)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32))
def test_what_workers_say_in_between_counts(seed: int) -> None:
    rng, fleet, policy = random.Random(seed), any_fleet(seed), EstimatePolicy()
    for number in range(12):
        some = [w for w in fleet if rng.random() < 0.9] if rng.random() < 0.3 else list(fleet)
        prompt = any_prompt(seed + number, fleet)
        if any(w.generates for w in some):
            assert policy.place(prompt, some) == place(prompt, some)
        w = rng.choice(list(fleet))
        now_at(fleet, w.id, rng.randint(0, 40), rng.randint(0, 20_000))
        if len(fleet) > 2 and rng.random() < 0.2:
            fleet.remove(w.id)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32))
def test_the_order_of_workers_makes_no_difference(seed: int) -> None:
    fleet = any_fleet(seed)
    prompt, workers = any_prompt(seed, fleet), list(fleet)
    random.Random(seed).shuffle(workers)
    assert place(prompt, workers) == place(prompt, list(fleet))


def fleet_of(*ids: str) -> Fleet:
    fleet = Fleet()
    for worker_id in ids:
        fleet.join(hello(worker_id, Role.PREFILL if worker_id[0] == "p" else Role.DECODE), 0.0)
        paced(fleet, worker_id, 1.0, random.Random(1))
        now_at(fleet, worker_id)
    return fleet


def test_a_prompt_with_little_to_compute_stays_where_it_is_decoded() -> None:
    fleet = fleet_of("p", "d")
    now_at(fleet, "d", streams=20)
    assert place(Prompt(8000, 200), list(fleet)).prefill == "p"
    assert place(Prompt(8000, 200, {"d": 7984}), list(fleet)).prefill is None
    assert place(Prompt(4, 200), list(fleet)).prefill is None
    apart = EstimatePolicy(Disaggregate.ALWAYS)
    assert apart.place(Prompt(4, 200), list(fleet)).prefill == "p"


def test_an_idle_worker_computes_its_prompts_itself_and_a_busy_one_s_streams_are_spared() -> None:
    fleet = fleet_of("p", "d")
    assert place(Prompt(1000, 200), list(fleet)).prefill is None
    now_at(fleet, "d", streams=30)
    assert place(Prompt(1000, 200), list(fleet)).prefill == "p"


def test_the_slower_of_two_workers_gets_a_prompt_when_the_other_s_queue_is_long_enough() -> None:
    fleet = fleet_of("d1", "d2")
    paced(fleet, "d2", 3.0, random.Random(2))
    for queued, expected in ((0, "d1"), (2000, "d1"), (200_000, "d2")):
        now_at(fleet, "d1", queued=queued)
        now_at(fleet, "d2")
        assert place(Prompt(4000, 10), list(fleet)).decode == expected


def test_who_has_no_room_is_not_chosen_while_another_has() -> None:
    fleet = fleet_of("d1", "d2")
    now_at(fleet, "d1", free=50)
    now_at(fleet, "d2", streams=60, queued=50_000, free=1000)
    assert place(Prompt(1000, 100), list(fleet)).decode == "d2"
    assert place(Prompt(500, 100), list(fleet)).decode == "d1"


@pytest.mark.parametrize("disaggregate", list(Disaggregate))
def test_a_herd_of_equal_requests_spreads_before_any_worker_has_answered(
    disaggregate: Disaggregate,
) -> None:
    f = Fakes()
    policy = EstimatePolicy(disaggregate)
    f.dispatch = Dispatch(lambda w, m: f.sent.append((w, m)), f, lambda: 0.0, policy=policy)
    for worker in [f"p{n}" for n in range(4)] + [f"d{n}" for n in range(4)]:
        f.dispatch.on_hello(hello(worker, Role.PREFILL if worker[0] == "p" else Role.DECODE))
    for number in range(80):
        f.dispatch.submit(Ask(f"r{number}", list(range(2000)), 200))
    records = [f.dispatch.journal.find(f"r{n}")[0] for n in range(80)]
    for letter in "pd":
        counts = Counter(
            w for r in records for w in (r.prefill_worker, r.decode_worker) if w and w[0] == letter
        )
        assert len(counts) == 4
        assert max(counts.values()) - min(counts.values()) <= 3, counts


def test_equal_workers_take_turns_when_requests_come_one_by_one() -> None:
    fleet = fleet_of("d1", "d2", "d3", "d4")
    counts = Counter(
        place(Prompt(100, 10, tie=n * 2_654_435), list(fleet)).decode for n in range(400)
    )
    assert min(counts.values()) > 60


def view(fleet: Fleet, worker_id: str) -> WorkerView:
    found = fleet.get(worker_id)
    assert found is not None
    return found


def asked(fleet: Fleet, paces: dict[str, float], now: float, times: int) -> Counter[str]:
    """Prompts one by one, five a second; each worker is so many times as slow as it should be."""
    used: Counter[str] = Counter()
    policy = EstimatePolicy(Disaggregate.ALWAYS)
    steps = {w.id: w.load.steps for w in fleet}
    for number in range(times):
        now += 0.2
        if number % 5 == 0:
            fleet.reconsider(now)
        prompt = Prompt(400, 50, tie=random.Random(number).getrandbits(32))
        made = policy.place(prompt, list(fleet))
        for worker_id, seconds, *what in (
            (made.prefill or "", 0.05, 400, 80_200, 0, 0),
            (made.decode, 0.01, 0, 0, 1, 500),
        ):
            used[worker_id] += 1
            steps[worker_id] += 1
            step = Step(seconds * paces.get(worker_id, 1.0), *what)
            load = Load(steps[worker_id], False, 0, 0, 0, BLOCKS, BLOCKS, 0, step=step)
            fleet.report(worker_id, load, 0, now)
    return used


@pytest.mark.parametrize("slow", ["p1", "d1"])
def test_who_was_slow_once_is_used_again_within_half_a_minute(slow: str) -> None:
    fleet = fleet_of("p1", "p2", "d1", "d2")
    paced(fleet, slow, 4.0, random.Random(2))
    now_at(fleet, slow)
    assert asked(fleet, {}, 0.0, 45)[slow] == 0
    assert asked(fleet, {}, 9.0, 105)[slow] > 5


def test_a_tick_has_the_idle_one_taken_for_the_one_that_works() -> None:
    f = Fakes(hello("d1", Role.DECODE), hello("d2", Role.DECODE))

    def say(worker_id: str, steps: int, seconds: float) -> None:
        load = Load(steps, False, 0, 0, 0, BLOCKS, BLOCKS, 0, step=Step(seconds, decodes=1))
        f.dispatch.on_batch(worker_id, Batch(load, []))

    def seems_slow() -> bool:
        return view(f.dispatch.fleet, "d1").step_s > 2 * view(f.dispatch.fleet, "d2").step_s

    for number in range(1, 50):
        say("d1", number, 0.4)
        say("d2", number, 0.04)
    f.now = UNMEASURED_S - 0.1
    say("d1", 49, 0.4)
    say("d2", 50, 0.04)
    f.dispatch.tick()
    assert seems_slow()
    f.now = UNMEASURED_S
    f.dispatch.tick()
    assert not seems_slow()


@pytest.mark.parametrize("slow", [1, 5])
def test_who_is_slow_costs_the_whole_role_a_request_in_ten_seconds(slow: int) -> None:
    paces = {f"p{number}": 4.0 for number in range(slow)}
    fleet = fleet_of(*paces, "p9", "d1")
    for worker_id in paces:
        paced(fleet, worker_id, 4.0, random.Random(2))
        now_at(fleet, worker_id)
    used = asked(fleet, paces, 0.0, 1500)
    assert 0 < sum(used[worker_id] for worker_id in paces) <= 1500 / 5 / 10 + 1


def test_a_promise_is_kept_as_blocks_are_taken() -> None:
    f = Fakes(hello("d", Role.DECODE))
    f.dispatch.accounts.output_tokens_mean = 100.0
    f.dispatch.submit(Ask("r", list(range(160)), 100))
    d = view(f.dispatch.fleet, "d")
    assert d.promised == {"r": 17}

    def say(tokens: int, finish: Finish | None = None) -> None:
        load = Load(1, True, 1, 0, 0, BLOCKS, BLOCKS, 0)
        f.dispatch.on_batch("d", Batch(load, [Delta("r", [7] * tokens, finish)], heard=1))

    say(1)
    assert d.promised == {"r": 6}
    say(40)
    assert d.promised == {"r": 4}
    say(300)
    assert d.promised == {"r": 0}
    assert d.tokens_left == BLOCKS * 16
    say(1, Finish.STOP)
    assert not d.promised
