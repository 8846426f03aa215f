"""What every engine owes its worker: one suite, over the simulated engine and over vLLM."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
from typing import TYPE_CHECKING

import pytest

from deploy.local.parts import ENVIRONMENT
from router.core.blocks import links
from router.core.cache_view import CacheView
from router.core.prefix_index import PrefixIndex
from tests.virtual_time import VirtualLoop
from workers.api import Delta, Finish, Generate, Load, Phase, Role
from workers.cache_mirror import CacheMirror
from workers.engines.sim import SimEngine
from workers.engines.sim_settings import SimSettings
from workers.models import is_prepared, resolve_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from workers.engines.base import Engine, EngineFacts

MODEL = "smollm2-135m"
WAIT_S = 60.0


class Driver:
    """An engine between tests: asks, and gathers what comes."""

    def __init__(
        self, runner: asyncio.Runner, engine: Engine, params: Callable[[int], bytes]
    ) -> None:
        self.runner, self.engine, self._params = runner, engine, params
        self.deltas: dict[str, list[Delta]] = {}
        self.loads: list[Load] = []
        self.mirror = CacheMirror()
        self._count = 0
        self._stepped = asyncio.Condition()
        self.facts: EngineFacts = runner.run(engine.start())
        self._running = runner.get_loop().create_task(engine.run(self._on_step))

    def close(self) -> None:
        self._running.cancel()
        self.runner.run(asyncio.wait([self._running]))
        self.engine.close()

    def _on_step(self, load: Load, deltas: list[Delta]) -> None:
        self.loads.append(load)
        self.mirror.apply(self.engine.cache_changes())
        for delta in deltas:
            self.deltas.setdefault(delta.request_id, []).append(delta)

    def generate(self, prompt: list[int], max_tokens: int) -> Generate:
        self._count += 1
        return Generate(
            f"r{self._count}", Phase.BOTH, prompt, max_tokens, self._params(max_tokens)
        )  # fmt: skip

    def submit(self, prompt: list[int], max_tokens: int) -> str:
        generate = self.generate(prompt, max_tokens)
        self.engine.submit(generate)
        return generate.request_id

    def until(self, true: Callable[[], bool], what: str) -> None:
        async def wait() -> None:
            async with asyncio.timeout(WAIT_S):
                while not true():
                    assert not self._running.done(), self._running
                    await asyncio.sleep(0.005)

        try:
            self.runner.run(wait())
        except TimeoutError:
            pytest.fail(f"waited {WAIT_S} s for {what}; load {self.engine.load()}")

    def ended(self, request_id: str) -> bool:
        return any(d.finish is not None for d in self.deltas.get(request_id, []))

    def ask(self, prompt: list[int], max_tokens: int) -> list[Delta]:
        """One request, to its end."""

        async def submit() -> str:
            return self.submit(prompt, max_tokens)

        request_id = self.runner.run(submit())
        self.until(lambda: self.ended(request_id), f"the end of {request_id}")
        return self.deltas[request_id]

    def all_free(self) -> bool:
        load = self.engine.load()
        return not load.busy and load.blocks_free == load.blocks_total


def tokens_of(deltas: list[Delta]) -> list[int]:
    return [t for d in deltas for t in d.token_ids]


def prompt_of(length: int, salt: int = 0) -> list[int]:
    return [200 + (i * 37 + salt * 101) % 5000 for i in range(length)]


def _sim() -> Iterator[Driver]:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        driver = Driver(runner, SimEngine(SimSettings(blocks_total=96), "epoch"), lambda _: b"")
        yield driver
        driver.close()


def _vllm() -> Iterator[Driver]:
    # As the Makefile has it; here so that the suite also runs by itself.
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not is_prepared(MODEL):
        pytest.fail(f"prepare the model first: tandem models prepare {MODEL}")
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    from workers.engines.vllm import VllmEngine
    from workers.engines.vllm_config import vllm_config
    from workers.server import Identity
    from workers.vllm_codec import encode_request

    def params(max_tokens: int) -> bytes:
        sampling = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        return encode_request(
            EngineCoreRequest(
                request_id="",
                prompt_token_ids=[],
                mm_features=None,
                sampling_params=sampling,
                pooling_params=None,
                arrival_time=0.0,
                lora_request=None,
                cache_salt=None,
                data_parallel_rank=None,
            )
        )

    args = argparse.Namespace(
        model=resolve_model(MODEL), role="mixed", host="127.0.0.1", lease_s=5,
        kv_connector="tandem", kv_transports="tcp", kv_checksums="off", kv_answer_s=5, kv_read_s=5,
        curve_secret_file="",
    )  # fmt: skip
    identity = Identity("w", "epoch", Role.MIXED, args.model, "m", "t", 5.0)
    config = vllm_config(
        args,
        identity,
        ["--dtype", "float32", "--max-model-len", "1024", "--enforce-eager",
         "--num-gpu-blocks-override", "25"],
    )  # fmt: skip
    with asyncio.Runner() as runner:
        driver = Driver(runner, VllmEngine(config), params)
        yield driver
        driver.close()


# Torch warns of its own deprecations while vLLM imports it.
REAL = [pytest.mark.real, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module", params=["sim", pytest.param("vllm", marks=REAL)])
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    yield from _sim() if request.param == "sim" else _vllm()


def test_a_request_gets_as_many_tokens_as_it_asked_for(driver: Driver) -> None:
    deltas = driver.ask(prompt_of(40), 7)
    assert len(tokens_of(deltas)) == 7
    assert [d.finish for d in deltas if d.finish] == [Finish.LENGTH]
    assert deltas[-1].finish is Finish.LENGTH


def test_the_same_prompt_gets_the_same_tokens_from_a_warm_cache(driver: Driver) -> None:
    prompt = prompt_of(2 * driver.facts.block_tokens + 5, salt=1)
    cold, warm = driver.ask(prompt, 6), driver.ask(prompt, 6)
    assert tokens_of(cold) == tokens_of(warm)
    assert cold[0].cached_tokens == 0
    assert warm[0].cached_tokens == 2 * driver.facts.block_tokens
    assert [d.cached_tokens for d in warm[1:]] == [None] * (len(warm) - 1), "told once"


def test_a_prompt_of_whole_blocks_still_has_a_token_to_compute(driver: Driver) -> None:
    prompt = prompt_of(2 * driver.facts.block_tokens, salt=2)
    assert tokens_of(driver.ask(prompt, 4)) == tokens_of(driver.ask(prompt, 4))
    cached = driver.ask(prompt, 1)[0].cached_tokens
    assert cached is not None
    assert cached < len(prompt)


def test_requests_in_one_batch_get_what_each_would_get_alone(driver: Driver) -> None:
    prompts = [prompt_of(20 + i, salt=10 + i) for i in range(4)]
    alone = [tokens_of(driver.ask(p, 5)) for p in prompts]

    async def together() -> list[str]:
        return [driver.submit(p, 5) for p in prompts]

    ids = driver.runner.run(together())
    driver.until(lambda: all(driver.ended(i) for i in ids), "the batch")
    assert [tokens_of(driver.deltas[i]) for i in ids] == alone


def test_an_aborted_request_frees_its_blocks_and_says_nothing_more(driver: Driver) -> None:
    async def start() -> str:
        return driver.submit(prompt_of(60, salt=3), 800)

    request_id = driver.runner.run(start())
    driver.until(lambda: request_id in driver.deltas, "a first token")
    assert driver.engine.load().blocks_free < driver.engine.load().blocks_total

    async def abort() -> int:
        driver.engine.abort([request_id, "never heard of"])
        return len(driver.deltas[request_id])

    told = driver.runner.run(abort())
    driver.until(driver.all_free, "free blocks")
    assert len(driver.deltas[request_id]) == told


def test_a_request_aborted_before_it_ran_leaves_nothing(driver: Driver) -> None:
    async def start() -> str:
        request_id = driver.submit(prompt_of(60, salt=4), 50)
        driver.engine.abort([request_id])
        return request_id

    request_id = driver.runner.run(start())
    driver.until(driver.all_free, "free blocks")
    assert request_id not in driver.deltas


@pytest.mark.parametrize("bad", ["too long", "empty", "no such token"])
def test_a_wrong_request_is_invalid_and_touches_nothing(driver: Driver, bad: str) -> None:
    limit = driver.facts.max_model_len
    prompt = {"too long": prompt_of(limit), "empty": [], "no such token": [1, 1 << 31]}[bad]
    deltas = driver.ask(prompt, 4)
    assert [(d.finish, d.token_ids) for d in deltas] == [(Finish.INVALID, [])]
    assert deltas[0].error
    if bad == "too long":
        assert str(limit) in deltas[0].error
    assert driver.all_free()


def test_what_the_cache_is_said_to_hold_it_holds_and_nothing_else(driver: Driver) -> None:
    """Through evictions: what is foretold of each prompt comes true, to the token."""
    size, rng = driver.facts.block_tokens, random.Random(4)
    assert driver.facts.tells_cache
    room = driver.facts.blocks_total
    trunks = [prompt_of(5 * size, salt=20 + i) for i in range(3)]
    view, told = CacheView("w", size, index := PrefixIndex()), driver.mirror.seq
    assert all(view.snapshot(part) for part in driver.mirror.snapshot())
    hits = asked = 0
    while asked < 2 * room:
        trunk = rng.choice(trunks)[: rng.randint(1, 5) * size]
        prompt = trunk + [5300 + rng.randrange(100) for _ in range(rng.randint(1, size))]
        asked += len(prompt) // size
        foretold = index.cached(links(prompt, size)).get("w", 0) * size
        assert driver.ask(prompt, 1)[0].cached_tokens == foretold
        hits += foretold > 0
        assert view.events(told, driver.mirror.since(told) or [])
        told = driver.mirror.seq
    assert hits
    assert 0 < len(view) <= room
    again = CacheView("again", size, PrefixIndex())
    assert all(again.snapshot(part) for part in driver.mirror.snapshot())
    assert len(again) == len(view)


def test_a_block_that_is_there_twice_is_gone_with_the_last(driver: Driver) -> None:
    """vLLM computes a prompt's last block again, though it is there, and keeps both. The older is
    evicted long before the newer, which can be found until then."""
    size, room = driver.facts.block_tokens, driver.facts.blocks_total
    view = CacheView("w", size, index := PrefixIndex())
    prompt = prompt_of(2 * size, salt=40)

    def fill(blocks: int, salt: int) -> None:
        for n in range(blocks):
            driver.ask(prompt_of(size, salt=salt + n), 1)

    driver.ask(prompt, 1)
    fill(room // 2, salt=100)
    driver.ask(prompt, 1)
    fill(room * 2 // 3, salt=200)
    assert all(view.snapshot(part) for part in driver.mirror.snapshot())
    longer = [*prompt, 7]
    foretold = index.cached(links(longer, size)).get("w", 0) * size
    assert driver.ask(longer, 1)[0].cached_tokens == foretold


def test_an_ended_request_holds_no_kv(driver: Driver) -> None:
    driver.ask(prompt_of(50, salt=5), 3)
    driver.until(driver.all_free, "free blocks")


def test_load_tells_the_truth(driver: Driver) -> None:
    driver.loads.clear()
    driver.ask(prompt_of(50, salt=6), 5)
    driver.until(driver.all_free, "an idle engine")
    steps = [load.steps for load in driver.loads]
    assert steps == sorted(steps)
    assert len(set(steps)) >= 5
    assert any(load.running == 1 for load in driver.loads)
    assert all(0 <= load.blocks_free <= load.blocks_total for load in driver.loads)
    assert driver.engine.load().prefill_tokens_queued == 0


def test_what_each_step_computed_is_told(driver: Driver) -> None:
    driver.loads.clear()
    prompt, outputs = prompt_of(40, salt=77), 6
    driver.ask(prompt, outputs)
    driver.until(driver.all_free, "an idle engine")
    steps = {load.steps: load.step for load in driver.loads if load.step is not None}.values()
    assert sum(s.prefill_tokens for s in steps) == len(prompt)
    assert sum(s.prefill_pairs for s in steps) == len(prompt) * (len(prompt) + 1) // 2
    assert sum(s.decodes for s in steps) == outputs - 1
    assert [s.context_tokens for s in steps if s.decodes] == [len(prompt) + n for n in range(5)]
    assert all(0 < s.seconds < 5 for s in steps)


def test_a_ticket_that_is_none_harms_nothing(driver: Driver) -> None:
    async def release() -> None:
        driver.engine.release([b"", b"not a ticket"])

    driver.runner.run(release())
    assert len(tokens_of(driver.ask(prompt_of(10), 2))) == 2
