"""vLLM's OpenAI front over an engine that answers at once: what the router is measured against.

    python -m loadtests.bare_front --model FOLDER --address-file F [any flag of vLLM's server]

It is vLLM's own application on uvicorn and uvloop as its server runs it, with nothing behind it:
no engine process, no scheduler, no detokenizing (the tokens' text is constant). A router can't be
cheaper than this and still speak vLLM's API; the difference is what the router adds.
"""

from __future__ import annotations

import asyncio
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
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.renderers import renderer_from_config
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.input_processor import InputProcessor

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncGenerator

    from vllm.sampling_params import SamplingParams
    from vllm.tasks import SupportedTask

_TOKEN_ID, _TEXT = 253, " a"


class InstantEngine(EngineClient):  # type: ignore[misc]
    """Every token costs one turn of the event loop."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.renderer = renderer_from_config(vllm_config)
        self.input_processor = InputProcessor(vllm_config, self.renderer)

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **_: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        count = sampling_params.max_tokens or 1
        prompt_token_ids = prompt["prompt_token_ids"]
        for n in range(1, count + 1):
            await asyncio.sleep(0)
            output = CompletionOutput(
                index=0, text=_TEXT, token_ids=[_TOKEN_ID], cumulative_logprob=None,
                logprobs=None, finish_reason="length" if n == count else None,
            )  # fmt: skip
            yield RequestOutput(
                request_id, prompt.get("prompt"), prompt_token_ids, None, [output], n == count
            )

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


async def _serve(args: argparse.Namespace, listener: socket.socket) -> None:
    engine_args = AsyncEngineArgs.from_cli_args(args)
    model_config = engine_args.create_model_config()
    envs.VLLM_CPU_KVCACHE_SPACE = 0
    engine = InstantEngine(VllmConfig(model_config=model_config))
    app = build_app(args, ("generate",), model_config)
    await init_app_state(engine, app.state, args, ("generate",))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    app.state.server = server
    await server.serve([listener])


def main() -> None:
    """Serve on a free port of 127.0.0.1 until SIGTERM."""
    parser = make_arg_parser(FlexibleArgumentParser(prog="bare_front"))
    parser.add_argument("--address-file", type=Path, required=True)
    args = parser.parse_args()
    args.disable_log_stats = True
    validate_parsed_serve_args(args)
    listener = socket.create_server(("127.0.0.1", 0))
    http = f"http://127.0.0.1:{listener.getsockname()[1]}"
    args.address_file.write_text(json.dumps({"channel": None, "http": http}))
    uvloop.run(_serve(args, listener))


if __name__ == "__main__":
    main()
