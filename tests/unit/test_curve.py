"""Who gets in when the token channel has keys, over real sockets and the simulated engine."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils import z85

from kvtransfer.curve import verdict
from router.ask import Ask
from router.core.compat import RouterFacts
from router.dispatch import Dispatch
from router.link import Curve, Links
from tests.unit.test_worker_channel import FAST, WAIT_S, generate, place, run, until
from workers.api import SILENCE_S, Finish
from workers.keys import WorkerKeys

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from router.core.errors import RouterError
    from tests.unit.test_worker_channel import Place
    from workers.api import Delta, ToWorker

WORKER_PUBLIC, WORKER_SECRET = zmq.curve_keypair()
ROUTER_PUBLIC, ROUTER_SECRET = zmq.curve_keypair()
OTHER_PUBLIC, OTHER_SECRET = zmq.curve_keypair()

KEYS = WorkerKeys(WORKER_SECRET, frozenset([ROUTER_PUBLIC]))
KNOWN = Curve(ROUTER_PUBLIC, ROUTER_SECRET, WORKER_PUBLIC)
STRANGERS = {
    "no keys": None,
    "an unknown key": Curve(OTHER_PUBLIC, OTHER_SECRET, WORKER_PUBLIC),
    "a wrong worker's key": Curve(ROUTER_PUBLIC, ROUTER_SECRET, OTHER_PUBLIC),
    "another's public key": Curve(ROUTER_PUBLIC, OTHER_SECRET, WORKER_PUBLIC),
}


async def is_well(here: Place) -> None:
    peer = here.peer(KNOWN)
    await peer.greet()
    await peer.say(generate("r"))
    assert (await peer.end_of("r")).finish is Finish.LENGTH


def test_a_router_with_the_right_keys_is_served() -> None:
    async def test() -> None:
        async with place(keys=KEYS) as here:
            await is_well(here)

    run(test())


@pytest.mark.parametrize("curve", STRANGERS.values(), ids=STRANGERS.keys())
def test_a_stranger_gets_no_answer_and_the_worker_stays_well(curve: Curve | None) -> None:
    async def test() -> None:
        async with place(keys=KEYS) as here:
            stranger = here.peer(curve)
            for message in (generate("s"), b"", b"noise"):
                await stranger.say(message)
            await stranger.turned_away()
            await is_well(here)
            assert here.channel.malformed_total == 0, "not a frame of it came through"

    run(test())


def test_noise_at_the_port_harms_nobody() -> None:
    async def test() -> None:
        async with place(keys=KEYS) as here:
            host, port = here.channel.address.removeprefix("tcp://").split(":")
            for noise in (b"", b"\0" * 64, b"\xff" + b"\0" * 8 + b"\x7f\x03" + b"x" * 500):
                _, writer = await asyncio.open_connection(host, int(port))
                writer.write(noise)
                await writer.drain()
                writer.close()
            await is_well(here)

    run(test())


def test_nobody_gets_in_when_nobody_keeps_the_gate() -> None:
    async def test() -> None:
        async with place(keys=KEYS) as here:
            assert here.channel.gate
            here.channel.gate.close()
            await here.peer(KNOWN).turned_away()

    run(test())


def test_strangers_are_counted_and_told_of_once_without_a_key(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        async with place(keys=KEYS) as here:
            for _ in range(3):
                await here.peer(STRANGERS["an unknown key"]).turned_away()
            assert here.channel.gate
            assert here.channel.gate.refused_total == 3

    with caplog.at_level(logging.DEBUG):
        run(test())
    told = [r for r in caplog.records if r.name == "workers.gate"]
    assert [vars(r)["address"] for r in told] == ["127.0.0.1"]
    for key in (OTHER_PUBLIC, OTHER_SECRET, WORKER_SECRET):
        assert key.decode() not in str([vars(r) for r in caplog.records])


@given(st.lists(st.binary(max_size=40), max_size=9), st.binary(min_size=32, max_size=32))
def test_only_a_known_key_is_let_in_whatever_is_asked(noise: list[bytes], key: bytes) -> None:
    known = frozenset([ROUTER_PUBLIC])
    assert verdict(noise, known)[2] == b"500"
    asked = [b"1.0", b"7", b"tandem", b"127.0.0.1", b"", b"CURVE", key]
    assert verdict(asked, known)[1:3] == [b"7", b"400"]
    asked[6] = z85.decode(ROUTER_PUBLIC)
    assert verdict(asked, known)[1:3] == [b"7", b"200"]
    for at, other in ((0, b"2.0"), (2, b""), (5, b"PLAIN"), (5, b"NULL"), (6, asked[6][:31])):
        assert verdict([*asked[:at], other, *asked[at + 1 :]], known)[2] == b"500"


# ---------------------------------------------------------------- the router's own end


class Router:
    """Links and dispatch as the process has them; its client is a list."""

    def __init__(self, curve: Curve | None, *addresses: str) -> None:
        self.tokens: list[int] = []
        self.dispatch = Dispatch(self._send, self, time.monotonic)
        facts = RouterFacts("r1", "m", "tokenizer", "model", FAST.max_model_len)
        self.links = Links(addresses, facts, self.dispatch, curve)

    def _send(self, worker_id: str, message: ToWorker) -> None:
        self.links.send(worker_id, message)

    def deliver(self, deltas: list[Delta], prompt_extras: dict[str, bytes]) -> None:
        for delta in deltas:
            self.tokens += delta.token_ids

    def fail(self, request_id: str, error: RouterError) -> None:
        raise AssertionError(error)

    @property
    def refusals(self) -> list[str | None]:
        return [link.refused for link in self.links]

    @property
    def knows(self) -> list[str]:
        return [w.hello.worker_id for w in self.dispatch.fleet]

    async def is_served(self) -> None:
        await until(lambda: self.knows == ["w1"])
        self.tokens.clear()
        self.dispatch.submit(Ask(f"r{time.monotonic()}", [1, 2, 3], 4))
        await until(lambda: len(self.tokens) == 4)


@asynccontextmanager
async def router(curve: Curve | None, *addresses: str) -> AsyncIterator[Router]:
    here = Router(curve, *addresses)
    beating = asyncio.create_task(here.links.run())
    try:
        yield here
    finally:
        beating.cancel()
        async with asyncio.timeout(WAIT_S):
            await asyncio.wait([beating])


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.link.BEAT_S", 0.05)


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize(
    ("keys", "curve", "reason"),
    [
        (KEYS, STRANGERS["no keys"], "has none"),
        (None, KNOWN, "has none"),
        (KEYS, STRANGERS["an unknown key"], "does not know this router's key"),
        (KEYS, STRANGERS["a wrong worker's key"], "are the workers' keys others?"),
    ],
)
def test_a_router_says_what_is_wrong_and_is_served_once_it_is_put_right(
    keys: WorkerKeys | None, curve: Curve | None, reason: str
) -> None:
    """The worker's next life has the keys that fit; the router stays as it is."""
    mended = None
    if curve:
        secret = WORKER_SECRET if curve.server == WORKER_PUBLIC else OTHER_SECRET
        mended = WorkerKeys(secret, frozenset([curve.public]))

    async def test() -> None:
        async with AsyncExitStack() as stack:
            async with place(keys=keys) as wrong:
                here = await stack.enter_async_context(router(curve, wrong.channel.address))
                await until(lambda: reason in (here.refusals[0] or ""))
                assert here.knows == []
            async with place(keys=mended, port=int(wrong.channel.address.rsplit(":", 1)[1])):
                await here.is_served()
                assert here.refusals == [None]

    run(test())


@pytest.mark.parametrize("keys", [None, KEYS], ids=["plain", "keys"])
def test_a_worker_that_ends_is_missed_at_once_and_not_when_it_has_been_silent(
    keys: WorkerKeys | None,
) -> None:
    async def test() -> None:
        async with AsyncExitStack() as stack:
            async with place(keys=keys) as worker:
                curve = KNOWN if keys else None
                here = await stack.enter_async_context(router(curve, worker.channel.address))
                await until(lambda: here.knows == ["w1"])
            async with asyncio.timeout(SILENCE_S / 2):
                await until(lambda: here.knows == [])

    run(test())


@pytest.mark.usefixtures("_quick")
def test_a_plain_worker_does_not_keep_a_router_with_keys_from_the_others() -> None:
    async def test() -> None:
        async with (
            place() as plain,
            place(keys=KEYS) as safe,
            router(KNOWN, plain.channel.address, safe.channel.address) as here,
        ):
            await here.is_served()
            await until(lambda: here.refusals[0] is not None)
            assert here.refusals[1] is None

    run(test())
