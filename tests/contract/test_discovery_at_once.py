"""Four hundred workers that join at the same moment."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from controller.access import Access
from controller.core.peers import RoleFacts
from controller.discovery import Discovery
from controller.reflector import Reflector
from router.core.compat import RouterFacts
from router.discover import Follower
from router.dispatch import Dispatch
from router.link import Links
from tests.apiserver.group import NAMESPACE, ROLE_LABEL, Group
from tests.apiserver.server import ApiServer
from workers.api import PROTOCOL, Role, WorkerHello, encode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workers.api import ToWorker

WORKERS = 400
MOST_S = 2.0
WAIT_S = 30.0


def ip(n: int) -> str:
    return f"127.9.{n // 200}.{n % 200 + 1}"


@contextmanager
def greeters() -> Iterator[int]:
    """Sockets of workers that say hello and no more, in a thread beside the router. Their port."""
    context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 2 * WORKERS)
    poller, hellos, over = zmq.Poller(), {}, threading.Event()
    port = 0
    for n in range(WORKERS):
        socket = context.socket(zmq.ROUTER)
        socket.linger = 0
        socket.bind(f"tcp://{ip(n)}:{port or '*'}")
        port = port or int(socket.last_endpoint.rsplit(b":", 1)[1])
        poller.register(socket, zmq.POLLIN)
        hellos[socket] = encode(
            WorkerHello(
                PROTOCOL, f"w{n}", "e", Role.MIXED, "sim", "1", "m", "model", "tokenizer", "kv",
                ["tcp"], 16, 1600, 1000, 4096, 30.0, tells_cache=False,
            )
        )  # fmt: skip

    def greet() -> None:
        greeted = set()
        while not over.is_set():
            for socket, _ in poller.poll(50):
                who, _ = socket.recv_multipart()
                if socket not in greeted:
                    greeted.add(socket)
                    socket.send_multipart([who, hellos[socket]])
        for socket in hellos:
            socket.close()

    thread = threading.Thread(target=greet)
    thread.start()
    try:
        yield port
    finally:
        over.set()
        thread.join()
        context.term()


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1e6


class Nobody:
    """No request is made."""

    def deliver(self, *_: object) -> None:
        raise AssertionError

    fail = deliver


async def join_at_once(port: int) -> tuple[float, float]:
    """Seconds until the router knows everybody, and the megabytes that this takes."""
    async with ApiServer() as server:
        group = Group(server.store)
        slices = [group.add_slice("mixed") for _ in range(4)]
        facts = RouterFacts("r", "m", "tokenizer", "model", 4096)

        def send(worker_id: str, message: ToWorker) -> None:
            links.send(worker_id, message)

        dispatch = Dispatch(send, Nobody(), time.monotonic)
        links = Links([], facts, dispatch)
        roles = {"mixed": RoleFacts(port)}
        reflector = Reflector(Access(server.url, NAMESPACE), group.selector, ROLE_LABEL, roles)
        discovery = Discovery(reflector, Follower(links).on_change)
        tasks = [asyncio.create_task(c) for c in (links.run(), discovery.run())]
        try:
            async with asyncio.timeout(WAIT_S):
                while not reflector.session.slices:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                # One event for each, as the controller's own batches may be that small.
                server.mute()
                for n in range(WORKERS):
                    group.add_pod(slices[n // 100], ip=ip(n))
                before_mb, began = resident_mb(), time.monotonic()
                for watch in server.watches:
                    watch.mute = False
                    watch.wake.set()
                while len(dispatch.fleet) < WORKERS:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            return time.monotonic() - began, resident_mb() - before_mb
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


def test_four_hundred_workers_that_join_at_once_are_known_in_two_seconds() -> None:
    with greeters() as port:
        took_s, took_mb = asyncio.run(join_at_once(port))
    print(f"{WORKERS} workers known after {took_s:.2f} s, with {took_mb:.0f} MB more")
    assert took_s < MOST_S
