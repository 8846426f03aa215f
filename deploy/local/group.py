"""Router, prefill and decode workers as processes of this machine."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

import httpx

from deploy.local.parts import Part, end
from workers.constraints import FLAGS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_SHARED_FLAGS = ("--max-model-len", "--dtype", *FLAGS)
"""Flags that the router must have as the workers do."""


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
        role_flags: Mapping[str, Sequence[str]] | None = None,
        router_flags: Sequence[str] = (),
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`flags` are vLLM's, for all workers, `role_flags` for those of a role besides;
        `router_flags` its front's. `progress` is told each thing that happens.
        """
        self._model = model
        self._port = port
        self._flags = list(flags)
        self._role_flags = role_flags or {}
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
        self._more_routers: list[Part] = []

    @property
    def url(self) -> str:
        assert self.router is not None
        return self.router.http

    def __enter__(self) -> Self:
        try:
            for worker in self.workers:
                self._spawn(worker)
            for worker in self.workers:
                worker.await_address(self.check)
            self.router = self._make_router("router", self._router_flags)
            self._spawn(self.router)
            self.router.await_address(self.check)
            for worker in self.workers:
                self._await_ready(worker)
            self._await_router(self.router)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def check(self) -> None:
        """Raise `PartDied` when any process has ended."""
        for part in [
            *self.workers,
            *self._more_routers,
            *([self.router] if self.router else []),
        ]:
            part.check()

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
        part.await_address(self.check)
        self._await_ready(part)
        for router in [self.router, *self._more_routers]:
            if router is not None:
                self._await_router(router)

    def add_router(self, name: str, flags: Sequence[str]) -> Part:
        """One more router over the same workers, ready; it ends with the group."""
        part = self._make_router(name, flags)
        self._more_routers.append(part)
        self._spawn(part)
        part.await_address(self.check)
        self._await_router(part)
        return part

    def stop(self) -> None:
        """The router first: it lets its streams end while the workers are still there."""
        end([*self._more_routers, *([self.router] if self.router else [])])
        end(self.workers)
        self._folder.cleanup()

    # ------------------------------------------------------------ parts

    def _part(self, name: str, command: list[str], core: int | None) -> Part:
        folder = Path(self._folder.name)
        address_file = folder / f"{name}.json"
        run = [sys.executable, "-m", "tandem", *command, "--address-file", str(address_file)]
        return Part(name, run, folder / f"{name}.log", address_file, core)

    def _worker(self, role: str, name: str, core: int) -> Part:
        own = ["--role", role, "--model", self._model, "--worker-id", name, "--drain-s", "5"]
        flags = [*self._flags, *self._role_flags.get(role, ())]
        return self._part(name, ["worker", *own, *flags], core)

    def _make_router(self, name: str, flags: Sequence[str]) -> Part:
        shared = shared_flags(self._flags)
        own = ["--model", self._model, "--workers", ",".join(w.channel for w in self.workers)]
        if os.environ.get("VLLM_API_KEY") or "--api-key" in flags:
            own += ["--admin-port", "0"]  # A client's key does not open the router's own routes.
        return self._part(
            name,
            ["router", *own, "--port", str(self._port if name == "router" else 0), *shared, *flags],
            None,
        )

    def _spawn(self, part: Part) -> None:
        part.spawn()
        self._progress(f"{part.name}: starting")

    def _await_ready(self, part: Part) -> None:
        waited_s = part.await_ready(self.check)
        self._progress(f"{part.name}: ready (waited {waited_s:.0f} s)")

    def _await_router(self, router: Part) -> None:
        """Until it knows every worker, too: it is ready as soon as anybody can serve."""
        everyone = {w.name for w in self.workers}

        def acquainted() -> bool:
            known = httpx.get(f"{router.admin}/tandem/workers", timeout=10).json()["workers"]
            return everyone <= {w["hello"]["worker_id"] for w in known}

        self._await_ready(router)
        router.wait_for(acquainted, self.check)


def shared_flags(flags: Sequence[str]) -> list[str]:
    """The workers' flags that the router must have too, with their values, in order.

    A flag's value follows it, or an equals sign; one of JSON may have a key of its own instead
    (`--structured-outputs-config.backend xgrammar`).
    """
    shared: list[str] = []
    for at, flag in enumerate(flags):
        name, equals, _ = flag.partition("=")
        if name.split(".", 1)[0].replace("_", "-") in _SHARED_FLAGS:
            shared += [flag] if equals else flags[at : at + 2]
    return shared
