"""A stranger's bytes do not become a process's memory, before a handshake and after."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import zmq

from deploy.local.keys import make
from deploy.local.models import prepare
from deploy.local.parts import Part, end
from tests.asking import MODEL
from tests.contract.handoff_rig import Prefill, Sends
from tests.contract.transport_rig import Remote
from tests.hostile import Zmtp
from workers.api import MESSAGE_BYTES_MAX, Heartbeat, RouterHello, decode_to_router, encode
from workers.newcomers import HELD_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Iterator

POURED = 400 << 20
GROWN_MAX = 8 << 20
"""Bytes that a stranger's too large frame may cost, whatever its size."""


def resident(pid: int) -> int:
    words = Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()
    return int(words[1]) * 4096


def grown(pid: int, before: int) -> int:
    return resident(pid) - before


def greeted(channel: str) -> bool:
    """Whether the worker there answers a router."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as router:
        router.setsockopt(zmq.LINGER, 0)
        router.connect(channel)
        router.send(encode(RouterHello(4, "r", None, None)))
        if not router.poll(10_000):
            return False
        decode_to_router(router.recv())
        router.send(encode(Heartbeat()))
        return True


@pytest.fixture(params=["plain", "curve"])
def worker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Part]:
    """A worker's process with a simulated engine."""
    prepare(MODEL)
    keys = []
    if request.param == "curve":
        make(tmp_path / "keys")
        keys = [
            *("--curve-secret-file", str(tmp_path / "keys" / "worker.secret")),
            *("--curve-routers-file", str(tmp_path / "keys" / "router.public")),
        ]
    address = tmp_path / "address.json"
    command = [
        *(sys.executable, "-m", "tandem", "worker", "--engine", "sim", "--role", "mixed"),
        *("--model", MODEL, "--kv-connector", "none", "--address-file", str(address), *keys),
    ]
    part = Part("worker", command, tmp_path / "worker.log", address)
    part.spawn()
    try:
        part.await_address(part.check)
        yield part
    finally:
        end([part])


def test_frame_of_400_mb_is_cut_off_before_the_handshake(worker: Part) -> None:
    before = resident(worker.pid)
    for mechanism in (b"NULL", b"CURVE"):
        try:
            stranger = Zmtp(worker.channel, mechanism)
        except (AssertionError, ConnectionError):
            continue  # The other mechanism than the worker's: it is cut off at once.
        for flags in (6, 2):  # As a command of the handshake, and as a message.
            assert stranger.pour(POURED, flags) < POURED / 4
        stranger.close()
    assert grown(worker.pid, before) < GROWN_MAX


@pytest.mark.parametrize("worker", ["plain"], indirect=True)
def test_frame_of_400_mb_is_cut_off_after_the_handshake(worker: Part) -> None:
    before = resident(worker.pid)
    stranger = Zmtp(worker.channel)
    stranger.ready()
    assert stranger.pour(POURED) < POURED / 4
    stranger.close()
    assert grown(worker.pid, before) < GROWN_MAX
    assert greeted(worker.channel)


def test_frame_of_400_mb_is_cut_off_by_the_handoffs_port() -> None:
    sender = Remote(partial(Prefill, Sends(("tcp",))))
    try:
        endpoint, _ = sender.ask("address")
        pid = sender.ask("pid")
        before = resident(pid)
        for shaken in (False, True):
            stranger = Zmtp(endpoint)
            if shaken:
                stranger.ready()
            assert stranger.pour(POURED) < POURED / 4
            stranger.close()
        assert grown(pid, before) < GROWN_MAX
        assert sender.ask("dead") is None
    finally:
        sender.end()


def test_many_frames_of_the_largest_size_leave_no_memory_behind(worker: Part) -> None:
    """Each alone is allowed, and none is understood."""
    if "curve" in str(worker.command):
        pytest.skip("nobody gets so far without keys")
    stranger = Zmtp(worker.channel)
    stranger.ready()
    before = resident(worker.pid)
    for _ in range(12):
        assert stranger.pour(MESSAGE_BYTES_MAX) == MESSAGE_BYTES_MAX
    stranger.close()
    until = time.monotonic() + 30
    while (growth := grown(worker.pid, before)) > 3 * MESSAGE_BYTES_MAX:
        assert time.monotonic() < until, f"{growth >> 20} MB stay"
        time.sleep(0.2)


@pytest.mark.parametrize("worker", ["plain"], indirect=True)
def test_strangers_with_unfinished_frames_hold_a_bounded_memory_together(worker: Part) -> None:
    before, held = resident(worker.pid), []
    for _ in range(3 * HELD_BYTES_MAX // MESSAGE_BYTES_MAX):
        stranger = Zmtp(worker.channel)
        stranger.ready()
        stranger.pour(MESSAGE_BYTES_MAX - 1, taken=MESSAGE_BYTES_MAX - 2)
        held.append(stranger)
        assert grown(worker.pid, before) < HELD_BYTES_MAX + 2 * MESSAGE_BYTES_MAX
    assert greeted(worker.channel)
    for stranger in held:
        stranger.close()
