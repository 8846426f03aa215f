"""Both ends of the handoff together, over a network and a memory that do their worst."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtransfer.core.manifest import Expectation, chain
from kvtransfer.core.pulling import (
    AskFollow,
    AskRenew,
    End,
    FencePeer,
    Pull,
    TellRelease,
    Timeouts,
    Wanted,
)
from kvtransfer.core.sending import Book
from kvtransfer.protocol import (
    LINK_BYTES,
    Blocks,
    Follow,
    Gone,
    Held,
    Manifest,
    Release,
    Renew,
    Sealed,
)

LEASE_S, BLOCK = 10.0, 4
MISHAPS = [
    "preempt", "abort_prefill", "restart_sender", "router_releases", "read_fails", "cancel",
    "lose", "repeat",
]  # fmt: skip
TIMES = Timeouts(answer_s=3.0, read_s=5.0, beat_s=1.0)


@dataclass
class Prompt:
    """One prompt at the sender, and the pull that wants it."""

    handle: str
    tokens: list[int]
    epoch: str
    first: int
    pull: Pull
    links: bytes = b""
    local: dict[int, Any] = field(default_factory=dict)
    """What the receiver's blocks hold."""
    reads: dict[int, tuple[list[int], list[int]]] = field(default_factory=dict)
    """By number: strides that have not landed, the sender's blocks at the time."""
    ids: list[int] = field(default_factory=list)
    generation: int = 0
    state: str = "unknown"
    unreached: Wanted | None = None
    """While its sender is being connected to."""
    ends: list[str | None] = field(default_factory=list)
    questions: dict[int, float] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        return len(self.links) // LINK_BYTES

    def content(self, block: int) -> tuple[str, int]:
        return self.handle, block


class Handoffs(RuleBasedStateMachine):
    """Rules are what can happen; the laws are checked after each."""

    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        self.count = itertools.count()
        self.epochs = itertools.count()
        self.memory: dict[int, Any] = {}
        self.fresh = itertools.count(1)
        self.prompts: dict[str, Prompt] = {}
        self.wire: list[tuple[str, Any]] = []
        """In flight: ("sender", message) or (handle, message)."""
        self.start_sender()

    def start_sender(self) -> None:
        self.epoch = f"e{next(self.epochs)}"
        self.book = Book(self.epoch, LEASE_S)
        for block in self.memory:
            self.memory[block] = "another process's"

    def some(self, index: int, state: str | None = None) -> Prompt | None:
        able = [p for p in self.prompts.values() if state is None or p.state == state]
        return able[index % len(able)] if able else None

    # ------------------------------------------------------------ what can happen

    @precondition(lambda self: len(self.prompts) < 2)
    @rule(length=st.integers(1, 17), cached=st.integers(0, 3), at_once=st.booleans())
    def want(self, length: int, cached: int, at_once: bool) -> None:
        handle = f"h{next(self.count)}"
        tokens = [hash((handle, i)) % 1000 for i in range(length)]
        first = min(cached, (length - 1) // BLOCK)
        pull = Pull(TIMES, asked_at=self.now)
        prompt = Prompt(handle, tokens, self.epoch, first, pull)
        prompt.links = chain(tokens, BLOCK, salt=None, lora=None)
        self.prompts[handle] = prompt
        prompt.unreached = Wanted(
            Expectation(length, prompt.links, "m", "t"), 1, first, prompt.blocks, LEASE_S
        )
        pull.answered()
        if at_once:
            self.reach(prompt)

    @rule(index=st.integers(0, 3))
    def connect(self, index: int) -> None:
        """To connect may take as long as it likes, and anything happen meanwhile."""
        if prompt := self.some(index):
            self.reach(prompt)

    def reach(self, prompt: Prompt) -> None:
        wanted, prompt.unreached = prompt.unreached, None
        if wanted is not None:
            self.effects(prompt, prompt.pull.opened(wanted, self.now))

    def arrive(self, index: int) -> None:
        prompt = self.some(index, "unknown")
        if prompt is None or prompt.epoch != self.epoch:
            return
        known = self.book.expect(prompt.handle, prompt.links)
        prompt.state = "computing" if known else "ended"

    def compute(self, index: int, count: int) -> None:
        prompt = self.some(index, "computing")
        if prompt is None:
            return
        ids = []
        for block in range(len(prompt.ids), min(len(prompt.ids) + count, prompt.blocks)):
            ids.append(number := next(self.fresh))
            self.memory[number] = prompt.content(block)
        prompt.ids += ids
        columns = [[block] for block in ids]
        self.say(self.book.computed(prompt.handle, prompt.generation, columns, []))

    def preempt(self, index: int) -> None:
        prompt = self.some(index, "computing")
        if prompt is None:
            return
        self.free(prompt)
        prompt.generation += 1
        self.book.restart(prompt.handle, prompt.generation)

    def seal(self, index: int) -> None:
        prompt = self.some(index, "computing")
        if prompt is None or len(prompt.ids) < prompt.blocks:
            return
        tail = prompt.links[-LINK_BYTES:]
        manifest = Manifest(len(prompt.tokens), prompt.blocks, tail, "m", "t", None)
        prompt.state = "sealed"
        self.say(self.book.seal(prompt.handle, manifest, self.now))
        self.free_ended()

    def abort_prefill(self, index: int) -> None:
        prompt = self.some(index, "computing")
        if prompt is not None:
            self.say(self.book.cancel(prompt.handle, "aborted"))
            self.free(prompt)
            prompt.state = "ended"

    def restart_sender(self, _: int) -> None:
        self.start_sender()
        for index, prompt in enumerate(list(self.prompts.values())):
            prompt.state, prompt.ids = "ended", []
            # No transport reads a process that took the place of the one it was connected to.
            while prompt.reads:
                self.read_fails(index)

    def router_releases(self, index: int) -> None:
        if prompt := self.some(index):
            self.wire.append(("sender", Release(prompt.epoch, prompt.handle)))

    @rule(index=st.integers(0, 9), mishap=st.sampled_from(MISHAPS))
    def go_wrong(self, index: int, mishap: str) -> None:
        if mishap in ("lose", "repeat"):
            if self.wire:
                self.carry(index, mishap)
        else:
            getattr(self, mishap)(index)

    @rule(index=st.integers(0, 9), count=st.integers(1, 3))
    def sender_goes_on(self, index: int, count: int) -> None:
        prompt = self.some(index)
        if prompt is None:
            return
        index = list(self.prompts).index(prompt.handle)
        for state, act in (("unknown", self.arrive), ("computing", self.seal)):
            able = [p for p in self.prompts.values() if p.state == state]
            if prompt in able:
                if state == "computing" and len(prompt.ids) < prompt.blocks:
                    self.compute(able.index(prompt), count)
                else:
                    act(able.index(prompt))
                return

    @rule(index=st.integers(0, 9), count=st.integers(1, 3))
    def all_goes_well(self, index: int, count: int) -> None:
        """For a while: without it, hardly any pull would ever get to its end."""
        self.sender_goes_on(index, count)
        for _ in range(len(self.wire)):
            self.carry(0, "deliver")
        self.read(index, count)

    @precondition(lambda self: self.wire)
    @rule(indexes=st.lists(st.integers(0, 5), min_size=1, max_size=6))
    def carry_some(self, indexes: list[int]) -> None:
        """Mostly in order."""
        for index in indexes:
            if self.wire:
                self.carry(index if index > 3 else 0, "deliver")

    def carry(self, index: int, fate: str) -> None:
        to, message = self.wire[index % len(self.wire)]
        if fate != "repeat":
            del self.wire[index % len(self.wire)]
        if fate != "lose":
            self.deliver(to, message)

    @rule(index=st.integers(0, 9), strides=st.integers(1, 3))
    def read(self, index: int, strides: int) -> None:
        prompt = self.some(index)
        if prompt is None:
            return
        if found := prompt.pull.next_read(strides, self.now):
            number, wanted = found
            assert not set(wanted) & {s for left, _ in prompt.reads.values() for s in left}
            prompt.reads[number] = (list(wanted), [block for (block,) in prompt.pull.remote])
            if prompt.epoch != self.epoch:
                self.read_fails(index)

    @rule(index=st.integers(0, 9), whole=st.booleans())
    def land(self, index: int, whole: bool) -> None:
        prompt = self.some(index)
        if prompt is None or not prompt.reads:
            return
        number, (left, remote) = next(iter(prompt.reads.items()))
        for stride in left if whole else left[:1]:
            prompt.local[stride] = self.memory.get(remote[stride], "unmapped")
        del left[: len(left) if whole else 1]
        if not left:
            del prompt.reads[number]
            self.effects(prompt, prompt.pull.read_done(number, self.now))

    def read_fails(self, index: int) -> None:
        """One failed read ends the connection, as in `kvtransfer.connection`."""
        prompt = self.some(index)
        if prompt is not None and prompt.reads:
            prompt.reads.clear()
            self.effects(prompt, prompt.pull.fenced("a read failed"))

    def cancel(self, index: int) -> None:
        if prompt := self.some(index):
            self.effects(prompt, prompt.pull.cancel(self.now))

    @rule(seconds=st.sampled_from([0.1, 0.4, 0.8, 1.1, 2.0, 6.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.say(self.book.expire(self.now))
        self.free_ended()
        for prompt in list(self.prompts.values()):
            self.effects(prompt, prompt.pull.tick(self.now))

    # ------------------------------------------------------------ the shells

    def say(self, messages: list[tuple[bytes, Any]]) -> None:
        self.wire += [(to.decode(), m) for to, m in messages]

    def free(self, prompt: Prompt) -> None:
        for block in prompt.ids:
            self.memory[block] = "another prompt's"
        prompt.ids = []

    def free_ended(self) -> None:
        for handle in self.book.ended():
            assert self.prompts[handle].state == "sealed", "only what was sealed ends, and once"
            self.prompts[handle].state = "ended"
            self.free(self.prompts[handle])

    def deliver(self, to: str, message: Any) -> None:
        if to == "sender":
            match message:
                case Follow():
                    self.say(self.book.follow(message.handle.encode(), message, self.now))
                case Renew():
                    self.say(self.book.renew(message.handle.encode(), message, self.now))
                case Release():
                    self.book.release(message.handle.encode(), message)
            self.free_ended()
            return
        prompt = self.prompts[to]
        pull = prompt.pull
        if prompt.ends:
            return
        match message:
            case Held(seq=seq):
                asked_at = prompt.questions.pop(seq, None)
                if asked_at is not None:
                    self.effects(prompt, pull.held(asked_at, self.now))
            case Blocks():
                self.effects(prompt, pull.blocks(message, self.now))
            case Sealed():
                self.effects(prompt, pull.seal(message, self.now))
            case Gone(reason=reason):
                self.effects(prompt, pull.gone(reason, self.now))

    def effects(self, prompt: Prompt, effects: list[Any]) -> None:
        for effect in effects:
            match effect:
                case AskFollow():
                    prompt.questions[seq := next(self.count)] = self.now
                    self.wire.append(("sender", Follow(seq, prompt.epoch, prompt.handle, 0, 1)))
                case AskRenew():
                    prompt.questions[seq := next(self.count)] = self.now
                    self.wire.append(("sender", Renew(seq, prompt.epoch, prompt.handle)))
                case TellRelease():
                    self.wire.append(("sender", Release(prompt.epoch, prompt.handle, 0)))
                case FencePeer(reason):
                    prompt.reads.clear()
                    self.effects(prompt, prompt.pull.fenced(reason))
                case End(error):
                    prompt.ends.append(error)
                    self.check_end(prompt, error)

    # ------------------------------------------------------------ the laws

    def check_end(self, prompt: Prompt, error: str | None) -> None:
        assert not prompt.reads, "nothing is in flight when a pull has ended"
        if error is None:
            for stride in range(prompt.first, prompt.blocks):
                assert prompt.local[stride] == prompt.content(stride), (
                    "what is used is the prompt's"
                )

    @invariant()
    def a_pull_ends_once(self) -> None:
        for prompt in getattr(self, "prompts", {}).values():
            assert len(prompt.ends) <= 1
            assert bool(prompt.ends) == prompt.pull.ended

    @invariant()
    def what_is_leased_is_kept(self) -> None:
        for prompt in getattr(self, "prompts", {}).values():
            if prompt.state == "sealed":
                assert len(prompt.ids) == prompt.blocks

    def teardown(self) -> None:
        """Whatever happened, some time later nothing is left."""
        if not hasattr(self, "prompts"):
            return
        self.wire.clear()
        for prompt in self.prompts.values():  # Connecting has a bound of its own.
            self.reach(prompt)
        self.wire.clear()
        for _ in range(40):
            self.now += 1.0
            self.say(self.book.expire(self.now))
            self.free_ended()
            for prompt in list(self.prompts.values()):
                self.effects(prompt, prompt.pull.tick(self.now))
            self.wire.clear()
        assert all(len(p.ends) == 1 for p in self.prompts.values())
        assert all(p.state != "sealed" for p in self.prompts.values())
        assert len(self.book) == 0


TestHandoffs = Handoffs.TestCase
TestHandoffs.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)


def test_a_pull_that_nothing_disturbs_ends_well_and_frees_the_sender() -> None:
    """The machine above could hold its laws by never finishing anything."""
    world = Handoffs()
    world.begin()
    world.want(length=17, cached=1, at_once=True)
    (prompt,) = world.prompts.values()
    for _ in range(3):
        world.arrive(0)
        world.compute(0, 2)
        for _ in range(20):
            if world.wire:
                world.carry(0, "deliver")
            world.read(0, 2)
            world.land(0, whole=True)
    assert prompt.local.keys() == {1, 2, 3, 4}, "what is computed is read before the rest is"
    world.seal(0)
    for _ in range(10):
        if world.wire:
            world.carry(0, "deliver")
    assert prompt.ends == [None]
    assert prompt.state == "ended"
    world.teardown()


def test_messages_survive_the_wire() -> None:
    from kvtransfer.protocol import ToReceiver

    sealed = Sealed("h", 1, Manifest(1, 1, b"c" * 16, "m", "t", 7))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sealed), type=ToReceiver) == sealed
