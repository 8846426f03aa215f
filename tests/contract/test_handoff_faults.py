"""Either side killed or stopped at each step of a handoff, between real processes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.handoff_rig import LEASE_S, TIMES, World, only, well
from tests.contract.numpy_kv import Prompt

STEPS = ("before it opens", "followed", "between chunks", "in mid-read", "sealed")
BOUND_S = max(TIMES.answer_s + TIMES.beat_s, TIMES.read_s) + 4.0
"""A deadline, the fence, and up to 3 s that a transport may take to connect."""
PROMPT_BLOCKS = 8

RESTARTED = STEPS[1::2]

processes = only("tcp", "ucx", "collective")
signals = pytest.mark.parametrize("how", ["kill", "stop"])


def lead_to(step: str, sender: Any, receiver: Any, handle: str) -> None:
    """A handoff as far as that step. Reads are held up from the one that must not end."""
    prompt, at = Prompt(handle, tokens=8 * PROMPT_BLOCKS), STEPS.index(step)
    if not at:
        return
    connects = receiver.ask("connects")
    receiver.ask("follow", prompt, sender.ask("address"))
    receiver.ask("await_connects", connects + 1)
    sender.ask("arrive", prompt)
    if at == 1:
        return
    reads = receiver.ask("reads")
    if at > 2:
        receiver.ask("hold")
    sender.ask("compute", handle, 3)
    receiver.ask("await_reading", reads + 1)
    if at == 4:
        sender.ask("compute", handle, 5)
        sender.ask("seal", handle)
        receiver.ask("await_reading", reads + 2)


def hand_over(sender: Any, receiver: Any, handle: str) -> None:
    prompt = Prompt(handle, tokens=61)
    receiver.ask("follow", prompt, sender.ask("address"))
    sender.ask("send", prompt)
    well(receiver.ask("outcome", handle))
    assert sender.ask("await_ended", [handle], LEASE_S / 2)


@processes
@signals
def test_a_sender_that_fails_at_any_step_fails_its_pull_in_time_and_nothing_else(
    world: World, how: str
) -> None:
    receiver, senders = world.receiver(), {step: world.sender() for step in STEPS}
    addresses = {step: sender.ask("address") for step, sender in senders.items()}
    for step, sender in senders.items():
        lead_to(step, sender, receiver, step)
        getattr(sender, how)()
    receiver.ask("follow", Prompt(STEPS[0], tokens=61), addresses[STEPS[0]])
    receiver.ask("go_on")
    for step in STEPS:
        outcome, seconds = receiver.ask("seconds", step)
        assert seconds < BOUND_S, step
        # Sealed: all of it may have been here already, and its lease known to run.
        assert outcome.pulled.error or (step == "sealed" and outcome.right), step
        assert receiver.ask("changed") == [], step
    for step in RESTARTED if how == "kill" else STEPS:
        if how == "stop":
            sender = senders[step]
            sender.wake()
            sender.ask("give_up")
            assert sender.ask("await_no_lease", LEASE_S + 1), step
        else:
            port = int(addresses[step][0].rpartition(":")[2])
            sender = world.sender(epoch="second", port=port)
        hand_over(sender, receiver, f"{step} next")


@processes
@signals
def test_a_receiver_that_fails_at_any_step_costs_a_sender_no_more_than_a_lease(
    world: World, how: str
) -> None:
    sender, receivers = world.sender(), {step: world.receiver() for step in STEPS}
    for step, receiver in receivers.items():
        lead_to(step, sender, receiver, step)
        getattr(receiver, how)()
    for step in STEPS:
        finish(sender, step, PROMPT_BLOCKS)
    assert sender.ask("await_ended", list(STEPS), LEASE_S + 1)
    assert sender.ask("leases")[0] == 0
    if how == "kill":
        hand_over(sender, world.receiver(), "next")
        return
    for step, receiver in receivers.items():
        receiver.wake()
        receiver.ask("go_on")
        if step != STEPS[0]:
            assert receiver.ask("outcome", step).pulled.error, step
        hand_over(sender, receiver, f"{step} next")
        assert receiver.ask("changed") == [], step


def finish(sender: Any, handle: str, blocks: int) -> None:
    """What an engine does whoever follows."""
    if sender.ask("arrive", Prompt(handle, tokens=8 * blocks)) or not sender.ask("sealed", handle):
        sender.ask("compute", handle, blocks)
        sender.ask("seal", handle)
