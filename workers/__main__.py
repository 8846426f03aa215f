"""`tandem worker`: one engine, in the role it is given."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop
import zmq

from workers.addresses import write_addresses
from workers.api import Role
from workers.channel import Channel
from workers.digests import model_digest, tokenizer_digest
from workers.engines.base import EngineDead
from workers.http import HttpSide
from workers.logs import log_to_stderr
from workers.metrics import Metrics
from workers.models import ModelMissing, resolve_model
from workers.orphans import guard
from workers.server import Identity, Worker

if TYPE_CHECKING:
    from workers.engines.base import Engine

log = logging.getLogger("workers")


def main(argv: list[str]) -> int:
    """Serve until SIGTERM or SIGINT. 0 after a drain, 1 when it can't start or the engine dies."""
    args, engine_flags = _parser().parse_known_args(argv)
    log_to_stderr()
    try:
        args.model = resolve_model(args.model)
        identity = Identity(
            worker_id=args.worker_id or f"{args.role}-{socket.gethostname()}-{os.getpid()}",
            epoch=uuid.uuid4().hex,
            role=Role(args.role),
            model=args.model,
            model_digest=model_digest(args.model),
            tokenizer_digest=tokenizer_digest(args.model),
            lease_s=args.lease_s,
        )
    except ModelMissing as error:
        print(f"tandem worker: {error}", file=sys.stderr)
        return 1
    guard()
    try:
        engine = _engine(args, identity, engine_flags)
    except ValueError as error:  # pydantic's and vLLM's own are ValueErrors too.
        print(f"tandem worker: {error}", file=sys.stderr)
        return 1
    status = 0
    try:
        uvloop.run(_serve(args, identity, engine))
    except* (OSError, zmq.ZMQError, EngineDead) as group:
        print(f"tandem worker: {_first(group)}", file=sys.stderr)
        status = 1
    return status


def _first(error: BaseException) -> BaseException:
    """Task groups nest: the group's own words say nothing."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tandem worker",
        description="One engine behind the token channel. Any other flag is the engine's own: "
        "see vLLM's engine arguments.",
        allow_abbrev=False,
    )
    parser.add_argument("--role", choices=[r.value for r in Role], required=True)
    parser.add_argument("--model", required=True, help="a prepared name, a local path or hub name")
    parser.add_argument("--engine", choices=["vllm", "sim"], default="vllm")
    parser.add_argument("--host", default="127.0.0.1", help="address that others reach this at")
    parser.add_argument("--port", type=int, default=0, help="token channel; 0 takes a free one")
    parser.add_argument("--http-port", type=int, default=0)
    parser.add_argument("--worker-id", help="stable over restarts; the pod's name")
    parser.add_argument("--address-file", type=Path, help="written once the sockets are bound")
    parser.add_argument("--lease-s", type=float, default=30.0, help="how long KV is kept unread")
    parser.add_argument("--drain-s", type=float, default=30.0, help="how long SIGTERM waits")
    parser.add_argument("--kv-connector", choices=["tandem", "nixl", "none"], default="tandem")
    parser.add_argument("--kv-transports", default="", help="names, best first; all by default")
    parser.add_argument(
        "--kv-checksums", choices=["off", "sampled", "full"], default="sampled",
        help="of the payload; what a sender sums is what its receivers compare",
    )  # fmt: skip
    parser.add_argument("--kv-answer-s", type=float, default=5.0, help="for a peer's answer")
    parser.add_argument("--kv-read-s", type=float, default=30.0, help="for one read of KV")
    return parser


def _engine(args: argparse.Namespace, identity: Identity, flags: list[str]) -> Engine:
    if args.engine == "sim":
        from workers.engines.sim import SimEngine, sim_settings

        return SimEngine(sim_settings(flags, args.lease_s), identity.epoch)
    from workers.engines.vllm import VllmEngine
    from workers.engines.vllm_config import vllm_config

    return VllmEngine(vllm_config(args, identity, flags))


async def _serve(args: argparse.Namespace, identity: Identity, engine: Engine) -> None:
    metrics = Metrics()
    worker = Worker(engine, identity, metrics)
    channel = Channel(args.host, args.port, worker)
    worker.attach(channel)
    http = HttpSide(args.host, args.http_port, worker, metrics)
    if args.address_file:
        write_addresses(args.address_file, channel=channel.address, http=http.address)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(worker.run()), tasks.create_task(http.run())]
            tasks.create_task(_until_stopped(stop, worker, args.drain_s, running))
    finally:
        engine.close()
        channel.close()


async def _until_stopped(
    stop: asyncio.Event, worker: Worker, drain_s: float, running: list[asyncio.Task[None]]
) -> None:
    await stop.wait()
    if worker.ready is None:
        stop.clear()
        drain = asyncio.ensure_future(worker.drain(drain_s))
        again = asyncio.ensure_future(stop.wait())
        # Whoever asks a second time means now.
        await asyncio.wait({drain, again}, return_when=asyncio.FIRST_COMPLETED)
        drain.cancel()
        again.cancel()
    for task in running:
        task.cancel()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
