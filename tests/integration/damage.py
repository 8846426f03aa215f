"""Bytes of a sender's KV memory, turned over from outside its process."""

from __future__ import annotations

import ctypes
import os
import time
from typing import TYPE_CHECKING, TypeVar

import msgspec
import zmq

from kvtransfer.protocol import (
    VERSION,
    Blocks,
    Follow,
    Layout,
    Open,
    Opened,
    Sealed,
    ToReceiver,
    decode_ticket,
)
from kvtransfer.transports.ucx import UcxDescription

if TYPE_CHECKING:
    from workers.api import WorkerHello

T = TypeVar("T")


class _Piece(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]


def damage(sender: WorkerHello, ticket: bytes) -> int:
    """Flip the first byte of every block that the ticket's handle has, in its first layer.

    The prompt must be sealed. We learn where it is as a receiver does, and leave the lease alone.
    Returns how many blocks there were.
    """
    told = decode_ticket(ticket)
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(told.endpoint)
    try:
        socket.send(msgspec.msgpack.encode(Open(1, VERSION, _layout(sender), 0)))
        opened = _next(socket, Opened)
        socket.send(msgspec.msgpack.encode(Follow(2, told.epoch, told.handle, 0, 1)))
        blocks = _next(socket, Blocks)
        _next(socket, Sealed)
    finally:
        socket.close(linger=0)
        context.term()
    description = next(r.description for r in opened.regions[0] if r.transport == "ucx")
    memory = msgspec.msgpack.decode(description, type=UcxDescription)
    first = memory.segments[0]
    for block in blocks.block_ids:
        _flip(memory.pid, first.base + block * first.stride)
    return len(blocks.block_ids)


def _layout(hello: WorkerHello) -> Layout:
    """As the worker told the router, in the one string by which workers are paired."""
    content, dtype, heads, head_token_bytes, *_ = hello.kv_digest.split("/")
    size = hello.block_bytes // (int(heads) * int(head_token_bytes) * hello.block_tokens)
    return Layout(
        content, dtype, size, int(heads), int(head_token_bytes), hello.block_tokens,
        ranks=1, by_head=True, by_token=False,
    )  # fmt: skip


def _next(socket: zmq.Socket[bytes], kind: type[T]) -> T:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if socket.poll(200):
            message = msgspec.msgpack.decode(socket.recv(), type=ToReceiver)
            if isinstance(message, kind):
                return message
    raise AssertionError(f"the sender does not answer with {kind.__name__}")


def _flip(pid: int, address: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    byte = ctypes.create_string_buffer(1)
    here = _Piece(ctypes.addressof(byte), 1)
    there = _Piece(address, 1)
    for call in (libc.process_vm_readv, libc.process_vm_writev):
        done = call(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        assert done == 1, os.strerror(ctypes.get_errno())
        byte[0] = bytes([byte.raw[0] ^ 0xFF])
