"""The handoff as one piece: production sender and receiver, real sockets, real transports."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from kvtransfer.checksums import Mode
from kvtransfer.receiver import Timeouts
from tests.contract.handoff_rig import LEASE_S, World, only, well
from tests.contract.numpy_kv import Cut, Prompt


def test_what_is_announced_is_read_before_the_seal_and_freed_at_once_after_it(
    world: World,
) -> None:
    sender, receiver = world.sender(), world.receiver()
    prompt = Prompt("h", tokens=75, cached=16)
    receiver.ask("follow", prompt, sender.ask("address"))
    assert sender.ask("arrive", prompt)
    for done in range(1, 5):
        sender.ask("compute", "h", 2)
        if done > 1:  # The first two blocks are cached.
            receiver.ask("await_reading", done - 1)
    sender.ask("compute", "h", 2)
    sender.ask("seal", "h", 42)
    pulled = well(receiver.ask("outcome", "h"))
    assert pulled.hidden_s > 0
    assert pulled.first_token == 42
    assert receiver.ask("changed") == [], "neither the cached prefix nor anybody else's block"
    assert sender.ask("await_ended", ["h"], LEASE_S / 2), "released, not expired"
    assert sender.ask("leases") == (0, 0)


def test_a_follower_that_comes_after_the_seal_gets_everything(world: World) -> None:
    sender, receiver = world.sender(), world.receiver()
    sender.ask("send", Prompt("h", tokens=61))
    receiver.ask("follow", Prompt("h", tokens=61), sender.ask("address"))
    well(receiver.ask("outcome", "h"))
    assert sender.ask("await_ended", ["h"], LEASE_S / 2)
    assert receiver.ask("changed") == []


def test_a_hundred_pulls_at_once_all_end_well(world: World) -> None:
    cut = Cut(blocks=700)
    # On a busy machine so many take longer than a lease that is short.
    sender = world.sender(cut=cut, mode=Mode.SAMPLED, lease_s=30)
    receiver = world.receiver(cut=cut)
    prompts = [Prompt(f"h{i}", tokens=1 + i % 50, cached=8 * (i % 50 // 8)) for i in range(100)]
    for prompt in prompts:
        receiver.ask("follow", prompt, sender.ask("address"))
    for prompt in prompts:
        sender.ask("send", prompt)
    for prompt in prompts:
        well(receiver.ask("outcome", prompt.handle))
    assert receiver.ask("changed") == []
    assert sender.ask("await_ended", [p.handle for p in prompts], 15)


# ------------------------------------------------------------ sides that differ

SPLITS = {
    "two-ranks-read-one": (Cut(), Cut(ranks=2)),
    "one-rank-reads-two": (Cut(ranks=2), Cut()),
    "four-ranks-read-two": (Cut(ranks=2), Cut(ranks=4)),
    "more-ranks-than-heads": (Cut(kv_heads=2, ranks=2), Cut(kv_heads=2, ranks=4)),
    "smaller-blocks": (Cut(block_tokens=16), Cut(block_tokens=4)),
    "larger-blocks": (Cut(block_tokens=4), Cut(block_tokens=16)),
    "both": (Cut(ranks=2, block_tokens=16), Cut(ranks=4, block_tokens=8)),
}


@pytest.mark.parametrize(
    ("world", "split"),
    [
        *(pytest.param("memory", split, id=f"memory-{name}") for name, split in SPLITS.items()),
        pytest.param("tcp", SPLITS["both"], id="tcp-both"),
    ],
    indirect=["world"],
)
def test_every_head_of_every_token_arrives_whatever_the_two_cuts(
    world: World, split: tuple[Cut, Cut]
) -> None:
    sends, reads = split
    sender = world.sender(cut=sends)
    receivers = [world.receiver(cut=reads, rank=rank) for rank in range(reads.ranks)]
    prompt = Prompt("h", tokens=75, cached=16)
    for receiver in receivers:
        receiver.ask("follow", prompt, sender.ask("address"))
    sender.ask("send", prompt, 2)
    for receiver in receivers:
        well(receiver.ask("outcome", "h"))
        assert receiver.ask("changed") == []
    assert sender.ask("await_ended", ["h"], LEASE_S / 2), "when every rank has released it"


@only("memory")
def test_a_handle_is_kept_until_every_rank_has_released_it(world: World) -> None:
    sender = world.sender(mode=Mode.OFF)
    slow, quick = (world.receiver(cut=Cut(ranks=2), rank=rank) for rank in range(2))
    prompt = Prompt("h", tokens=75)
    slow.ask("hold")
    for receiver in (slow, quick):
        receiver.ask("follow", prompt, sender.ask("address"))
    sender.ask("send", prompt)
    slow.ask("await_reading")
    well(quick.ask("outcome", "h"))
    assert not sender.ask("await_ended", ["h"], 0.2), "what is freed is overwritten"
    slow.ask("go_on")
    well(slow.ask("outcome", "h"))
    assert sender.ask("await_ended", ["h"], LEASE_S / 2)


UNLIKE = {
    "content": ({"content": "llama"}, {"content": "qwen"}, ("llama", "qwen")),
    "layers": ({"cut": Cut(layers=2)}, {"cut": Cut(layers=3)}, ("2", "3")),
    "blocks": ({"cut": Cut(block_tokens=12)}, {"cut": Cut(block_tokens=8)}, ("12", "8")),
    "tokens-packed": (
        {"cut": Cut(block_tokens=16, by_token=False)},
        {"cut": Cut(block_tokens=8, by_token=False)},
        ("16", "8"),
    ),
}  # fmt: skip


@only("memory")
@pytest.mark.parametrize("unlike", UNLIKE.values(), ids=UNLIKE)
def test_layouts_that_do_not_fit_are_refused_naming_both(world: World, unlike: Any) -> None:
    sends, reads, names = unlike
    sender, receiver = world.sender(**sends), world.receiver(**reads)
    receiver.ask("follow", Prompt("h", tokens=40), sender.ask("address"))
    error = receiver.ask("outcome", "h").pulled.error
    assert "differs" in error or "blocks" in error
    assert re.search(f"sender has .*{names[0]}.*receiver .*{names[1]}", error)
    assert receiver.ask("changed") == []


# ------------------------------------------------------------ handles


@only("memory")
def test_a_prompt_that_never_comes_ends_its_pull_within_a_lease(world: World) -> None:
    sender, receiver = world.sender(), world.receiver()
    receiver.ask("follow", Prompt("h", tokens=40), sender.ask("address"))
    outcome, seconds = receiver.ask("seconds", "h")
    assert "its prompt never came" in outcome.pulled.error
    assert seconds < LEASE_S + 1
    assert not sender.ask("arrive", Prompt("h", tokens=40)), "whoever wanted it has left"


@only("memory")
@pytest.mark.parametrize("same", [0, 31, 32, 60])
def test_no_block_of_another_prompt_is_read_and_both_links_are_named(
    world: World, same: int
) -> None:
    sender = world.sender(mode=Mode.OFF, cut=Cut(blocks=40))
    receiver = world.receiver(cut=Cut(blocks=40), in_flight_bytes_max=6144)
    receiver.ask("follow", Prompt("h", tokens=61), sender.ask("address"))
    sender.ask("send", Prompt("h", tokens=61, same=same), 1)
    pulled = receiver.ask("outcome", "h").pulled
    assert pulled.mismatched
    wrong = same // 8
    assert re.search(
        f"differs at column {wrong}: sender has [0-9a-f]{{32}}, receiver [0-9a-f]{{32}}",
        pulled.error,
    )
    assert receiver.ask("reads") <= wrong
    assert sender.ask("await_ended", ["h"], LEASE_S / 2)


@only("memory")
def test_a_manifest_of_another_model_is_refused_naming_both(world: World) -> None:
    sender, receiver = world.sender(model="llama"), world.receiver()
    sender.ask("send", Prompt("h", tokens=61))
    receiver.ask("follow", Prompt("h", tokens=61), sender.ask("address"))
    pulled = receiver.ask("outcome", "h").pulled
    assert pulled.mismatched
    assert pulled.error == "model digest differs: sender has llama, receiver model"
    assert sender.ask("await_ended", ["h"], LEASE_S / 2)


@only("memory")
def test_a_released_handle_is_gone_and_never_comes_back(world: World) -> None:
    sender, receiver = world.sender(), world.receiver()
    prompt = Prompt("h", tokens=40)
    receiver.ask("follow", prompt, sender.ask("address"))
    sender.ask("send", prompt)
    well(receiver.ask("outcome", "h"))
    assert sender.ask("await_ended", ["h"], LEASE_S / 2)
    assert not sender.ask("arrive", prompt), "single use"
    receiver.ask("follow", prompt, sender.ask("address"))
    assert receiver.ask("outcome", "h").pulled.error == "released"


@only("memory")
def test_an_expired_handle_is_gone_and_counted(world: World) -> None:
    sender, receiver = world.sender(lease_s=0.3), world.receiver()
    sender.ask("send", Prompt("h", tokens=40))
    assert sender.ask("leases") == (1, 0)
    assert sender.ask("await_ended", ["h"], 1)
    assert sender.ask("leases") == (0, 1)
    receiver.ask("follow", Prompt("h", tokens=40), sender.ask("address"))
    assert receiver.ask("outcome", "h").pulled.error == "the lease has ended"


@only("memory")
def test_one_receiver_pulls_a_handle_once_at_a_time(world: World) -> None:
    sender, receiver = world.sender(), world.receiver()
    prompt = Prompt("h", tokens=40)
    receiver.ask("follow", prompt, sender.ask("address"))
    receiver.ask("follow", prompt, sender.ask("address"), "again")
    assert "is being pulled already" in receiver.ask("outcome", "again").pulled.error
    sender.ask("send", prompt)
    well(receiver.ask("outcome", "h"))


@only("memory")
def test_a_lease_shorter_than_the_beat_outlives_a_slow_read(world: World) -> None:
    sender = world.sender(lease_s=0.6)
    receiver = world.receiver(timeouts=Timeouts(answer_s=1, read_s=10, beat_s=60))
    receiver.ask("hold")
    sender.ask("send", Prompt("h", tokens=40))
    receiver.ask("follow", Prompt("h", tokens=40), sender.ask("address"))
    receiver.ask("await_reading")
    assert not sender.ask("await_ended", ["h"], 1.5), "it is read"
    receiver.ask("go_on")
    well(receiver.ask("outcome", "h"))


@only("memory")
def test_a_second_follower_of_a_handle_is_refused_and_frees_nothing_under_the_first(
    world: World,
) -> None:
    sender = world.sender(mode=Mode.OFF)
    first, second = world.receiver(), world.receiver()
    prompt = Prompt("h", tokens=40)
    first.ask("hold")
    sender.ask("send", prompt)
    first.ask("follow", prompt, sender.ask("address"))
    first.ask("await_reading")
    second.ask("follow", prompt, sender.ask("address"))
    outcome = second.ask("outcome", "h")
    sender.ask("ended")  # What is freed is overwritten.
    first.ask("go_on")
    well(first.ask("outcome", "h"))
    assert "another receiver" in outcome.pulled.error


@only("memory")
def test_an_address_that_is_none_fails_its_pull_and_no_other(world: World) -> None:
    sender, receiver = world.sender(), world.receiver()
    for i, endpoint in enumerate(("", "nonsense", "tcp://127.0.0.1:port", "tcp://127.0.0.1:0")):
        receiver.ask("follow", Prompt(f"h{i}", tokens=8), (endpoint, "first"))
        assert receiver.ask("outcome", f"h{i}").pulled.error
    sender.ask("send", Prompt("h", tokens=40))
    receiver.ask("follow", Prompt("h", tokens=40), sender.ask("address"))
    well(receiver.ask("outcome", "h"))


@only("memory")
def test_a_handle_of_another_epoch_is_refused_naming_both_and_disturbs_no_other(
    world: World,
) -> None:
    sender, receiver = world.sender(), world.receiver()
    endpoint, epoch = sender.ask("address")
    receiver.ask("follow", Prompt("now", tokens=40), (endpoint, epoch))
    sender.ask("arrive", Prompt("now", tokens=40))
    sender.ask("compute", "now", 2)
    receiver.ask("await_reading")
    receiver.ask("follow", Prompt("old", tokens=40), (endpoint, "former"))
    error = receiver.ask("outcome", "old").pulled.error
    assert epoch in error
    assert "former" in error
    sender.ask("compute", "now", 9)
    sender.ask("seal", "now")
    well(receiver.ask("outcome", "now"))


@only("memory")
def test_a_transport_that_takes_its_time_to_connect_costs_no_pull_its_answer(
    world: World,
) -> None:
    sender = world.sender(lease_s=10)
    receiver = world.receiver(timeouts=Timeouts(answer_s=0.5, read_s=2, beat_s=0.2))
    receiver.ask("connect_slowly", 0.7)
    for i in range(2):
        receiver.ask("follow", Prompt(f"h{i}", tokens=40), sender.ask("address"))
        sender.ask("send", Prompt(f"h{i}", tokens=40))
    for i in range(2):
        well(receiver.ask("outcome", f"h{i}"))


@only("memory")
def test_a_sender_that_is_slow_to_connect_to_holds_up_no_other(world: World) -> None:
    quick, slow, receiver = world.sender(), world.sender(epoch="slow"), world.receiver()
    for name in ("before", "meanwhile", "slowly"):
        (slow if name == "slowly" else quick).ask("send", Prompt(name, tokens=40))
    receiver.ask("follow", Prompt("before", tokens=40), quick.ask("address"))
    well(receiver.ask("outcome", "before"))
    receiver.ask("connect_slowly", 1.0)
    receiver.ask("follow", Prompt("slowly", tokens=40), slow.ask("address"))
    receiver.ask("follow", Prompt("meanwhile", tokens=40), quick.ask("address"))
    well(receiver.ask("outcome", "meanwhile", 0.5))
    assert receiver.ask("running") == 1
    well(receiver.ask("outcome", "slowly"))


@only("memory")
def test_a_cancelled_pull_waits_for_no_connection(world: World) -> None:
    sender, receiver = world.sender(), world.receiver()
    receiver.ask("connect_slowly", 1.0)
    sender.ask("send", Prompt("h", tokens=40))
    receiver.ask("follow", Prompt("h", tokens=40), sender.ask("address"))
    time.sleep(0.2)
    receiver.ask("cancel", "h")
    assert receiver.ask("outcome", "h", 0.5).pulled.error == "cancelled"


@only("memory")
def test_a_connection_of_no_use_is_given_up_and_made_anew_when_it_is(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtransfer.connection.IDLE_S_MAX", 0.3)
    sender, receiver = world.sender(lease_s=5), world.receiver()
    receiver.ask("follow", Prompt("waits", tokens=40), sender.ask("address"))
    time.sleep(0.8)
    sender.ask("send", Prompt("waits", tokens=40))
    well(receiver.ask("outcome", "waits"))
    assert receiver.ask("connects") == 1, "it waited, and was of use"
    for connects, pause_s in ((1, 0.0), (2, 0.8)):
        time.sleep(pause_s)
        sender.ask("send", Prompt(f"{connects}", tokens=40))
        receiver.ask("follow", Prompt(f"{connects}", tokens=40), sender.ask("address"))
        well(receiver.ask("outcome", f"{connects}"))
        assert receiver.ask("connects") == connects
