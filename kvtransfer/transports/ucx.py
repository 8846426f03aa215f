"""One-sided reads over UCX, driven by NIXL: shared memory here, RDMA and NVLink there."""

from __future__ import annotations

import os
import threading
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

from kvtransfer.transports import place
from kvtransfer.transports.api import Abilities, Memory, Progress, Segment, TransferError
from kvtransfer.transports.unit_views import check_range
from kvtransfer.views import span_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvtransfer.transports.api import Units

NAME: Final = "ucx"
VERSION: Final = 1
PROGRESS_NAP_S: Final = 0.01
CONNECT_TIMEOUT_S: Final = 3.0
CONNECT_NAP_S: Final = 0.001
CMA_PIECE: Final = "8m"
"""Of one system call's copy; UCX's 512 KiB lose a tenth (docs/adr/0005). UCX_CMA_SEG_SIZE wins."""


class UcxDescription(msgspec.Struct, frozen=True, array_like=True):
    """Memory that can be read, and the agent to read it from."""

    version: int
    agent: bytes
    segments: tuple[Segment, ...]
    device: str
    place: place.Place
    pid: int
    cookie_address: int
    cookie: bytes


@dataclass(frozen=True, slots=True)
class _Options:
    progress_thread: bool
    backends: tuple[str, ...]
    tls: str | None


class UcxTransport:
    """NIXL agents: one for each offer, one for each peer."""

    name = NAME
    abilities = Abilities(
        one_sided=True, cuda=True, needs="nixl, and memory shared with the sender, or RDMA"
    )

    def __init__(
        self,
        *,
        progress_thread: bool = False,
        backends: tuple[str, ...] = ("UCX",),
        tls: str | None = None,
        reaches: bool | None = None,
    ) -> None:
        """`tls`: UCX's transports, as UCX_TLS has them; its own choice by default. Of `tcp` alone
        beware: there a reader that goes away in mid-read ends the sender's process.

        `progress_thread`: NIXL's, which spins (docs/adr/0002). `reaches`: what to answer, for
        whoever knows better than we can find out.
        """
        self._options = _Options(progress_thread, backends, tls)
        self._reaches = reaches

    def missing(self, memory: Memory) -> str | None:
        try:
            _nixl_errors()
            _kind(memory)
        except (ImportError, TransferError) as error:
            return f"ucx needs nixl, and cpu or cuda memory: {error}"
        return None

    def offer(self, memory: Memory) -> UcxOffer:
        return UcxOffer(memory, self._options)

    def reaches(self, description: bytes) -> bool:
        try:
            theirs = _decode(description)
        except TransferError:
            return False
        if self._reaches is not None:
            return self._reaches
        here = place.here()
        if here.rdma and theirs.place.rdma:
            return True
        if not here.boot or here.boot != theirs.place.boot:
            return False
        if theirs.device != "cpu":
            return True  # CUDA's own sharing between processes; not run yet.
        same = bool(here.pid_ns) and here.pid_ns == theirs.place.pid_ns
        return same and place.can_read(theirs.pid, theirs.cookie_address, theirs.cookie)

    def connect(self, memory: Memory, description: bytes, unit_bytes: int) -> UcxPeer:
        return UcxPeer(memory, _decode(description), unit_bytes, self._options)


class UcxOffer:
    """KV memory that peers may read, until `close`."""

    def __init__(self, memory: Memory, options: _Options) -> None:
        self._cookie = cookie = place.Cookie()
        try:
            self._agent: Any = _agent(options)
            _register(self._agent, memory)
            self._agent.register_memory([(cookie.address, cookie.BYTES, 0, "")], "DRAM")
            metadata = self._agent.get_agent_metadata()
        except _nixl_errors() as error:
            raise TransferError(f"ucx can't offer this memory: {error!r}") from error
        self.description = msgspec.msgpack.encode(
            UcxDescription(
                VERSION, metadata, memory.segments, memory.device, place.here(), os.getpid(),
                cookie.address, cookie.value,
            )
        )  # fmt: skip
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        if not options.progress_thread:
            # Reads need nothing of us, but a new peer's connection does, and an engine computes
            # for seconds without asking after anybody. NIXL's thread would spin: a whole core.
            self._thread = threading.Thread(target=self._answer, name="kv-connections", daemon=True)
            self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        self._agent = None

    def _answer(self) -> None:
        while not self._closing.wait(PROGRESS_NAP_S):
            self._agent.get_new_notifs()  # What moves a NIXL agent on.


@dataclass(eq=False, slots=True)
class _Read:
    """NIXL's handle keeps its agent alive, and so the read: only the peer may hold that."""

    nixl: Any
    progress: Progress


class UcxPeer:
    """Reads from one sender, through an agent of its own: destroying it is the fence."""

    def __init__(
        self, memory: Memory, theirs: UcxDescription, unit_bytes: int, options: _Options
    ) -> None:
        remote = Memory(theirs.segments, theirs.device)
        self._units = memory.units(unit_bytes), remote.units(unit_bytes)
        self._reads: set[_Read] = set()
        self._gone: str | None = None
        self._errors: tuple[type[Exception], ...] = _nixl_errors()
        self._cookie = place.Cookie()  # Overwritten with theirs, once there is a connection.
        self._agent: Any = None
        failures: tuple[type[Exception], ...] = (*self._errors, TransferError)
        reason = ""
        try:
            self._agent = _agent(options)
            _register(self._agent, memory)
            self._name = self._agent.add_remote_agent(theirs.agent)
            self._greet(theirs)
            self._local = self._list("NIXL_INIT_AGENT", memory, unit_bytes)
            self._remote = self._list(self._name, remote, unit_bytes)
        except failures as error:
            reason = f"ucx can't connect: {error!r}"
        if reason:  # Out here: an exception's traceback would keep the agent.
            self.fence()
            raise TransferError(reason)

    def read(self, local: Units, remote: Units) -> _Read:
        if len(local) != len(remote):
            raise TransferError(f"{len(local)} local units for {len(remote)} remote ones")
        if self._gone is not None:
            self._check(local, remote)
            raise TransferError(self._gone)
        if not len(local):
            return _Read(None, Progress.DONE)
        try:
            return self._start(self._local, local, self._remote, remote)
        except self._errors as error:
            # NIXL looks at every number; what it found, ours says better.
            self._check(local, remote)
            reason = f"the sender is gone: {error!r}"
        self._end(reason)
        raise TransferError(reason)

    def poll(self, handle: _Read) -> Progress:
        if handle.progress is not Progress.PENDING:
            return handle.progress
        try:
            self._judge(handle, self._agent.check_xfer_state(handle.nixl))
        except self._errors:
            self._judge(handle, "ERR")
        return handle.progress

    def descriptors(self) -> list[int]:
        return []

    def fence(self) -> None:
        """Nothing less than the agent's end does it: releasing a handle or deregistering memory
        leaves a stalled read to land whenever the sender wakes.
        """
        self._end("the peer is fenced")

    def _check(self, local: Units, remote: Units) -> None:
        check_range(local, self._units[0], "the receiver")
        check_range(remote, self._units[1], "the sender")

    def _judge(self, read: _Read, state: str) -> None:
        if state == "DONE":
            self._agent.release_xfer_handle(read.nixl)
            self._reads.discard(read)
            read.nixl, read.progress = None, Progress.DONE
        elif state != "PROC":
            # One of the read's many pieces has failed: only this is sure to end the others.
            self._end("the sender is gone: a read failed")

    def _end(self, reason: str) -> None:
        self._gone = self._gone or reason
        for read in self._reads:
            read.nixl = None
        self._local = self._remote = None
        self._agent = None
        for read in self._reads:
            read.progress = Progress.FAILED
        self._reads.clear()

    def _start(self, ours: Any, local: Units, theirs: Any, remote: Units) -> _Read:
        read = _Read(
            self._agent.make_prepped_xfer("READ", ours, local, theirs, remote), Progress.PENDING
        )
        state = self._agent.transfer(read.nixl)
        if state == "DONE":  # As it mostly is between processes of one machine.
            self._agent.release_xfer_handle(read.nixl)
            return _Read(None, Progress.DONE)
        self._reads.add(read)
        self._judge(read, state)
        return read

    def _greet(self, theirs: UcxDescription) -> None:
        """Read the sender's cookie: the connection stands, and to the process we were told of.

        UCX connects when it is first used; a sender that does not answer would show only at the
        deadline of a prompt's whole read.
        """
        spans = [(self._cookie.address, self._cookie.BYTES, 0, "")]
        self._agent.register_memory(spans, "DRAM")
        ours = self._agent.prep_xfer_dlist(
            "NIXL_INIT_AGENT", [(self._cookie.address, self._cookie.BYTES, 0)], "DRAM"
        )
        cookie = self._agent.prep_xfer_dlist(
            self._name, [(theirs.cookie_address, self._cookie.BYTES, 0)], "DRAM"
        )
        only = np.zeros(1, dtype=np.int32)
        read = self._start(ours, only, cookie, only)
        until = time.monotonic() + CONNECT_TIMEOUT_S
        while (progress := self.poll(read)) is Progress.PENDING and time.monotonic() < until:
            time.sleep(CONNECT_NAP_S)
        if progress is not Progress.DONE or self._cookie.content() != theirs.cookie:
            reason = "no answer" if progress is Progress.PENDING else "not the sender described"
            raise TransferError(f"{reason} at agent {self._name}")

    def _list(self, agent: str, memory: Memory, unit_bytes: int) -> Any:
        return self._agent.prep_xfer_dlist(agent, _rows(memory, unit_bytes), _kind(memory)[0])


def _agent(options: _Options) -> Any:
    from nixl._api import nixl_agent, nixl_agent_config

    config = nixl_agent_config(enable_prog_thread=options.progress_thread, backends=[])
    agent = nixl_agent(uuid.uuid4().hex, config)
    settings = {} if "UCX_CMA_SEG_SIZE" in os.environ else {"CMA_SEG_SIZE": CMA_PIECE}
    if options.tls is not None:
        settings["TLS"] = options.tls
    tuned = {"engine_config": ",".join(f"{name}={value}" for name, value in settings.items())}
    for backend in options.backends:
        agent.create_backend(backend, tuned if backend == "UCX" else {})
    return agent


def _nixl_errors() -> tuple[type[Exception], ...]:
    """They share no base class of their own."""
    from nixl import _bindings

    names = vars(_bindings).values()
    found = [v for v in names if isinstance(v, type) and issubclass(v, Exception)]
    return (*found, RuntimeError)


def _kind(memory: Memory) -> tuple[str, int]:
    """NIXL's kind of memory, and the device's number."""
    device, _, number = memory.device.partition(":")
    kinds = {"cpu": "DRAM", "cuda": "VRAM"}
    if device not in kinds or not (number or "0").isdecimal():
        raise TransferError(f"ucx moves cpu and cuda memory only, and this is on {memory.device}")
    return kinds[device], int(number or 0)


def _register(agent: Any, memory: Memory) -> None:
    kind, device = _kind(memory)
    spans = [(s.base, span_bytes(s), device, "") for s in memory.segments]
    agent.register_memory(spans, kind)


def _rows(memory: Memory, unit_bytes: int) -> NDArray[np.uint64]:
    """Every unit in NIXL's short form: address, bytes, device, stride, how many."""
    _, device = _kind(memory)
    rows = []
    for s in memory.segments:
        pieces = s.block_bytes // unit_bytes
        if s.stride == s.block_bytes:
            rows.append((s.base, unit_bytes, device, unit_bytes, s.blocks * pieces))
        elif pieces == 1:
            rows.append((s.base, unit_bytes, device, s.stride, s.blocks))
        else:
            rows += [(s.base + i * s.stride, unit_bytes, device, unit_bytes, pieces)
                     for i in range(s.blocks)]  # fmt: skip
    return np.array(rows, dtype=np.uint64)


def _decode(description: bytes) -> UcxDescription:
    try:
        theirs = msgspec.msgpack.decode(description, type=UcxDescription)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise TransferError(f"not a description of ucx: {error}") from None
    if theirs.version != VERSION:
        raise TransferError(f"sender speaks ucx {theirs.version}, receiver {VERSION}")
    return theirs
