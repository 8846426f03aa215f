"""NIXL agents: memory registered once, reads through it, and the end that is their fence.

Host memory: an agent for each peer. Device memory: one for all peers of a process, since each
registration with an RDMA device pins and maps all of it anew (docs/adr/0008).

An agent is gone when nobody refers to it, NIXL's handles and the frames of a traceback included:
so nothing of NIXL's leaves this module, and what it raises is raised anew outside of its handler.
"""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kvtransfer.transports import device
from kvtransfer.transports.api import Memory, Progress, TransferError
from kvtransfer.transports.spans import spans

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from kvtransfer.transports.api import Units

CMA_PIECE: Final = "8m"
"""One system call's copy; UCX's 512 KiB lose a tenth (docs/adr/0005). UCX_CMA_SEG_SIZE wins."""
ROWS_MAX: Final = 4 << 20
"""NIXL keeps some 90 bytes for each row of a list, and takes 0.2 us to make it."""


@dataclass(frozen=True, slots=True)
class Options:
    progress_thread: bool = False
    backends: tuple[str, ...] = ("UCX",)
    tls: str | None = None


@dataclass(eq=False, slots=True)
class Read:
    """NIXL's handle keeps its agent alive, and so the read: only the agent may hold that."""

    nixl: Any
    member: Member
    progress: Progress = Progress.PENDING


@dataclass(eq=False, frozen=True, slots=True)
class Member:
    """One peer that reads through an agent, and the sender's agent that it reads from."""

    sender: str


OURS: Final = ""
"""The name of our own list, beside those of senders."""


@dataclass(slots=True)
class Agent:
    """One NIXL agent with `memory` registered. Any thread may call; calls take turns."""

    memory: Memory
    options: Options
    also: tuple[Memory, ...] = ()
    over: str | None = None
    """Why it is no more."""
    _nixl: Any = None
    _errors: tuple[type[Exception], ...] = ()
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _members: set[Member] = field(default_factory=set)
    _lists: dict[tuple[str, Memory, int], Any] = field(default_factory=dict)
    """By whose they are (`OURS`, or a sender), their memory and their unit bytes."""
    _reads: set[Read] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Raises `TransferError`."""
        self._errors = errors()
        reason = ""
        try:
            with device.on(self.memory.device):
                self._nixl = bare_agent(self.memory, self.options, self.also)
        except self._errors as error:
            reason = f"ucx can't register this memory: {error!r}"
        if reason:
            self.end(reason)
            raise TransferError(reason)

    def join(self, sender: str, metadata: bytes) -> Member:
        """Be able to read from that agent, which `metadata` describes. Raises `TransferError`."""
        member = Member(sender)
        with self._lock:
            self._check()
            if all(each.sender != sender for each in self._members):
                self._load(sender, metadata)
            self._members.add(member)
        return member

    def prepare(self, whose: str, memory: Memory, unit_bytes: int) -> Key:
        """List the units of `memory`, a sender's or `OURS`; the list's key.

        Raises `TransferError`, also for more than `ROWS_MAX` rows.
        """
        key = whose, memory, unit_bytes
        table, reason = rows(memory, unit_bytes), ""
        with self._lock:
            self._check()
            if key in self._lists:
                return key
            try:
                self._lists[key] = self._nixl.prep_xfer_dlist(
                    whose or "NIXL_INIT_AGENT", table, kind(memory)[0]
                )
            except self._errors as error:
                reason = f"ucx can't list this memory: {error!r}"
        if reason:
            raise TransferError(reason)
        return key

    def start(self, member: Member, keys: tuple[Key, Key], local: Units, remote: Units) -> Read:
        """Start to read, from the second list into the first. Raises `TransferError`.

        What fails while it is being started may be under way in part: that ends the agent.
        """
        ours, theirs = keys
        read, state, reason = Read(None, member), "", "a read failed"
        with self._lock:
            self._check()
            try:
                read.nixl = self._nixl.make_prepped_xfer(
                    "READ", self._lists[ours], local, self._lists[theirs], remote
                )
                state = self._nixl.transfer(read.nixl)
            except self._errors as error:
                reason = repr(error)
            if state == "DONE":  # As it mostly is between processes of one machine.
                self._finish(read)
                return read
            if read.nixl is not None:
                self._reads.add(read)
                if state != "PROC":
                    self._end(f"the sender is gone: {reason}")
                    self._check()
                return read
        # Nothing of it has been started.
        raise TransferError(f"the sender is gone: {reason}")

    def poll(self, read: Read) -> Progress:
        with self._lock:
            if read.progress is not Progress.PENDING:
                return read.progress
            try:
                state = self._nixl.check_xfer_state(read.nixl)
            except self._errors:
                state = "ERR"
            if state == "DONE":
                self._reads.discard(read)
                self._finish(read)
            elif state != "PROC":
                # One of the read's many pieces has failed: only this is sure to end the others.
                self._end("the sender is gone: a read failed")
            return read.progress

    def leave(self, member: Member) -> None:
        """Returns when nothing that this member has read can land any more.

        With a read of its own under way the whole agent ends, and with it the reads of everybody
        who shares it: nothing less is a fence.
        """
        with self._lock:
            if member not in self._members:
                return
            self._members.discard(member)
            sender = member.sender
            if any(read.member is member for read in self._reads):
                self._end(f"a read from {sender} was fenced while it was under way")
            elif not self._members:
                self._end("nobody reads through it")
            elif all(each.sender != sender for each in self._members):
                for key in [k for k in self._lists if k[0] == sender]:
                    del self._lists[key]
                with contextlib.suppress(*self._errors):  # It is disconnected already.
                    self._nixl.remove_remote_agent(sender)

    def end(self, reason: str) -> None:
        """Returns when nothing can land through this agent any more. Again is harmless."""
        with self._lock:
            self._end(reason)

    def _load(self, sender: str, metadata: bytes) -> None:
        name: str | bytes = ""
        try:
            name, reason = self._nixl.add_remote_agent(metadata), ""
        except self._errors as error:
            reason = f"ucx can't join the sender's agent: {error!r}"
        found = name.decode() if isinstance(name, bytes) else name
        if not reason and found != sender:
            reason = f"the sender's agent is {found}, and its description says {sender}"
        if reason:
            raise TransferError(reason)

    def _finish(self, read: Read) -> None:
        self._nixl.release_xfer_handle(read.nixl)
        read.nixl, read.progress = None, Progress.DONE

    def _end(self, reason: str) -> None:
        if self.over is not None:
            return
        self.over = reason
        for read in self._reads:
            read.nixl = None
        self._lists.clear()
        self._nixl = None
        # UCX has gone; what it had handed to the device's copy engines has not.
        device.settle(self.memory.device)
        for read in self._reads:
            read.progress = Progress.FAILED
        self._reads.clear()
        self._members.clear()

    def _check(self) -> None:
        if self.over is not None:
            raise TransferError(self.over)


Key = tuple[str, Memory, int]


def bare_agent(memory: Memory, options: Options, also: Iterable[Memory] = ()) -> Any:
    """A NIXL agent with these memories registered. Raises what NIXL raises."""
    from nixl._api import nixl_agent, nixl_agent_config

    config = nixl_agent_config(enable_prog_thread=options.progress_thread, backends=[])
    agent = nixl_agent(uuid.uuid4().hex, config)
    tuned = {"engine_config": ",".join(f"{k}={v}" for k, v in settings(memory, options).items())}
    for backend in options.backends:
        agent.create_backend(backend, tuned if backend == "UCX" else {})
    for each in (memory, *also):
        name, number = kind(each)
        agent.register_memory([(low, size, number, "") for low, size in spans(each)], name)
    return agent


def settings(memory: Memory, options: Options) -> dict[str, str]:
    """UCX's settings, without their prefix; what the environment says stays."""
    wanted = {"CMA_SEG_SIZE": CMA_PIECE}
    if memory.device != device.HOST:
        # UCX leaves reads out where it sees no NVLink, and would ask the sender's CPU for each.
        wanted["CUDA_IPC_ENABLE_GET_ZCOPY"] = "on"
    found = {k: v for k, v in wanted.items() if f"UCX_{k}" not in os.environ}
    if options.tls is not None:
        found["TLS"] = options.tls
    return found


def errors() -> tuple[type[Exception], ...]:
    """NIXL's exceptions, which share no base class of their own. Raises ImportError without it."""
    from nixl import _bindings

    names = vars(_bindings).values()
    found = [v for v in names if isinstance(v, type) and issubclass(v, Exception)]
    return (*found, RuntimeError)


def kind(memory: Memory) -> tuple[str, int]:
    """NIXL's kind of memory, and the device's number."""
    name, _, number = memory.device.partition(":")
    kinds = {"cpu": "DRAM", "cuda": "VRAM"}
    if name not in kinds or not (number or "0").isdecimal():
        raise TransferError(f"ucx moves cpu and cuda memory only, and this is on {memory.device}")
    return kinds[name], int(number or 0)


def rows(memory: Memory, unit_bytes: int) -> NDArray[np.uint64]:
    """Every unit in NIXL's short form: address, bytes, device, stride, how many; shape (rows, 5).

    A row a segment, where its units are evenly spaced; else a row a block. Raises `TransferError`
    for more than `ROWS_MAX`.
    """
    memory.units(unit_bytes)
    _, number = kind(memory)
    found = []
    for s in memory.segments:
        pieces = s.block_bytes // unit_bytes
        if s.stride == s.block_bytes:
            found.append(np.array([(s.base, unit_bytes, number, unit_bytes, s.blocks * pieces)]))
        elif pieces == 1:
            found.append(np.array([(s.base, unit_bytes, number, s.stride, s.blocks)]))
        else:
            starts = s.base + np.arange(s.blocks, dtype=np.int64) * s.stride
            block = np.empty((s.blocks, 5), dtype=np.int64)
            block[:, 0], block[:, 1:] = starts, (unit_bytes, number, unit_bytes, pieces)
            found.append(block)
        if (count := sum(map(len, found))) > ROWS_MAX:
            raise TransferError(
                f"ucx would need {count} rows or more for units of {unit_bytes} bytes of this "
                f"memory, and makes {ROWS_MAX} at most"
            )
    if not found:
        return np.empty((0, 5), dtype=np.uint64)
    table: NDArray[np.uint64] = np.concatenate(found).astype(np.uint64)
    return table
