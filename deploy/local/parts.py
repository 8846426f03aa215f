"""One process of ours: started with its parent's fate, watched, waited for, and ended."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

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


class PartDied(Exception):
    """A process ended by itself; the message says which, with the end of its log."""


def free_port() -> int:
    """Free a moment ago: for programs that can't be given 0 and say what they took."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@dataclass(slots=True)
class Part:
    """One process. `channel` and `http` are known once it has bound its sockets."""

    name: str
    command: list[str]
    log: Path
    address_file: Path | None = None
    """Where it writes its addresses; None when `http` is known beforehand."""
    core: int | None = None
    ready_path: str = "/readyz"
    process: subprocess.Popen[bytes] | None = None
    channel: str = ""
    http: str = ""
    admin: str = ""
    """Where a router has its own routes; `http`, unless it has another address for them."""

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def spawn(self) -> None:
        if self.address_file:
            self.address_file.unlink(missing_ok=True)
        parent = os.getpid()

        def prepare() -> None:
            # Whatever becomes of us, no engine is left behind.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)
            if self.core is not None:
                os.sched_setaffinity(0, {self.core})

        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**ENVIRONMENT, **os.environ},
                preexec_fn=prepare,  # noqa: PLW1509  # It takes no lock.
                start_new_session=True,
            )

    def check(self) -> None:
        """Raise `PartDied` when it has ended."""
        if self.process is not None and self.process.poll() is not None:
            end = self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
            raise PartDied(
                f"{self.name} ended with status {self.process.returncode}; its log ends:\n  "
                + "\n  ".join(end)
            )

    def await_address(self, check: Callable[[], None]) -> None:
        """Until its sockets are bound. `check` raises when waiting has become vain."""
        if self.address_file is None:
            return
        self.wait_for(self.address_file.exists, check)
        addresses = json.loads(self.address_file.read_text())
        self.channel, self.http = addresses["channel"] or "", addresses["http"]
        self.admin = addresses.get("admin", self.http)

    def await_ready(self, check: Callable[[], None]) -> float:
        """Until it says that it is ready; seconds waited."""

        # One client for all tries, without the certificates that it never needs: reading them
        # ten times a second takes a sixth of a core from the engines that it waits for.
        with httpx.Client(base_url=self.http, timeout=2, verify=False) as http:

            def ready() -> bool:
                try:
                    return http.get(self.ready_path).status_code == 200
                except httpx.TransportError:
                    return False

            started = time.monotonic()
            self.wait_for(ready, check)
            return time.monotonic() - started

    def wait_for(self, condition: Callable[[], bool], check: Callable[[], None]) -> None:
        """Until `condition` holds. `check` raises when waiting has become vain."""
        until = time.monotonic() + _START_S
        while not condition():
            check()
            if time.monotonic() > until:
                raise PartDied(f"{self.name} is not ready after {_START_S:.0f} s")
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL its whole session: vLLM's engine runs in processes of its own."""
        os.killpg(self.pid, signal.SIGKILL)
        assert self.process is not None
        self.process.wait()


def end(parts: Sequence[Part]) -> None:
    """SIGTERM to all, and SIGKILL to those that take too long."""
    running = [p for p in parts if p.process and p.process.poll() is None]
    for part in running:
        os.kill(part.pid, signal.SIGTERM)
    until = time.monotonic() + _STOP_S
    for part in running:
        assert part.process is not None
        try:
            part.process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            part.kill()
