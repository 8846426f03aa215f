"""`tandem worker`: one engine, in the role it is given."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
import sys
import time
import traceback
import uuid
from typing import TYPE_CHECKING

import uvloop
import zmq

from kvtransfer.refusal import one_line
from workers.addresses import write_addresses
from workers.channel import Channel
from workers.digests import model_digest, tokenizer_digest
from workers.drain import Drain
from workers.engines.base import EngineDead
from workers.flags import read_settings
from workers.http import HttpSide
from workers.keys import KeyFileBad, WorkerKeys, read_public, read_secret
from workers.logs import log_to_stderr
from workers.metrics import Metrics
from workers.models import ModelMissing, resolve_model
from workers.orphans import guard
from workers.server import Identity, Worker
from workers.settings import WorkerSettings
from workers.signals import ENDING, end_unheard

if TYPE_CHECKING:
    from workers.engines.base import Engine

log = logging.getLogger("workers")


def main(argv: list[str]) -> int:
    """Serve until SIGTERM or SIGINT. 0 after a drain, 1 when it can't start or the engine dies."""
    settings, engine_flags = read_settings(
        WorkerSettings,
        argv,
        prog="tandem worker",
        description="One engine behind the token channel. Any other flag is the engine's own: "
        "see vLLM's engine arguments.",
    )
    log_to_stderr()
    try:
        keys = _keys(settings)
        model = resolve_model(settings.model)
        identity = Identity(
            worker_id=settings.worker_id or f"{settings.role}-{socket.gethostname()}-{os.getpid()}",
            epoch=uuid.uuid4().hex,
            role=settings.role,
            model=model,
            model_digest=model_digest(model),
            tokenizer_digest=tokenizer_digest(model),
            lease_s=settings.lease_s,
            message_bytes_max=settings.message_bytes_max,
        )
    except (KeyFileBad, ModelMissing) as error:
        print(f"tandem worker: {error}", file=sys.stderr)
        return 1
    guard()
    _let_us_have_the_last_line()
    try:
        engine = _engine(settings, identity, engine_flags)
    except Exception as error:  # noqa: BLE001  # A process's edge: vLLM's own are of many types.
        if not isinstance(error, ValueError):  # What it is of may matter then.
            traceback.print_exc()
        print(f"tandem worker: {one_line(error)}", file=sys.stderr)
        return 2
    status = 0
    try:
        uvloop.run(_serve(settings, identity, engine, keys))
    except* (OSError, zmq.ZMQError, EngineDead) as group:
        print(f"tandem worker: {_first(group)}", file=sys.stderr)
        status = 1
    return status


def _let_us_have_the_last_line() -> None:
    """Python's resource tracker outlives this process, and would tell that an engine which did not
    start left shared memory behind: it removes that, and it is no news."""
    told = [w for w in (os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker") if w]
    os.environ["PYTHONWARNINGS"] = ",".join(told)


def _first(error: BaseException) -> BaseException:
    """Task groups nest: the group's own words say nothing."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _keys(settings: WorkerSettings) -> WorkerKeys | None:
    if settings.curve_secret_file is None or settings.curve_routers_file is None:
        return None
    routers = frozenset(read_public(settings.curve_routers_file))
    return WorkerKeys(read_secret(settings.curve_secret_file), routers)


def _engine(settings: WorkerSettings, identity: Identity, flags: list[str]) -> Engine:
    if settings.engine == "sim":
        from workers.engines.sim import SimEngine, sim_settings

        return SimEngine(sim_settings(flags, settings.lease_s), identity.epoch)
    from workers.engines.vllm import VllmEngine
    from workers.engines.vllm_config import vllm_config

    args = argparse.Namespace(
        model=identity.model,
        role=settings.role.value,
        host=settings.host,
        lease_s=settings.lease_s,
        kv_connector=settings.kv_connector,
        kv_transports=settings.kv_transports,
        kv_checksums=settings.kv_checksums,
        kv_answer_s=settings.kv_answer_s,
        kv_read_s=settings.kv_read_s,
        curve_secret_file=str(settings.curve_secret_file or ""),
    )
    return VllmEngine(vllm_config(args, identity, flags))


async def _serve(
    settings: WorkerSettings, identity: Identity, engine: Engine, keys: WorkerKeys | None
) -> None:
    metrics = Metrics()
    silence_s = settings.router_silence_s
    worker = Worker(engine, identity, metrics, router_silence_s=silence_s)
    channel = Channel(
        settings.host, settings.port, worker, keys,
        message_bytes_max=settings.message_bytes_max, silence_s=silence_s,
    )  # fmt: skip
    worker.attach(channel)
    metrics.watch(channel)
    drain = Drain(worker, settings.drain_s, time.monotonic)
    http = HttpSide(settings.host, settings.http_port, worker, metrics, drain)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in ENDING:
        loop.add_signal_handler(number, stop.set)
    if settings.address_file:
        write_addresses(settings.address_file, channel=channel.address, http=http.address)
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(worker.run()),
                tasks.create_task(drain.forget_unused()),
                tasks.create_task(_limit_loading(worker, settings.load_s)),
                tasks.create_task(metrics.loop_hold.run()),
            ]
            tasks.create_task(http.run())
            await _until_stopped(stop, worker, drain)
            for task in running:
                task.cancel()
            http.leave()
    finally:
        engine.close()
        channel.close()
        end_unheard(loop)


async def _limit_loading(worker: Worker, load_s: float) -> None:
    """An engine whose own process died while it loaded may never tell."""
    await asyncio.sleep(load_s)
    if worker.loading:
        print(f"tandem worker: the engine is not loaded after {load_s:g} s", file=sys.stderr)
        _leave_loading(1)


def _leave_loading(status: int) -> None:
    """The load runs in a thread that nothing can end. Our guard ends the engine's processes."""
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)


async def _until_stopped(stop: asyncio.Event, worker: Worker, drain: Drain) -> None:
    await stop.wait()
    if worker.loading:
        log.info("stopped while loading")
        _leave_loading(0)
    stop.clear()
    last = asyncio.ensure_future(drain.finish())
    again = asyncio.ensure_future(stop.wait())
    try:
        # Whoever asks a second time means now.
        await asyncio.wait({last, again}, return_when=asyncio.FIRST_COMPLETED)
        if not last.done():
            drain.call_off()
    finally:
        last.cancel()
        again.cancel()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
