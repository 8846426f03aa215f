"""Real engines, once a session."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import httpx
import pytest

from deploy.local.group import ENVIRONMENT, LocalGroup
from deploy.local.models import prepare

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MODEL = "smollm2-135m"
FLAGS = ["--max-model-len", "2048", "--dtype", "float32", "--enforce-eager"]
TOOLS = ["--tool-call-parser", "hermes", "--enable-auto-tool-choice"]


@pytest.fixture(scope="session")
def group() -> Iterator[LocalGroup]:
    """A router with one prefill and one decode worker, in float32."""
    prepare(MODEL)
    with LocalGroup(MODEL, flags=FLAGS, router_flags=TOOLS) as running:
        yield running


@pytest.fixture(scope="session")
def aggregated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """vLLM's own server over one engine: what every answer is compared with. Its address."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    log: Path = tmp_path_factory.mktemp("aggregated") / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry",
                "--model", str(prepare(MODEL)), "--served-model-name", MODEL,
                "--host", "127.0.0.1", "--port", str(port), *FLAGS, *TOOLS,
            ],
            stdout=out, stderr=out, env={**ENVIRONMENT, **os.environ}, start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 200
        while True:
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < until, log.read_text()[-2000:]
            try:
                if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.3)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
