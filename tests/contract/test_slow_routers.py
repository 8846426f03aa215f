"""A router that is slow loses nothing; one that is gone frees what workers hold for it.

Router and workers are processes with simulated engines; the router is stopped, held up and killed.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

import httpx
import pytest

from deploy.local.group import LocalGroup
from tests.asking import MODEL, await_free, complete, metrics
from workers.api import ROUTER_SILENCE_S, SILENCE_S

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.timeout(300)

# Simulated engines in two processes can't tell each other that a handoff is over: leases end.
SIMULATED = ["--engine", "sim", "--max-model-len", "2048", "--sim-step-ms", "40", "--lease-s", "8"]
MODEST = [*SIMULATED, "--sim-blocks", "60000"]
TOKENS = 300
"""Twelve seconds of them: they begin before a router is stopped, and end after it is resumed."""
PAUSE_S = 8.0
assert PAUSE_S > SILENCE_S

PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_DETACH = 0x4206, 0x4207, 17
_WALL = 0x40000000


@pytest.fixture
def group() -> Iterator[LocalGroup]:
    with LocalGroup(MODEL, flags=MODEST) as made:
        yield made


class Streams:
    """Several completions at once, each with a prompt of its own."""

    def __init__(self, url: str, count: int, tokens: int) -> None:
        self.begun = threading.Semaphore(0)
        self._url, self._count, self._tokens = url, count, tokens
        # A client for each would load as many certificates.
        self._client = httpx.Client(limits=httpx.Limits(max_connections=None), timeout=120)
        self._pool = ThreadPoolExecutor(count)
        self._asked = [self._pool.submit(self._follow, n) for n in range(count)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._client.close()  # What still streams ends in an error.
        self._pool.shutdown()

    def await_begun(self) -> None:
        """Until each has its first token."""
        for _ in range(self._count):
            assert self.begun.acquire(timeout=120)

    def texts_at_end(self) -> list[str]:
        return [asked.result(timeout=200) for asked in self._asked]

    def expected(self) -> list[str]:
        """The same group's answers when nothing is wrong with it."""
        bodies = [{"prompt": prompt(n), "max_tokens": self._tokens} for n in range(self._count)]
        answers = list(self._pool.map(lambda body: complete(self._url, **body), bodies))
        return [answer.json()["choices"][0]["text"] for answer in answers]

    def _follow(self, number: int) -> str:
        body = {
            "model": MODEL,
            "prompt": prompt(number),
            "max_tokens": self._tokens,
            "stream": True,
        }
        text: list[str] = []
        with self._client.stream("POST", f"{self._url}/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    return "".join(text)
                if not line.startswith("data: "):
                    continue
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                text.append(event["choices"][0]["text"])
                if len(text) == 1:
                    self.begun.release()
        raise AssertionError("it ended before its end")


def prompt(number: int) -> list[int]:
    return [1000 + number, *range(100, 130)]


@contextmanager
def thread_stopped(tid: int) -> Iterator[None]:
    """One thread of a process of ours stands still; the others, ZeroMQ's too, go on."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    if libc.ptrace(PTRACE_SEIZE, tid, None, None):
        pytest.skip(f"no ptrace here: {os.strerror(ctypes.get_errno())}")
    assert not libc.ptrace(PTRACE_INTERRUPT, tid, None, None)
    os.waitpid(tid, _WALL)
    try:
        yield
    finally:
        assert not libc.ptrace(PTRACE_DETACH, tid, None, None)


def test_a_router_stopped_for_8_s_and_resumed_loses_nothing(group: LocalGroup) -> None:
    assert group.router is not None
    with Streams(group.url, 8, TOKENS) as streams:
        streams.await_begun()
        os.kill(group.router.pid, signal.SIGSTOP)
        time.sleep(PAUSE_S)
        os.kill(group.router.pid, signal.SIGCONT)
        assert streams.texts_at_end() == streams.expected()
    await_free(group, 10)


def test_a_router_whose_loop_is_held_up_for_10_s_loses_nothing(group: LocalGroup) -> None:
    assert group.router is not None
    with Streams(group.url, 8, TOKENS) as streams:
        streams.await_begun()
        with thread_stopped(group.router.pid):  # The main thread's id is the process's.
            time.sleep(10)
        got = streams.texts_at_end()
        told = httpx.get(f"{group.url}/metrics").text
        longest = "tandem_router_loop_hold_longest"
        held = [line for line in told.splitlines() if line.startswith(longest)]
        assert float(held[0].split()[1]) > SILENCE_S
        assert got == streams.expected()
    await_free(group, 10)


def test_400_streams_survive_on_a_third_of_a_core(group: LocalGroup) -> None:
    """A duty cycle of signals stands for a cgroup's quota."""
    assert group.router is not None
    pid, done = group.router.pid, threading.Event()

    def throttle() -> None:
        while not done.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.066)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.033)

    throttling = threading.Thread(target=throttle)
    throttling.start()
    try:
        with Streams(group.url, 400, 100) as streams:
            texts = streams.texts_at_end()
    finally:
        done.set()
        throttling.join()
    assert len(texts) == 400
    assert all(texts)
    await_free(group, 20)


def test_a_killed_router_s_blocks_are_free_within_seconds(group: LocalGroup) -> None:
    assert group.router is not None
    with Streams(group.url, 4, 1500) as streams:
        streams.await_begun()
        assert metrics(group, "decode-0")["vllm:num_requests_running"] == 4
        os.kill(group.router.pid, signal.SIGKILL)
    assert group.router.process is not None
    group.router.process.wait()
    await_free(group, ROUTER_SILENCE_S / 2)  # A second where the machine is idle.
