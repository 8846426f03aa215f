"""A look at a group over real HTTP: whole, or it says who is missing."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from controller.access import Access
from controller.core.demand import Size
from controller.core.peers import Change, Kind, Peer
from controller.core.sums import OF_ROUTERS, OF_WORKERS
from controller.observe import Bounds, Observer, RoleNames
from controller.scale import Scales
from tests.apiserver.server import ApiServer
from tests.apiserver.store import ADAPTERS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

ROLES = RoleNames("router", "prefill", "decode")
QUICK = Bounds(at_once=4, scrape_s=0.5, tries=2, bytes_max=20_000, look_s=5.0)
MET = "tandem_router_met_total"


class Process:
    """Somebody's /metrics, good or bad."""

    def __init__(self, role: str, name: str) -> None:
        self.role, self.name = role, name
        names = OF_ROUTERS if role == "router" else OF_WORKERS
        self.values = dict.fromkeys(names, 1.0)
        self.answer: bytes | None = None
        """Instead of its own; empty: none at all."""
        self.asked = 0
        self.at_once: list[int] = [0, 0]
        """Now, and at most; of all who share the list."""
        self.server: asyncio.Server

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked += 1
        self.at_once[0] += 1
        self.at_once[1] = max(self.at_once)
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(0.01)
        body = "".join(f"{name} {value}\n" for name, value in self.values.items()).encode()
        answer = answered(200, body) if self.answer is None else self.answer
        if answer:
            writer.write(answer)
        else:
            await reader.read()
        self.at_once[0] -= 1
        writer.close()


def answered(status: int, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status} It\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


class Rig:
    def __init__(self, server: ApiServer) -> None:
        self.server = server
        self.processes: list[Process] = []
        self.age_s: float | None = 1.0
        self.observer = Observer(ROLES, Scales(Access(server.url, "default"), "g"), QUICK)
        self.observer.age_s = lambda now: self.age_s

    async def add(self, role: str, kind: Kind = Kind.READY) -> Process:
        process = Process(role, f"{role}-{len(self.processes)}")
        process.server = await asyncio.start_server(process.serve, "127.0.0.1", 0)
        self.processes.append(process)
        self.become(process, kind)
        return process

    def become(self, process: Process, kind: Kind) -> None:
        port = process.server.sockets[0].getsockname()[1]
        peer = Peer(process.name, process.name, process.role, f"tcp://127.0.0.1:{port}")
        self.observer.on_change(Change(kind, peer))


@asynccontextmanager
async def rig() -> AsyncIterator[Rig]:
    async with ApiServer() as server, asyncio.timeout(30):
        for role, replicas in (("prefill", 3), ("decode", 4)):
            content = {"metadata": {"name": f"g-{role}"}, "spec": {"replicas": replicas}}
            server.store.put(ADAPTERS, "default", content)
        here = Rig(server)
        for role in ("router", "prefill", "decode"):
            await here.add(role)
        try:
            yield here
        finally:
            for process in here.processes:
                process.server.close()


def play(story: Callable[[Rig], Awaitable[None]]) -> None:
    async def told() -> None:
        async with rig() as here:
            await story(here)

    asyncio.run(told())


def test_a_whole_look_has_everybody_who_serves() -> None:
    async def story(here: Rig) -> None:
        joined = await here.add("decode", Kind.JOINED)
        look = await here.observer.look()
        assert look.observed is not None
        assert (look.observed.wanted, look.observed.ready) == (Size(3, 4), Size(1, 1))
        assert joined.asked == 0
        here.become(joined, Kind.READY)
        look = await here.observer.look()
        assert look.observed is not None
        assert look.observed.ready == Size(1, 2)

    play(story)


BAD: dict[str, bytes] = {
    "no answer in time": b"",
    "HTTP 503": answered(503, b"loading"),
    "HTTP 302": b"HTTP/1.1 302 It\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
    "more than 20000 bytes": answered(200, b"# \n" * 10_000),
    "it has no ": answered(200, b"up 1\n"),
    "is nan": answered(200, MET.encode() + b" NaN\n"),
    "RemoteProtocolError": b"what\r\n\r\n",
    "ValueError": answered(200, MET.encode() + b" many\n"),
    "UnicodeDecodeError": answered(200, b"\xff\n"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("role", ["router", "decode"])
def test_one_that_can_t_be_read_is_named_and_nothing_is_observed(what: str, role: str) -> None:
    async def story(here: Rig) -> None:
        bad = await here.add(role)
        bad.answer = BAD[what]
        look = await here.observer.look()
        assert look.observed is None
        assert f"no metrics of {bad.name} (" in look.missing
        assert what in look.missing
        assert here.observer.scrapes_failed == {role: 1}
        assert bad.asked == 1 if what == "it has no " else QUICK.tries
        bad.answer = None
        assert (await here.observer.look()).observed is not None

    play(story)


def test_many_that_can_t_be_read_are_counted() -> None:
    async def story(here: Rig) -> None:
        for _ in range(5):
            (await here.add("decode")).answer = answered(500, b"")
        assert (await here.observer.look()).missing.endswith(" and 2 more")

    play(story)


def test_one_that_leaves_counts_while_it_can_be_read_and_is_not_missed() -> None:
    async def story(here: Rig) -> None:
        leaves = await here.add("decode")
        await here.observer.look()
        here.become(leaves, Kind.DRAINING)
        leaves.values["tandem_worker_output_tokens_total"] += 7
        look = await here.observer.look()
        assert look.observed is not None
        assert (look.observed.output_tokens, look.observed.ready) == (7, Size(1, 1))
        leaves.answer = answered(500, b"")
        look = await here.observer.look()
        assert look.observed is not None
        here.become(leaves, Kind.GONE)
        look = await here.observer.look()
        assert look.observed is not None
        assert look.observed.output_tokens == 7

    play(story)


def test_a_router_that_begins_anew_takes_nothing_back() -> None:
    async def story(here: Rig) -> None:
        router = here.processes[0]
        met = []
        for value in (100.0, 130.0, 5.0, 6.0):
            router.values[MET] = value
            look = await here.observer.look()
            assert look.observed is not None
            met.append(look.observed.met)
        assert met == [0, 30, 35, 36]

    play(story)


def test_without_a_router_or_peers_or_replicas_nothing_is_observed() -> None:
    async def story(here: Rig) -> None:
        here.age_s = 181.0
        assert (await here.observer.look()).missing == "peers were not heard of for 181 s"
        here.age_s = 0.0
        here.server.forbidden = {("get", "rolebasedgroupscalingadapters/scale")}
        missing = (await here.observer.look()).missing
        assert missing.startswith("no scale of prefill: HTTP 403")
        assert here.observer.scales_failed == {"forbidden": 1}
        here.server.forbidden = set()
        here.become(here.processes[0], Kind.DRAINING)
        assert (await here.observer.look()).missing == "no router is ready"

    play(story)


def test_peers_that_are_only_being_asked_for_are_waited_for() -> None:
    async def story(here: Rig) -> None:
        here.age_s = None
        look = asyncio.create_task(here.observer.look())
        await asyncio.sleep(0.2)
        here.age_s = 0.0
        assert (await look).observed is not None

    play(story)


def test_no_more_are_asked_at_once_than_may_be_and_a_look_has_an_end() -> None:
    async def story(here: Rig) -> None:
        at_once = here.processes[0].at_once
        for _ in range(40):
            (await here.add("decode")).at_once = at_once
        assert (await here.observer.look()).observed is not None
        assert 1 < at_once[1] <= QUICK.at_once
        for process in here.processes:
            process.answer = b""
        began = asyncio.get_running_loop().time()
        assert (await here.observer.look()).observed is None
        assert asyncio.get_running_loop().time() - began < QUICK.look_s + 2.0

    play(story)
