"""What the transports are measured beside: NIXL bare, two plain sockets, and memcpy."""

from __future__ import annotations

import mmap
import os
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec
import numpy as np

from kvtransfer import views

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvtransfer.transports.api import Memory, Units

    Copy = Callable[[Units, Units], None]
    """Bring the sender's units into ours, and return when they are there."""

NAP_S: Final = 0.01
HANG_S: Final = 60.0
IOV_MAX: Final = 1024
_HEAD = struct.Struct("<I")


class Source(Protocol):
    @property
    def description(self) -> bytes: ...

    def close(self) -> None: ...


# ---------------------------------------------------------------- NIXL


class NixlSource:
    """An agent with its memory registered, as NIXL's own examples do it."""

    def __init__(self, memory: Memory, *, progress_thread: bool) -> None:
        self._agent = _agent("sender", progress_thread)
        addresses = [(s.base, views.span_bytes(s), 0, "") for s in memory.segments]
        self._agent.register_memory(addresses, "DRAM")
        spans = [(s.base, s.stride, s.block_bytes, s.blocks) for s in memory.segments]
        self.description = msgspec.msgpack.encode((self._agent.get_agent_metadata(), spans))
        self._closing = threading.Event()
        if not progress_thread:
            threading.Thread(target=self._answer, daemon=True).start()

    def close(self) -> None:
        self._closing.set()

    def _answer(self) -> None:
        """A connection needs the target to be moved on; that is all this is for."""
        while not self._closing.wait(NAP_S):
            self._agent.get_new_notifs()


def nixl_copy(memory: Memory, description: bytes, unit_bytes: int, progress_thread: bool) -> Copy:
    metadata, spans = msgspec.msgpack.decode(description)
    agent = _agent(f"reader-{unit_bytes}", progress_thread)
    addresses = [(s.base, views.span_bytes(s), 0, "") for s in memory.segments]
    agent.register_memory(addresses, "DRAM")
    name = agent.add_remote_agent(metadata)
    theirs = [
        (base + block * stride + piece, unit_bytes, 0)
        for base, stride, size, blocks in spans
        for block in range(blocks)
        for piece in range(0, size, unit_bytes)
    ]
    ours = [(a, unit_bytes, 0) for a in memory.addresses(unit_bytes).tolist()]
    local_list = agent.prep_xfer_dlist("NIXL_INIT_AGENT", ours, "DRAM")
    remote_list = agent.prep_xfer_dlist(name, theirs, "DRAM")

    def copy(local: Units, remote: Units) -> None:
        handle = agent.make_prepped_xfer("READ", local_list, local, remote_list, remote)
        state = agent.transfer(handle)
        until = time.monotonic() + HANG_S
        while state == "PROC" and time.monotonic() < until:
            state = agent.check_xfer_state(handle)
        if state != "DONE":
            raise RuntimeError(f"NIXL says {state}")
        agent.release_xfer_handle(handle)

    return copy


def _agent(name: str, progress_thread: bool) -> Any:
    from nixl._api import nixl_agent, nixl_agent_config

    config = nixl_agent_config(enable_prog_thread=progress_thread, backends=["UCX"])
    return nixl_agent(f"{name}-{os.getpid()}", config)


# ---------------------------------------------------------------- two sockets


class SocketSource:
    """Sends the units that a reader lists, with `sendmsg`, straight from memory."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.description = msgspec.msgpack.encode(self._listener.getsockname())
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # Wakes the thread that accepts.
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            (unit_bytes,) = _HEAD.unpack(_exactly(connection, _HEAD.size))
            places = _Places(self._memory, unit_bytes)
            while head := _exactly(connection, _HEAD.size):
                (size,) = _HEAD.unpack(head)
                wanted = np.frombuffer(_exactly(connection, size), dtype=np.int32)
                _all(places.of(wanted), connection.sendmsg)


class SocketCopy:
    """Asks for units and takes them, with `recvmsg_into`, straight to memory."""

    def __init__(self, memory: Memory, description: bytes, unit_bytes: int) -> None:
        host, port = msgspec.msgpack.decode(description)
        self._connection = socket.create_connection((host, port), HANG_S)
        self._connection.settimeout(None)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection.sendall(_HEAD.pack(unit_bytes))
        self._places = _Places(memory, unit_bytes)

    def __call__(self, local: Units, remote: Units) -> None:
        wanted = remote.astype(np.int32).tobytes()
        self._connection.sendall(_HEAD.pack(len(wanted)) + wanted)
        _all(self._places.of(local), lambda parts: self._connection.recvmsg_into(parts)[0])

    def close(self) -> None:
        self._connection.close()


class _Places:
    """Units as buffers; neighbours become one."""

    def __init__(self, memory: Memory, unit_bytes: int) -> None:
        self._addresses = memory.addresses(unit_bytes)
        self._unit_bytes = unit_bytes

    def of(self, units: Units) -> list[memoryview]:
        addresses = self._addresses[units]
        breaks = np.flatnonzero(np.diff(addresses) != self._unit_bytes) + 1
        starts = [0, *breaks.tolist()]
        ends = [*breaks.tolist(), len(units)]
        return [
            views.array(int(addresses[a]), (b - a) * self._unit_bytes).data
            for a, b in zip(starts, ends, strict=True)
        ]


def _all(parts: list[memoryview], move: Callable[[Sequence[memoryview]], int]) -> None:
    """Move every part, some at a time."""
    at = 0
    while at < len(parts):
        moved = move(parts[at : at + IOV_MAX])
        if not moved:
            raise RuntimeError("the other side hung up")
        while moved:
            if moved < len(parts[at]):
                parts[at] = parts[at][moved:]
                break
            moved -= len(parts[at])
            at += 1


def _exactly(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        data = connection.recv(size - len(found))
        if not data:
            return b""
        found += data
    return found


# ---------------------------------------------------------------- memcpy


class SharedSource:
    """Memory that both processes map; nobody sends anything."""

    def __init__(self, memory: Memory) -> None:
        size = sum(s.block_bytes * s.blocks for s in memory.segments)
        self._file = os.memfd_create("memcpy")
        os.ftruncate(self._file, size)
        self._map = mmap.mmap(self._file, size)
        shared = np.frombuffer(self._map, np.uint8)
        first = memory.segments[0]
        shared[:] = views.array(first.base, size)
        self.description = f"/proc/{os.getpid()}/fd/{self._file}".encode()

    def close(self) -> None:
        os.close(self._file)


def memcpy(memory: Memory, description: bytes, unit_bytes: int) -> Copy:
    """Whole runs only: the first unit of each list says where it starts."""
    size = sum(s.block_bytes * s.blocks for s in memory.segments)
    with open(description.decode(), "rb") as file:
        source = np.frombuffer(mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ), np.uint8)
    target = views.array(memory.segments[0].base, size)

    def copy(local: Units, remote: Units) -> None:
        count = len(local) * unit_bytes
        to, at = int(local[0]) * unit_bytes, int(remote[0]) * unit_bytes
        target[to : to + count] = source[at : at + count]

    return copy
