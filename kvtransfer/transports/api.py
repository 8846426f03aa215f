"""What a transport is: reads from a peer's memory, and a way to be sure they are over.

Sender side: `offer` makes a process's KV memory readable and describes it in bytes; whoever has the
bytes may read until the offer is closed. Receiver side: `connect` makes a `Peer` of a description;
`read` starts to copy, `poll` moves it on and tells how it stands, `fence` returns only when nothing
more can land in our memory.

Memory is counted in *units*: equal pieces of `unit_bytes`, which every block of every segment is a
whole number of. Unit 0 is the first piece of the first block of the first segment; pieces come
before blocks, blocks before segments. Both sides count alike, so one list of unit numbers a side
says everything of a read, whatever the two sides' block sizes and head splits are.

An `Offer` may have threads of its own. A `Peer` belongs to one thread and starts none that writes
into our memory after `fence`. Nothing is ever written into a peer's memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Units = NDArray[np.int32]


UNITS_MAX: Final = (1 << 31) - 1
"""Units' numbers are 32-bit: 16 TiB of memory in units of 8 KiB."""


class TransferError(Exception):
    """Expected: a peer can't be reached, read, or understood; the message names both sides."""


class Progress(Enum):
    """Of one read. DONE and FAILED mean that nothing more of this read can land."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """Equal, evenly spaced blocks of one layer. Block `i` starts at `base + i * stride`."""

    base: int
    """Address in its process."""
    stride: int
    """Bytes from one block to the next."""
    block_bytes: int
    blocks: int


@dataclass(frozen=True, slots=True)
class Memory:
    """One engine rank's KV memory: a segment a layer. Whoever owns the bytes keeps them alive."""

    segments: tuple[Segment, ...]
    device: str = "cpu"
    """`cpu`, or a torch device such as `cuda:0`."""

    def units(self, unit_bytes: int) -> int:
        """How many there are. Raises `TransferError` where blocks are no whole number of them,
        and where there are more than `UNITS_MAX`."""
        if unit_bytes < 1 or any(s.block_bytes % unit_bytes for s in self.segments):
            sizes = sorted({s.block_bytes for s in self.segments})
            raise TransferError(f"blocks of {sizes} bytes are no whole units of {unit_bytes}")
        units = sum(s.blocks * (s.block_bytes // unit_bytes) for s in self.segments)
        if units > UNITS_MAX:
            raise TransferError(
                f"this memory has {units} units of {unit_bytes} bytes, and {UNITS_MAX} can be "
                "numbered"
            )
        return units

    def addresses(self, unit_bytes: int) -> NDArray[np.int64]:
        """Where each unit starts; shape (units,)."""
        import numpy as np

        self.units(unit_bytes)
        found = []
        for s in self.segments:
            blocks = s.base + np.arange(s.blocks, dtype=np.int64) * s.stride
            pieces = np.arange(0, s.block_bytes, unit_bytes, dtype=np.int64)
            found.append((blocks[:, None] + pieces[None, :]).reshape(-1))
        return np.concatenate(found)


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a transport can do, for whoever chooses one."""

    one_sided: bool
    """The sender computes on undisturbed while it is read."""
    cuda: bool
    """Device memory can be read and written."""
    needs: str
    """What must be there, in words: for messages."""


class Offer(Protocol):
    """Memory that peers may read, until `close`."""

    @property
    def description(self) -> bytes:
        """For `connect`, at the other side: opaque, a few KiB at most besides its segments."""

    def close(self) -> None: ...


class Peer(Protocol):
    """One sender's memory, as one thread of ours reads it."""

    def read(self, local: Units, remote: Units) -> Any:
        """Start to copy the sender's units `remote` into our units `local`, in pairs.

        Returns a handle for `poll`. Raises `TransferError` for a unit that does not exist, and
        when the peer is fenced or known to be gone; then nothing has been started.
        """

    def poll(self, handle: Any) -> Progress:
        """Move the read on, without waiting. After DONE or FAILED the handle is spent."""

    def descriptors(self) -> list[int]:
        """File descriptors that become readable when a `poll` may bring something on.

        Empty: there is none to wait for, so poll by the clock while something is pending.
        """

    def fence(self) -> None:
        """Returns when nothing more can land in our memory; the peer is of no use afterwards.

        Well under a second, whatever the sender does: stopped, dead, or unreachable. Again is
        harmless.
        """


class Transport(Protocol):
    """One way to move bytes between two processes."""

    name: str
    abilities: Abilities

    def missing(self, memory: Memory) -> str | None:
        """Why it can't serve this memory in this process (a package, a device); None if it can."""

    def offer(self, memory: Memory) -> Offer:
        """Make it readable. Raises `TransferError`."""

    def reaches(self, description: bytes) -> bool:
        """Whether it may be fit to read what the description describes, from this process.

        `ucx`, say, answers no where two hosts have neither memory in common nor RDMA devices:
        sockets of our own are faster there. A yes is a reason to try: `connect` proves it.
        """

    def connect(self, memory: Memory, description: bytes, unit_bytes: int) -> Peer:
        """Be able to read it. Raises `TransferError`, within seconds."""
