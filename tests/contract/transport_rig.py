"""Two processes that do as they are told with a transport, or two stand-ins inside this one."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import select
import signal
import threading
import time
import zlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvtransfer.transports.api import Memory, Progress, Segment, TransferError, Transport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

ANSWER_S = 60

_processes = multiprocessing.get_context("forkserver")
# What takes seconds to import is imported once.
_processes.set_forkserver_preload(["numpy", "nixl._api", "tests.contract.handoff_rig"])


@dataclass(frozen=True)
class Subject:
    """A transport under test."""

    of: str
    """Module and class."""
    settings: dict[str, Any] = field(default_factory=dict)
    stalls: bool = True
    """A stopped sender stalls its reads: over memory that both share, it has no part in them."""

    def make(self) -> Transport:
        module, _, name = self.of.partition(":")
        loaded = importlib.import_module(f"kvtransfer.transports.{module}")
        made: Transport = getattr(loaded, name)(**self.settings)
        return made


@dataclass(frozen=True)
class Shape:
    """Of one side's memory: `gap` bytes between blocks belong to nobody."""

    layers: int = 3
    blocks: int = 24
    block_bytes: int = 32 * 1024
    gap: int = 0

    @property
    def stride(self) -> int:
        return self.block_bytes + self.gap

    def content(self, seed: int) -> np.ndarray:
        """Random bytes; shape (layers, blocks x stride)."""
        content = np.random.default_rng(seed).bytes(self.layers * self.blocks * self.stride)
        return np.frombuffer(content, dtype=np.uint8).reshape(self.layers, -1).copy()

    def units(self, unit_bytes: int) -> int:
        return self.layers * self.blocks * (self.block_bytes // unit_bytes)

    def unit(self, content: np.ndarray, number: int, unit_bytes: int) -> np.ndarray:
        """As the interface counts them, spelt out."""
        pieces = self.block_bytes // unit_bytes
        layer, rest = divmod(number, self.blocks * pieces)
        block, piece = divmod(rest, pieces)
        start = block * self.stride + piece * unit_bytes
        return content[layer, start : start + unit_bytes]


class Actor:
    """One side. Each method is a word that its process can be told."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._content: np.ndarray | None = None
        self._offer: Any = None
        self._peers: dict[str, Any] = {}
        self._handles: dict[str, Any] = {}

    def hold(self, shape: Shape, seed: int | None) -> None:
        """Memory of this shape, zero without a seed, and nothing of what was before."""
        self.end()
        zero = np.zeros((shape.layers, shape.blocks * shape.stride), dtype=np.uint8)
        self._content = zero if seed is None else shape.content(seed)
        self._memory = Memory(
            tuple(
                Segment(layer.ctypes.data, shape.stride, shape.block_bytes, shape.blocks)
                for layer in self._content
            )
        )

    def content(self) -> np.ndarray:
        assert self._content is not None
        return self._content.copy()

    def crc(self) -> int:
        assert self._content is not None
        return zlib.crc32(self._content)

    def offer(self) -> bytes:
        self._offer = self._transport.offer(self._memory)
        return bytes(self._offer.description)

    def close(self) -> None:
        self._offer.close()

    def reaches(self, description: bytes) -> bool:
        return self._transport.reaches(description)

    def connect(self, peer: str, description: bytes, unit_bytes: int) -> None:
        self._peers[peer] = self._transport.connect(self._memory, description, unit_bytes)

    def read(self, peer: str, handle: str, local: list[int], remote: list[int]) -> None:
        self._handles[handle] = self._peers[peer].read(
            np.array(local, dtype=np.int32), np.array(remote, dtype=np.int32)
        )

    def poll(self, peer: str, handle: str) -> str:
        progress: Progress = self._peers[peer].poll(self._handles[handle])
        return progress.value

    def finish(self, peer: str, handle: str, within_s: float) -> str:
        """Poll, woken by descriptors alone where there are some."""
        until = time.monotonic() + within_s
        while (progress := self.poll(peer, handle)) == "pending" and time.monotonic() < until:
            if self._peers[peer].descriptors():
                self.wait(peer, until - time.monotonic())
            else:
                time.sleep(0.0005)
        return progress

    def wait(self, peer: str, seconds: float) -> bool | None:
        """Whether a descriptor wakes us; None where there is none."""
        descriptors = self._peers[peer].descriptors()
        if not descriptors:
            return None
        return bool(select.select(descriptors, [], [], max(0, seconds))[0])

    def let_go(self, handle: str) -> None:
        del self._handles[handle]

    def fence(self, peer: str) -> float:
        began = time.monotonic()
        self._peers[peer].fence()
        return time.monotonic() - began

    def end(self) -> None:
        for peer in self._peers.values():
            peer.fence()
        if self._offer is not None:
            self._offer.close()
        self._peers.clear()
        self._handles.clear()
        self._offer = None

    def resources(self) -> tuple[int, int]:
        """File descriptors, threads of Python."""
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    def processor_share(self, seconds: float) -> float:
        began = time.process_time()
        time.sleep(seconds)
        return (time.process_time() - began) / seconds


def _actor(subject: Subject) -> Actor:
    return Actor(subject.make())


def _serve(pipe: Connection, make: Callable[[], Any]) -> None:
    actor = make()
    while (told := pipe.recv()) is not None:
        word, arguments = told
        try:
            pipe.send((True, getattr(actor, word)(*arguments)))
        except TransferError as error:
            pipe.send((False, str(error)))


class Remote:
    """An actor in a process of its own, which makes it."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._pipe, theirs = _processes.Pipe()
        self._process = _processes.Process(target=_serve, args=(theirs, make), daemon=True)
        self._process.start()
        theirs.close()

    def tell(self, word: str, *arguments: Any) -> None:
        self._pipe.send((word, arguments))

    def answer(self) -> Any:
        """Raises `TransferError` where the actor did."""
        assert self._pipe.poll(ANSWER_S), "no answer"
        ok, answer = self._pipe.recv()
        if not ok:
            raise TransferError(answer)
        return answer

    def ask(self, word: str, *arguments: Any) -> Any:
        self.tell(word, *arguments)
        return self.answer()

    def stop(self) -> None:
        """Returns when every thread has stopped: on a busy machine that takes a while."""
        self._signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self._process.pid}/task")
        until = time.monotonic() + ANSWER_S
        while any(_state(task) != "T" for task in tasks.iterdir()):
            assert time.monotonic() < until, "it does not stop"
            time.sleep(0.001)

    def wake(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)


def _state(task: Path) -> str:
    """Of a thread, as proc(5) has it. The name before it, in parentheses, may hold anything."""
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


class Local:
    """An actor in this process, for the transport that has no other."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._actor = Actor(transport)

    def ask(self, word: str, *arguments: Any) -> Any:
        return getattr(self._actor, word)(*arguments)

    def stop(self) -> None:
        self._transport.pause()

    def wake(self) -> None:
        self._transport.resume()

    def kill(self) -> None:
        self._actor.end()

    def end(self) -> None:
        self._actor.end()


class Pair:
    """A sender that offers and a reader: what tests speak to."""

    def __init__(self, subject: Subject) -> None:
        if subject.of.startswith("memory:"):
            transport = subject.make()
            self.sender: Remote | Local = Local(transport)
            self.reader: Remote | Local = Local(transport)
        else:
            self.sender = Remote(partial(_actor, subject))
            self.reader = Remote(partial(_actor, subject))
        self.description = b""

    def hold(self, sends: Shape, reads: Shape, seed: int = 1) -> None:
        self.sender.ask("hold", sends, seed)
        self.reader.ask("hold", reads, None)
        self.description = self.sender.ask("offer")

    def connect(self, unit_bytes: int, peer: str = "peer") -> None:
        self.reader.ask("connect", peer, self.description, unit_bytes)

    def end(self) -> None:
        self.sender.end()
        self.reader.end()


def pairs_of(subject: Subject) -> Iterator[Pair]:
    pair = Pair(subject)
    try:
        yield pair
    finally:
        pair.end()
