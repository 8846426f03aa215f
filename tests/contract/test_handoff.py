"""The handoff as one piece: production sender and receiver, real sockets, real transports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.contract.handoff_rig import LEASE_S, Prompt, World

if TYPE_CHECKING:
    from collections.abc import Iterator

TRANSPORTS = ("memory", "tcp", "ucx", "collective")


@pytest.fixture(params=TRANSPORTS)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(request.param)
    try:
        yield made
    finally:
        made.end()


def only(*names: str) -> Any:
    return pytest.mark.parametrize("world", names, indirect=True)


def well(outcome: Any) -> Any:
    assert outcome.pulled.error is None, outcome.pulled.error
    assert outcome.right
    return outcome.pulled


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
