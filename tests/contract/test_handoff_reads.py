"""What is read: damaged, overwritten, late, let go, and how much of it at once."""

from __future__ import annotations

import os
import re
import threading
import time
from typing import Any

import pytest

from kvtransfer.checksums import Mode, sampled_layers
from kvtransfer.receiver import Timeouts
from tests.contract.handoff_rig import LEASE_S, World, only, well
from tests.contract.numpy_kv import Cut, Prompt

SUM = "[0-9a-f]{16}"


# ------------------------------------------------------------ damage


def test_one_flipped_byte_is_never_used_and_both_numbers_are_named(world: World) -> None:
    sender, receiver = world.sender(mode=Mode.FULL), world.receiver()
    for i in range(3):
        prompt = Prompt(f"h{i}", tokens=64)
        receiver.ask("damage", 17 * i)
        receiver.ask("follow", prompt, sender.ask("address"))
        sender.ask("send", prompt)
        pulled = receiver.ask("outcome", prompt.handle).pulled
        assert pulled.mismatched
        assert re.search(f"sender has {SUM}, receiver {SUM}", pulled.error)
        assert sender.ask("await_ended", [prompt.handle], LEASE_S / 2)
    sender.ask("send", Prompt("h", tokens=64))
    receiver.ask("follow", Prompt("h", tokens=64), sender.ask("address"))
    well(receiver.ask("outcome", "h"))


@only("memory")
def test_memory_that_changes_after_its_checksum_is_never_used(world: World) -> None:
    sender, receiver = world.sender(mode=Mode.FULL), world.receiver()
    for layer in range(3):
        prompt = Prompt(f"h{layer}", tokens=64)
        sender.ask("send", prompt)
        sender.ask("spoil", prompt.handle, layer, [layer])
        receiver.ask("follow", prompt, sender.ask("address"))
        pulled = receiver.ask("outcome", prompt.handle).pulled
        assert pulled.mismatched
        assert re.search(f"column {layer} differs: sender has {SUM}, receiver {SUM}", pulled.error)


@only("memory")
def test_sampled_catches_every_block_that_is_wrong_as_a_whole(world: World) -> None:
    cut = Cut(layers=12)
    sender = world.sender(mode=Mode.SAMPLED, cut=cut)
    receiver = world.receiver(cut=cut)
    for block in range(10):
        prompt = Prompt(f"h{block}", tokens=80)
        sender.ask("send", prompt)
        sender.ask("spoil", prompt.handle, block, list(range(12)))
        receiver.ask("follow", prompt, sender.ask("address"))
        pulled = receiver.ask("outcome", prompt.handle).pulled
        assert pulled.mismatched
        assert f"column {block} differs" in pulled.error
        assert sender.ask("await_ended", [prompt.handle], LEASE_S / 2)


@only("memory")
def test_sampled_looks_at_the_layers_that_it_says(world: World) -> None:
    """So that the law above is not the work of FULL."""
    cut = Cut(layers=12)
    sender, receiver = world.sender(mode=Mode.SAMPLED, cut=cut), world.receiver(cut=cut)
    looked_at = sampled_layers(2, 12, b"h")
    sender.ask("send", Prompt("h", tokens=80))
    sender.ask("spoil", "h", 2, [layer for layer in range(12) if layer not in looked_at])
    receiver.ask("follow", Prompt("h", tokens=80), sender.ask("address"))
    assert receiver.ask("outcome", "h").pulled.error is None


# ------------------------------------------------------------ preemption


def test_what_a_preempted_prompt_is_computed_to_anew_is_what_arrives(world: World) -> None:
    sender, receiver = world.sender(), world.receiver()
    prompt = Prompt("h", tokens=75, cached=8)
    receiver.ask("follow", prompt, sender.ask("address"))
    sender.ask("arrive", prompt)
    receiver.ask("hold")
    sender.ask("compute", "h", 4)
    receiver.ask("await_reading", 1)
    sender.ask("preempt", "h")  # Freed, and overwritten, while it is read.
    sender.ask("compute", "h", 3)
    receiver.ask("go_on")
    sender.ask("compute", "h", 3)
    sender.ask("preempt", "h")
    sender.ask("compute", "h", 9)
    sender.ask("compute", "h", 9)
    sender.ask("seal", "h")
    well(receiver.ask("outcome", "h"))
    assert receiver.ask("changed") == []


@only("memory")
def test_without_checksums_too_a_preempted_generation_is_never_used(world: World) -> None:
    sender, receiver = world.sender(mode=Mode.OFF), world.receiver()
    for whole in (3, 10):
        prompt = Prompt(f"h{whole}", tokens=75)
        receiver.ask("hold")
        receiver.ask("follow", prompt, sender.ask("address"))
        sender.ask("arrive", prompt)
        sender.ask("compute", prompt.handle, whole)
        receiver.ask("await_reading", 1)
        sender.ask("preempt", prompt.handle)
        receiver.ask("go_on")
        sender.ask("compute", prompt.handle, 10)
        sender.ask("seal", prompt.handle)
        well(receiver.ask("outcome", prompt.handle))


@only("memory")
def test_nothing_is_read_anew_while_a_preempted_read_may_still_land(world: World) -> None:
    sender, receiver = world.sender(mode=Mode.OFF), world.receiver()
    prompt, other = Prompt("h", tokens=75), Prompt("other", tokens=40)
    receiver.ask("postpone")
    receiver.ask("follow", prompt, sender.ask("address"))
    sender.ask("arrive", prompt)
    sender.ask("compute", "h", 4)
    receiver.ask("await_reading", 1)
    sender.ask("preempt", "h")
    sender.ask("compute", "h", 10)
    sender.ask("seal", "h")
    receiver.ask("follow", other, sender.ask("address"))  # Its end: all news has been heard.
    sender.ask("send", other)
    well(receiver.ask("outcome", "other"))
    assert receiver.ask("running") == 1
    receiver.ask("land")
    well(receiver.ask("outcome", "h"))


# ------------------------------------------------------------ quarantine

LARGE = Cut(head_token_bytes=8192)
"""Far more than sockets and staging take in while nobody polls."""


@only("memory", "tcp", "collective", "ucx-over-tcp")
def test_not_one_byte_lands_after_its_blocks_were_due_back(world: World) -> None:
    sender = world.sender(cut=LARGE, mode=Mode.OFF, lease_s=60)
    receiver = world.receiver(cut=LARGE, timeouts=Timeouts(1.0, 1.0, 0.2))
    prompt = Prompt("h", tokens=8 * 40)
    receiver.ask("follow", Prompt("first", tokens=8), sender.ask("address"))
    sender.ask("send", Prompt("first", tokens=8))
    well(receiver.ask("outcome", "first"))
    receiver.ask("hold")
    receiver.ask("follow", prompt, sender.ask("address"))
    sender.ask("send", prompt, 40)
    receiver.ask("await_reading", 2)
    stop(world, sender)
    receiver.ask("go_on")
    outcome, seconds = receiver.ask("seconds", "h")
    assert "took longer than 1 s" in outcome.pulled.error or "not answer" in outcome.pulled.error
    assert seconds < 3
    assert not outcome.right, "a stopped sender must stall the read, or this shows nothing"
    wake(world, sender)
    if world.name == "ucx-over-tcp":
        time.sleep(1)  # UCX may end such a sender: there is nobody left to ask.
    else:
        sender.ask("send", Prompt("next", tokens=8))
        receiver.ask("follow", Prompt("next", tokens=8), sender.ask("address"))
        well(receiver.ask("outcome", "next"))
    assert receiver.ask("changed") == []


def stop(world: World, sender: Any) -> None:
    if world.name == "memory":
        world.memory.pause()
    else:
        sender.stop()


def wake(world: World, sender: Any) -> None:
    if world.name == "memory":
        world.memory.resume()
    else:
        sender.wake()


# ------------------------------------------------------------ bounds


@only("memory", "tcp")
def test_bytes_in_flight_never_exceed_the_bound_and_none_of_it_idles(world: World) -> None:
    cut, bound = Cut(blocks=400), 20_000  # Of one sender; a block is 6,144 bytes.
    sender = world.sender(cut=cut)
    receiver = world.receiver(cut=cut, in_flight_bytes_max=2 * bound)
    prompts = [Prompt(f"h{i}", tokens=8 * 12) for i in range(12)]
    for prompt in prompts:
        sender.ask("send", prompt)
    began = time.monotonic()
    receiver.ask("hold")
    for prompt in prompts:
        receiver.ask("follow", prompt, sender.ask("address"))
    receiver.ask("await_reading")
    for i in range(3):  # Refused, which shows that the receiver has had its turns meanwhile.
        receiver.ask("follow", Prompt(f"old{i}", tokens=8), (sender.ask("address")[0], "former"))
        assert receiver.ask("outcome", f"old{i}").pulled.error
    receiver.ask("go_on")
    for prompt in prompts:
        well(receiver.ask("outcome", prompt.handle))
    assert bound // 2 < receiver.ask("bytes_at_once") <= bound
    assert time.monotonic() - began < 2, "48 reads of 18 KB"


@only("tcp")
def test_a_stopped_sender_leaves_room_for_another(world: World) -> None:
    cut = Cut(blocks=320, head_token_bytes=4096)  # A block is 393 KB.
    stopped, other = world.sender(cut=cut, lease_s=10), world.sender(cut=cut)
    receiver = world.receiver(cut=cut, in_flight_bytes_max=4 << 20, timeouts=Timeouts(read_s=3))
    for sender, name in ((stopped, "first"), (other, "second")):
        sender.ask("send", Prompt(name, tokens=40))
        receiver.ask("follow", Prompt(name, tokens=40), sender.ask("address"))
        well(receiver.ask("outcome", name))
    address = stopped.ask("address")
    stopped.ask("arrive", Prompt("large", tokens=8 * 300))
    receiver.ask("follow", Prompt("large", tokens=8 * 300), address)
    reads = receiver.ask("reads")
    receiver.ask("hold")
    stopped.ask("compute", "large", 300)
    receiver.ask("await_reading", reads + 1)
    stopped.stop()  # When at most 4 of the 118 MB are there.
    receiver.ask("go_on")
    other.ask("send", Prompt("small", tokens=40))
    receiver.ask("follow", Prompt("small", tokens=40), other.ask("address"))
    well(receiver.ask("outcome", "small", 2.0))
    assert "took longer" in receiver.ask("outcome", "large").pulled.error
    stopped.wake()


@only("memory")
def test_a_bound_below_one_block_is_no_standstill(world: World) -> None:
    sender, receiver = world.sender(), world.receiver(in_flight_bytes_max=1)
    for i in range(3):
        sender.ask("send", Prompt(f"h{i}", tokens=40))
        receiver.ask("follow", Prompt(f"h{i}", tokens=40), sender.ask("address"))
    for i in range(3):
        well(receiver.ask("outcome", f"h{i}"))
    assert receiver.ask("bytes_at_once") == 6144, "one block at a time"


# ------------------------------------------------------------ letting go

MOMENTS = ("at once", "followed", "announced", "in mid-read", "sealed")


@only("memory", "tcp")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_cancelled_pull_ends_and_frees_both_sides(world: World, moment: str) -> None:
    sender, receiver = world.sender(), world.receiver()
    receiver.ask("follow", Prompt("before", tokens=8), sender.ask("address"))
    sender.ask("send", Prompt("before", tokens=8))
    well(receiver.ask("outcome", "before"))
    prompt = Prompt("h", tokens=64)
    receiver.ask("hold")
    receiver.ask("follow", prompt, sender.ask("address"))
    at = MOMENTS.index(moment)
    if at:
        sender.ask("arrive", prompt)
    if at > 1:
        sender.ask("compute", "h", 4)
    if at > 2:
        receiver.ask("await_reading", 2)
    if at > 3:
        sender.ask("compute", "h", 4)
        sender.ask("seal", "h")
    receiver.ask("cancel", "h")
    if at > 2:
        assert receiver.ask("running") == 1, "its blocks are in a read's reach"
    receiver.ask("go_on")
    assert receiver.ask("outcome", "h").pulled.error == "cancelled"
    if not at and not sender.ask("arrive", prompt):
        return  # Its release was there first: nothing is ever kept for it.
    if at < 4:
        sender.ask("compute", "h", 8)
        sender.ask("seal", "h")
    assert sender.ask("await_ended", ["h"], LEASE_S / 2)
    assert receiver.ask("changed") == []


def test_closed_in_mid_read_a_receiver_leaves_its_pulls_failed(world: World) -> None:
    sender, receiver = world.sender(), world.receiver()
    receiver.ask("hold")
    receiver.ask("follow", Prompt("h", tokens=64), sender.ask("address"))
    sender.ask("send", Prompt("h", tokens=64))
    receiver.ask("await_reading")
    receiver.ask("close")
    assert receiver.ask("outcome", "h", 1).pulled.error == "closing"
    assert sender.ask("await_ended", ["h"], LEASE_S + 1)
    assert receiver.ask("changed") == []


@pytest.mark.parametrize("transport", ["memory", "tcp"])
def test_closed_sides_leave_no_thread_and_no_descriptor(transport: str) -> None:
    counts = []
    for _ in range(4):
        near = World(transport, near=True)
        sender, receiver = near.sender(), near.receiver()
        for i in range(3):
            receiver.ask("follow", Prompt(f"h{i}", tokens=40), sender.ask("address"))
        sender.ask("send", Prompt("h0", tokens=40))
        well(receiver.ask("outcome", "h0"))
        near.end()
        counts.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
    assert counts[1:] == counts[:1] * 3
