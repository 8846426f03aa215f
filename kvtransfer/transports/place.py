"""Where a process runs, so that another can tell what they share."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import msgspec


class Place(msgspec.Struct, frozen=True, array_like=True):
    """Empty strings where the platform does not tell: such a place is like no other."""

    boot: str
    """One value for each start of a kernel: the same for all containers of a machine."""
    pid_ns: str
    net_ns: str
    rdma: bool


def here() -> Place:
    return Place(
        boot=_read("/proc/sys/kernel/random/boot_id"),
        pid_ns=_link("/proc/self/ns/pid"),
        net_ns=_link("/proc/self/ns/net"),
        rdma=_any_in("/sys/class/infiniband"),
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _any_in(folder: str) -> bool:
    try:
        return bool(os.listdir(folder))
    except OSError:
        return False


def can_read(pid: int, address: int, value: bytes) -> bool:
    """Whether this process may read that one's memory (CMA), and it is the one we think it is."""
    got = ctypes.create_string_buffer(len(value))
    ours = _Iovec(ctypes.addressof(got), len(value))
    theirs = _Iovec(address, len(value))
    try:
        read = ctypes.CDLL(None).process_vm_readv
    except AttributeError:
        return False  # Not Linux.
    read.restype = ctypes.c_ssize_t
    moved = read(pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
    return moved == len(value) and got.raw == value


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))
