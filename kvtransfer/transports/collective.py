"""Point to point over torch.distributed: NCCL between GPUs, gloo between CPUs, the same code.

The library is two-sided, so the sender has threads that send what readers ask for. A reader gets
the bytes into staging buffers that belong to its group of two; they reach KV memory only in
`read` and `poll`, on the owner's thread. So a fence waits for nobody: without another `poll`
nothing lands.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from kvtransfer.protocol import MALFORMED
from kvtransfer.transports import collective_wire as wire
from kvtransfer.transports import device
from kvtransfer.transports.api import Abilities, Memory, Progress, TransferError
from kvtransfer.transports.collective_offer import CollectiveOffer, Description
from kvtransfer.transports.pieces import Pieces

if TYPE_CHECKING:
    from kvtransfer.transports.api import Units


class CollectiveTransport:
    """`host` is the address that offers listen on and that readers reach them by."""

    name = "collective"
    abilities = Abilities(
        one_sided=False, cuda=True, needs="PyTorch with gloo, or with NCCL for GPU memory"
    )

    def __init__(self, host: str = "127.0.0.1", backend: str | None = None) -> None:
        self._host = host
        self._backend = backend

    def missing(self, memory: Memory) -> str | None:
        return wire.unfit(self._backend_for(memory), memory.device)

    def offer(self, memory: Memory) -> CollectiveOffer:
        self._check(memory)
        try:
            return CollectiveOffer(memory, self._host, self._backend_for(memory))
        except OSError as error:
            raise TransferError(f"can't listen on {self._host}: {error}") from None

    def reaches(self, description: bytes) -> bool:
        try:
            theirs = _description(description)
        except TransferError:
            return False
        return self._backend in (None, theirs.backend)

    def connect(self, memory: Memory, description: bytes, unit_bytes: int) -> CollectivePeer:
        self._check(memory)
        theirs = _description(description)
        if theirs.backend != (ours := self._backend_for(memory)):
            raise TransferError(
                f"the sender sends by {theirs.backend}, this reader reads by {ours}"
            )
        with device.on(memory.device):
            return CollectivePeer(memory, theirs, unit_bytes)

    def _backend_for(self, memory: Memory) -> str:
        return self._backend or ("nccl" if memory.device.startswith("cuda") else "gloo")

    def _check(self, memory: Memory) -> None:
        if reason := self.missing(memory):
            raise TransferError(reason)


@dataclass(slots=True)
class _Read:
    """A handle."""

    chunks_left: int


@dataclass(slots=True)
class _Chunk:
    read: _Read
    local: Units
    remote: Units


class CollectivePeer:
    """One sender, as one thread reads it. A second thread only waits for chunks to arrive."""

    def __init__(self, memory: Memory, theirs: Description, unit_bytes: int) -> None:
        self._broken: str | None = None
        self._most = wire.units_per_slot(unit_bytes)
        self._pieces = Pieces(memory, unit_bytes)
        self._theirs = Memory(tuple(theirs.segments))
        self._first = _segment_starts(self._theirs, unit_bytes)
        self._inbox = bytearray()
        self._outbox = bytearray()
        self._where = f"{theirs.host}:{theirs.port}"
        self._connection = self._reach(theirs)
        try:
            self._lane: wire.Lane | None = self._meet(theirs, memory.device)
        except BaseException:
            self._connection.close()
            raise
        self._connection.setblocking(False)
        self._slots = wire.slots(unit_bytes, memory.device)
        self._free = list(range(len(self._slots)))
        self._tag = wire.WARM_TAG
        self._todo: deque[_Chunk] = deque()
        self._under_way: dict[int, tuple[_Chunk, int]] = {}  # By tag: the chunk, its slot.
        self._waiter = _Waiter(self._lane, memory.device)

    # ------------------------------------------------------------ the interface

    def read(self, local: Units, remote: Units) -> _Read:
        if self._broken is not None:
            raise TransferError(f"can't read {self._where}: {self._broken}")
        if len(local) != len(remote):
            raise TransferError(f"{len(remote)} units into {len(local)}")
        _check_units(local, self._pieces.count, "our")
        _check_units(remote, int(self._first[-1]), "the sender's")
        chunks = self._chunks(np.asarray(local, np.int32), np.asarray(remote, np.int32))
        handle = _Read(len(chunks))
        self._todo.extend(_Chunk(handle, a, b) for a, b in chunks)
        self._request()
        return handle

    def poll(self, handle: _Read) -> Progress:
        if self._broken is None:
            self._land()
            self._hear()
            self._request()
        if not handle.chunks_left:
            return Progress.DONE
        return Progress.PENDING if self._broken is None else Progress.FAILED

    def descriptors(self) -> list[int]:
        return (
            [] if self._broken is not None else [self._waiter.readable, self._connection.fileno()]
        )

    def fence(self) -> None:
        """Nothing can land once `poll` will not copy, which is at once.

        A sender that is stopped leaves a thread of ours waiting, with this peer's staging
        buffers and gloo's sockets, until it goes on, dies, or STALL_S are over; NCCL is aborted.
        """
        self._break("it is fenced")

    # ------------------------------------------------------------ reading

    def _chunks(self, local: Units, remote: Units) -> list[tuple[Units, Units]]:
        """Slots' worth of pairs, sorted by segments: both sides then copy in long runs."""
        ours = self._pieces.segments_of(local)
        theirs = np.searchsorted(self._first, remote, side="right")
        order = np.lexsort((ours, theirs))
        local, remote = local[order], remote[order]
        starts = range(0, len(local), self._most)
        return [(local[i : i + self._most], remote[i : i + self._most]) for i in starts]

    def _request(self) -> None:
        """Ask for as many chunks as there are free slots."""
        while self._todo and self._free and self._lane is not None:
            chunk, slot = self._todo.popleft(), self._free.pop()
            self._tag += 1
            into = self._slots[slot][: len(chunk.local) * self._pieces.unit_bytes]
            try:
                with self._lane.copying():
                    work = self._lane.receive(into, self._tag)
            except RuntimeError as error:  # All of torch's.
                self._break(_first_line(error))
                return
            self._under_way[self._tag] = chunk, slot
            self._waiter.expect(self._tag, work)
            self._outbox += wire.frame(wire.Want(self._tag, chunk.remote.astype("<i4").tobytes()))
        self._flush()

    def _land(self) -> None:
        """Copy what has arrived to where it belongs."""
        for tag, error in self._waiter.arrived():
            if error is not None:
                self._break(error)
                return
            assert self._lane is not None
            chunk, slot = self._under_way.pop(tag)
            with self._lane.copying():
                self._pieces.scatter(chunk.local, self._pieces.staging(self._slots[slot]))
            self._lane.copied()
            chunk.read.chunks_left -= 1
            self._free.append(slot)

    # ------------------------------------------------------------ talking

    def _reach(self, theirs: Description) -> socket.socket:
        try:
            connection = socket.create_connection((theirs.host, theirs.port), wire.ANSWER_S)
        except OSError as error:
            raise TransferError(f"can't reach the sender at {self._where}: {error}") from None
        wire.keep_alive(connection)
        return connection

    def _meet(self, theirs: Description, device: str) -> wire.Lane:
        hello = wire.Hello(wire.VERSION, theirs.token, self._pieces.unit_bytes)
        try:
            self._connection.sendall(wire.frame(hello))
        except OSError as error:
            raise TransferError(f"can't speak to {self._where}: {error}") from None
        answer = wire.receive(self._connection, self._inbox, wire.ToPeer)
        if isinstance(answer, wire.Refused):
            raise TransferError(f"the sender at {self._where} refuses: {answer.reason}")
        if answer is None:
            raise TransferError(f"the sender at {self._where} hung up")
        store = wire.join_store(theirs.host, answer.store_port)
        ours = self._connection.getsockname()[0]
        return wire.Lane(store, wire.READER, theirs.backend, device, ours)

    def _flush(self) -> None:
        """Send what the socket takes; it takes little from a peer that is stopped."""
        if not self._outbox:
            return
        try:
            del self._outbox[: self._connection.send(self._outbox)]
        except BlockingIOError:
            pass
        except OSError as error:
            self._break(f"the control connection failed: {error}")

    def _hear(self) -> None:
        """The sender says nothing more, unless something is wrong."""
        if self._broken is not None:
            return
        try:
            data = self._connection.recv(wire.FRAME_BYTES_MAX)
            self._inbox += data
            refused = wire.decode(self._inbox, wire.ToPeer)
        except BlockingIOError:
            return
        except (OSError, TransferError) as error:
            self._break(str(error))
            return
        if refused is not None:
            self._break(f"the sender refuses: {getattr(refused, 'reason', refused)}")
        elif not data:
            self._break("the sender hung up")

    def _break(self, reason: str) -> None:
        if self._broken is not None:
            return
        self._broken = reason
        self._connection.close()
        self._waiter.leave()
        assert self._lane is not None
        self._lane.abandon()
        self._lane = None
        self._todo.clear()
        self._under_way.clear()


class _Waiter:
    """A thread that waits for chunks, since gloo says of none whether it has come without it."""

    def __init__(self, lane: wire.Lane, on: str) -> None:
        self.readable, self._signal = os.pipe()
        os.set_blocking(self.readable, False)
        os.set_blocking(self._signal, False)
        self._expected: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        self._arrived: deque[tuple[int, str | None]] = deque()
        threading.Thread(target=self._run, args=(lane, on), name="kv-arrivals", daemon=True).start()

    def expect(self, tag: int, work: Any) -> None:
        self._expected.put((tag, work))

    def arrived(self) -> list[tuple[int, str | None]]:
        """Tags of chunks in their slots, or why there will be no more."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.readable, 4096)
        found = []
        while self._arrived:
            found.append(self._arrived.popleft())
        return found

    def leave(self) -> None:
        """The thread ends when its present wait does."""
        self._expected.put(None)
        os.close(self.readable)

    def _run(self, lane: wire.Lane, on: str) -> None:
        device.use(on)
        try:
            while (item := self._expected.get()) is not None:
                tag, work = item
                del item
                try:
                    lane.wait(work)
                except RuntimeError as error:  # All of torch's.
                    self._arrived.append((tag, _first_line(error)))
                    self._wake()
                    return
                del work
                self._arrived.append((tag, None))
                self._wake()
        finally:
            os.close(self._signal)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # Full: it is awake. Closed: it has left.
            os.write(self._signal, b"\0")


def _first_line(error: RuntimeError) -> str:
    return f"the group failed: {str(error).splitlines()[0][:200]}"


def _description(description: bytes) -> Description:
    try:
        found = msgspec.msgpack.decode(description, type=Description)
    except MALFORMED as error:
        raise TransferError(f"no description of a collective offer: {error}") from None
    if found.version != wire.VERSION:
        raise TransferError(f"the sender speaks version {found.version}, we {wire.VERSION}")
    return found


def _segment_starts(memory: Memory, unit_bytes: int) -> Any:
    """The first unit of each segment, and the number of units at the end."""
    memory.units(unit_bytes)
    sizes = [s.blocks * (s.block_bytes // unit_bytes) for s in memory.segments]
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _check_units(units: Units, count: int, whose: str) -> None:
    if len(units) and not (units.min() >= 0 and units.max() < count):
        raise TransferError(f"a unit is outside {whose} {count}")
