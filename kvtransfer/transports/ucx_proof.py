"""Proof that a sender's memory can be read, one-sidedly: a cookie of it is, before anything else.

The cookie lies where the KV memory does, on the host or on the device, and is as large as a block,
so that UCX reads it the way it will read blocks. Where there is neither shared memory, CUDA IPC
nor RDMA, UCX emulates reads: its TCP asks the sender's processor for each, and that takes as long
as the sender's thread naps. There a stopped sender stalls reads, and a reader that leaves in
mid-read ends the sender's process (docs/adr/0004): so that path is refused.
"""

from __future__ import annotations

import ctypes
import secrets
import time
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kvtransfer import views
from kvtransfer.transports import device
from kvtransfer.transports.api import Memory, Progress, Segment, TransferError
from kvtransfer.transports.ucx_agents import OURS

if TYPE_CHECKING:
    from kvtransfer.transports.ucx_agents import Agent, Key, Member

VALUE_BYTES: Final = 16
COOKIE_BYTES: Final = 64 << 10
PROOF_S: Final = 3.0
"""For all of it: a connection of UCX's is made by the first read."""
NAP_S: Final = 0.001
READS: Final = 16
SWIFT: Final = 3
"""So many of the reads must be done within `SWIFT_S`."""
SWIFT_S: Final = 0.005
"""Half of the sender's nap (`ucx.PROGRESS_NAP_S`): a read that needs the sender takes a whole one.

One that does not takes microseconds, and a few milliseconds where two processes take turns on one
GPU or core.
"""


class Cookie:
    """Memory of this process with a value known to whoever was told: who reads it reads the rest.

    Filled with its value over and over.
    """

    def __init__(self, on: str) -> None:
        self.value = secrets.token_bytes(VALUE_BYTES)
        filled = self.value * (COOKIE_BYTES // VALUE_BYTES)
        self._kept: Any
        if on == device.HOST:
            self._kept = ctypes.create_string_buffer(filled, COOKIE_BYTES)
            address = ctypes.addressof(self._kept)
        else:
            import torch

            host = torch.frombuffer(bytearray(filled), dtype=torch.uint8)
            self._kept = host.to(on)
            device.settle(on)  # Whoever reads it does not wait for a stream of ours.
            address = self._kept.data_ptr()
        self.memory = memory_of(address, on)

    def content(self) -> bytes:
        """All that it holds now."""
        (segment,) = self.memory.segments
        on = self.memory.device
        if on == device.HOST:
            return views.array(segment.base, COOKIE_BYTES).tobytes()
        found: bytes = self._kept.cpu().numpy().tobytes()
        return found

    def holds(self, value: bytes) -> bool:
        return self.content() == value * (COOKIE_BYTES // VALUE_BYTES)


def memory_of(address: int, on: str) -> Memory:
    """A cookie's, as one block."""
    return Memory((Segment(address, COOKIE_BYTES, COOKIE_BYTES, 1),), on)


def prove(
    agent: Agent, member: Member, ours: Cookie, theirs: Memory, value: bytes, *, one_sided: bool
) -> None:
    """Read the sender's cookie, at `theirs`, a few times over.

    Raises `TransferError`, within `PROOF_S`. `ours` is registered with the agent. Afterwards the
    connection stands, it is to the process that we were told of, and, if `one_sided` is asked for,
    reads need nothing of it.
    """
    keys = (
        agent.prepare(OURS, ours.memory, COOKIE_BYTES),
        agent.prepare(member.sender, theirs, COOKIE_BYTES),
    )
    until = time.monotonic() + PROOF_S
    swift, took = 0, []
    for _ in range(READS):
        took.append(_read(agent, member, keys, until))
        if len(took) == 1 and not ours.holds(value):
            raise TransferError(f"not the sender described, at agent {member.sender}")
        swift += took[-1] < SWIFT_S
        if swift == SWIFT or not one_sided:
            return
    raise TransferError(
        f"neither shared memory, CUDA IPC nor RDMA leads to agent {member.sender}: reads of "
        f"{COOKIE_BYTES} bytes wait for the sender's thread, {sorted(took)[READS // 2]:.4f} s each"
    )


def _read(agent: Agent, member: Member, keys: tuple[Key, Key], until: float) -> float:
    """One read of the cookie; its seconds."""
    only = np.zeros(1, dtype=np.int32)
    began = time.monotonic()
    read = agent.start(member, keys, only, only)
    while (progress := agent.poll(read)) is Progress.PENDING:
        now = time.monotonic()
        if now > until:
            raise TransferError(f"no answer at agent {member.sender}")
        if now > began + SWIFT_S:
            time.sleep(NAP_S)
    if progress is Progress.FAILED:
        raise TransferError(f"no answer at agent {member.sender}: {agent.over}")
    return time.monotonic() - began
