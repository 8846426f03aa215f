"""`tandem controller`: sizes a group on Kubernetes, and says why."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import uuid
from typing import Final

import httpx

from controller import explain
from controller.access import Access, NoCluster
from controller.core.demand import Size
from controller.core.lease import Terms
from controller.core.peers import RoleFacts
from controller.core.sizing import Sizer, SizingPolicy
from controller.discovery import Discovery
from controller.http import HttpSide
from controller.leader import Leadership
from controller.loop import Loop, Parts
from controller.metrics import DiscoveryMetrics
from controller.observe import Observer, RoleNames
from controller.reflector import Reflector
from controller.scale import Scales
from controller.settings import ControllerSettings
from controller.sizing_metrics import SizingMetrics
from workers.addresses import write_addresses
from workers.flags import read_settings
from workers.logs import log_to_stderr
from workers.signals import ENDING, end_unheard

log = logging.getLogger("controller")

PROG: Final = "tandem controller"
GROUP_LABEL: Final = "rbg.workloads.x-k8s.io/group-name"


def main(argv: list[str]) -> int:
    """`run` until SIGTERM or SIGINT, or `explain`. 1 when it can't start, 2 for a bad flag."""
    if argv[:1] == ["explain"]:
        return _explain(argv[1:])
    settings, rest = read_settings(
        ControllerSettings,
        argv[1:] if argv[:1] == ["run"] else argv,
        prog=PROG,
        description="Sizes a RoleBasedGroup's prefill and decode. `tandem controller explain` asks "
        "a running one what it decided, and why.",
    )
    if rest:
        print(f"{PROG}: unknown argument {rest[0]!r}", file=sys.stderr)
        return 2
    log_to_stderr()
    logging.getLogger("httpx").setLevel("WARNING")  # It tells of every request.
    try:
        access = Access.find(
            os.environ,
            url=settings.discover_api,
            namespace=settings.namespace,
            token_file=settings.discover_token_file,
            ca_file=settings.discover_ca_file,
        )
        asyncio.run(_serve(settings, access))
    except (NoCluster, OSError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 1
    return 0


def _explain(argv: list[str]) -> int:
    args = explain.parse(argv)
    try:
        content = explain.ask(args)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        print(f"{PROG} explain: {args.url}: {error}", file=sys.stderr)
        return 1
    for line in explain.lines(content, facts=args.facts):
        print(line)
    return 0


def _policy(settings: ControllerSettings) -> SizingPolicy:
    return SizingPolicy(
        least=Size(settings.prefill_min, settings.decode_min),
        most=Size(settings.prefill_max, settings.decode_max),
        attainment=settings.attainment,
        ttft_s=settings.ttft_objective_s,
        itl_s=settings.itl_objective_s,
        look_s=settings.look_s,
        startup_s=settings.startup_s,
        up_cooldown_s=settings.up_cooldown_s,
        down_cooldown_s=settings.down_cooldown_s,
        down_window_s=settings.down_window_s,
        caution=settings.caution,
    )


def _terms(settings: ControllerSettings, access: Access) -> Terms:
    # One life of one process: a restarted container has its pod's name and none of its memory.
    who = settings.identity or socket.gethostname()
    return Terms(
        f"{who}_{uuid.uuid4().hex[:8]}",
        settings.lease_name or f"{settings.group}-controller",
        access.namespace,
        settings.lease_s,
    )


def _reflector(settings: ControllerSettings, access: Access) -> Reflector:
    names = (settings.router_role, settings.prefill_role, settings.decode_role)
    leaders, ports = settings.discover_leaders or (), settings.metrics_ports
    return Reflector(
        access,
        settings.discover_selector or f"{GROUP_LABEL}={settings.group}",
        settings.discover_role_label,
        {role: RoleFacts(ports[role], role in leaders) for role in names},
    )


async def _serve(settings: ControllerSettings, access: Access) -> None:
    """Raises OSError where it can't listen."""
    loop = asyncio.get_running_loop()
    roles = RoleNames(settings.router_role, settings.prefill_role, settings.decode_role)
    scales, leadership = (
        Scales(access, settings.group),
        Leadership(_terms(settings, access), access),
    )
    observer, reflector = Observer(roles, scales), _reflector(settings, access)
    discovery = Discovery(reflector, observer.on_change, settings.discover_debounce_s)
    observer.age_s = discovery.age_s
    parts = Parts(observer, Sizer(_policy(settings)), leadership, scales, roles)
    sizing = Loop(parts, settings.look_s, dry_run=settings.dry_run)
    http = HttpSide(settings.http_host, settings.http_port, sizing, leadership)
    DiscoveryMetrics(discovery, reflector.session, loop.time)
    SizingMetrics(sizing, observer, leadership, loop.time)
    stop = asyncio.Event()
    for number in ENDING:
        loop.add_signal_handler(number, stop.set)
    if settings.address_file:
        write_addresses(settings.address_file, channel=None, http=http.address)
    log.info("controller started", extra={"group": settings.group, "http": http.address})
    async with asyncio.TaskGroup() as tasks:
        sides = [tasks.create_task(discovery.run()), tasks.create_task(http.run())]
        acts = [tasks.create_task(sizing.run())]
        if not settings.dry_run:
            acts.append(tasks.create_task(leadership.run()))
        await stop.wait()
        await _end(acts)  # Nothing is scaled from here on.
        if not settings.dry_run:
            await leadership.leave()
        await _end(sides)
    end_unheard(loop)


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
