"""What must hold when a run is over."""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.core.blocks import next_link, root
from router.core.caches import ASK_INTERVAL_S
from router.core.errors import TenantOverRate
from router.core.fleet import UNMEASURED_S
from router.core.placement import Disaggregate, EstimatePolicy
from router.dispatch import Ask
from tests.simulation.cluster import MENDS_S
from tests.simulation.plan import Call, Departure
from tests.simulation.violation import Violation
from workers.api import LOAD_INTERVAL_S, Role
from workers.channel import QUEUE_MAX

if TYPE_CHECKING:
    from collections.abc import Sequence

    from router.core.blocks import Link
    from router.core.fleet import WorkerView
    from router.core.placement import Placement, Prompt
    from router.journal import Record
    from tests.simulation.clients import Request
    from tests.simulation.cluster import Cluster
    from tests.simulation.hosts import RouterHost
    from workers.cache_mirror import CacheMirror

LOST_S = 200.0
"""Of a hung engine a router is sure after a minute, three times in a row. Nobody who waits hears
nothing of any request for so long."""
ATTEMPTS = 3
"""As docs/architecture.md has it."""
DOUBTED_S = UNMEASURED_S + 2.0
"""A worker that was late is tried again within this."""
RELEASED_S = 2.0
"""Without faults, nothing is kept for longer than messages and a pull take."""

_OUTCOMES = {
    "finished": "finished", "enough": "finished", "cancelled": "cancelled", "failed": "failed",
}  # fmt: skip


async def conclude(cluster: Cluster) -> None:
    """Run it out, then check. Raises `Violation`."""
    await cluster.until(cluster.plan.calls[-1].at + 0.001)
    await every_request_ends(cluster)
    await cluster.until(cluster.plan.quiet_at + 0.001)
    await every_request_ends(cluster)
    await every_worker_is_known_again(cluster)
    await every_worker_is_used_again(cluster)
    for router in cluster.routers.values():
        cluster.counts.update(router.counts)
        for request in router.clients.requests.values():
            an_end_has_its_reason(cluster, router, request)
        demand_is_who_came(router)
    await nothing_is_kept(cluster)
    await indexes_are_the_caches(cluster)


def demand_is_who_came(router: RouterHost) -> None:
    """What sizing is told: nobody left out, and no more in time than there are verdicts."""
    demand, requests = router.dispatch.door.demand, router.clients.requests.values()
    over_rate = sum(isinstance(r.error, TenantOverRate) for r in requests)
    if demand.requests != len(requests) - over_rate:
        raise Violation(f"{router.name}: {len(requests)} came, and it told of {demand.requests}")
    if not 0 <= demand.met <= demand.first_in_time <= demand.judged <= demand.requests:
        raise Violation(f"{router.name}: impossible verdicts of {demand.requests} requests")
    prompts = sum(len(r.call.ask.prompt_token_ids) for r in requests)
    if not 0 <= demand.computed_tokens <= prompts:
        raise Violation(f"{router.name}: {demand.computed_tokens} computed of {prompts}")
    queue = router.dispatch.door.queue
    if bool(queue) != bool(queue.uncached_tokens):
        raise Violation(f"{router.name}: {len(queue)} wait with {queue.uncached_tokens} tokens")


async def every_request_ends(cluster: Cluster) -> None:
    while any(_open(host) for host in cluster.live_routers):
        now = cluster.loop.time()
        for host in cluster.live_routers:
            asked_at = max((r.asked_at for r in _open(host)), default=now)
            if now > max(asked_at, host.clients.heard_at) + LOST_S:
                raise Violation(f"lost: {[r.id for r in _open(host)]}")
        await cluster.until(now + 1.0)


def _open(router: RouterHost) -> list[Request]:
    return [r for r in router.clients.requests.values() if r.ended is None]


async def every_worker_is_known_again(cluster: Cluster) -> None:
    until = cluster.plan.quiet_at + MENDS_S
    await cluster.until(min(until, cluster.loop.time() + 2.0))
    while True:
        lives = {h.name: h.life.epoch for h in cluster.live_workers if h.life}
        known = {
            r.name: {v.id: v.hello.epoch for v in r.dispatch.fleet if not v.load.draining}
            for r in cluster.live_routers
        }
        if all(k == lives for k in known.values()):
            return
        if cluster.loop.time() >= until:
            raise Violation(f"there are {lives}, the routers know {known}")
        await cluster.until(cluster.loop.time() + 0.5)


async def every_worker_is_used_again(cluster: Cluster) -> None:
    roles = [h.plan.role for h in cluster.live_workers]
    if not set(roles) & {Role.DECODE, Role.MIXED}:
        return
    if any(w.doubted for r in cluster.live_routers for w in r.dispatch.fleet):
        await cluster.until(cluster.loop.time() + DOUBTED_S)
    for router in cluster.live_routers:
        await cluster.until(
            cluster.loop.time() + 2 * LOAD_INTERVAL_S
        )  # What others placed is told.
        idle = {h.name for h in cluster.live_workers}
        idle -= await _used_by(cluster, router, 2 * len(roles), "any")
        # Whoever was not worth it is used too, when it is the only one.
        policy = router.dispatch._policy
        for name in sorted(idle):
            router.dispatch._policy = _Only(name)
            if name not in await _used_by(cluster, router, 1, name):
                raise Violation(f"{router.name} no longer uses {name}")
        router.dispatch._policy = policy


class _Only:
    """Places on this worker, together with another where it can't serve alone."""

    def __init__(self, name: str) -> None:
        self._name = name

    def place(
        self, prompt: Prompt, workers: Sequence[WorkerView], avoid: frozenset[str] = frozenset()
    ) -> Placement:
        alone = [w for w in workers if w.id == self._name and w.generates]
        if alone:
            return EstimatePolicy().place(prompt, alone)
        some = [w for w in workers if w.id == self._name or (w.generates and not w.computes)]
        return EstimatePolicy(Disaggregate.ALWAYS).place(prompt, some)


async def _used_by(cluster: Cluster, router: RouterHost, crowd: int, name: str) -> set[str | None]:
    """Whom so many requests at once were placed on."""
    now = cluster.loop.time()
    asks = [
        Ask(f"{router.name}-probe-{name}.{n}", [7 + n] * 60, 8, relay=n % 2 == 0)
        for n in range(crowd)
    ]
    for ask in asks:
        router.ask(Call(now, router.name, ask, Departure()))
    await every_request_ends(cluster)
    used: set[str | None] = set()
    for ask in asks:
        request = router.clients.requests[ask.request_id]
        if request.ended != "finished":
            raise Violation(f"with all faults over, {request.id} {request.ended}")
        record = _record(router, request)
        assert record is not None
        used |= {record.prefill_worker, record.decode_worker}
    return used


def an_end_has_its_reason(cluster: Cluster, router: RouterHost, request: Request) -> None:
    """Counted as it ended; and nothing fails but what is wrong in itself or was hit by a fault."""
    cluster.counts[f"ended {request.ended}"] += 1
    record = _record(router, request)
    if request.ended == "router died":
        return
    if request.ended == "refused":
        assert request.error is not None
        if record is not None or request.id in router.worked_for:
            raise Violation(f"{request.id} was refused and yet begun: {record}")
        _excused(cluster, request, request.error.code, set())
        return
    if record is None:
        raise Violation(f"{request.id} has no record")
    if cluster.plan.calm and (record.attempts > 1 or record.kv_failed):
        raise Violation(f"without a fault, {request.id} did not go as it should: {record}")
    cluster.counts["handed off"] += bool(record.kv_tokens)
    cluster.counts["pull failed"] += record.kv_failed is not None
    cluster.counts["tried again"] += record.attempts > 1
    if record.prefill_worker is not None and record.prefill_worker == record.decode_worker:
        raise Violation(f"{request.id} was handed off to where it was: {record}")
    if record.outcome != _OUTCOMES[str(request.ended)]:
        raise Violation(f"{request.id} {request.ended}, the journal says {record.outcome}")
    if record.output_tokens != len(request.got):
        raise Violation(f"{request.id} got {len(request.got)} tokens, {record}")
    if request.ended == "finished" and not request.expected:
        raise Violation(f"{request.id} was served, alone an engine refuses it")
    if request.ended == "failed":
        assert request.error is not None
        cluster.counts[f"failed {request.error.code}"] += 1
        where = {record.prefill_worker or "", record.decode_worker or ""}
        _excused(cluster, request, request.error.code, where)
        if request.error.code in ("worker_lost", "worker_failed") and not request.got:
            if record.attempts < ATTEMPTS:
                raise Violation(f"{request.id} was given up after {record.attempts} attempts")
            _nobody_else_could(cluster, request)


def _excused(cluster: Cluster, request: Request, code: str, where: set[str]) -> None:
    router = {request.call.router}
    touched = cluster.losses.touched
    match code:
        case "invalid_request":
            excused = not request.expected
        case "worker_lost" | "worker_failed":
            excused = touched(where | router, request.asked_at, request.ended_at)
        case "no_workers":
            # Everybody who could have decoded it, as this router knew.
            able = [w.worker_id for w in cluster.plan.workers if w.role is not Role.PREFILL]
            excused = all(touched({w} | router, request.asked_at, request.ended_at) for w in able)
        case _:
            excused = False
    if not excused:
        raise Violation(f"{request.id} ended for no reason: {request.error!r}")


def _nobody_else_could(cluster: Cluster, request: Request) -> None:
    """With one worker in trouble, the second try goes where there is none."""
    since, until = request.asked_at, request.ended_at
    if cluster.losses.touched({request.call.router}, since, until):
        return
    workers = cluster.plan.workers
    well = [w for w in workers if not cluster.losses.touched({w.worker_id}, since, until)]
    able = any(w.role is not Role.PREFILL for w in well)
    if len(well) == len(workers) - 1 and able:
        raise Violation(f"{request.id} failed three times, and {well} are well: {request.error}")


async def nothing_is_kept(cluster: Cluster) -> None:
    plan = cluster.plan
    await cluster.until(cluster.loop.time() + (RELEASED_S if plan.calm else plan.lease_s + 0.5))
    for host in cluster.live_workers:
        assert host.life is not None
        load = host.life.worker.load
        held = load.blocks_total - load.blocks_free
        book = cluster.handoffs.book(host.life.epoch)
        if book is None or book._live:
            raise Violation(f"{host.name} still has handles: {book and book._live}")
        if held or load.leases_open or load.busy or load.prefill_tokens_queued:
            raise Violation(f"{host.name} still holds {held} blocks: {load}")
    for router in cluster.live_routers:
        queue = router.dispatch.door.queue
        if queue or queue.tokens or queue._clocks or queue._blocked_since or queue._waiting:
            raise Violation(f"{router.name} still queues {queue.tokens} tokens")
        # The second is nobody's business but the router's memory's.
        if len(router.dispatch) or router.dispatch._by_wire:
            raise Violation(f"{router.name} still holds {router.dispatch._by_wire}")
        for view in router.dispatch.fleet:
            if view.promised or view.unheard or view._unheard_tokens or view._promised_blocks:
                raise Violation(f"{router.name} still counts on {view.id}: {view}")
    if cluster.network.queued_max > QUEUE_MAX / 10:
        raise Violation(f"a queue grew to {cluster.network.queued_max} messages")


async def indexes_are_the_caches(cluster: Cluster) -> None:
    """At rest, and a question's interval later, each router knows what each worker has cached."""
    await cluster.until(cluster.loop.time() + ASK_INTERVAL_S + 2 * LOAD_INTERVAL_S)
    held: dict[str, dict[int, Link]] = {}
    for host in cluster.live_workers:
        assert host.life is not None
        pool = host.life.engine._engine._model._pool
        mirror = host.life.worker._mirror
        if set(mirror._ids) != {*pool._owners, *pool._idle}:
            raise Violation(f"{host.name} tells of other blocks than it has")
        held[host.name] = _links_held(mirror)
    for router in cluster.live_routers:
        index_is(router, held)


def index_is(router: RouterHost, held: dict[str, dict[int, Link]]) -> None:
    caches = router.dispatch.caches
    holders: dict[Link, set[str]] = {}
    for name, links in held.items():
        view = caches.view(name)
        if view is None or not view.in_step or view._links != links:
            known = None if view is None else (view.in_step, len(view))
            raise Violation(f"{router.name} knows {known} of {name}, not {len(links)}")
        for link in links.values():
            holders.setdefault(link, set()).add(name)
    for index in caches._indexes.values():
        found = {link: set(index._workers(bits)) for link, bits in index._holders.items()}
        if found != holders:
            raise Violation(f"{router.name} finds {len(found)} blocks, not {len(holders)}")


def _links_held(mirror: CacheMirror) -> dict[int, Link]:
    """What is in the cache, by the worker's numbers, named anew from its tokens."""
    links: dict[int, Link] = {}
    for number, block in mirror._blocks.items():  # A parent is always older.
        before = links[block.parent] if block.parent >= 0 else root(block.salt, block.lora)
        links[number] = next_link(before, block.token_ids)
    return {number: links[number] for number in mirror._ids.values()}


def _record(router: RouterHost, request: Request) -> Record | None:
    found = [r for r in router.dispatch.journal.find(request.id) if r.request_id == request.id]
    return found[0] if found else None
