"""Workers that lie on the wire: put aside with a reason, their requests go on elsewhere."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from math import nan
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from router.ask import Ask
from tests.hostile import heads_of, hostile, mutated
from tests.unit.test_curve import router
from tests.unit.test_dispatch import load
from tests.unit.test_worker_channel import FAST, HELLO, generate, place, run, until
from workers.api import (
    PROTOCOL,
    Batch,
    Delta,
    Finish,
    Generate,
    Heartbeat,
    KvSnapshot,
    KvStored,
    Phase,
    Release,
    Role,
    RouterHello,
    WorkerHello,
    decode_to_worker,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

SOUND = WorkerHello(
    PROTOCOL, "liar", "e", Role.MIXED, "sim", "1", "m", "model", "tokenizer", "kv", [],
    FAST.block_tokens, 1600, 10_000, FAST.max_model_len, 30.0,
)  # fmt: skip
LOAD = load()
MUTATIONS = 300


class Liar:
    """A worker's socket that answers a request with whatever it is told to."""

    def __init__(self, hello: WorkerHello, lies: list[Any]) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind("tcp://127.0.0.1:*")
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._hello, self._lies = hello, lies
        self.asked: list[Generate] = []
        self.greeted = 0
        self.may_lie = asyncio.Event()

    async def run(self) -> None:
        while True:
            who, frame = await self._socket.recv_multipart()
            match decode_to_worker(frame):
                case RouterHello():
                    self.greeted += 1
                    await self._say(who, self._hello)
                case Generate() as asked:
                    self.asked.append(asked)
                    await self.may_lie.wait()
                    for lie in self._lies:
                        await self._say(who, lie(asked) if callable(lie) else lie)

    async def _say(self, who: bytes, message: Any) -> None:
        frame = message if isinstance(message, bytes) else encode(message)
        await self._socket.send_multipart([who, frame])

    def close(self) -> None:
        self._socket.close()
        self._context.term()


@asynccontextmanager
async def liar_of(hello: WorkerHello, lies: list[Any]) -> AsyncIterator[Liar]:
    liar = Liar(hello, lies)
    lying = asyncio.create_task(liar.run())
    try:
        yield liar
    finally:
        lying.cancel()
        await asyncio.wait([lying])
        liar.close()


def flood(asked: Generate) -> Batch:
    return Batch(LOAD, [Delta(asked.request_id, list(range(1_000_000)))])


LIES: dict[str, Any] = {
    "a delta of a million tokens": flood,
    "NaN": lambda asked: Batch(LOAD, [Delta(asked.request_id, [1], kv_s=nan)]),
    "negative load": msgspec.structs.replace(
        Batch(LOAD), load=msgspec.structs.replace(LOAD, running=-5)
    ),
    "a snapshot of two million blocks": KvSnapshot(
        0, 0, True, [KvStored(list(range(2_000_000)), -1, [])]
    ),
}


async def is_put_aside(lie: Any) -> None:
    """A request that the liar got first is answered whole by an honest worker, and only by it."""
    async with liar_of(SOUND, [lie]) as liar, router(None, liar.address) as here, place() as honest:
        await until(lambda: here.knows == ["liar"])
        here.dispatch.submit(Ask("r", list(range(1, 20)), 4))
        await until(lambda: bool(liar.asked))
        here.links.connect(honest.channel.address)
        await until(lambda: here.knows == ["liar", "w1"])
        liar.may_lie.set()
        await until(lambda: here.knows == ["w1"])
        assert "worker liar is not believed" in (here.refusals[0] or "")
        assert here.dispatch.doubts.total == 1
        await until(lambda: len(here.tokens) == 4 and not len(here.dispatch))
        greeted = liar.greeted
        await until(lambda: liar.greeted > greeted)  # It answers hellos, and is not taken back.
        assert here.knows == ["w1"]


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.link.BEAT_S", 0.05)


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_liar_is_put_aside_and_its_request_answered_elsewhere(lie: Any) -> None:
    run(is_put_aside(lie))


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize(
    "change", [{"block_tokens": 0}, {"lease_s": nan}, {"blocks_total": -1}], ids=str
)
def test_absurd_hello_is_refused_and_named(change: dict[str, Any]) -> None:
    async def test() -> None:
        hello = msgspec.structs.replace(SOUND, **change)
        async with (
            liar_of(hello, []) as liar,
            router(None, liar.address) as here,
            place() as honest,
        ):
            here.links.connect(honest.channel.address)
            await here.is_served()
            await until(lambda: next(iter(change)) in (here.refusals[0] or ""))

    run(test())


@pytest.mark.usefixtures("_quick")
def test_hostile_frames_of_a_worker_cost_the_router_nothing_but_a_few_log_lines(
    caplog: pytest.LogCaptureFixture,
) -> None:
    real = [
        encode(SOUND),
        encode(Batch(LOAD, [Delta("r", [1])])),
        encode(KvSnapshot(0, 0, True, [])),
    ]
    frames = [*hostile(heads_of(real))[::7], *mutated(real, 1, MUTATIONS)]

    async def test() -> None:
        async with (
            liar_of(SOUND, frames) as liar,
            router(None, liar.address) as here,
            place() as honest,
        ):
            await until(lambda: here.knows == ["liar"])
            here.dispatch.submit(Ask("r", list(range(1, 20)), 4))
            await until(lambda: bool(liar.asked))
            here.links.connect(honest.channel.address)
            await until(lambda: here.knows == ["liar", "w1"])
            liar.may_lie.set()
            await until(lambda: here.links.malformed_total > 100)
            here.links.disconnect(liar.address)
            here.dispatch.cancel(["r"])
            await until(lambda: here.knows == ["w1"])
            await here.is_served()

    with caplog.at_level(logging.WARNING):
        run(test())
    lines = [r for r in caplog.records if r.getMessage() == "malformed message"]
    assert 0 < len(lines) <= 10


@pytest.mark.parametrize("seed", range(3))
def test_hostile_frames_of_a_router_leave_its_worker_well(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    real = [
        encode(m)
        for m in (
            HELLO, generate("r"), Heartbeat(), Release([b"t"]),
            Generate("s", Phase.DECODE, [1, 2], 4, b"", ticket=b"\x94\x03\xa1e\xa1h\xa1t"),
        )
    ]  # fmt: skip
    frames = [*hostile(heads_of(real))[seed::7], *mutated(real, seed, MUTATIONS)]

    async def test() -> None:
        async with place() as here:
            stranger, peer = here.peer(), here.peer()
            await stranger.greet()
            for frame in frames:
                await stranger.say(frame)
            await peer.greet()
            await peer.say(generate("fine"))
            assert (await peer.end_of("fine")).finish is Finish.LENGTH
            assert here.channel.malformed_total > 100
            assert here.channel.failed_total == 0

    with caplog.at_level(logging.WARNING):
        run(test())
    assert len([r for r in caplog.records if r.getMessage() == "malformed message"]) <= 10


def test_message_that_the_worker_cannot_take_does_not_end_hearing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug of ours in one message: the next one is heard, from the same socket."""

    async def test() -> None:
        async with place() as here:
            peer = here.peer()
            await peer.greet()
            submit: Callable[[Generate], None] = here.worker._engine.submit

            def fail_once(asked: Generate) -> None:
                if asked.request_id == "bad":
                    raise RuntimeError("a bug")
                submit(asked)

            monkeypatch.setattr(here.worker._engine, "submit", fail_once)
            await peer.say(generate("bad"))
            await peer.say(generate("good"))
            assert (await peer.end_of("good")).finish is Finish.LENGTH
            assert here.channel.failed_total == 1

    with caplog.at_level(logging.ERROR):
        run(test())
