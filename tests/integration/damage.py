"""Bytes of a sender's KV memory, turned over from outside its process."""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import TYPE_CHECKING

import msgspec
import zmq

from kvtransfer.protocol import VERSION, Group, Layout, Open, Opened, ToReceiver
from kvtransfer.transports.ucx import UcxDescription

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workers.api import WorkerHello


class _Piece(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]


@contextlib.contextmanager
def damaged(sender: WorkerHello) -> Iterator[None]:
    """Inside, the first byte of every block in the first layer is another.

    Where the memory is we learn as a receiver does.
    """
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(sender.handoff_endpoint)
    try:
        socket.send(msgspec.msgpack.encode(Open(1, VERSION, _layout(sender), 0)))
        assert socket.poll(10_000), "the sender does not answer"
        opened = msgspec.msgpack.decode(socket.recv(), type=ToReceiver)
        assert isinstance(opened, Opened), opened
    finally:
        socket.close(linger=0)
        context.term()
    description = next(r.description for r in opened.regions[0] if r.transport == "ucx")
    memory = msgspec.msgpack.decode(description, type=UcxDescription)
    first = memory.segments[0]
    addresses = [first.base + block * first.stride for block in range(first.blocks)]
    for address in addresses:
        _flip(memory.pid, address)
    yield
    for address in addresses:
        _flip(memory.pid, address)


def _layout(hello: WorkerHello) -> Layout:
    """As the worker told the router, in the one string by which workers are paired."""
    content, dtype, heads, head_token_bytes, *_ = hello.kv_digest.split("/")
    size = int(heads) * int(head_token_bytes) * hello.block_tokens
    layers = hello.block_bytes // size
    group = Group("full_attention", 0, hello.block_tokens, list(range(layers)))
    return Layout(
        content, dtype, int(heads), int(head_token_bytes), ranks=1, by_head=True, by_token=False,
        groups=[group], segments=[size] * layers,
    )  # fmt: skip


def _flip(pid: int, address: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    byte = ctypes.create_string_buffer(1)
    here = _Piece(ctypes.addressof(byte), 1)
    there = _Piece(address, 1)
    for call in (libc.process_vm_readv, libc.process_vm_writev):
        done = call(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        assert done == 1, os.strerror(ctypes.get_errno())
        byte[0] = bytes([byte.raw[0] ^ 0xFF])
