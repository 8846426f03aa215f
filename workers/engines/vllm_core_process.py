"""vLLM's executors by classes of ours: the engine core's process imports this module with them.

Where that process is spawned, as on a CPU, nothing else of ours is imported before the engine is
built, and what it dies of would stay in its log.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vllm.v1.executor import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from kvtransfer.refusal import tell_deaths

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class MultiprocCore(MultiprocExecutor):  # type: ignore[misc]
    """vLLM's own, with this module's import."""


class UniProcCore(UniProcExecutor):  # type: ignore[misc]
    """vLLM's own, with this module's import."""


_OURS: Final[dict[type[Executor], type[Executor]]] = {
    MultiprocExecutor: MultiprocCore,
    UniProcExecutor: UniProcCore,
}


def executor_class(config: VllmConfig) -> type[Executor]:
    """vLLM's choice. Of another executor than those two, no cause of death is told by the core."""
    chosen: type[Executor] = Executor.get_class(config)
    return _OURS.get(chosen, chosen)


tell_deaths()
