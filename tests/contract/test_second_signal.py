"""A process that is told to end twice, or without pause, ends as one that was told once."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import TYPE_CHECKING

import pytest

from deploy.local.models import prepare
from deploy.local.parts import Part, end
from tests.asking import MODEL

if TYPE_CHECKING:
    from pathlib import Path

ENDED_S = 60.0
COMMANDS = {
    "worker": ["worker", "--engine", "sim", "--role", "mixed", "--kv-connector", "none"],
    "router": ["router", "--port", "0", "--workers", "tcp://127.0.0.1:9", "--max-model-len", "512"],
    "controller": [
        *("controller", "--group", "g", "--dry-run", "--namespace", "n", "--http-port", "0"),
        *("--metrics-ports", "router=1,prefill=2,decode=3"),
        *("--discover-api", "http://127.0.0.1:9"),
    ],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_signals_without_pause_leave_status_0(name: str, tmp_path: Path) -> None:
    prepare(MODEL)
    address = tmp_path / "address.json"
    model = [] if name == "controller" else ["--model", MODEL]
    command = [sys.executable, "-m", "tandem", *COMMANDS[name], *model]
    part = Part(name, [*command, "--address-file", str(address)], tmp_path / "log", address)
    part.spawn()
    assert part.process is not None
    try:
        part.await_address(part.check)
        if name == "worker":
            part.await_ready(part.check)
        until = time.monotonic() + ENDED_S
        while part.process.poll() is None:
            os.kill(part.pid, signal.SIGTERM)
            time.sleep(0.002)
            assert time.monotonic() < until, "it does not end"
        assert part.process.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    finally:
        end([part])
