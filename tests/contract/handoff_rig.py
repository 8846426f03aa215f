"""Two engines of numpy memory with the production sender and receiver between them."""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvtransfer import checksums
from kvtransfer.core.manifest import chain
from kvtransfer.protocol import LINK_BYTES, Manifest, Region
from kvtransfer.receiver import Mine, Order, Pulled, Receiver, Timeouts
from kvtransfer.sender import Offered, Sender
from kvtransfer.transports.choose import load
from kvtransfer.transports.memory import MemoryTransport
from tests.contract.numpy_kv import PLAIN, Cut, Kv, Prompt
from tests.contract.transport_rig import Remote
from tests.contract.watched import Watched

if TYPE_CHECKING:
    from kvtransfer.curve import Pair
    from kvtransfer.transports.api import Offer, Transport

TIMES = Timeouts(answer_s=1.0, read_s=2.0, beat_s=0.2)
LEASE_S = 1.5
STEP_S = 0.002
"""Between two looks at what no event tells of."""
PATIENCE_S = 30.0
"""What takes longer than this has hung."""


def _transport(name: str) -> Transport:
    if name == "ucx-over-tcp":
        from kvtransfer.transports.ucx import UcxTransport

        return UcxTransport(tls="tcp", reaches=True)
    return load(name)


# ------------------------------------------------------------------------- the sender's side


@dataclass
class _Produced:
    prompt: Prompt
    links: bytes
    blocks: list[int] = field(default_factory=list)
    generation: int = 0
    sealed: bool = False


@dataclass(frozen=True)
class Sends:
    """How a sending engine is set up."""

    transports: tuple[str, ...]
    cut: Cut = PLAIN
    epoch: str = "first"
    lease_s: float = LEASE_S
    mode: checksums.Mode = checksums.Mode.FULL
    port: int = 0
    content: str = "numpy"
    model: str = "model"
    keys: Pair | None = None


class Prefill:
    """A sending engine. What it frees it overwrites at once, as a busy one would."""

    def __init__(self, sends: Sends, transport: Transport | None = None) -> None:
        self._sends, cut = sends, sends.cut
        self._kv = [Kv(cut, rank, seed=rank) for rank in range(cut.ranks)]
        transports = [transport] if transport else [_transport(n) for n in sends.transports]
        self._offers: list[Offer] = []
        regions = []
        for kv in self._kv:
            offers = [(t.name, t.offer(kv.memory)) for t in transports]
            self._offers += [offer for _, offer in offers]
            regions.append([Region(n, o.description, cut.blocks) for n, o in offers])
        offered = Offered(cut.layout(sends.content), sends.mode.value, regions)
        self._sender = Sender(
            "127.0.0.1", sends.epoch, sends.lease_s, offered, sends.port, keys=sends.keys
        )
        self._free = random.Random(5).sample(range(1, cut.blocks), cut.blocks - 1)
        self._produced: dict[str, _Produced] = {}
        self._ended: list[str] = []

    def address(self) -> tuple[str, str]:
        return self._sender.endpoint, self._sends.epoch

    def refused(self) -> int:
        """Peers without the group's keys."""
        return self._sender.refused_total

    def pid(self) -> int:
        return os.getpid()

    def dead(self) -> str | None:
        return self._sender.dead

    def malformed(self) -> int:
        return self._sender.malformed_total

    def arrive(self, prompt: Prompt) -> bool:
        links = chain(prompt.token_ids, self._sends.cut.block_tokens, salt=None, lora=None)
        known = self._sender.expect(prompt.handle, links)
        if known:
            self._produced[prompt.handle] = _Produced(prompt, links)
        return known

    def compute(self, handle: str, count: int) -> int:
        """A step: `count` more blocks of the prompt, or what is left; how many there are now."""
        produced = self._produced[handle]
        first = len(produced.blocks)
        left = self._sends.cut.blocks_of(produced.prompt.tokens) - first
        new = [self._free.pop() for _ in range(min(count, left))]
        for kv in self._kv:
            kv.write(produced.prompt, first, new)
        columns, slots = [[block] for block in new], self._sends.cut.layout().slots
        by_rank = [
            checksums.Checksums(kv.memory, slots, self._sends.mode).of(
                columns, handle.encode(), first
            )
            for kv in self._kv
        ]
        produced.blocks += new
        sums = [list(s) for s in zip(*by_rank, strict=True)]
        return self._sender.computed(handle, produced.generation, columns, sums)

    def seal(self, handle: str, first_token: int | None = None) -> None:
        produced = self._produced[handle]
        produced.sealed = True
        tail = produced.links[-LINK_BYTES:]
        tokens, blocks = produced.prompt.tokens, len(produced.links) // LINK_BYTES
        manifest = Manifest(tokens, blocks, tail, self._sends.model, "tok", first_token)
        self._sender.seal(handle, manifest)

    def send(self, prompt: Prompt, chunk: int = 4) -> None:
        """All of it."""
        assert self.arrive(prompt)
        while self.compute(prompt.handle, chunk) < self._sends.cut.blocks_of(prompt.tokens):
            pass
        self.seal(prompt.handle)

    def preempt(self, handle: str) -> None:
        produced = self._produced[handle]
        self._scribble(produced)
        produced.generation += 1
        self._sender.restart(handle, produced.generation)

    def cancel(self, handle: str) -> None:
        self._sender.cancel(handle, "the client has left")
        self._scribble(self._produced.pop(handle))

    def spoil(self, handle: str, block: int, layers: list[int]) -> None:
        """Memory that changes after its checksum was taken: one byte in each of these layers."""
        at = self._produced[handle].blocks[block]
        for layer in layers:
            self._kv[0].array.view(np.uint8)[layer, at, 0, 0, 0] ^= 1

    def ended(self) -> list[str]:
        """All that have ended so far."""
        for handle in self._sender.ended():
            self._scribble(self._produced.pop(handle))
            self._ended.append(handle)
        return list(self._ended)

    def await_ended(self, handles: list[str], within_s: float) -> bool:
        until = time.monotonic() + within_s
        while not set(handles) <= set(self.ended()) and time.monotonic() < until:
            time.sleep(STEP_S)
        return set(handles) <= set(self._ended)

    def sealed(self, handle: str) -> bool:
        return handle in self._ended or self._produced[handle].sealed

    def give_up(self) -> None:
        """Cancel what was never sealed."""
        for handle in [h for h, p in self._produced.items() if not p.sealed]:
            self.cancel(handle)

    def await_no_lease(self, within_s: float) -> bool:
        until = time.monotonic() + within_s
        while self.leases()[0] and time.monotonic() < until:
            self.ended()
            time.sleep(STEP_S)
        return not self.leases()[0]

    def leases(self) -> tuple[int, int]:
        """Open, expired."""
        return self._sender.leases_open, self._sender.leases_expired_total

    def free(self) -> int:
        return len(self._free)

    def close(self) -> None:
        self._sender.close()
        for offer in self._offers:
            offer.close()

    def _scribble(self, produced: _Produced) -> None:
        for kv in self._kv:
            kv.array[:, produced.blocks] = np.uint64(0xDEAD)
        self._free = produced.blocks + self._free
        produced.blocks = []


# ------------------------------------------------------------------------- the receiver's side


@dataclass(frozen=True)
class Receives:
    """How a receiving engine's rank is set up."""

    transports: tuple[str, ...]
    cut: Cut = PLAIN
    rank: int = 0
    timeouts: Timeouts = TIMES
    in_flight_bytes_max: int = 256 << 20
    content: str = "numpy"
    keys: Pair | None = None


@dataclass(frozen=True)
class Outcome:
    """How a pull ended, and whether its blocks held the prompt when it did."""

    pulled: Pulled
    right: bool


class Decode:
    """One rank of a receiving engine, which looks after every byte of its memory."""

    def __init__(self, receives: Receives, transport: Transport | None = None) -> None:
        self._receives, cut = receives, receives.cut
        self._kv = Kv(cut, receives.rank, seed=100 + receives.rank)
        self.watched = [
            Watched(t, self._kv.memory)
            for t in ([transport] if transport else [_transport(n) for n in receives.transports])
        ]
        layout = cut.layout(receives.content)
        mine = Mine(self._kv.memory, layout, receives.rank, self.watched, receives.keys)
        self._receiver = Receiver(mine, receives.timeouts, receives.in_flight_bytes_max)
        self._known = self._kv.array.copy()
        self._free = random.Random(6).sample(range(1, cut.blocks), cut.blocks - 1)
        self._running: dict[str, tuple[Prompt, list[int]]] = {}
        self._outcomes: dict[str, Outcome] = {}

    def follow(self, prompt: Prompt, address: tuple[str, str], as_: str = "") -> None:
        """As request `as_`, or the handle's own name."""
        blocks = [self._free.pop() for _ in range(self._receives.cut.blocks_of(prompt.tokens))]
        request_id = as_ or prompt.handle
        self._running[request_id] = prompt, blocks
        endpoint, epoch = address
        self._receiver.start(
            Order(
                request_id, prompt.handle, epoch, endpoint, prompt.token_ids, None, None, "model",
                "tok", prompt.cached, [[block] for block in blocks],
            )
        )  # fmt: skip

    def cancel(self, request_id: str) -> None:
        self._receiver.cancel(request_id)

    def outcome(self, request_id: str, within_s: float = PATIENCE_S) -> Outcome:
        """Waits for the pull's end."""
        until = time.monotonic() + within_s
        while request_id not in self._outcomes:
            left = until - time.monotonic()
            assert left > 0, f"{request_id} hangs"
            self._take(self._receiver.ended(left))
        return self._outcomes.pop(request_id)

    def seconds(self, request_id: str) -> tuple[Outcome, float]:
        began = time.monotonic()
        return self.outcome(request_id), time.monotonic() - began

    def dead(self) -> str | None:
        return self._receiver.dead

    def running(self) -> int:
        self._take(self._receiver.ended())
        return len(self._running)

    def changed(self) -> list[int]:
        """Blocks that differ from what they must hold, those of running pulls left out."""
        wanted = {b for p, blocks in self._running.values() for b in self._own(p, blocks)}
        differ = (self._known != self._kv.array).any(axis=(0, 2, 3, 4))
        return [int(b) for b in np.flatnonzero(differ) if int(b) not in wanted]

    def hold(self) -> None:
        """Whatever reads begin from now on stay in flight."""
        for watched in self.watched:
            watched.open.clear()

    def go_on(self) -> None:
        for watched in self.watched:
            watched.open.set()

    def reads(self) -> int:
        return sum(w.begun for w in self.watched)

    def connects(self) -> int:
        return sum(w.connects for w in self.watched)

    def await_connects(self, connects: int) -> None:
        """Until there were so many in all."""
        until = time.monotonic() + PATIENCE_S
        while self.connects() < connects:
            assert time.monotonic() < until, "nothing is connected"
            time.sleep(STEP_S)

    def await_reading(self, reads: int = 1) -> None:
        """Until so many reads have begun in all."""
        until = time.monotonic() + PATIENCE_S
        while self.reads() < reads:
            assert time.monotonic() < until, "nothing is read"
            time.sleep(STEP_S)

    def connect_slowly(self, seconds: float) -> None:
        for watched in self.watched:
            watched.connect_s = seconds

    def postpone(self) -> None:
        """The next read's bytes land only when they are told to."""
        for watched in self.watched:
            watched.next_is_late = True

    def land(self) -> None:
        for watched in self.watched:
            watched.due.set()

    def damage(self, at: int) -> None:
        """Flip a byte of the read that ends next, at this offset of its unit."""
        for watched in self.watched:
            watched.damage_at = at

    def bytes_at_once(self) -> int:
        return max(w.most for w in self.watched)

    def close(self) -> None:
        self._receiver.close()
        self._take(self._receiver.ended())

    def _own(self, prompt: Prompt, blocks: list[int]) -> list[int]:
        return blocks[prompt.cached // self._receives.cut.block_tokens :]

    def _take(self, ended: list[Pulled]) -> None:
        for pulled in ended:
            prompt, blocks = self._running.pop(pulled.request_id)
            right = self._kv.holds(prompt, blocks)
            self._outcomes[pulled.request_id] = Outcome(pulled, right)
            own = self._own(prompt, blocks)
            self._known[:, own] = self._kv.array[:, own]
            self._free = blocks + self._free


# ------------------------------------------------------------------------- the two together


class Near:
    """An actor in this process, spoken to like one in another."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def ask(self, word: str, *arguments: Any) -> Any:
        return getattr(self.actor, word)(*arguments)

    def end(self) -> None:
        self.actor.close()


class World:
    """Senders and receivers over one transport; all end with it."""

    def __init__(self, transport: str, *, near: bool = False) -> None:
        """`near`: both sides in this process, which `memory` always are."""
        self.name, self._near = transport, near or transport == "memory"
        self._memory = MemoryTransport() if transport == "memory" else None
        self._sides: list[Near | Remote] = []

    @property
    def memory(self) -> MemoryTransport:
        assert self._memory is not None
        return self._memory

    def sender(self, **settings: Any) -> Any:
        sends = Sends((self.name,), **settings)
        return self._keep(partial(Prefill, sends))

    def receiver(self, **settings: Any) -> Any:
        receives = Receives((self.name,), **settings)
        return self._keep(partial(Decode, receives))

    def _keep(self, make: Any) -> Near | Remote:
        side = Near(make(self._memory)) if self._near else Remote(make)
        self._sides.append(side)
        return side

    def end(self) -> None:
        for side in reversed(self._sides):
            side.end()


def only(*names: str) -> Any:
    """These transports instead of all."""
    return pytest.mark.parametrize("world", names, indirect=True)


def well(outcome: Outcome) -> Pulled:
    """It ended well, with the prompt's own KV."""
    assert outcome.pulled.error is None, outcome.pulled.error
    assert outcome.right
    return outcome.pulled
