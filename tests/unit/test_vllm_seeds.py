"""A CPU's runner leaves a seeded generator alone while its request's prompt is being computed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

# Torch warns of its own deprecations while vLLM imports it.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def runner(generators: dict[int, str], inside: list[bool]) -> Any:
    mask = np.array([*inside, True, True])  # What is beyond the batch is a former step's.
    batch = SimpleNamespace(generators=generators, num_reqs=len(inside))
    return SimpleNamespace(input_batch=batch, discard_request_mask=SimpleNamespace(np=mask))


def test_only_requests_past_their_prompt_are_sampled_with_their_generator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    from workers.engines.vllm_worker_process import keep_seeds_on_cpu

    seen: list[dict[int, str]] = []

    def sample(self: Any, grammar: object) -> object:
        seen.append(dict(self.input_batch.generators))
        if grammar is None:
            raise RuntimeError("failed")
        return grammar

    monkeypatch.setattr(CPUModelRunner, "sample_tokens", sample)
    keep_seeds_on_cpu()
    generators = {0: "a", 2: "c", 3: "d"}
    batch = runner(generators, [True, True, False, True])
    assert CPUModelRunner.sample_tokens(batch, "grammar") == "grammar"
    assert seen == [{2: "c"}]
    assert generators == {0: "a", 2: "c", 3: "d"}
    with pytest.raises(RuntimeError):
        CPUModelRunner.sample_tokens(batch, None)
    assert generators == {0: "a", 2: "c", 3: "d"}
