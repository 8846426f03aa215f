"""Workers that come and go as processes, found by a file and by an API server, under load."""

from __future__ import annotations

import asyncio
import itertools
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import httpx
import pytest

from deploy.local.models import prepare
from deploy.local.parts import Part, end
from tests.apiserver.group import NAMESPACE, Group
from tests.apiserver.server import ApiServer
from tests.asking import MODEL, complete

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

WAIT_S = 30.0


class Processes:
    """A router and simulated workers, each worker at a loopback address of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._all: list[Part] = []
        self.router: Part | None = None
        with socket.create_server(("127.0.0.11", 0)) as free:
            self.port = free.getsockname()[1]
        """The same for all workers, as a role's is in a cluster."""

    def worker(self, number: int) -> Part:
        return self._start(
            f"mixed-{number}",
            [
                *("worker", "--engine", "sim", "--role", "mixed", "--model", MODEL),
                *("--host", f"127.0.0.{number + 10}", "--port", str(self.port)),
                *("--worker-id", f"mixed-{number}", "--kv-connector", "none", "--drain-s", "5"),
            ],
        )

    def start_router(self, *flags: str) -> None:
        common = ["router", "--model", MODEL, "--port", "0", "--max-model-len", "2048"]
        self.router = self._start("router", [*common, *flags])

    def _start(self, name: str, command: list[str]) -> Part:
        address_file = self._folder / f"{name}.json"
        run = [sys.executable, "-m", "tandem", *command, "--address-file", str(address_file)]
        part = Part(name, run, self._folder / f"{name}.log", address_file)
        part.spawn()
        self._all.append(part)
        part.await_address(part.check)
        return part

    @property
    def url(self) -> str:
        assert self.router is not None
        return self.router.http

    def knows(self) -> set[str]:
        found = httpx.get(f"{self.url}/tandem/workers", timeout=10).json()["workers"]
        return {w["hello"]["worker_id"] for w in found}

    def until_known(self, *numbers: int) -> float:
        """Seconds that it took."""
        return until(lambda: self.knows() == {f"mixed-{n}" for n in numbers})

    def served_by(self) -> str:
        answer = complete(self.url, prompt="Once", max_tokens=3)
        assert answer.status_code == 200, answer.text
        record = httpx.get(f"{self.url}/tandem/requests/{answer.json()['id']}", timeout=10)
        return record.json()[-1]["decode_worker"]

    def until_only(self, number: int) -> None:
        """All new requests go there: soon, and then for good."""
        until(lambda: self.served_by() == f"mixed-{number}")
        time.sleep(0.5)
        assert {self.served_by() for _ in range(8)} == {f"mixed-{number}"}

    def stop(self) -> None:
        end(self._all)


def until(true: Callable[[], bool]) -> float:
    began = time.monotonic()
    while not true():
        assert time.monotonic() < began + WAIT_S
        time.sleep(0.02)
    return time.monotonic() - began


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    prepare(MODEL)
    running = Processes(tmp_path)
    try:
        yield running
    finally:
        running.stop()


@contextmanager
def load(processes: Processes) -> Iterator[list[int]]:
    """Clients that ask without a pause; the statuses that they got."""
    statuses: list[int] = []
    over = threading.Event()

    def ask() -> None:
        for n in itertools.count():
            if over.is_set():
                return
            try:
                statuses.append(
                    complete(processes.url, prompt=f"Story {n}", max_tokens=30).status_code
                )
            except httpx.HTTPError:
                statuses.append(0)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(ask)
        try:
            yield statuses
        finally:
            over.set()


def test_a_line_in_a_file_makes_a_worker_serve(processes: Processes, tmp_path: Path) -> None:
    file = tmp_path / "peers"
    processes.start_router("--discover", "file", "--discover-file", str(file))
    assert httpx.get(f"{processes.url}/readyz", timeout=10).status_code == 503
    one = processes.worker(1)
    file.write_text(f"{one.channel} mixed\n")
    processes.until_known(1)
    assert processes.served_by() == "mixed-1"
    two = processes.worker(2)
    with load(processes) as statuses:
        file.write_text(f"{one.channel} mixed draining\n{two.channel} mixed\n")
        processes.until_known(1, 2)
        processes.until_only(2)
        file.write_text(f"{two.channel}\n")
        processes.until_known(2)
        end([one])
        time.sleep(0.5)
    assert set(statuses) == {200}


@contextmanager
def api_server() -> Iterator[tuple[ApiServer, Callable[[Callable[[], None]], None]]]:
    """In a loop of its own; the second runs a change there."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def there(change: Callable[[], None]) -> None:
        async def do() -> None:
            change()

        asyncio.run_coroutine_threadsafe(do(), loop).result(10)

    async def make() -> ApiServer:
        server = ApiServer()
        await server.start()
        return server

    server = asyncio.run_coroutine_threadsafe(make(), loop).result(10)
    try:
        yield server, there
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_an_endpoint_in_a_slice_makes_a_worker_serve(processes: Processes) -> None:
    with api_server() as (server, there):
        group = Group(server.store)
        processes.start_router(
            *("--discover", "kubernetes", "--discover-selector", group.selector),
            *("--discover-ports", f"mixed={processes.port}", "--discover-namespace", NAMESPACE),
            *("--discover-api", server.url),
        )
        pods: dict[int, str] = {}
        slice_name = ""

        def add(number: int) -> None:
            nonlocal slice_name
            slice_name = slice_name or group.add_slice("mixed")
            pods[number] = group.add_pod(slice_name, serving=False, ip=f"127.0.0.{number + 10}")

        parts = {n: processes.worker(n) for n in (1, 2)}
        there(lambda: add(1))
        there(lambda: group.set(pods[1], serving=True))
        took_s = processes.until_known(1)
        with load(processes) as statuses:
            # Scaled up, then the first is deleted, as RBG does it.
            there(lambda: add(2))
            there(lambda: group.set(pods[2], serving=True))
            took_s = max(took_s, processes.until_known(1, 2))
            there(lambda: group.set(pods[1], terminating=True))
            processes.until_only(2)
            there(lambda: group.remove(pods[1]))
            processes.until_known(2)
            end([parts[1]])
            time.sleep(0.5)
            metrics = httpx.get(f"{processes.url}/metrics", timeout=10).text
        assert set(statuses) == {200}
        assert 'tandem_controller_peers{state="ready"} 1.0' in metrics
        assert "tandem_controller_peers_age_seconds" in metrics
        print(f"known after {took_s * 1000:.0f} ms at most, {len(statuses)} requests meanwhile")
