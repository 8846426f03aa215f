"""Connections to the raw transports before their hello: bounded in number and in time."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from kvtransfer.transports import tcp_sender
from kvtransfer.transports.api import Memory, Segment
from kvtransfer.transports.collective import CollectiveTransport
from kvtransfer.transports.collective_offer import Description
from kvtransfer.transports.strangers import STRANGERS_MAX, Deadline, Strangers, accept_each
from kvtransfer.transports.tcp import TcpTransport
from kvtransfer.transports.tcp_wire import HELLO, TcpDescription

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvtransfer.transports.tcp_sender import TcpOffer

UNIT = 64
CLOSED_S = 20.0
"""Patience for what a loaded machine may do late."""


@pytest.fixture
def array() -> np.ndarray[Any, Any]:
    return np.zeros((8, UNIT), dtype=np.uint8)


@pytest.fixture
def memory(array: np.ndarray[Any, Any]) -> Memory:
    return Memory((Segment(array.ctypes.data, UNIT, UNIT, len(array)),))


@pytest.fixture
def offer(memory: Memory) -> Iterator[TcpOffer]:
    offered = TcpTransport().offer(memory)
    yield offered
    offered.close()


def port_of(description: bytes) -> int:
    return msgspec.msgpack.decode(description, type=TcpDescription).port


def closed(connection: socket.socket) -> bool:
    """The other side has ended it."""
    connection.settimeout(CLOSED_S)
    try:
        return not connection.recv(1)
    except ConnectionResetError:
        return True


def test_hello_that_trickles_is_cut_off_at_its_deadline(
    offer: TcpOffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_sender, "HELLO_S", 0.3)
    with socket.create_connection(("127.0.0.1", port_of(offer.description))) as slow:
        slow.settimeout(0.05)
        for _ in range(HELLO.size - 1):  # Each byte alone is in time, and the hello is never whole.
            try:
                slow.sendall(b"T")
                if not slow.recv(1):
                    return
            except TimeoutError:
                continue
            except OSError:
                return
        pytest.fail("it is still open")


def test_readers_get_in_beside_a_crowd_of_silent_strangers(offer: TcpOffer, memory: Memory) -> None:
    with ExitStack() as stack:
        crowd = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port_of(offer.description))))
            for _ in range(2 * STRANGERS_MAX)
        ]
        peer = TcpTransport().connect(memory, offer.description, UNIT)
        assert closed(crowd[0]), "the oldest makes room"
        peer.fence()


def test_collective_offer_refuses_a_long_hello_before_it_takes_it(memory: Memory) -> None:
    offer = CollectiveTransport().offer(memory)
    try:
        port = msgspec.msgpack.decode(offer.description, type=Description).port
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall((60_000).to_bytes(4, "little"))
            stranger.settimeout(CLOSED_S)
            assert b"control frame of 60000 bytes" in stranger.recv(4096)
    finally:
        offer.close()


def test_accepting_goes_on_after_errors_of_the_system() -> None:
    seen: list[str] = []

    class Listener:
        """Out of descriptors first, then one connection whose thread can't be started."""

        def accept(self) -> tuple[socket.socket, None]:
            seen.append("accept")
            if len(seen) == 1:
                raise OSError(24, "Too many open files")
            ours, theirs = socket.socketpair()
            theirs.close()
            return ours, None

    def serve(connection: socket.socket) -> None:
        seen.append("serve")
        if seen.count("serve") == 1:
            raise RuntimeError("can't start new thread")
        connection.close()

    listener: Any = Listener()
    accept_each(listener, serve, lambda: seen.count("serve") >= 2)
    assert seen.count("serve") == 2


def test_stranger_that_was_cut_off_is_not_admitted() -> None:
    crowd, pairs = Strangers(), [socket.socketpair() for _ in range(STRANGERS_MAX + 1)]
    for ours, _ in pairs:
        crowd.add(ours)
    assert len(crowd) == STRANGERS_MAX
    assert not crowd.admitted(pairs[0][0])
    assert crowd.admitted(pairs[1][0])
    assert len(crowd) == STRANGERS_MAX - 1
    for pair in pairs:
        for each in pair:
            each.close()


def test_deadline_is_for_all_pieces_together() -> None:
    deadline = Deadline(0.05)
    assert 0 < deadline.left_s() <= 0.05
    time.sleep(0.06)
    with pytest.raises(TimeoutError):
        deadline.left_s()


def test_listeners_thread_ends_with_the_offer(offer: TcpOffer) -> None:
    offer.close()
    assert not [t for t in threading.enumerate() if t.name == "kv-tcp-accept"]
