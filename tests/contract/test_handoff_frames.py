"""Control frames that are lost, repeated, reordered, cut, made up: content right, all freed."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec
import pytest
import zmq

from kvtransfer.checksums import Mode
from kvtransfer.protocol import (
    VERSION,
    Follow,
    Gone,
    Open,
    Rejected,
    Release,
    Renew,
    ToReceiver,
)
from kvtransfer.receiver import Timeouts
from kvtransfer.transports.memory import MemoryTransport
from tests.contract.bad_line import BadLine
from tests.contract.handoff_rig import Decode, Prefill, Receives, Sends, World, only, well
from tests.contract.numpy_kv import Cut, Prompt

TIMES = Timeouts(answer_s=0.4, read_s=0.6, beat_s=0.05)
LEASE_S = 0.8
PULLS = 4
BOUND_S = 5.0
"""For all pulls of a seed: several answers and leases one after the other."""
SEEDS = 48
AT_ONCE = 8


@dataclass
class Result:
    well: int
    errors: list[str]


def run(seed: int) -> Result:
    chance, transport = random.Random(seed), MemoryTransport()
    prompts = [
        Prompt(f"s{seed}h{i}", tokens=chance.randrange(1, 90), cached=8 * chance.randrange(2))
        for i in range(PULLS)
    ]
    prompts = [p if p.cached < p.tokens else Prompt(p.handle, p.tokens) for p in prompts]
    cut = Cut(blocks=120)
    # Without checksums nothing but the protocol keeps wrong blocks out.
    mode = chance.choice([Mode.OFF, Mode.FULL])
    prefill = Prefill(Sends(("memory",), cut=cut, lease_s=LEASE_S, mode=mode), transport)
    decode = Decode(Receives(("memory",), cut=cut, timeouts=TIMES), transport)
    endpoint, epoch = prefill.address()
    line = BadLine(endpoint, seed, [p.handle for p in prompts])
    try:
        kept = []
        for prompt in prompts:
            early = chance.random() < 0.5
            if early:
                decode.follow(prompt, (line.endpoint, epoch))
                time.sleep(chance.choice([0, 0.005, 0.03]))
            if compute(prefill, prompt, cut, chance):
                kept.append(prompt.handle)
            if not early:
                decode.follow(prompt, (line.endpoint, epoch))
        until = time.monotonic() + BOUND_S
        ends = [decode.outcome(p.handle, until - time.monotonic()) for p in prompts]
        assert all(o.right for o in ends if o.pulled.error is None), "wrong content was vouched for"
        assert not decode.changed()
        assert prefill.await_ended(kept, LEASE_S + 0.5), "kept for longer than a lease"
        assert prefill.leases()[0] == 0
        errors = [o.pulled.error for o in ends if o.pulled.error is not None]
        return Result(len(ends) - len(errors), errors)
    finally:
        decode.close()
        prefill.close()
        line.close()


def compute(prefill: Prefill, prompt: Prompt, cut: Cut, chance: random.Random) -> bool:
    """A prefill with its mishaps; whether it was sealed."""
    if not prefill.arrive(prompt):
        return False
    while prefill.compute(prompt.handle, chance.randrange(1, 5)) < cut.blocks_of(prompt.tokens):
        time.sleep(chance.choice([0, 0, 0.002, 0.01]))
        if chance.random() < 0.1:
            prefill.preempt(prompt.handle)
    if chance.random() < 0.3:  # All of it was announced, and may have been read.
        prefill.preempt(prompt.handle)
        prefill.compute(prompt.handle, cut.blocks)
    prefill.seal(prompt.handle)
    return True


@pytest.mark.parametrize("block", range(SEEDS // AT_ONCE // 2))
def test_whatever_happens_to_control_frames_pulls_end_and_content_is_right(block: int) -> None:
    seeds = range(block * 2 * AT_ONCE, (block + 1) * 2 * AT_ONCE)
    well, failures = 0, []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for seed, outcome in [(s, pool.submit(run, s)) for s in seeds]:
            if error := outcome.exception():
                failures.append(f"seed {seed}: {type(error).__name__}: {error}")
            else:
                well += outcome.result().well
    assert not failures, "\n".join(failures)
    assert well > len(seeds), "most pulls must get through, or this shows little"


@only("memory")
def test_senseless_frames_neither_silence_a_sender_nor_free_what_is_read(world: World) -> None:
    sender, receiver = world.sender(mode=Mode.OFF), world.receiver()
    endpoint, epoch = sender.ask("address")
    prompt = Prompt("h", tokens=40)
    receiver.ask("hold")
    receiver.ask("follow", prompt, (endpoint, epoch))
    sender.ask("send", prompt)
    receiver.ask("await_reading")
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(endpoint)
        for frame in (
            Open(1, VERSION, Cut(block_tokens=0).layout(), 0),
            Open(2, VERSION, Cut(ranks=0).layout(), 0),
            Open(3, VERSION, Cut(kv_heads=-1).layout(), -1),
            Follow(4, epoch, "h", 0, 1),
            Follow(5, epoch, "h", 1, 2**62),
            Follow(6, epoch, "h", -1, -1),
            Follow(7, epoch, "other", 3, 2),
            Follow(8, "former", "other", 0, 1),
            Renew(9, "former", "h"),
            Release(epoch, "h", 0),
            Release(epoch, "h", 7),
            Release(epoch, "h"),
        ):
            stranger.send(msgspec.msgpack.encode(frame))
            if not isinstance(frame, Release):
                assert stranger.poll(5000), f"no answer to {frame}"
                answer = msgspec.msgpack.decode(stranger.recv(), type=ToReceiver)
                assert isinstance(answer, Rejected | Gone)
        stranger.send(msgspec.msgpack.encode(Renew(10, epoch, "other")))
        assert stranger.poll(5000), "what was sent before this was heard"
    sender.ask("ended")  # What is freed is overwritten.
    receiver.ask("go_on")
    well(receiver.ask("outcome", "h"))


class Relay:
    """A TCP line to a sender that can be cut: whoever used it must connect anew."""

    def __init__(self, endpoint: str) -> None:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        self._to = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._ends: list[socket.socket] = []
        self._accepting = threading.Thread(target=self._accept)
        self._threads = [self._accepting]
        self._accepting.start()

    def cut(self) -> None:
        ends, self._ends = self._ends, []
        for each in ends:
            with contextlib.suppress(OSError):  # The other end's went first.
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self.cut()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                ours, _ = self._listener.accept()
            except OSError:
                return
            theirs = socket.create_connection(self._to)
            pair = (ours, theirs)
            self._ends += pair
            for source, sink in (pair, pair[::-1]):
                self._threads.append(threading.Thread(target=self._carry, args=(source, sink)))
                self._threads[-1].start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with source, contextlib.suppress(OSError):
            while some := source.recv(1 << 16):
                sink.sendall(some)
            sink.shutdown(socket.SHUT_RDWR)


@only("memory")
def test_a_control_connection_that_is_cut_and_comes_back_costs_no_pull(world: World) -> None:
    sender, receiver = world.sender(), world.receiver()
    endpoint, epoch = sender.ask("address")
    relay = Relay(endpoint)
    try:
        prompt = Prompt("h", tokens=64)
        receiver.ask("follow", prompt, (relay.endpoint, epoch))
        sender.ask("arrive", prompt)
        sender.ask("compute", "h", 3)
        receiver.ask("await_reading", 1)
        relay.cut()
        sender.ask("compute", "h", 3)
        sender.ask("compute", "h", 3)
        sender.ask("seal", "h")
        well(receiver.ask("outcome", "h"))
        assert sender.ask("await_ended", ["h"], LEASE_S / 2)
    finally:
        relay.close()


@only("memory")
def test_what_is_read_after_its_lease_is_never_vouched_for(world: World) -> None:
    sender = world.sender(lease_s=0.5, mode=Mode.OFF)
    receiver = world.receiver(timeouts=Timeouts(answer_s=1.5, read_s=10, beat_s=0.1))
    endpoint, epoch = sender.ask("address")
    relay = Relay(endpoint)
    try:
        receiver.ask("hold")
        receiver.ask("follow", Prompt("h", tokens=64), (relay.endpoint, epoch))
        sender.ask("send", Prompt("h", tokens=64), 8)
        receiver.ask("await_reading")
    finally:
        relay.close()
    assert sender.ask("await_ended", ["h"], 2), "nobody renews"
    receiver.ask("go_on")
    outcome = receiver.ask("outcome", "h")
    assert not outcome.right, "what is freed is overwritten, or this shows nothing"
    assert "did not answer" in outcome.pulled.error
