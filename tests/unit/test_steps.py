"""What a worker says of its last step is what the step did."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from workers.api import Batch, Generate, Load, Phase, Step, decode_to_router, encode
from workers.engines.sim_blocks import Handoffs
from workers.engines.sim_model import SimModel
from workers.engines.sim_settings import SimSettings

PACE = SimSettings(chunk_tokens=64, step_s=0.01, prefill_tokens_per_s=1000.0)


def engine(settings: SimSettings = PACE) -> SimModel:
    handoffs = Handoffs(only_here=True)
    handoffs.join("e", settings.lease_s)
    return SimModel(settings, "e", handoffs)


def steps(model: SimModel) -> list[Step]:
    found, now = [], 0.0
    while model.busy:
        began, now = now, now + model.begin(now)
        model.finish(now)
        step = model.load(now).step
        assert step is not None
        assert abs(step.seconds - (now - began)) < 1e-9
        found.append(step)
    return found


def test_a_prompt_s_chunks_and_then_its_tokens_are_told() -> None:
    model = engine()
    model.submit(Generate("r", Phase.BOTH, list(range(150)), 3, b""))
    told = [msgspec.structs.astuple(s)[1:] for s in steps(model)]
    assert told == [
        (64, 2080, 0, 0),
        (64, 6176, 0, 0),
        (22, 3069, 0, 0),
        (0, 0, 1, 150),
        (0, 0, 1, 151),
    ]


@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 6)), min_size=1, max_size=8))
def test_all_prompts_are_computed_and_all_tokens_generated(asks: list[tuple[int, int]]) -> None:
    model = engine()
    for number, (prompt, outputs) in enumerate(asks):
        tokens = [number * 1000 + i for i in range(prompt)]  # None has another's prefix.
        model.submit(Generate(f"r{number}", Phase.BOTH, tokens, outputs, b""))
    found = steps(model)
    assert sum(s.prefill_tokens for s in found) == sum(prompt for prompt, _ in asks)
    assert sum(s.decodes for s in found) == sum(outputs - 1 for _, outputs in asks)


def test_a_worker_that_says_nothing_of_its_steps_is_still_understood() -> None:
    load = Load(1, False, 0, 0, 0, 9, 9, 0)
    kind, (tag, *fields), *rest = msgspec.msgpack.decode(encode(Batch(load)))
    old = msgspec.msgpack.encode([kind, [tag, *fields[:10]], *rest])
    assert decode_to_router(old) == Batch(load)
