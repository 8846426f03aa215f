"""What vLLM's OpenAI application asks of an engine, where none is in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.engine.protocol import EngineClient
from vllm.renderers import renderer_from_config
from vllm.v1.engine.input_processor import InputProcessor

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.tasks import SupportedTask


class NoEngine(EngineClient):  # type: ignore[misc]
    """Whoever derives from it brings `generate`."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.renderer = renderer_from_config(vllm_config)
        self.input_processor = InputProcessor(vllm_config, self.renderer)

    @property
    def is_running(self) -> bool:
        return True

    @property
    def is_stopped(self) -> bool:
        return False

    @property
    def errored(self) -> bool:
        return False

    @property
    def dead_error(self) -> BaseException:
        return RuntimeError("there is no engine here that could be dead")

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Everybody is let in."""

    async def get_supported_tasks(self) -> tuple[SupportedTask, ...]:
        return ("generate",)

    async def check_health(self) -> None:
        """Nothing here can be ill."""

    async def notify_kv_transfer_request_rejected(self, *_: Any, **__: Any) -> None:
        """Nobody here keeps anything for it."""

    async def is_tracing_enabled(self) -> bool:
        return False

    async def do_log_stats(self) -> None:
        """There are none."""

    async def is_sleeping(self) -> bool:
        return False

    async def is_paused(self) -> bool:
        return False

    async def reset_mm_cache(self) -> None:
        await self.renderer.clear_mm_cache_async()

    def shutdown(self, timeout: float | None = None) -> None:
        self.renderer.shutdown()

    def encode(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("only generation is served")

    async def _one_engine_only(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("this acts on one engine; ask the worker itself")

    abort = start_profile = stop_profile = sleep = wake_up = _one_engine_only
    add_lora = reset_encoder_cache = reset_prefix_cache = _one_engine_only
    pause_generation = resume_generation = release_kv_cache_memory = _one_engine_only
