"""vLLM's own server over one engine: what a disaggregated answer is compared with."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

from deploy.local.parts import Part, free_port

if TYPE_CHECKING:
    from collections.abc import Sequence


class Aggregated:
    """As a context manager: started inside, gone outside. `model` is a folder or hub name."""

    def __init__(self, model: str, *, served_as: str, flags: Sequence[str] = ()) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="aggregated-")
        port = free_port()
        command = [
            sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry",
            "--model", model, "--served-model-name", served_as,
            "--host", "127.0.0.1", "--port", str(port), *flags,
        ]  # fmt: skip
        log = Path(self._folder.name) / "log"
        self.part = Part("aggregated", command, log, ready_path="/health")
        self.part.http = f"http://127.0.0.1:{port}"

    @property
    def url(self) -> str:
        return self.part.http

    def __enter__(self) -> Self:
        self.part.spawn()
        return self

    def await_ready(self) -> None:
        self.part.await_ready(self.part.check)

    def __exit__(self, *exc: object) -> None:
        # vLLM's server takes its engine down on SIGTERM in its own good time; nothing is lost here.
        self.part.kill()
        self._folder.cleanup()
