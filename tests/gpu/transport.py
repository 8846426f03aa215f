"""Each transport on device memory, between two processes: what arrives, how fast, the fence."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvtransfer.checksums import Checksums, Mode
from kvtransfer.transports import device as devices
from kvtransfer.transports.api import Memory, Progress, Segment, TransferError
from kvtransfer.transports.choose import load
from tests.gpu.machine import await_device, copy_rate
from tests.gpu.report import Skip

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from tests.gpu.machine import Machine
    from tests.gpu.report import Rows

UNIT = 32 << 10
ANSWER_S = 40.0
READ_S = 15.0
PRIME = 1_000_003


class Kv:
    """Layers whose blocks interleave, so that each layer's span overlaps every other's."""

    def __init__(self, device: str, layers: int, blocks: int, *, filled: bool) -> None:
        import torch

        self.layers, self.blocks, self.device = layers, blocks, device
        words = blocks * layers * UNIT // 8
        self.words = torch.zeros(words, dtype=torch.int64, device=device)
        if filled:
            self.words += torch.arange(1, words + 1, dtype=torch.int64, device=device) * PRIME
        await_device(device)
        base, block = self.words.data_ptr(), layers * UNIT
        self.memory = Memory(
            tuple(Segment(base + i * UNIT, block, UNIT, blocks) for i in range(layers)), device
        )

    def units(self) -> Any:
        """The content, shape (units, words), in the order in which units are counted."""
        cut = self.words.view(self.blocks, self.layers, UNIT // 8)
        return cut.transpose(0, 1).reshape(self.layers * self.blocks, UNIT // 8)

    def expect(self, local: Any, remote: Any) -> bool:
        """Whether the sender's units `remote` lie in `local`, as `filled` makes them."""
        import torch

        layer, block = np.divmod(np.asarray(remote, np.int64), self.blocks)
        first = (block * self.layers + layer) * (UNIT // 8) + 1
        offsets = torch.arange(UNIT // 8, dtype=torch.int64, device=self.device)
        wanted = (torch.from_numpy(first).to(self.device)[:, None] + offsets[None]) * PRIME
        index = torch.from_numpy(np.asarray(local, np.int64)).to(self.device)
        return bool((self.units()[index] == wanted).all())


def sender(pipe: Connection, name: str, device: str, layers: int, blocks: int) -> None:
    devices.use(device)
    kv = Kv(device, layers, blocks, filled=True)
    transport = load(name)
    reason = transport.missing(kv.memory)
    if reason is not None:
        pipe.send(("skip", reason))
        return
    began = time.perf_counter()
    offer = transport.offer(kv.memory)
    pipe.send(("offered", offer.description, time.perf_counter() - began))
    while True:
        match pipe.recv():
            case "sums":
                pipe.send(_sums(kv.memory))
            case "end":
                offer.close()
                return


class Pair:
    """A sender's process, and this one, which reads."""

    def __init__(self, name: str, machine: Machine) -> None:
        self.layers, self.blocks = (2, 64) if machine.dry else (16, 1024)
        self.name, self.device = name, machine.peer
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(
            target=sender,
            args=(theirs, name, machine.device, self.layers, self.blocks),
            daemon=True,
        )
        self.process.start()
        theirs.close()
        told = self.hear()
        if told[0] == "skip":
            raise Skip(told[1])
        _, self.description, self.offer_s = told
        devices.use(self.device)
        self.kv = Kv(self.device, self.layers, self.blocks, filled=False)
        self.transport = load(name)
        self.peer: Any = None
        self.every = np.arange(self.layers * self.blocks, dtype=np.int32)

    def hear(self) -> Any:
        if not self.pipe.poll(ANSWER_S):
            raise RuntimeError("the sender's process does not answer")
        try:
            return self.pipe.recv()
        except EOFError:
            raise RuntimeError("the sender's process has ended") from None

    def connect(self) -> float:
        began = time.perf_counter()
        self.peer = self.transport.connect(self.kv.memory, self.description, UNIT)
        return time.perf_counter() - began

    def read(self, local: Any, remote: Any) -> float:
        """Read and wait; seconds. Raises `TransferError` when it fails or takes too long."""
        began = time.perf_counter()
        handle = self.peer.read(local, remote)
        while (progress := self.peer.poll(handle)) is Progress.PENDING:
            if time.perf_counter() - began > READ_S:
                raise TransferError(f"a read takes over {READ_S} s")
        if progress is Progress.FAILED:
            raise TransferError("a read failed")
        return time.perf_counter() - began

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        tasks = Path(f"/proc/{self.process.pid}/task")
        until = time.monotonic() + 5
        while number == signal.SIGSTOP and time.monotonic() < until:
            if all((t / "stat").read_text().rpartition(")")[2].split()[0] == "T"
                   for t in tasks.iterdir()):  # fmt: skip
                return
            time.sleep(0.001)

    def end(self) -> None:
        if self.peer is not None:
            self.peer.fence()
        self.process.kill()
        self.process.join(10)


def run(rows: Rows, machine: Machine, name: str = "ucx") -> None:
    if name == "collective" and not machine.dry and machine.peer == machine.device:
        skip_all(rows, "NCCL refuses two ranks on one GPU")
        return
    pair: Pair | None = None
    with rows.row("offer") as row:
        pair = Pair(name, machine)
        row.figures = {"mib": pair.kv.words.nbytes / 2**20, "offer_s": pair.offer_s}
    if pair is None:
        skip_all(rows, "there is no offer", first=1)
        return
    try:
        _read_rows(rows, pair)
        _fault_rows(rows, pair)
    finally:
        pair.end()


def skip_all(rows: Rows, reason: str, first: int = 0) -> None:
    from tests.gpu.groups import GROUPS

    names = next(g.rows for g in GROUPS if g.module == "transport")
    for name in names[first:]:
        with rows.row(name):
            raise Skip(reason)


def _sums(memory: Memory) -> list[int]:
    """Checksums of some blocks, all layers; block 0 is never hashed."""
    found = Checksums(memory, [range(len(memory.segments))], Mode.FULL)
    blocks = range(1, min(memory.segments[0].blocks, 65))
    return found.of([[block] for block in blocks], b"gpu-check", 0)


def _read_rows(rows: Rows, pair: Pair) -> None:
    with rows.row("connect") as row:
        row.figures = {"connect_s": pair.connect()}
    with rows.row("bytes") as row:
        _needs(pair)
        pair.read(pair.every, pair.every)
        assert pair.kv.expect(pair.every, pair.every), "other bytes arrived than were sent"
        draw = np.random.default_rng(1)
        local, remote = (draw.permutation(len(pair.every)).astype(np.int32) for _ in range(2))
        pair.read(local, remote)
        assert pair.kv.expect(local, remote), "scattered units arrived in other places"
        row.figures = {"units": len(pair.every), "unit_kib": UNIT >> 10}
    with rows.row("sums") as row:
        _needs(pair)
        pair.read(pair.every, pair.every)
        began = time.perf_counter()
        ours = _sums(pair.kv.memory)
        took = time.perf_counter() - began
        pair.pipe.send("sums")
        assert ours == pair.hear(), "checksums of equal bytes differ"
        row.figures = {"gb_s": len(ours) * pair.layers * UNIT / took / 1e9}
    with rows.row("rates") as row:
        _needs(pair)
        row.figures = _rates(pair)


def _rates(pair: Pair) -> dict[str, float]:
    """GB/s of reads, and their share of a copy on the reader's device in the same run."""
    found: dict[str, float] = {}
    draw = np.random.default_rng(2)
    for mib in (1, 4) if pair.device == "cpu" else (1, 16, 64, 256):
        count = (mib << 20) // UNIT
        if count > len(pair.every):
            continue
        copied = copy_rate(pair.device, mib << 20)
        run_ = pair.every[:count]
        taken = sorted(pair.read(run_, run_) for _ in range(5))
        found[f"{mib}_mib_gb_s"] = rate = (mib << 20) / taken[2] / 1e9
        found[f"{mib}_mib_share"] = rate / copied
    count = min(1024, len(pair.every))
    local, remote = (
        draw.permutation(len(pair.every))[:count].astype(np.int32) for _ in range(2)
    )  # fmt: skip
    taken = sorted(pair.read(local, remote) for _ in range(5))
    copied = copy_rate(pair.device, count * UNIT)
    found[f"{count}_x_32_kib_gb_s"] = rate = count * UNIT / taken[2] / 1e9
    found[f"{count}_x_32_kib_share"] = rate / copied
    taken = sorted(pair.read(pair.every[:1], pair.every[:1]) for _ in range(20))
    found["one_unit_us"] = taken[10] * 1e6
    return found


def _fault_rows(rows: Rows, pair: Pair) -> None:
    with rows.row("stopped sender") as row:
        _needs(pair)
        if not pair.transport.abilities.one_sided:
            raise Skip(f"{pair.name} needs the sender for each read")
        pair.signal(signal.SIGSTOP)
        try:
            row.figures = {"read_s": pair.read(pair.every, pair.every)}
        finally:
            pair.signal(signal.SIGCONT)
    with rows.row("fence") as row:
        _needs(pair)
        pair.kv.words.zero_()
        await_device(pair.device)
        handle = pair.peer.read(pair.every, pair.every)
        began = time.perf_counter()
        pair.peer.fence()
        row.figures = {"fence_s": time.perf_counter() - began}
        before = pair.kv.words.clone()
        await_device(pair.device)
        time.sleep(0.5)
        await_device(pair.device)
        assert bool((pair.kv.words == before).all()), "bytes landed after the fence"
        row.figures["was"] = pair.peer.poll(handle).value
        row.figures["landed_share"] = float((before != 0).float().mean())
        pair.connect()
        pair.read(pair.every, pair.every)
        assert pair.kv.expect(pair.every, pair.every), "a new connection brings other bytes"
    with rows.row("late connect") as row:
        _needs(pair)
        pair.signal(signal.SIGSTOP)
        kept, began = pair.peer, time.perf_counter()
        try:
            pair.connect()
            pair.peer.fence()
            row.figures["ended"] = "connected"
        except TransferError as error:
            row.figures["ended"] = f"refused: {error}"[:100]
        finally:
            pair.signal(signal.SIGCONT)
        pair.peer = kept
        row.figures["seconds"] = took = time.perf_counter() - began
        assert took < 10, f"connecting to a stopped sender took {took:.1f} s"
    with rows.row("killed sender") as row:
        _needs(pair)
        pair.process.kill()
        pair.process.join(10)
        time.sleep(0.2)
        began = time.perf_counter()
        try:
            pair.read(pair.every, pair.every)
            row.figures["ended"] = "read all the same"
        except TransferError as error:
            row.figures["ended"] = f"failed: {error}"[:100]
        row.figures["seconds"] = took = time.perf_counter() - began
        pair.peer.fence()
        assert took < READ_S, "a read from a killed sender does not end by itself"


def _needs(pair: Pair) -> None:
    if pair.peer is None:
        raise Skip("there is no connection")
