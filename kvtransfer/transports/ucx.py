"""One-sided reads over UCX, driven by NIXL: shared memory here, RDMA and NVLink there."""

from __future__ import annotations

import threading
import uuid
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

NAME = "ucx"
PROGRESS_NAP_S: Final = 0.01


class Progress(Enum):
    """Of one read."""

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


class Description(msgspec.Struct, frozen=True, array_like=True):
    """Memory that can be read, and the agent to read it from."""

    agent: bytes
    segments: list[Segment]


class UcxMemory:
    """This process's KV memory: registered once for an offer, once for each peer to read from."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = list(segments)

    @property
    def segments(self) -> list[Segment]:
        return self._segments


class UcxOffer:
    """KV memory that peers may read, until `close`."""

    def __init__(self, memory: UcxMemory) -> None:
        self._agent = _agent()
        _register(self._agent, memory.segments)
        self.description = msgspec.msgpack.encode(
            Description(self._agent.get_agent_metadata(), memory.segments)
        )
        self._closing = threading.Event()
        # Reads need nothing of us, but a new peer's connection does, and an engine computes for
        # seconds without asking after anybody. NIXL's own thread would spin: a whole core.
        self._thread = threading.Thread(target=self._answer, name="kv-connections", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._agent = None

    def _answer(self) -> None:
        while not self._closing.wait(PROGRESS_NAP_S):
            self._agent.get_new_notifs()  # What moves a NIXL agent on.


class UcxPeer:
    """Reads from one sender, through an agent of its own: destroying it is the fence."""

    def __init__(self, memory: UcxMemory, description: bytes) -> None:
        """Connect. Raises ValueError when the two memories are not shaped alike."""
        theirs = msgspec.msgpack.decode(description, type=Description)
        ours = memory.segments
        if [s.block_bytes for s in ours] != [s.block_bytes for s in theirs.segments]:
            raise ValueError("the sender's KV layers have other block sizes than the receiver's")
        self._layers = len(ours)
        self._blocks = (ours[0].blocks, theirs.segments[0].blocks)
        self._agent: Any = _agent()
        _register(self._agent, ours)
        self._name = self._agent.add_remote_agent(theirs.agent)
        self._local = self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", _blocks(ours), "DRAM")
        self._remote = self._agent.prep_xfer_dlist(self._name, _blocks(theirs.segments), "DRAM")

    def read(self, local: Sequence[int], remote: Sequence[int]) -> Any:
        """Start to copy the sender's blocks `remote` into our blocks `local`, all layers.

        Raises ValueError for blocks that do not exist.
        """
        import numpy as np

        ours, theirs = self._blocks
        if any(not 0 <= b < theirs for b in remote) or any(not 0 <= b < ours for b in local):
            raise ValueError("a block id is out of range")
        here = [layer * ours + b for layer in range(self._layers) for b in local]
        there = [layer * theirs + b for layer in range(self._layers) for b in remote]
        handle = self._agent.make_prepped_xfer(
            "READ",
            self._local,
            np.asarray(here, dtype=np.int32),
            self._remote,
            np.asarray(there, dtype=np.int32),
        )
        self._agent.transfer(handle)
        return handle

    def poll(self, handle: Any) -> Progress:
        """DONE and FAILED mean that nothing more of this read can land."""
        try:
            state = self._agent.check_xfer_state(handle)
        except Exception:  # noqa: BLE001  # NIXL's errors share no base class.
            return Progress.FAILED
        if state == "DONE":
            self._agent.release_xfer_handle(handle)
            return Progress.DONE
        return Progress.FAILED if state == "ERR" else Progress.PENDING

    def fence(self) -> None:
        """Returns when nothing more can land; the peer is of no use afterwards.

        Nothing less does it: releasing a handle or deregistering memory leaves a stalled read
        to land whenever the sender wakes.
        """
        self._local = self._remote = None
        self._agent = None


def _agent() -> Any:
    from nixl._api import nixl_agent, nixl_agent_config

    config = nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
    return nixl_agent(uuid.uuid4().hex, config)


def _register(agent: Any, segments: Sequence[Segment]) -> None:
    spans = [(s.base, s.stride * (s.blocks - 1) + s.block_bytes, 0, "") for s in segments]
    agent.register_memory(spans, "DRAM")


def _blocks(segments: Sequence[Segment]) -> list[tuple[int, int, int]]:
    return [(s.base + i * s.stride, s.block_bytes, 0) for s in segments for i in range(s.blocks)]
