"""Router, prefill and decode workers as processes of this machine."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import httpx

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
"""For vLLM on a CPU; what is set already stays."""

_START_S = 300.0
_STOP_S = 15.0
_LOG_LINES = 20
_PR_SET_PDEATHSIG = 1
_SHARED_FLAGS = ("--max-model-len", "--dtype")
"""Flags that the router must have as the workers do."""


class PartDied(Exception):
    """A process ended by itself; the message says which, with the end of its log."""


@dataclass(slots=True)
class Part:
    """One process. `channel` and `http` are known once it has bound its sockets."""

    name: str
    command: list[str]
    log: Path
    address_file: Path
    core: int | None
    process: subprocess.Popen[bytes] | None = None
    channel: str = ""
    http: str = ""


class LocalGroup:
    """As a context manager: everything is ready inside, and gone outside."""

    def __init__(
        self,
        model: str,
        *,
        prefill: int = 1,
        decode: int = 1,
        port: int = 0,
        flags: Sequence[str] = (),
        router_flags: Sequence[str] = (),
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`flags` are vLLM's, for all workers, `router_flags` its front's.

        `progress` is told each thing that happens.
        """
        self._model = model
        self._port = port
        self._flags = list(flags)
        self._router_flags = list(router_flags)
        self._progress = progress
        self._folder = tempfile.TemporaryDirectory(prefix="tandem-")
        names = [("prefill", i) for i in range(prefill)] + [("decode", i) for i in range(decode)]
        cores = sorted(os.sched_getaffinity(0))
        self.workers = [
            self._worker(role, f"{role}-{i}", cores[n % len(cores)])
            for n, (role, i) in enumerate(names)
        ]
        self.router: Part | None = None

    @property
    def url(self) -> str:
        assert self.router is not None
        return self.router.http

    def __enter__(self) -> Self:
        try:
            for worker in self.workers:
                self._spawn(worker)
            for worker in self.workers:
                self._await_address(worker)
            self.router = self._make_router()
            self._spawn(self.router)
            self._await_address(self.router)
            for part in [*self.workers, self.router]:
                self._await_ready(part)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def check(self) -> None:
        """Raise `PartDied` when any process has ended."""
        for part in self._parts():
            if part.process is not None and part.process.poll() is not None:
                end = part.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
                raise PartDied(
                    f"{part.name} ended with status {part.process.returncode}; its log ends:\n  "
                    + "\n  ".join(end)
                )

    def worker(self, name: str) -> Part:
        return next(w for w in self.workers if w.name == name)

    def kill(self, name: str) -> None:
        """SIGKILL one worker. Its engine's processes must end by themselves."""
        process = self.worker(name).process
        assert process is not None
        process.kill()
        process.wait()

    def restart(self, name: str) -> None:
        """Start a worker that has ended again, at the address it had, and wait for it."""
        part = self.worker(name)
        port, http = (a.rsplit(":", 1)[1] for a in (part.channel, part.http))
        part.command += ["--port", port, "--http-port", http]
        self._spawn(part)
        self._await_address(part)
        self._await_ready(part)

    def stop(self) -> None:
        """The router first: it lets its streams end while the workers are still there."""
        if self.router is not None:
            _end([self.router])
        _end(self.workers)
        self._folder.cleanup()

    # ------------------------------------------------------------ parts

    def _parts(self) -> list[Part]:
        return [*self.workers, *([self.router] if self.router else [])]

    def _part(self, name: str, command: list[str], core: int | None) -> Part:
        folder = Path(self._folder.name)
        address_file = folder / f"{name}.json"
        run = [sys.executable, "-m", "tandem", *command, "--address-file", str(address_file)]
        return Part(name, run, folder / f"{name}.log", address_file, core)

    def _worker(self, role: str, name: str, core: int) -> Part:
        own = ["--role", role, "--model", self._model, "--worker-id", name, "--drain-s", "5"]
        return self._part(name, ["worker", *own, *self._flags], core)

    def _make_router(self) -> Part:
        shared = []
        for at, flag in enumerate(self._flags):
            if flag in _SHARED_FLAGS:
                shared += self._flags[at : at + 2]
            elif flag.startswith(tuple(f"{f}=" for f in _SHARED_FLAGS)):
                shared.append(flag)
        own = ["--model", self._model, "--workers", ",".join(w.channel for w in self.workers)]
        return self._part(
            "router",
            ["router", *own, "--port", str(self._port), *shared, *self._router_flags],
            None,
        )

    def _spawn(self, part: Part) -> None:
        part.address_file.unlink(missing_ok=True)
        parent = os.getpid()

        def prepare() -> None:
            # Whatever becomes of us, no engine is left behind.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)
            if part.core is not None:
                os.sched_setaffinity(0, {part.core})

        with part.log.open("ab") as log:
            part.process = subprocess.Popen(
                part.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**ENVIRONMENT, **os.environ},
                preexec_fn=prepare,  # noqa: PLW1509  # It takes no lock.
                start_new_session=True,
            )
        self._progress(f"{part.name}: starting")

    def _await_address(self, part: Part) -> None:
        self._await(part, part.address_file.exists)
        addresses = json.loads(part.address_file.read_text())
        part.channel, part.http = addresses["channel"] or "", addresses["http"]

    def _await_ready(self, part: Part) -> None:
        def ready() -> bool:
            try:
                return httpx.get(f"{part.http}/readyz", timeout=2).status_code == 200
            except httpx.TransportError:
                return False

        started = time.monotonic()
        self._await(part, ready)
        self._progress(f"{part.name}: ready (waited {time.monotonic() - started:.0f} s)")

    def _await(self, part: Part, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + _START_S
        while not condition():
            self.check()
            if time.monotonic() > until:
                raise PartDied(f"{part.name} is not ready after {_START_S:.0f} s")
            time.sleep(0.1)


def _end(parts: Sequence[Part]) -> None:
    """SIGTERM to all, and SIGKILL to those that take too long."""
    running = [p.process for p in parts if p.process and p.process.poll() is None]
    for process in running:
        process.terminate()
    until = time.monotonic() + _STOP_S
    for process in running:
        try:
            process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Its whole session: vLLM's engine runs in processes of its own."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
