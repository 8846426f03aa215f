"""How long the simulated engine's steps take, and what several at once leave as it was."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.api import Delta, Generate, Phase
from workers.engines.sim import sim_settings
from workers.engines.sim_blocks import Handoffs
from workers.engines.sim_model import SimModel
from workers.engines.sim_settings import SimSettings
from workers.engines.sim_steps import lasting_s, step_of, steps_within

PACE = SimSettings(
    prefill_tokens_per_s=1000.0, step_s=0.01, pair_s=1e-6, stream_s=1e-3, context_token_s=1e-5,
    chunk_tokens=64, blocks_total=64, block_tokens=4, max_model_len=500,
)  # fmt: skip


def engine(config: SimSettings = PACE) -> SimModel:
    handoffs = Handoffs(only_here=True)
    handoffs.join("e", config.lease_s)
    return SimModel(config, "e", handoffs)


def ask(number: int, prompt: int, outputs: int) -> Generate:
    tokens = [number * 1000 + i for i in range(prompt)]
    return Generate(f"r{number}", Phase.BOTH, tokens, outputs, b"")


def test_a_lone_prompt_takes_what_the_formula_says() -> None:
    model, now = engine(), 0.0
    model.submit(ask(0, 100, 3))
    for _ in range(2):
        now += model.begin(now)
        model.finish(now)
    pairs = 100 * 101 / 2
    assert now == pytest.approx(2 * 0.01 + 100 / 1000 + pairs * 1e-6)
    assert model.begin(now) == pytest.approx(0.01 + 1e-3 + 100 * 1e-5)


def test_a_step_that_only_generates_takes_what_its_batch_does_besides() -> None:
    config = SimSettings(step_s=0.01, batch_s=(0.0, 0.005, -0.002))
    run = type("Run", (), {"computed": 50, "outputs": 1})()
    steps = [step_of([(run, 1)] * n, config) for n in (1, 2, 3, 4)]
    assert [s.seconds for s in steps if s] == pytest.approx([0.01, 0.015, 0.008, 0.008])
    mixed = step_of([(run, 1), (run, 1), (run, 10)], config)
    assert mixed is not None
    assert mixed.seconds == pytest.approx(0.01 + 10 / config.prefill_tokens_per_s)


def test_the_defaults_are_what_they_were() -> None:
    model = engine(SimSettings())
    model.submit(ask(0, 100, 3))
    assert model.begin(0.0) == pytest.approx(0.02 + 0.1)
    model.finish(0.12)
    assert model.begin(0.12) == pytest.approx(0.02)


@given(st.integers(1, 400), st.floats(0, 1e-4), st.floats(0.0, 20.0))
def test_as_many_steps_as_fit_and_not_one_more(
    streams: int, context_token_s: float, seconds: float
) -> None:
    config = SimSettings(step_s=0.01, context_token_s=context_token_s)
    run = type("Run", (), {"computed": 50, "outputs": 1})()
    step = step_of([(run, 1)] * streams, config)
    assert step is not None
    count = steps_within(step, seconds, config)
    assert lasting_s(step, count, config) <= seconds + 1e-6
    assert lasting_s(step, count + 1, config) > seconds - 1e-6


def serve(asks: list[tuple[float, Generate]], alike_s: float) -> dict[str, list[tuple[float, int]]]:
    """When each request had how many tokens, with requests that come in at any time."""
    model, now, told = engine(), 0.0, dict[str, list[tuple[float, int]]]()
    coming = sorted(asks, key=lambda a: a[0])
    while coming or model.busy:
        if not model.busy:
            now = max(now, coming[0][0])
        while coming and coming[0][0] <= now:
            model.submit(coming.pop(0)[1])
        ends = now + model.begin(now, alike_s)
        while coming and coming[0][0] < ends:
            at, generate = coming.pop(0)
            model.submit(generate)
            ends = now + model.cut(at - now)
        now = ends
        for delta in model.finish(now):
            note(told, delta, now)
    return told


def note(told: dict[str, list[tuple[float, int]]], delta: Delta, now: float) -> None:
    said = told.setdefault(delta.request_id, [])
    said.append((round(now, 6), len(delta.token_ids) + (said[-1][1] if said else 0)))


ASKS = st.lists(
    st.tuples(st.floats(0, 3), st.integers(1, 100), st.integers(1, 60)), min_size=1, max_size=6
)


@settings(max_examples=50)
@given(ASKS)
def test_several_steps_at_once_end_when_they_would_one_by_one(
    asks: list[tuple[float, int, int]],
) -> None:
    # So few that none is preempted: blocks taken a little early may let another one go instead.
    coming = [(at, ask(n, prompt, outputs)) for n, (at, prompt, outputs) in enumerate(asks)]
    roomy = sum(-(-(p + o) // 4) for _, p, o in asks) <= PACE.blocks_total
    single, several = serve(coming, 0.0), serve(coming, 5.0)
    if not roomy:
        assert {r: s[-1][1] for r, s in single.items()} == {r: s[-1][1] for r, s in several.items()}
        return
    for request_id, said in several.items():
        one_by_one = {count: at for at, count in single[request_id]}
        for at, count in said:
            assert at == pytest.approx(one_by_one[count], abs=1e-5)


def test_of_two_prompts_that_begin_alike_the_later_finds_the_earlier_s_blocks() -> None:
    model, now, deltas = engine(), 0.0, list[Delta]()
    for number in range(2):
        model.submit(Generate(f"r{number}", Phase.BOTH, list(range(100)), 1, b""))
    while model.busy:
        now += model.begin(now)
        deltas += model.finish(now)
    cached = {d.request_id: d.cached_tokens for d in deltas}
    # It is let in with what is left of the step that ends the first: two thirds are there by then.
    assert cached == {"r0": 0, "r1": 64}


def test_flags_set_every_rate() -> None:
    told = sim_settings(["--sim-pair-ns", "2", "--sim-stream-us", "3", "--sim-context-ns", "4"])
    assert (told.pair_s, told.stream_s, told.context_token_s) == (2e-9, 3e-6, 4e-9)


@pytest.mark.parametrize(
    ("params", "tokens"), [(b"5", 5), (b"90", 30), (b"", 30), (b"\x93vLLM", 30)]
)
def test_it_stops_by_itself_where_params_say_so(params: bytes, tokens: int) -> None:
    model, now, deltas = engine(), 0.0, list[Delta]()
    model.submit(Generate("r", Phase.BOTH, [1, 2, 3], 30, params))
    while model.busy:
        now += model.begin(now)
        deltas += model.finish(now)
    assert sum(len(d.token_ids) for d in deltas) == tokens
