"""One-sided reads over UCX, driven by NIXL: shared memory here, RDMA and NVLink there."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any, Final

import msgspec

from kvtransfer.transports import device, place
from kvtransfer.transports import ucx_agents as agents
from kvtransfer.transports.api import Abilities, Memory, Progress, Segment, TransferError
from kvtransfer.transports.ucx_agents import OURS, Agent, Options, Read
from kvtransfer.transports.ucx_proof import Cookie, memory_of, prove
from kvtransfer.transports.unit_views import check_range

if TYPE_CHECKING:
    from kvtransfer.transports.api import Units
    from kvtransfer.transports.ucx_agents import Key, Member

NAME: Final = "ucx"
VERSION: Final = 2
PROGRESS_NAP_S: Final = 0.01


class UcxDescription(msgspec.Struct, frozen=True, array_like=True):
    """Memory that can be read, and the agent to read it from."""

    version: int
    name: str
    """The agent's."""
    agent: bytes
    segments: tuple[Segment, ...]
    device: str
    place: place.Place
    pid: int
    cookie_address: int
    """On the same device."""
    cookie: bytes


class UcxTransport:
    """NIXL agents: one for each offer; for each peer, or, on a device, for all peers together."""

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
        shared: bool | None = None,
    ) -> None:
        """`tls`: UCX's transports, as UCX_TLS has them; its own choice by default. Of `tcp` alone
        beware: there a reader that goes away in mid-read ends the sender's process.

        `progress_thread`: NIXL's, which spins (docs/adr/0002). `reaches`: what to answer, for
        whoever knows better than we can find out; with True nothing is proved at connecting.
        `shared`: one agent for all peers, also on the host; by default on devices only.
        """
        self._options = Options(progress_thread, backends, tls)
        self._reaches = reaches
        self._shared = shared
        self._agents: dict[Memory, Agent] = {}
        """Agents that are shared. Connecting threads take turns to make them."""
        self._lock = threading.Lock()

    def missing(self, memory: Memory) -> str | None:
        try:
            agents.errors()
            agents.kind(memory)
        except (ImportError, TransferError) as error:
            return f"ucx needs nixl, and cpu or cuda memory: {error}"
        return None

    def offer(self, memory: Memory) -> UcxOffer:
        return UcxOffer(memory, self._options)

    def reaches(self, description: bytes) -> bool:
        """Whether connecting is worth a try: `connect` proves it."""
        try:
            theirs = _decode(description)
        except TransferError:
            return False
        if self._reaches is not None:
            return self._reaches
        here = place.here()
        if theirs.device != device.HOST or (here.rdma and theirs.place.rdma):
            return True
        same = bool(here.boot and here.pid_ns) and (here.boot, here.pid_ns) == (
            theirs.place.boot,
            theirs.place.pid_ns,
        )
        return same and place.can_read(theirs.pid, theirs.cookie_address, theirs.cookie)

    def connect(self, memory: Memory, description: bytes, unit_bytes: int) -> UcxPeer:
        theirs = _decode(description)
        agents.kind(memory)
        with device.on(memory.device):
            if self._shared or (self._shared is None and memory.device != device.HOST):
                return self._connect_shared(memory, theirs, unit_bytes)
            ours = Cookie(memory.device)
            agent = Agent(memory, self._options, (ours.memory,))
            return UcxPeer(agent, self._join(agent, theirs, ours), theirs, unit_bytes)

    def _connect_shared(self, memory: Memory, theirs: UcxDescription, unit_bytes: int) -> UcxPeer:
        # Through an agent of its own: a sender that does not answer must end no other's reads.
        ours = Cookie(memory.device)
        alone = Agent(ours.memory, self._options)
        alone.leave(self._join(alone, theirs, ours))
        for last in (False, True):
            agent = self._shared_agent(memory)
            try:
                member = agent.join(theirs.name, theirs.agent)
                return UcxPeer(agent, member, theirs, unit_bytes)
            except TransferError:
                # Another's fence may have ended the agent meanwhile: then there is a new one.
                if last or agent.over is None:
                    raise
        raise AssertionError("unreachable")

    def _shared_agent(self, memory: Memory) -> Agent:
        with self._lock:
            agent = self._agents.get(memory)
            if agent is None or agent.over is not None:
                agent = self._agents[memory] = Agent(memory, self._options)
            return agent

    def _join(self, agent: Agent, theirs: UcxDescription, ours: Cookie) -> Member:
        """Prove that the sender can be read, unless whoever configured us knows."""
        member = agent.join(theirs.name, theirs.agent)
        try:
            there = memory_of(theirs.cookie_address, theirs.device)
            prove(agent, member, ours, there, theirs.cookie, one_sided=not self._reaches)
        except TransferError:
            agent.leave(member)
            raise
        return member


class UcxOffer:
    """KV memory that peers may read, until `close`."""

    def __init__(self, memory: Memory, options: Options) -> None:
        self._device = memory.device
        reason = ""
        try:
            with device.on(memory.device):
                self._cookie = Cookie(memory.device)
                self._agent: Any = agents.bare_agent(memory, options, (self._cookie.memory,))
                metadata = self._agent.get_agent_metadata()
        except agents.errors() as error:
            reason = f"ucx can't offer this memory: {error!r}"
        if reason:
            raise TransferError(reason)
        (there,) = self._cookie.memory.segments
        self.description = msgspec.msgpack.encode(
            UcxDescription(
                VERSION, self._agent.name, metadata, memory.segments, memory.device, place.here(),
                os.getpid(), there.base, self._cookie.value,
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
        device.use(self._device)
        while not self._closing.wait(PROGRESS_NAP_S):
            self._agent.get_new_notifs()  # What moves a NIXL agent on.


class UcxPeer:
    """Reads from one sender, through an agent of its own or one that others share."""

    def __init__(
        self, agent: Agent, member: Member, theirs: UcxDescription, unit_bytes: int
    ) -> None:
        remote = Memory(theirs.segments, theirs.device)
        self._agent, self._member = agent, member
        self._fenced = False
        try:
            self._units = agent.memory.units(unit_bytes), remote.units(unit_bytes)
            self._keys: tuple[Key, Key] = (
                agent.prepare(OURS, agent.memory, unit_bytes),
                agent.prepare(member.sender, remote, unit_bytes),
            )
        except TransferError:
            agent.leave(member)
            raise

    def read(self, local: Units, remote: Units) -> Read:
        if len(local) != len(remote):
            raise TransferError(f"{len(local)} local units for {len(remote)} remote ones")
        if self._fenced or self._agent.over is not None:
            self._check(local, remote)
            raise TransferError(self._agent.over or "the peer is fenced")
        if not len(local):
            return Read(None, self._member, Progress.DONE)
        try:
            return self._agent.start(self._member, self._keys, local, remote)
        except TransferError:
            # NIXL looks at every number; what it found, ours says better.
            self._check(local, remote)
            self.fence()
            raise

    def poll(self, handle: Read) -> Progress:
        return self._agent.poll(handle)

    def descriptors(self) -> list[int]:
        return []

    def fence(self) -> None:
        """Nothing less than the agent's end stops a read that is under way: releasing a handle or
        deregistering memory leaves it to land whenever the sender wakes. Without one the peer
        leaves, and an agent that others share goes on.
        """
        self._fenced = True
        self._agent.leave(self._member)

    def _check(self, local: Units, remote: Units) -> None:
        check_range(local, self._units[0], "the receiver")
        check_range(remote, self._units[1], "the sender")


def _decode(description: bytes) -> UcxDescription:
    try:
        theirs = msgspec.msgpack.decode(description, type=UcxDescription)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise TransferError(f"not a description of ucx: {error}") from None
    if theirs.version != VERSION:
        raise TransferError(f"sender speaks ucx {theirs.version}, receiver {VERSION}")
    return theirs
