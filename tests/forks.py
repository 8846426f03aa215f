"""Processes forked from the zygote, in the places of those that `deploy.local` starts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self, cast

from deploy.local.aggregated import Aggregated
from deploy.local.group import LocalGroup
from deploy.local.parts import ENVIRONMENT, Part, end
from tests.zygote import Start

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_EAGER = {"TORCHDYNAMO_DISABLE": "1"}
"""vLLM compiles how it ranks logprobs even with `--enforce-eager`: seconds for each process."""
IMPORTED_S = 240
"""How long the zygote may take to import vLLM on a busy machine."""


class Forked:
    """As much of `subprocess.Popen` as a part uses."""

    def __init__(self, zygote: Zygote, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._zygote = zygote

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._zygote.ask({"poll": self.pid})["status"]
        return self.returncode

    def wait(self, timeout: float = 60.0) -> int:
        """Its status, negative for a signal's. Raises `subprocess.TimeoutExpired`."""
        until = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.02)
        return status

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def end(self, timeout_s: float) -> int:
        """Its status, once it has ended by itself or was killed after `timeout_s`."""
        try:
            return self.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.sweep()
            return self.wait()
        finally:
            self.sweep()

    def sweep(self) -> None:
        """Kill it, if it is not over, and whatever it has left behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


class Zygote:
    """As a context manager: the process that forks. Everything that it started ends with it."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "zygote.log"
        self._turn = threading.Lock()

    def __enter__(self) -> Self:
        ours, theirs = socket.socketpair()
        with theirs, self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.zygote", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**ENVIRONMENT, **os.environ, **_EAGER},
                pass_fds=[theirs.fileno()],
            )
        self._socket = ours
        ours.settimeout(IMPORTED_S)
        self._stream = ours.makefile("rw")
        if not self._stream.readline():
            raise RuntimeError(f"the zygote died:\n{self._log.read_text()[-3000:]}")
        return self

    def __exit__(self, *exc: object) -> None:
        self._stream.close()
        self._socket.close()
        self._process.wait(60)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with self._turn:
            print(json.dumps(request), file=self._stream, flush=True)
            answer: dict[str, Any] = json.loads(self._stream.readline())
            return answer

    def start(self, start: Start) -> Forked:
        return Forked(self, self.ask(asdict(start))["pid"])


@dataclass(slots=True)
class ForkedPart(Part):
    """A part whose command, `python -m MODULE …`, is run by the zygote."""

    zygote: Zygote | None = None
    change: str | None = None

    def spawn(self) -> None:
        assert self.zygote is not None
        if self.address_file:
            self.address_file.unlink(missing_ok=True)
        _, dash_m, module, *arguments = self.command
        assert dash_m == "-m"
        start = Start(module, arguments, str(self.log), self.core, self.change)
        self.process = cast("subprocess.Popen[bytes]", self.zygote.start(start))


class ForkedGroup(LocalGroup):
    """A `LocalGroup` from the zygote. When it has stopped, `logs` has what each part wrote."""

    def __init__(
        self, zygote: Zygote, model: str, *, change: str | None = None, **options: Any
    ) -> None:
        self._zygote = zygote
        self._change = change
        self.logs: dict[str, str] = {}
        self.statuses: dict[str, int | None] = {}
        super().__init__(model, **options)

    def _part(self, name: str, command: list[str], core: int | None) -> Part:
        part = super()._part(name, command, core)
        return ForkedPart(
            name, part.command, part.log, part.address_file, core,
            zygote=self._zygote, change=self._change,
        )  # fmt: skip

    @property
    def _parts(self) -> Sequence[Part]:
        return [*self.workers, *([self.router] if self.router else [])]

    def died(self) -> list[str]:
        """Parts that have ended by themselves, so far."""
        return [p.name for p in self._parts if p.process and p.process.poll() is not None]

    def stop(self) -> None:
        routers = [*self._more_routers, *([self.router] if self.router else [])]
        end(routers)
        end(self.workers)
        for part in [*self.workers, *routers]:
            process = cast("Forked | None", part.process)
            if process is not None:
                self.statuses[part.name] = process.poll()
                process.sweep()
            if part.log.exists():
                self.logs[part.name] = part.log.read_text(errors="replace")
        self._folder.cleanup()


class ForkedAggregated(Aggregated):
    """vLLM's own server from the zygote."""

    def __init__(
        self, zygote: Zygote, model: str, *, served_as: str = "", flags: Sequence[str] = ()
    ) -> None:
        super().__init__(model, served_as=served_as or model, flags=flags)
        part = self.part
        self.part = ForkedPart(
            part.name, part.command, part.log, ready_path=part.ready_path, http=part.http,
            zygote=zygote,
        )  # fmt: skip
