"""Our part in each process with a part of the model: it is imported before it builds anything.

vLLM imports this module for the name in `--worker-extension-cls`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.platforms import current_platform

from kvtransfer.refusal import tell_deaths


class WorkerExtension:
    """A base that vLLM gives its worker's class; it is here for the import of its module."""


def keep_seeds_on_cpu() -> None:
    """Have a CPU's runner leave a seeded request's generator alone until its prompt is computed.

    vLLM 0.32 samples in each step for every request, also where the step ends inside a prompt; it
    throws that token away and sets the generator back by `set_offset`, which PyTorch's CPU
    generators don't have: the engine dies. So those generators are out of its reach during such a
    step, as if the requests had no seed: the token is thrown away whatever it is, and nothing was
    drawn from them.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    sample = CPUModelRunner.sample_tokens

    def sample_tokens(runner: Any, *args: Any, **kwargs: Any) -> Any:
        generators, mask = runner.input_batch.generators, runner.discard_request_mask.np
        inside = np.flatnonzero(mask[: runner.input_batch.num_reqs]).tolist()
        aside = {index: generators.pop(index) for index in inside if index in generators}
        try:
            return sample(runner, *args, **kwargs)
        finally:
            generators.update(aside)

    CPUModelRunner.sample_tokens = sample_tokens


tell_deaths()
if current_platform.is_cpu():
    from workers.engines import vllm_cpu_collectives

    vllm_cpu_collectives.add()
    keep_seeds_on_cpu()
