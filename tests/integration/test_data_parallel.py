"""Two data-parallel ranks are two workers, and what they answer is what one engine answers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from deploy.local.models import prepare
from deploy.local.parts import ENVIRONMENT, Part, end, free_port
from tests.asking import EVERYTHING, MODEL, random_prompt
from tests.integration.conftest import FLAGS, OURS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not EVERYTHING, reason="three engines by themselves: `make test-long`"),
]

_MAKE = """
import sys, torch, transformers
torch.manual_seed(0)
config = transformers.Qwen3MoeConfig(
    vocab_size=49152, hidden_size=64, intermediate_size=128, moe_intermediate_size=64,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    num_experts=4, num_experts_per_tok=2, norm_topk_prob=True, use_sliding_window=False,
    max_position_embeddings=4096, initializer_range=0.15, tie_word_embeddings=False,
    bos_token_id=1, eos_token_id=2, pad_token_id=2,
)
transformers.Qwen3MoeForCausalLM(config).to(torch.float32).save_pretrained(sys.argv[1])
"""
"""In a process of its own: torch must not be in the tests'."""
LENGTHS = [1, 3, 64, 127, 128, 129, 256, 300, 513, 700, 1025]


class Ranks:
    """A router over the two ranks, and one over an engine that computes by itself."""

    def __init__(self, folder: Path, model: str) -> None:
        self._folder, self._model = folder, model
        self._all: list[Part] = []
        shared = ["--data-parallel-size", "2", "--data-parallel-rpc-port", str(free_port())]
        self.ranks = [
            self._worker(f"rank-{n}", "--data-parallel-rank", str(n), *shared) for n in range(2)
        ]
        self._one = self._worker("one")
        for worker in self._all:
            worker.await_ready(self.check)
        self.url = self._router("router", *self.ranks)
        self.one_url = self._router("other", self._one)

    def check(self) -> None:
        for part in self._all:
            part.check()

    def _worker(self, name: str, *flags: str) -> Part:
        own = ["worker", "--role", "mixed", "--worker-id", name, *FLAGS, *OURS, *flags]
        return self._start(name, own)

    def _router(self, name: str, *workers: Part) -> str:
        channels = ",".join(w.channel for w in workers)
        length = ["--max-model-len", "2048"]
        part = self._start(name, ["router", "--port", "0", "--workers", channels, *length])
        part.await_ready(self.check)
        part.wait_for(lambda: len(known(part.http)) == len(workers), self.check)
        return part.http

    def _start(self, name: str, command: list[str]) -> Part:
        file = self._folder / f"{name}.json"
        run = [sys.executable, "-m", "tandem", *command, "--model", self._model]
        part = Part(name, [*run, "--address-file", str(file)], self._folder / f"{name}.log", file)
        part.spawn()
        self._all.append(part)
        part.await_address(self.check)
        return part

    def stop(self) -> None:
        end(self._all[::-1])


def known(url: str) -> list[dict[str, Any]]:
    workers: list[dict[str, Any]] = httpx.get(f"{url}/tandem/workers", timeout=10).json()["workers"]
    return workers


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    model = tmp_path_factory.mktemp("experts")
    environment = {**ENVIRONMENT, **os.environ}
    subprocess.run([sys.executable, "-c", _MAKE, str(model)], check=True, env=environment)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(prepare(MODEL) / name, model / name)
    (model / "generation_config.json").unlink(missing_ok=True)
    running = None
    try:
        running = Ranks(tmp_path_factory.mktemp("ranks"), str(model))
        yield running
    finally:
        if running is not None:
            running.stop()


def tokens(url: str, model: str, length: int, salt: str) -> tuple[list[int], dict[str, Any]]:
    sampled = {"temperature": 1.0, "seed": length} if length % 2 else {"temperature": 0}
    body = {
        "model": model, "prompt": random_prompt(length, seed=length), "max_tokens": 12,
        "ignore_eos": True, "return_token_ids": True, "cache_salt": salt, **sampled,
    }  # fmt: skip
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    record = httpx.get(f"{url}/tandem/requests/{answer.json()['id']}", timeout=10).json()[0]
    return answer.json()["choices"][0]["token_ids"], record


def test_each_rank_is_a_worker_that_says_which_it_is(ranks: Ranks) -> None:
    said = [(w["hello"]["worker_id"], w["hello"]["dp_rank"]) for w in known(ranks.url)]
    assert sorted(said) == [("rank-0", 0), ("rank-1", 1)]
    assert {w["hello"]["dp_size"] for w in known(ranks.url)} == {2}
    assert {w["hello"]["dp_size"] for w in known(ranks.one_url)} == {1}


@pytest.mark.parametrize("together", [1, 4])
def test_two_ranks_answer_as_one_engine_alone_and_together(ranks: Ranks, together: int) -> None:
    """One by one, the other rank has nothing to do and must step along all the same."""
    model = httpx.get(f"{ranks.url}/v1/models").json()["data"][0]["id"]
    with ThreadPoolExecutor(together) as pool:
        here = list(pool.map(lambda n: tokens(ranks.url, model, n, f"two-{together}-{n}"), LENGTHS))
    there = [tokens(ranks.one_url, model, n, f"one-{together}-{n}")[0] for n in LENGTHS]
    assert [found for found, _ in here] == there
    assert {record["attempts"] for _, record in here} == {1}
    assert {record["kv_failed"] for _, record in here} == {None}


def test_an_idle_rank_is_not_busy_and_stays(ranks: Ranks) -> None:
    ranks.check()
    assert sorted(w["hello"]["worker_id"] for w in known(ranks.url)) == ["rank-0", "rank-1"]
    assert {w["load"]["busy"] for w in known(ranks.url)} == {False}
