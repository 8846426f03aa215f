"""The handoff between workers that have keys: they alone get in, and only who has the handle."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import zmq

from kvtransfer.curve import Pair, present
from kvtransfer.keys import KeyFileBad
from kvtransfer.protocol import (
    VERSION,
    Follow,
    Gone,
    Held,
    Open,
    Opened,
    Release,
    Renew,
    ToReceiver,
    encode_ticket,
)
from kvtransfer.releases import ReleaseClient
from kvtransfer.transports.memory import MemoryTransport
from tests.contract.handoff_rig import TIMES, Decode, Prefill, Receives, Sends, well
from tests.contract.numpy_kv import PLAIN, Prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

OURS = Pair(*zmq.curve_keypair())
THEIRS = Pair(*zmq.curve_keypair())
WAIT_S = 20.0
PROMPT = Prompt("a handle that nobody can guess", tokens=40)


@pytest.fixture
def transport() -> MemoryTransport:
    return MemoryTransport()


@pytest.fixture
def prefill(transport: MemoryTransport) -> Iterator[Prefill]:
    made = Prefill(Sends(("memory",), keys=OURS, lease_s=60.0), transport)
    yield made
    made.close()


def receiver(transport: MemoryTransport, keys: Pair | None) -> Decode:
    return Decode(Receives(("memory",), timeouts=TIMES, keys=keys), transport)


def until(true: Callable[[], bool]) -> None:
    by = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < by
        time.sleep(0.01)


def test_worker_with_the_groups_key_pulls(prefill: Prefill, transport: MemoryTransport) -> None:
    decode = receiver(transport, OURS)
    try:
        prefill.send(PROMPT)
        decode.follow(PROMPT, prefill.address())
        well(decode.outcome(PROMPT.handle, WAIT_S))
        assert prefill.await_ended([PROMPT.handle], WAIT_S)
    finally:
        decode.close()


@pytest.mark.parametrize("keys", [None, THEIRS], ids=["no keys", "another group's"])
def test_worker_without_the_groups_key_learns_and_frees_nothing(
    prefill: Prefill, transport: MemoryTransport, keys: Pair | None
) -> None:
    decode, (endpoint, epoch) = receiver(transport, keys), prefill.address()
    try:
        prefill.send(PROMPT)
        decode.follow(PROMPT, prefill.address())
        outcome = decode.outcome(PROMPT.handle, WAIT_S)
        assert "did not answer" in (outcome.pulled.error or "")
        assert not outcome.right
        releases = ReleaseClient(keys)
        assert releases.release(encode_ticket(epoch, PROMPT.handle, endpoint))
        time.sleep(0.3)
        releases.close()
        assert prefill.leases() == (1, 0), "it is still kept for whoever has the key"
    finally:
        decode.close()


def test_stolen_public_key_is_refused_and_counted(prefill: Prefill) -> None:
    """The sender's public key alone: what a stranger may learn from a router's folder."""
    public, secret = zmq.curve_keypair()
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.curve_publickey, stranger.curve_secretkey = public, secret
        stranger.curve_serverkey = OURS.public
        stranger.connect(prefill.address()[0])
        stranger.send(msgspec.msgpack.encode(Open(1, VERSION, PLAIN.layout(), 0)))
        until(lambda: prefill.refused() > 0)
        assert not stranger.poll(100)


def test_release_client_with_the_key_releases(prefill: Prefill) -> None:
    endpoint, epoch = prefill.address()
    prefill.send(PROMPT)
    releases = ReleaseClient(OURS)
    try:
        assert releases.release(encode_ticket(epoch, PROMPT.handle, endpoint))
        assert prefill.await_ended([PROMPT.handle], WAIT_S)
    finally:
        releases.close()


def test_lease_is_out_of_reach_of_a_worker_that_has_not_its_handle(prefill: Prefill) -> None:
    """Epoch and endpoint are known to many; they alone neither release nor renew nor follow."""
    endpoint, epoch = prefill.address()
    prefill.send(PROMPT)
    with zmq.Context() as context, context.socket(zmq.DEALER) as other:
        other.setsockopt(zmq.LINGER, 0)
        present(other, OURS)
        other.connect(endpoint)

        def ask(message: Any) -> Any:
            other.send(msgspec.msgpack.encode(message))
            assert other.poll(1000 * WAIT_S)
            return msgspec.msgpack.decode(other.recv(), type=ToReceiver)

        opened = ask(Open(1, VERSION, PLAIN.layout(), 0))
        assert isinstance(opened, Opened)
        assert PROMPT.handle not in repr(opened), "what is told to all names no lease"
        guess = PROMPT.handle[:-1]
        other.send(msgspec.msgpack.encode(Release(epoch, guess)))
        assert isinstance(ask(Renew(2, epoch, guess)), Gone)
        held = ask(Follow(3, epoch, guess, 0, 1))
        assert isinstance(held, Held), "one that is awaited: nothing is told of another's"
        assert not other.poll(100)
    assert prefill.leases() == (1, 0)


def test_pair_is_read_from_the_secret_alone(tmp_path: Path) -> None:
    file = tmp_path / "worker.secret"
    file.write_bytes(OURS.secret + b"\n")
    file.chmod(0o600)
    assert Pair.read(file) == OURS
    assert OURS.secret.decode() not in repr(Pair.read(file))
    file.chmod(0o604)
    with pytest.raises(KeyFileBad, match="open to all"):
        Pair.read(file)


def test_workers_tell_their_engines_the_keys_file_and_not_the_key(tmp_path: Path) -> None:
    import argparse

    from workers.api import Role
    from workers.engines.vllm_config import _transfer
    from workers.server import Identity

    file = tmp_path / "worker.secret"
    file.write_bytes(OURS.secret)
    args = argparse.Namespace(
        kv_connector="tandem", host="127.0.0.1", lease_s=5, role="mixed", kv_transports="tcp",
        kv_checksums="off", kv_answer_s=5, kv_read_s=5, curve_secret_file=str(file),
    )  # fmt: skip
    identity = Identity("w", "epoch", Role.MIXED, "m", "m", "t", 5.0)
    config = _transfer(args, identity)
    assert config.get_from_extra_config("curve_secret_file", "") == str(file)
    assert OURS.secret.decode() not in repr(config)
