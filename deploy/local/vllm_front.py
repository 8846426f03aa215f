"""vLLM's OpenAI application as its own server runs it, over an engine that is no vLLM engine.

There is no engine process, no scheduler of vLLM's and no detokenizing behind it: whoever derives
from `NoEngine` says in `generate` what comes out.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
import uvloop
from vllm import AsyncEngineArgs, envs
from vllm.config import VllmConfig
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.renderers import renderer_from_config
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.input_processor import InputProcessor

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from vllm.tasks import SupportedTask


class NoEngine(EngineClient):  # type: ignore[misc]
    """All that the application asks of an engine, but for `generate`."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.renderer = renderer_from_config(vllm_config)
        self.input_processor = InputProcessor(vllm_config, self.renderer)

    async def start(self) -> None:
        """Once, on the event loop that serves."""

    async def get_supported_tasks(self) -> tuple[SupportedTask, ...]:
        return ("generate",)

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        pass

    async def check_health(self) -> None:
        pass

    async def notify_kv_transfer_request_rejected(self, *_: Any, **__: Any) -> None:
        pass

    async def is_tracing_enabled(self) -> bool:
        return False

    async def do_log_stats(self) -> None:
        pass

    async def is_sleeping(self) -> bool:
        return False

    async def is_paused(self) -> bool:
        return False

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
        return RuntimeError("it can't die")

    async def _nothing_to_act_on(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    abort = start_profile = stop_profile = sleep = wake_up = _nothing_to_act_on
    add_lora = reset_mm_cache = reset_encoder_cache = reset_prefix_cache = _nothing_to_act_on
    pause_generation = resume_generation = release_kv_cache_memory = _nothing_to_act_on

    def encode(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    def shutdown(self, timeout: float | None = None) -> None:
        self.renderer.shutdown()


def serve(name: str, argv: Sequence[str], make: Callable[[VllmConfig], NoEngine]) -> None:
    """On a free port of 127.0.0.1 until SIGTERM. `argv`: `--address-file F` and vLLM's flags."""
    parser = make_arg_parser(FlexibleArgumentParser(prog=name))
    parser.add_argument("--address-file", type=Path, required=True)
    args = parser.parse_args(list(argv))
    args.disable_log_stats = True
    validate_parsed_serve_args(args)
    listener = socket.create_server(("127.0.0.1", 0))
    http = f"http://127.0.0.1:{listener.getsockname()[1]}"
    args.address_file.write_text(json.dumps({"channel": None, "http": http}))
    uvloop.run(_serve(args, listener, make))


async def _serve(
    args: argparse.Namespace, listener: socket.socket, make: Callable[[VllmConfig], NoEngine]
) -> None:
    engine_args = AsyncEngineArgs.from_cli_args(args)
    model_config = engine_args.create_model_config()
    envs.VLLM_CPU_KVCACHE_SPACE = 0
    engine = make(VllmConfig(model_config=model_config))
    await engine.start()
    app = build_app(args, ("generate",), model_config)
    await init_app_state(engine, app.state, args, ("generate",))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    app.state.server = server
    await server.serve([listener])
