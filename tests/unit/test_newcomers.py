"""Connections that say nothing are ended, and routers that speak are not."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

import zmq

from tests.unit.test_worker_channel import run, until
from workers import newcomers
from workers.api import Heartbeat, encode
from workers.channel import Channel

if TYPE_CHECKING:
    import pytest

    from workers.api import ToWorker


class Heard:
    """Counts messages by router, in their order."""

    def __init__(self) -> None:
        self.by_router: dict[bytes, int] = {}

    def on_message(self, router: bytes, message: ToWorker) -> None:
        self.by_router[router] = self.by_router.get(router, 0) + 1


def strangers(channel: Channel, count: int) -> list[socket.socket]:
    host, _, port = channel.address.removeprefix("tcp://").rpartition(":")
    return [socket.create_connection((host, int(port))) for _ in range(count)]


def is_over(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        while connection.recv(1024):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    return True


def test_oldest_stranger_makes_room_and_newest_stay() -> None:
    async def test() -> None:
        with closing(Channel("127.0.0.1", 0, Heard())) as channel:
            most = channel.newcomers.most
            found = strangers(channel, most + 3)
            await until(lambda: [is_over(each) for each in found] == [True] * 3 + [False] * most)
            assert channel.newcomers.ended_total == 3
            for each in found:
                each.close()

    run(test())


def test_stranger_that_says_nothing_is_ended_after_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(newcomers, "UNHEARD_S", 0.3)
    monkeypatch.setattr(newcomers, "_CHECK_S", 0.1)

    async def test() -> None:
        with closing(Channel("127.0.0.1", 0, Heard())) as channel:
            [silent] = strangers(channel, 1)
            await until(lambda: is_over(silent))
            silent.close()

    run(test())


def test_routers_that_speak_stay_however_many_come_while_the_loop_is_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(newcomers, "UNHEARD_S", 0.3)
    monkeypatch.setattr(newcomers, "_CHECK_S", 0.1)
    heard = Heard()

    async def test() -> None:
        with closing(Channel("127.0.0.1", 0, heard)) as channel, ExitStack() as stack:
            count = 3 * channel.newcomers.most
            context = stack.enter_context(zmq.Context())
            routers = []
            for _ in range(count):
                router = stack.enter_context(context.socket(zmq.DEALER))
                router.setsockopt(zmq.LINGER, 0)
                router.connect(channel.address)
                router.send(encode(Heartbeat()))
                routers.append(router)
            time.sleep(0.5)  # noqa: ASYNC251  # Our loop is busy while all arrive.
            await until(lambda: len(heard.by_router) == count)
            time.sleep(0.5)  # noqa: ASYNC251  # Longer than who says nothing may stay.
            for router in routers:
                router.send(encode(Heartbeat()))
            await until(lambda: set(heard.by_router.values()) == {2})
            assert len(heard.by_router) == count  # None had to connect anew.
            assert channel.newcomers.ended_total == 0

    run(test())
