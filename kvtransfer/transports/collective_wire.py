"""What the two sides of `collective` share: control frames, and a private process group of two."""

from __future__ import annotations

import struct
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import msgspec

from kvtransfer.protocol import MALFORMED
from kvtransfer.transports.api import TransferError
from kvtransfer.transports.device import settle

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from kvtransfer.transports.strangers import Deadline

VERSION: Final = 1
SLOTS: Final = 4
SLOT_BYTES: Final = 4 << 20
"""Staging is SLOTS buffers of this size a side and pair, or of one unit, where that is larger."""
UNIT_BYTES_MAX: Final = 64 << 20
UNITS_PER_SLOT_MAX: Final = 16384
FRAME_BYTES_MAX: Final = 4 * UNITS_PER_SLOT_MAX + 4096
ANSWER_S: Final = 5.0
STALL_S: Final = 30.0
"""A chunk under way for so long means that the group is of no use."""
SENDER, READER = 0, 1
WARM_TAG: Final = 0

_HEAD = struct.Struct("<I")


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=True):
    version: int
    token: bytes
    unit_bytes: int


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """To `Hello`: meet me at this store, on the host that you have reached me by."""

    store_port: int


class Want(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Send these units, int32 little-endian, as one chunk with this tag."""

    tag: int
    units: bytes


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=True):
    reason: str


ToOffer = Hello | Want
ToPeer = Ready | Refused


def units_per_slot(unit_bytes: int) -> int:
    """Raises `TransferError` where one unit is more than a slot may grow to."""
    if not 0 < unit_bytes <= UNIT_BYTES_MAX:
        raise TransferError(f"units of {unit_bytes} bytes: 1 to {UNIT_BYTES_MAX} are possible")
    return min(UNITS_PER_SLOT_MAX, max(1, SLOT_BYTES // unit_bytes))


def slots(unit_bytes: int, device: str) -> list[Any]:
    """Staging buffers: flat tensors of bytes."""
    import torch

    size = units_per_slot(unit_bytes) * unit_bytes
    found = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
    settle(device)  # They are used on other streams than what was freed here may still be.
    return found


# ---------------------------------------------------------------- frames


def frame(message: ToOffer | ToPeer) -> bytes:
    body = msgspec.msgpack.encode(message)
    assert len(body) <= FRAME_BYTES_MAX
    return _HEAD.pack(len(body)) + body


def decode(buffer: bytearray, kind: Any, most: int = FRAME_BYTES_MAX) -> Any:
    """The first frame of `buffer`, taken out of it; None while it is not all there."""
    if len(buffer) < _HEAD.size:
        return None
    (size,) = _HEAD.unpack_from(buffer)
    if size > most:
        raise TransferError(f"a control frame of {size} bytes; {most} are allowed")
    end = _HEAD.size + size
    if len(buffer) < end:
        return None
    body = bytes(buffer[_HEAD.size : end])
    del buffer[:end]
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except MALFORMED as error:
        raise TransferError(f"a control frame is not readable: {error}") from None


def receive(
    connection: socket.socket,
    buffer: bytearray,
    kind: Any,
    deadline: Deadline | None = None,
    most: int = FRAME_BYTES_MAX,
) -> Any:
    """Wait for a frame, as long as the socket's timeout says; None when the other side left.

    With a deadline, for all of it and not for each of its pieces.
    """
    while (message := decode(buffer, kind, most)) is None:
        try:
            if deadline is not None:
                connection.settimeout(deadline.left_s())
            data = connection.recv(65536)
        except OSError as error:
            raise TransferError(f"the control connection failed: {error}") from None
        if not data:
            return None
        buffer += data
    return message


def keep_alive(connection: socket.socket) -> None:
    """A host that vanished closes nothing: ask after it, and give it up after some 3 s."""
    import socket

    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 1), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 2)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


# ---------------------------------------------------------------- groups


def unfit(backend: str, device: str) -> str | None:
    """Why this process can't form such a group for memory of this device."""
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed"
    distributed = torch.distributed
    if not distributed.is_available():
        return "this PyTorch is built without torch.distributed"
    if backend == "nccl":
        if not distributed.is_nccl_available():
            return "this PyTorch is built without NCCL"
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        return None if device.startswith("cuda") else f"NCCL can't read memory of {device}"
    if backend != "gloo":
        return f"there is no backend {backend!r}: gloo and nccl are"
    if not distributed.is_gloo_available():
        return "this PyTorch is built without gloo"
    return None if device == "cpu" else f"gloo can't read memory of {device}"


class Lane:
    """One member's sends and receives in a private group of two.

    The group is an object of its own over a store of its own. The default group, and all that
    `torch.distributed`'s functions know by name, are the engine's.
    """

    def __init__(self, store: Any, rank: int, backend: str, device: str, host: str) -> None:
        """Form it. Raises `TransferError` when the other does not come within seconds."""
        import torch
        from torch.distributed import PrefixStore

        self._other = READER if rank == SENDER else SENDER
        self._cuda = backend == "nccl"
        # Two streams: a copy must not queue behind the wait for a chunk that has not come.
        self._copies = torch.cuda.Stream(device) if self._cuda else None
        self._waits = torch.cuda.Stream(device) if self._cuda else None
        try:
            named = PrefixStore("pair", store)
            self._group = _nccl(named, rank) if self._cuda else _gloo(named, rank, host)
            self._warm(rank, device)
        except RuntimeError as error:
            raise TransferError(f"no {backend} group of two was formed: {error}") from None

    def send(self, tensor: Any, tag: int) -> Any:
        return self._group.send([tensor], self._other, tag)

    def receive(self, tensor: Any, tag: int) -> Any:
        return self._group.recv([tensor], self._other, tag)

    def wait(self, work: Any) -> None:
        """Until a chunk is through. Raises RuntimeError, at the latest after STALL_S.

        May be called by another thread than the one that began it.
        """
        import torch

        if self._waits is None:
            work.wait(timedelta(seconds=STALL_S))
            return
        # NCCL's wait only orders streams; the host's wait is for that stream.
        with torch.cuda.stream(self._waits):
            work.wait(timedelta(seconds=STALL_S))
        self._waits.synchronize()

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Where copies belong that precede a send, or that must be over at the end of it."""
        if self._copies is None:
            yield
            return
        import torch

        with torch.cuda.stream(self._copies):
            yield

    def copied(self) -> None:
        """Returns when the copies are in memory; microseconds for a slot's worth."""
        if self._copies is not None:
            self._copies.synchronize()

    def abandon(self) -> None:
        """End what is under way, where the library can: gloo's pending waits end by STALL_S."""
        if self._cuda:
            self._group.abort()

    def _warm(self, rank: int, device: str) -> None:
        """The first bytes form NCCL's communicator, and show to both sides that it works."""
        import torch

        byte = torch.zeros(1, dtype=torch.uint8, device=device)
        begin = self.send if rank == SENDER else self.receive
        work = begin(byte, WARM_TAG)
        if self._cuda:
            self.wait(work)
        else:
            work.wait(timedelta(seconds=ANSWER_S))


def _gloo(store: Any, rank: int, host: str) -> Any:
    from torch.distributed import ProcessGroupGloo

    options = ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=ANSWER_S)
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    return ProcessGroupGloo(store, rank, 2, options)


def _nccl(store: Any, rank: int) -> Any:
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=STALL_S)
    return ProcessGroupNCCL(store, rank, 2, options)


def serve_store(host: str) -> tuple[Any, int]:
    """A store to meet at, listening on this address only, and its port.

    Left to itself the library listens on every address.
    """
    import socket

    from torch.distributed import TCPStore

    listener = socket.create_server((host, 0))
    port: int = listener.getsockname()[1]
    store = TCPStore(
        host, port, is_master=True, wait_for_workers=False,
        timeout=timedelta(seconds=ANSWER_S), master_listen_fd=listener.detach(),
    )  # fmt: skip
    return store, port


def join_store(host: str, port: int) -> Any:
    """Raises `TransferError` when nobody serves it."""
    from torch.distributed import TCPStore

    try:
        return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=ANSWER_S))
    except RuntimeError as error:
        raise TransferError(f"the store at {host}:{port} does not answer: {error}") from None
