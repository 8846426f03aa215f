"""vLLM's OpenAI application as its own server runs it, over an engine that is no vLLM engine.

There is no engine process, no scheduler of vLLM's and no detokenizing behind it.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
import uvloop
from vllm import AsyncEngineArgs, envs
from vllm.config import VllmConfig
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from router.no_engine import NoEngine

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence


class FrontEngine(NoEngine):
    """Whoever derives from it says in `generate` what comes out."""

    async def start(self) -> None:
        """Once, on the event loop that serves."""


def serve(name: str, argv: Sequence[str], make: Callable[[VllmConfig], FrontEngine]) -> None:
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
    args: argparse.Namespace, listener: socket.socket, make: Callable[[VllmConfig], FrontEngine]
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
