"""`tandem router`: the OpenAI endpoint in front of the workers."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import sys
import time
import uuid
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

import uvicorn
import uvloop
import zmq

from controller.access import NoCluster
from router.asker import AccessRules
from router.bounds import connection_limits, request_limits
from router.connection import ConnectionLimits, bounded
from router.core.access import Keys
from router.core.compat import RouterFacts
from router.core.limits import Limits
from router.core.placement import EstimatePolicy
from router.discover import follow, make_source
from router.dispatch import Dispatch
from router.guard import at_admin_address
from router.heap import set_up_heap
from router.journal import Journal
from router.keys import read_admin_key
from router.leaving import Departure, LeavingServer
from router.link import Curve, Links
from router.metrics import (
    CacheMetrics,
    DemandMetrics,
    HandoffMetrics,
    Metrics,
    QueueMetrics,
    loop_hold,
)
from router.settings import RouterSettings
from workers.addresses import write_addresses
from workers.constraints import constraints
from workers.digests import model_digest, tokenizer_digest
from workers.flags import read_settings
from workers.keys import KeyFileBad, read_public, read_secret
from workers.logs import log_to_stderr
from workers.models import ModelMissing, resolve_model
from workers.signals import end_unheard

if TYPE_CHECKING:
    import argparse

    from starlette.types import ASGIApp

    from controller.sources import Source
    from workers.api import ToWorker

log = logging.getLogger("router")

FILES_WANTED = 65_536


def main(argv: list[str]) -> int:
    """Serve until SIGTERM or SIGINT. 1 when it can't start, 2 when it was told what it can't."""
    settings, flags = read_settings(
        RouterSettings,
        argv,
        prog="tandem router",
        description="The OpenAI endpoint. Any other flag is that of vLLM's OpenAI server.",
    )
    log_to_stderr()
    try:
        curve = _curve(settings)
        source = make_source(settings, os.environ)
        model = resolve_model(settings.model)
        digests = model_digest(model), tokenizer_digest(model)
        admin_key = read_admin_key(settings.admin_key_file) if settings.admin_key_file else None
        listeners = _listeners(settings)
    except (KeyFileBad, ModelMissing, NoCluster, OSError) as error:
        print(f"tandem router: {error}", file=sys.stderr)
        return 1
    _allow_files()
    set_up_heap()
    # A bad flag should be told of in a moment: what takes seconds comes after.
    # vLLM's GPU build refuses to start where there is no GPU, and the router needs none.
    os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
    from router.front import Unserved, front_args, take_keys

    if not any(f.startswith("--served-model-name") for f in flags):
        flags += ["--served-model-name", settings.model]
    front = front_args(model, flags)
    try:
        keys = Keys(take_keys(front, tenants_named=settings.trust_tenant_header), admin_key)
        at_admin = listeners.admin is not None
        rules = AccessRules(keys, settings.trust_tenant_header, admin_address=at_admin)
        ways = Ways(listeners, rules, curve, source)
        uvloop.run(_serve(settings, front, digests, ways))
    except Unserved as refusal:
        print(f"tandem router: {refusal}", file=sys.stderr)
        return 2
    return 0


def _curve(settings: RouterSettings) -> Curve | None:
    if settings.curve_secret_file is None or settings.curve_workers_file is None:
        return None
    secret = read_secret(settings.curve_secret_file)
    workers = read_public(settings.curve_workers_file)
    if len(workers) > 1:
        raise KeyFileBad(f"key file {settings.curve_workers_file}: the workers share one key")
    return Curve(zmq.curve_public(secret), secret, workers[0])


@dataclass(frozen=True, slots=True)
class Listeners:
    """Sockets that are bound: the API's, and the admin's where it has an address of its own."""

    api: socket.socket
    admin: socket.socket | None


def _listeners(settings: RouterSettings) -> Listeners:
    """Raises OSError."""
    api = socket.create_server((settings.host, settings.port))
    # Connections inherit it. An event loop may not set it by itself, and then each event of a
    # stream waits for the acknowledgement of the one before, up to 40 ms.
    api.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    admin = None
    if settings.admin_port is not None:
        admin = socket.create_server((settings.host, settings.admin_port))
    return Listeners(api, admin)


def _url(host: str, listener: socket.socket) -> str:
    return f"http://{host}:{listener.getsockname()[1]}"


@dataclass(frozen=True, slots=True)
class Ways:
    """Clients' ways to the router, and the router's to its workers."""

    listeners: Listeners
    rules: AccessRules
    curve: Curve | None
    source: Source | None


def _allow_files() -> None:
    """A worker takes four, and many systems allow 1,024 until one asks for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_WANTED if hard == resource.RLIM_INFINITY else min(FILES_WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _limits(settings: RouterSettings) -> Limits:
    return Limits(
        queue_max=settings.queue_max,
        queue_s=settings.queue_s,
        prefill_s=settings.prefill_queue_s,
        ttft_s=settings.ttft_objective_s or inf,
        itl_s=settings.itl_objective_s or inf,
        tenant_tokens_per_s=settings.tenant_tokens_per_s or inf,
        tenant_burst_s=settings.tenant_burst_s,
        hedge_after_s=settings.hedge_after_s,
        hedge_ratio=settings.hedge_ratio,
        shares=settings.tenant_shares or {},
        message_bytes=settings.message_bytes_max,
    )


async def _serve(
    settings: RouterSettings,
    front: argparse.Namespace,
    digests: tuple[str, str],
    ways: Ways,
) -> None:
    from router.engine import DisaggregatedEngine
    from router.front import VLLM_VERSION, Surface, View, build_front, front_config

    config = front_config(front)
    engine = DisaggregatedEngine(config, request_limits(settings))
    facts = RouterFacts(
        router_id=f"router-{socket.gethostname()}-{uuid.uuid4().hex[:8]}",
        model=settings.model,
        model_digest=digests[0],
        tokenizer_digest=digests[1],
        max_model_len=config.model_config.max_model_len,
        vllm_version=VLLM_VERSION,
        constraints=constraints(config),
        message_bytes_max=settings.message_bytes_max,
    )

    def send(worker_id: str, message: ToWorker) -> None:
        links.send(worker_id, message)

    journal = Journal(Metrics())
    limits = _limits(settings)
    policy = EstimatePolicy(settings.disaggregate, limits.prefill_s)
    dispatch = Dispatch(
        send, engine, time.monotonic, journal, settings.reserve, policy=policy, limits=limits
    )
    _count(dispatch)
    engine.attach(dispatch)
    engine.priorities = settings.tenant_priorities or {}
    links = Links(settings.workers or (), facts, dispatch, ways.curve)
    departure = Departure()
    surface = Surface(ways.rules, settings.api_docs)
    app = await build_front(engine, View(links, dispatch, departure), front, surface)
    # What is here now stays. Looked through again it would hold all streams up, for 280 ms.
    gc.collect()
    gc.freeze()
    server = LeavingServer(app, departure, settings.drain_s, connection_limits(settings))
    app.state.server = server
    loop = asyncio.get_running_loop()
    _leave_when_told(loop, server, settings.notice_s)
    _tell_addresses(settings, ways.listeners)
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(links.run()), tasks.create_task(loop_hold().run())]
        if ways.source is not None:
            discovery = follow(ways.source, settings, links, loop.time)
            running.append(tasks.create_task(discovery.run()))
        admin = _admin_server(app, connection_limits(settings))
        if ways.listeners.admin is not None:
            tasks.create_task(admin._serve([ways.listeners.admin]))
        await server._serve([ways.listeners.api])
        admin.should_exit = True  # It tells of the streams until they have ended.
        for task in running:
            task.cancel()
    engine.shutdown()
    end_unheard(loop)


def _count(dispatch: Dispatch) -> None:
    CacheMetrics(dispatch.caches)
    QueueMetrics(dispatch)
    DemandMetrics(dispatch)
    HandoffMetrics(dispatch.handoffs.known)


def _leave_when_told(
    loop: asyncio.AbstractEventLoop, server: LeavingServer, notice_s: float
) -> None:
    loop.add_signal_handler(signal.SIGTERM, server.leave, notice_s)
    loop.add_signal_handler(signal.SIGINT, server.leave, 0.0)  # A person has no balancer.


def _tell_addresses(settings: RouterSettings, listeners: Listeners) -> None:
    if settings.address_file:
        host, admin = settings.host, listeners.admin
        write_addresses(
            settings.address_file,
            channel=None,
            http=_url(host, listeners.api),
            admin=_url(host, admin) if admin else None,
        )


def _admin_server(app: ASGIApp, limits: ConnectionLimits) -> uvicorn.Server:
    """The same application, whose life is the other server's to begin and to end."""
    config = uvicorn.Config(
        at_admin_address(app), lifespan="off", log_level="warning", access_log=False,
        timeout_graceful_shutdown=1, http=bounded(limits), ws="none",
    )  # fmt: skip
    return uvicorn.Server(config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
