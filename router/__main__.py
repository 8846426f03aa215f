"""`tandem router`: the OpenAI endpoint in front of the workers."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
import uvloop

from router.core.compat import RouterFacts
from router.dispatch import Dispatch
from router.journal import Journal
from router.link import Links
from router.metrics import Metrics
from workers.addresses import write_addresses
from workers.digests import model_digest, tokenizer_digest
from workers.logs import log_to_stderr
from workers.models import ModelMissing, resolve_model

if TYPE_CHECKING:
    from workers.api import ToWorker

log = logging.getLogger("router")


def main(argv: list[str]) -> int:
    """Serve until SIGTERM or SIGINT. 1 when it can't start."""
    args, flags = _parser().parse_known_args(argv)
    log_to_stderr()
    addresses = [a for a in args.workers.split(",") if a]
    bad = [a for a in addresses if not a.startswith("tcp://")]
    if bad or not addresses:
        print(f"tandem router: --workers: {bad or 'none'}: want tcp://host:port", file=sys.stderr)
        return 2
    try:
        model = resolve_model(args.model)
        digests = model_digest(model), tokenizer_digest(model)
        listener = socket.create_server((args.host, args.port))
        # Connections inherit it. An event loop may not set it by itself, and then each event of a
        # stream waits for the acknowledgement of the one before, up to 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except (ModelMissing, OSError) as error:
        print(f"tandem router: {error}", file=sys.stderr)
        return 1
    # A bad flag should be told of in a moment: what takes seconds comes after.
    # vLLM's GPU build refuses to start where there is no GPU, and the router needs none.
    os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
    from router.front import front_args

    if not any(f.startswith("--served-model-name") for f in flags):
        flags += ["--served-model-name", args.model]
    front = front_args(model, flags)
    uvloop.run(_serve(args, front, listener, digests))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tandem router",
        description="The OpenAI endpoint. Any other flag is that of vLLM's OpenAI server.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="the workers' own")
    parser.add_argument("--workers", required=True, help="tcp://host:port,… of token channels")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--address-file", type=Path, help="written once the socket is bound")
    return parser


async def _serve(
    args: argparse.Namespace,
    front: argparse.Namespace,
    listener: socket.socket,
    digests: tuple[str, str],
) -> None:
    from router.engine import DisaggregatedEngine
    from router.front import build_front, front_config

    config = front_config(front)
    engine = DisaggregatedEngine(config)
    facts = RouterFacts(
        router_id=f"router-{socket.gethostname()}-{uuid.uuid4().hex[:8]}",
        model=args.model,
        model_digest=digests[0],
        tokenizer_digest=digests[1],
        max_model_len=config.model_config.max_model_len,
    )

    def send(worker_id: str, message: ToWorker) -> None:
        links.send(worker_id, message)

    dispatch = Dispatch(send, engine, time.monotonic, Journal(Metrics()))
    engine.attach(dispatch)
    links = Links(args.workers.split(","), facts, dispatch)
    app = await build_front(engine, links, dispatch, front)
    server = _Server(
        uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=10)
    )
    app.state.server = server
    if args.address_file:
        http = f"http://{args.host}:{listener.getsockname()[1]}"
        write_addresses(args.address_file, channel=None, http=http)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.leave)
    async with asyncio.TaskGroup() as tasks:
        beating = tasks.create_task(links.run())
        await server._serve([listener])
        beating.cancel()
    engine.shutdown()


class _Server(uvicorn.Server):
    def leave(self) -> None:
        """Finish what streams, for a while; the second time, at once."""
        self.force_exit = self.should_exit
        self.should_exit = True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
