"""The two processes of one contender in `make bench-handoff`: each does what its pipe tells it."""

from __future__ import annotations

import importlib
import mmap
import os
import select
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kvtransfer import bench_bare, checksums
from kvtransfer.huge_pages import advise
from kvtransfer.transports.api import Memory, Progress, Segment, TransferError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from numpy.typing import NDArray

    from kvtransfer.bench_bare import Copy, Source
    from kvtransfer.transports.api import Transport

MIB: Final = 1 << 20
UNIT: Final = 32 * 1024
SMALL_UNIT: Final = 4 * 1024
LAYERS: Final = 32
BLOCKS: Final = 256
TOTAL: Final = LAYERS * BLOCKS * UNIT

ENVIRONMENT: Final = {"NIXL_LOG_LEVEL": "WARN", "OMP_NUM_THREADS": "1"}
"""As a worker has it: one thread of torch's, since the other core is the other side's."""


@dataclass(frozen=True)
class Contender:
    name: str
    kind: str
    """`module:Class` of a transport; or `nixl`, `sockets`, `memcpy`."""
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    huge: bool = True


@dataclass(frozen=True)
class Job:
    name: str
    size: int
    """Bytes of one read."""
    repeats: int
    scattered: bool = False
    small: bool = False

    def units(self, turn: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Where to, where from."""
        unit = SMALL_UNIT if self.small else UNIT
        count, every = self.size // unit, TOTAL // unit
        if not self.scattered:
            run = np.arange(count, dtype=np.int32)
            return run, run
        draw = np.random.default_rng(turn)
        local, remote = (draw.permutation(every)[:count].astype(np.int32) for _ in range(2))
        return local, remote


class Kv:
    """Memory like an engine's: layers in one allocation, on small pages unless advised."""

    def __init__(self, *, filled: bool, huge: bool) -> None:
        self._area = mmap.mmap(-1, TOTAL, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            self._area.madvise(mmap.MADV_NOHUGEPAGE)
        self.words = np.frombuffer(self._area, np.uint64)
        self.words[:] = pattern() if filled else 1
        base, size = self.words.ctypes.data, BLOCKS * UNIT
        self.memory = Memory(
            tuple(Segment(base + i * size, UNIT, UNIT, BLOCKS) for i in range(LAYERS))
        )
        began = time.perf_counter()
        self.huge_bytes = advise(self.memory) if huge else 0
        self.advise_s = time.perf_counter() - began


def pattern() -> NDArray[np.uint64]:
    return np.arange(TOTAL // 8, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


class Missing(Exception):
    """This contender can't run here; the message says why."""


def send(pipe: Connection, contender: Contender) -> None:
    """The sender's process: offers, then tells its CPU time whenever asked."""
    os.environ.update(ENVIRONMENT | contender.environment)
    kv = Kv(filled=True, huge=contender.huge)
    try:
        source = _source(contender, kv.memory)
    except (Missing, ImportError, TransferError) as error:
        pipe.send(str(error))
        return
    pipe.send(source.description)
    while (asked := pipe.recv()) != "end":
        pipe.send(time.process_time() if asked == "cpu" else (kv.huge_bytes, kv.advise_s))
    source.close()


def read(pipe: Connection, contender: Contender, description: bytes) -> None:
    """The reader's process: does jobs, and answers each with seconds a read and CPU seconds."""
    os.environ.update(ENVIRONMENT | contender.environment)
    kv = Kv(filled=False, huge=contender.huge)
    copies = {unit: _copy(contender, kv.memory, description, unit) for unit in (UNIT, SMALL_UNIT)}
    every = np.arange(TOTAL // UNIT, dtype=np.int32)
    copies[UNIT](every, every)
    if not np.array_equal(kv.words, pattern()):
        raise AssertionError(f"{contender.name} brought other bytes than were sent")
    pipe.send("ready")
    turn = 0
    while (job := pipe.recv()) != "end":
        turn += 1
        if isinstance(job, checksums.Mode):
            pipe.send(_sums(kv.memory, job))
        else:
            copy = copies[SMALL_UNIT if job.small else UNIT]
            pipe.send(_timed(copy, job, turn))


def _timed(copy: Copy, job: Job, turn: int) -> tuple[list[float], float]:
    local, remote = job.units(turn)
    seconds = []
    cpu = time.process_time()
    copy(local, remote)  # Not timed: this process has just been woken.
    for _ in range(job.repeats):
        began = time.perf_counter()
        copy(local, remote)
        seconds.append(time.perf_counter() - began)
    return seconds, time.process_time() - cpu


def _sums(memory: Memory, mode: checksums.Mode) -> float:
    blocks = [[n] for n in range(1, BLOCKS)]
    found = checksums.Checksums(memory, [range(LAYERS)], mode)
    began = time.perf_counter()
    found.of(blocks, b"bench", 0)
    return time.perf_counter() - began


# ---------------------------------------------------------------- contenders


def _source(contender: Contender, memory: Memory) -> Source:
    match contender.kind:
        case "nixl":
            return bench_bare.NixlSource(memory, **contender.settings)
        case "sockets":
            return bench_bare.SocketSource(memory)
        case "memcpy":
            return bench_bare.SharedSource(memory)
    transport = _transport(contender)
    if reason := transport.missing(memory):
        raise Missing(reason)
    return transport.offer(memory)


def _copy(contender: Contender, memory: Memory, description: bytes, unit: int) -> Copy:
    match contender.kind:
        case "nixl":
            return bench_bare.nixl_copy(memory, description, unit, **contender.settings)
        case "sockets":
            return bench_bare.SocketCopy(memory, description, unit)
        case "memcpy":
            return bench_bare.memcpy(memory, description, unit)
    peer = _transport(contender).connect(memory, description, unit)

    def copy(local: NDArray[np.int32], remote: NDArray[np.int32]) -> None:
        handle = peer.read(local, remote)
        until = time.monotonic() + bench_bare.HANG_S
        while (progress := peer.poll(handle)) is Progress.PENDING:
            if time.monotonic() > until:
                raise TransferError(f"{contender.name}: a read takes over {bench_bare.HANG_S} s")
            if waiting := peer.descriptors():
                select.select(waiting, [], [], 1)
        if progress is Progress.FAILED:
            raise TransferError(f"{contender.name}: a read failed")

    return copy


def _transport(contender: Contender) -> Transport:
    module, _, name = contender.kind.partition(":")
    try:
        made: Transport = getattr(importlib.import_module(f"kvtransfer.transports.{module}"), name)(
            **contender.settings
        )
    except (ImportError, AttributeError) as error:
        raise Missing(f"this tree has no such transport: {error}") from None
    return made
