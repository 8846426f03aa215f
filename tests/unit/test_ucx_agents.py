"""Agents on a device: who shares them, what a fence waits for, which device threads are on.

There is no device and no NIXL in these tests: a stand-in answers as NIXL does.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvtransfer.orders import Mine
from kvtransfer.receiver import Receiver, Timeouts
from kvtransfer.transports import device, ucx_agents
from kvtransfer.transports.api import Memory, Progress, Segment, TransferError
from kvtransfer.transports.ucx_agents import OURS, Agent, Options

GPU = "cuda:3"
MEMORY = Memory((Segment(1 << 20, 64, 64, 8), Segment((1 << 20) + 4096, 64, 64, 8)), GPU)
THEIRS = Memory((Segment(1 << 30, 64, 64, 8),), "cuda:0")
ONE = np.zeros(1, dtype=np.int32)


class NixlError(Exception):
    pass


class Nixl:
    """As much of `nixl_agent` as is used. Reads end when the test says so."""

    def __init__(self, memory: Memory, options: Options, also: Any = ()) -> None:
        self.removed: list[str] = []
        self.state = "PROC"

    def add_remote_agent(self, metadata: bytes) -> bytes:
        return metadata

    def remove_remote_agent(self, name: str) -> None:
        self.removed.append(name)

    def prep_xfer_dlist(self, whose: str, rows: Any, kind: str) -> Any:
        return (whose, kind, self)

    def make_prepped_xfer(self, *_: Any) -> Any:
        if self.state == "refused":
            raise NixlError("no such agent")
        return ("read", self)

    def transfer(self, _: Any) -> str:
        return self.state

    def check_xfer_state(self, _: Any) -> str:
        return self.state

    def release_xfer_handle(self, _: Any) -> None:
        pass


@pytest.fixture
def happened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls made to devices, and by which thread."""
    found: list[Any] = []
    monkeypatch.setattr(ucx_agents, "bare_agent", Nixl)
    monkeypatch.setattr(ucx_agents, "errors", lambda: (NixlError,))
    monkeypatch.setattr(device, "settle", lambda on: found.append(("settle", on)))
    monkeypatch.setattr(
        device, "use", lambda on: found.append((threading.current_thread().name, on))
    )
    monkeypatch.setattr(device, "on", lambda on: contextlib.nullcontext(found.append(("on", on))))
    return found


def joined(agent: Agent, sender: str) -> tuple[Any, tuple[Any, Any]]:
    member = agent.join(sender, sender.encode())
    return member, (agent.prepare(OURS, MEMORY, 64), agent.prepare(sender, THEIRS, 64))


def test_a_read_under_way_has_failed_only_when_the_device_has_done_what_it_was_handed(
    happened: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = Agent(MEMORY, Options())
    assert happened == [("on", GPU)], "it is made on its memory's device"
    member, keys = joined(agent, "a")
    read = agent.start(member, keys, ONE, ONE)
    seen = []
    monkeypatch.setattr(device, "settle", lambda on: seen.append((on, read.progress)))
    agent.leave(member)
    assert seen == [(GPU, Progress.PENDING)]
    assert agent.poll(read) is Progress.FAILED


def test_nothing_keeps_an_agent_that_has_ended_not_even_the_error_that_tells_of_it(
    happened: list[Any],
) -> None:
    agent = Agent(MEMORY, Options())
    member, keys = joined(agent, "a")
    agent.start(member, keys, ONE, ONE)
    nixl = weakref.ref(agent._nixl)
    nixl().state = "ERR"
    with pytest.raises(TransferError, match="the sender is gone") as caught:
        agent.start(member, keys, ONE, ONE)
    gc.collect()
    assert nixl() is None, "NIXL's agent is gone while the error is still held"
    assert caught.value is not None


def test_a_read_that_could_not_be_begun_ends_nobody_elses(happened: list[Any]) -> None:
    agent = Agent(MEMORY, Options())
    (one, keys_of_one), (other, keys_of_other) = joined(agent, "a"), joined(agent, "b")
    kept = agent.start(other, keys_of_other, ONE, ONE)
    agent._nixl.state = "refused"
    with pytest.raises(TransferError, match="no such agent"):
        agent.start(one, keys_of_one, ONE, ONE)
    agent.leave(one)
    assert agent._nixl.removed == ["a"]
    agent._nixl.state = "DONE"
    assert agent.poll(kept) is Progress.DONE
    assert agent.over is None


def test_a_sender_that_two_read_from_stays_until_both_have_left(happened: list[Any]) -> None:
    agent = Agent(MEMORY, Options())
    (one, _), (two, keys), (other, _) = (joined(agent, s) for s in ("a", "a", "b"))
    agent.leave(one)
    assert agent._nixl.removed == []
    agent.start(two, keys, ONE, ONE)
    agent.leave(other)
    assert agent._nixl.removed == ["b"]
    agent.leave(two)
    assert "under way" in str(agent.over)
    with pytest.raises(TransferError, match="under way"):
        agent.join("c", b"c")


def test_the_receivers_thread_is_on_its_memorys_device(happened: list[Any]) -> None:
    layout: Any = SimpleNamespace(slots=[])
    mine = Mine(MEMORY, layout, 0, [])
    receiver = Receiver(mine, Timeouts(answer_s=1.0, read_s=1.0))
    until = time.monotonic() + 20
    while not happened and time.monotonic() < until:
        time.sleep(0.01)
    receiver.close()
    assert happened == [("kv-receiver", GPU)]
