"""What a router may count on from a worker, over a real socket and the simulated engine."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import zmq
import zmq.asyncio

from workers.api import (
    PROTOCOL,
    Abort,
    Batch,
    Delta,
    Finish,
    Generate,
    Heartbeat,
    Phase,
    Refused,
    Release,
    Role,
    RouterHello,
    WorkerHello,
    decode_to_router,
    encode,
)
from workers.channel import Channel
from workers.drain import Drain
from workers.engines.sim import SimEngine
from workers.engines.sim_settings import SimSettings
from workers.metrics import Metrics
from workers.server import Identity, Worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from router.link import Curve
    from workers.api import ToRouter, ToWorker
    from workers.keys import WorkerKeys

WAIT_S = 10.0
FAST = SimSettings(step_s=0.002, prefill_tokens_per_s=1e6, max_model_len=4096, lease_s=30.0)
HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
PROMPT = list(range(1, 40))
HELLO = RouterHello(PROTOCOL, "r1", "model", "tokenizer")


class Peer:
    """A router's end, said and heard by hand."""

    def __init__(
        self, context: zmq.asyncio.Context, address: str, curve: Curve | None = None
    ) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        if curve:
            self._socket.curve_publickey = curve.public
            self._socket.curve_secretkey = curve.secret
            self._socket.curve_serverkey = curve.server
        self._monitor = self._socket.get_monitor_socket(HANDSHAKE_FAILED)
        self._socket.connect(address)
        self.batches: list[Batch] = []

    async def say(self, message: ToWorker | bytes) -> None:
        await self._socket.send(message if isinstance(message, bytes) else encode(message))

    async def hear(self) -> ToRouter:
        async with asyncio.timeout(WAIT_S):
            message = decode_to_router(await self._socket.recv())
        if isinstance(message, Batch):
            self.batches.append(message)
        return message

    async def greet(self) -> WorkerHello:
        await self.say(HELLO)
        hello = await self.hear()
        assert isinstance(hello, WorkerHello)
        return hello

    async def until(self, true: Callable[[Batch], bool]) -> Batch:
        while True:
            message = await self.hear()
            if isinstance(message, Batch) and true(message):
                return message

    async def end_of(self, request_id: str) -> Delta:
        def ends(batch: Batch) -> bool:
            return any(d.request_id == request_id and d.finish for d in batch.deltas)

        batch = await self.until(ends)
        return next(d for d in batch.deltas if d.request_id == request_id and d.finish)

    async def turned_away(self) -> None:
        """Until the handshake has failed. Nothing was heard by then."""
        async with asyncio.timeout(WAIT_S):
            await self._monitor.recv_multipart()
        assert not await self._socket.poll(0)

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close()


class Place:
    def __init__(self, worker: Worker, channel: Channel, context: zmq.asyncio.Context) -> None:
        self.worker, self.channel, self._context = worker, channel, context
        self.peers: list[Peer] = []

    async def drain(self, limit_s: float) -> None:
        await Drain(self.worker, limit_s, time.monotonic).finish()

    def peer(self, curve: Curve | None = None) -> Peer:
        self.peers.append(Peer(self._context, self.channel.address, curve))
        return self.peers[-1]


@asynccontextmanager
async def place(
    role: Role = Role.MIXED,
    config: SimSettings = FAST,
    keys: WorkerKeys | None = None,
    port: int = 0,
) -> AsyncIterator[Place]:
    identity = Identity("w1", "e1", role, "m", "model", "tokenizer", config.lease_s)
    engine = SimEngine(config, "e1")
    worker = Worker(engine, identity, Metrics())
    channel = Channel("127.0.0.1", port, worker, keys)
    worker.attach(channel)
    running = asyncio.create_task(worker.run())
    here = Place(worker, channel, zmq.asyncio.Context())
    try:
        yield here
    finally:
        for peer in here.peers:
            peer.close()
        here._context.term()
        running.cancel()
        await asyncio.wait([running])
        engine.close()
        channel.close()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not true():  # noqa: ASYNC110  # Another says when.
            await asyncio.sleep(0.01)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


def generate(request_id: str, outputs: int = 4, phase: Phase = Phase.BOTH) -> Generate:
    return Generate(request_id, phase, PROMPT, outputs, b"")


def test_a_router_that_greets_learns_whom_it_speaks_to() -> None:
    async def test() -> None:
        async with place() as here:
            hello = await here.peer().greet()
            assert (hello.worker_id, hello.epoch, hello.role) == ("w1", "e1", Role.MIXED)
            assert hello.blocks_total == FAST.blocks_total
            assert hello.block_bytes == FAST.block_tokens * FAST.token_bytes

    run(test())


@pytest.mark.parametrize(
    ("hello", "theirs", "ours"),
    [
        (RouterHello(PROTOCOL + 1, "r1", "model", "tokenizer"), str(PROTOCOL + 1), str(PROTOCOL)),
        (RouterHello(PROTOCOL, "r1", "other", "tokenizer"), "other", "model"),
        (RouterHello(PROTOCOL, "r1", "model", "other"), "other", "tokenizer"),
    ],
)
def test_a_stranger_is_refused_and_both_sides_are_named(
    hello: RouterHello, theirs: str, ours: str
) -> None:
    async def test() -> None:
        async with place() as here:
            peer = here.peer()
            await peer.say(hello)
            answer = await peer.hear()
            assert isinstance(answer, Refused)
            for part in ("r1", "w1", theirs, ours):
                assert part in answer.reason
            await peer.say(generate("r"))
            assert isinstance(await peer.hear(), Refused), "what it sends is lost, and it knows"
            await peer.say(HELLO)
            assert isinstance(await peer.hear(), WorkerHello), "it may come back as another"
            assert not (await peer.until(lambda b: True)).load.busy, "and nothing was taken on"

    run(test())


def test_one_step_is_one_message_for_all_of_a_routers_requests() -> None:
    async def test() -> None:
        async with place() as here:
            peer = here.peer()
            await peer.greet()
            for name in "abc":
                await peer.say(generate(name, 30))
            await peer.end_of("c")
            assert any(len(b.deltas) == 3 for b in peer.batches)
            steps = [b.load.steps for b in peer.batches if b.deltas]
            assert len(steps) == len(set(steps))
            told = [d.request_id for b in peer.batches for d in b.deltas]
            assert {name: told.count(name) for name in "abc"} == {"a": 30, "b": 30, "c": 30}

    run(test())


def test_two_routers_hear_only_of_their_own() -> None:
    async def test() -> None:
        async with place() as here:
            one, two = here.peer(), here.peer()
            for peer, name in ((one, "a"), (two, "b")):
                await peer.greet()
                await peer.say(generate(name, 20))
            await one.end_of("a")
            await two.end_of("b")
            assert {d.request_id for b in one.batches for d in b.deltas} == {"a"}
            assert {d.request_id for b in two.batches for d in b.deltas} == {"b"}

    run(test())


def test_noise_is_counted_and_harms_nobody() -> None:
    async def test() -> None:
        async with place() as here:
            peer = here.peer()
            await peer.greet()
            for noise in (b"", b"\xc1", b"hello", b"\x92\xa5Abort\x01", encode(Heartbeat())[:-1]):
                await peer.say(noise)
            await peer.say(generate("r"))
            assert (await peer.end_of("r")).finish is Finish.LENGTH
            assert here.channel.malformed_total >= 4

    run(test())


def test_a_request_id_in_use_is_refused_to_another_router() -> None:
    async def test() -> None:
        async with place() as here:
            one, two = here.peer(), here.peer()
            await one.greet()
            await two.greet()
            await one.say(generate("r", 200))
            await one.until(lambda b: bool(b.deltas))
            await two.say(generate("r"))
            refused = await two.end_of("r")
            assert refused.finish is Finish.REFUSED
            assert "r" in (refused.error or "")
            await two.say(Abort(["r"]))
            assert (await one.end_of("r")).finish is Finish.LENGTH, "another's abort is ignored"

    run(test())


def test_a_phase_that_the_role_does_not_take_is_refused() -> None:
    async def test() -> None:
        async with place(Role.PREFILL) as here:
            peer = here.peer()
            await peer.greet()
            await peer.say(generate("r", phase=Phase.BOTH))
            refused = await peer.end_of("r")
            assert refused.finish is Finish.REFUSED
            assert "prefill" in (refused.error or "")

    run(test())


def test_an_abort_frees_what_the_request_held() -> None:
    async def test() -> None:
        async with place() as here:
            peer = here.peer()
            await peer.greet()
            await peer.say(generate("r", 3000))
            await peer.until(lambda b: bool(b.deltas))
            await peer.say(Abort(["r", "unknown"]))
            load = (await peer.until(lambda b: not b.load.busy)).load
            assert load.blocks_free == load.blocks_total

    run(test())


def test_a_released_ticket_frees_the_prefills_blocks() -> None:
    async def test() -> None:
        async with place(Role.PREFILL) as here:
            peer = here.peer()
            await peer.greet()
            await peer.say(generate("r/p", phase=Phase.PREFILL))
            done = await peer.end_of("r/p")
            assert done.ticket is not None
            assert peer.batches[-1].load.leases_open == 1
            await peer.say(Release([done.ticket, b"junk"]))
            load = (await peer.until(lambda b: b.load.leases_open == 0)).load
            assert load.blocks_free == load.blocks_total

    run(test())


def test_a_silent_routers_requests_are_aborted() -> None:
    async def test() -> None:
        async with place() as here:
            here.worker._router_silence_s = 0.3
            silent, other = here.peer(), here.peer()
            await silent.greet()
            await other.greet()
            await silent.say(generate("r", 4000))
            async with asyncio.timeout(WAIT_S):
                while not here.worker.load.busy:  # noqa: ASYNC110  # Another says when.
                    await asyncio.sleep(0.01)
                while here.worker.load.busy:
                    await other.say(Heartbeat())
                    await asyncio.sleep(0.05)
            await other.say(generate("s"))
            assert (await other.end_of("s")).finish is Finish.LENGTH

    run(test())


def test_who_comes_while_another_is_sent_to_in_vain_is_heard() -> None:
    """What is sent to a router that is gone takes in the news of all the others, too."""
    heard: dict[bytes, str] = {}

    class Ear:
        def on_message(self, router: bytes, message: ToWorker) -> None:
            assert isinstance(message, RouterHello)
            heard[router] = message.router_id

    async def test() -> None:
        channel = Channel("127.0.0.1", 0, Ear())
        with zmq.Context() as context:
            first, second = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
            first.connect(channel.address)
            first.send(encode(RouterHello(PROTOCOL, "first", None, None)))
            await until(lambda: list(heard.values()) == ["first"])
            [gone] = heard
            first.close(linger=0)
            second.connect(channel.address)
            second.send(encode(RouterHello(PROTOCOL, "second", None, None)))
            time.sleep(0.3)  # noqa: ASYNC251  # Our loop is busy while both arrive.
            assert not channel.send(gone, Refused("nobody"))
            await until(lambda: "second" in heard.values())
            second.close(linger=0)
        channel.close()

    run(test())


def test_an_idle_worker_still_says_that_it_is_there() -> None:
    async def test() -> None:
        async with place() as here:
            peer = here.peer()
            await peer.greet()
            for _ in range(2):
                assert not (await peer.until(lambda b: not b.deltas)).load.draining

    run(test())


def test_a_draining_worker_refuses_and_finishes_what_runs() -> None:
    async def test() -> None:
        async with place() as here:
            peer = here.peer()
            await peer.greet()
            await peer.say(generate("old", 50))
            await peer.until(lambda b: bool(b.deltas))
            drain = asyncio.create_task(here.drain(WAIT_S))
            await asyncio.sleep(0)
            await peer.say(generate("new"))
            assert (await peer.end_of("new")).finish is Finish.REFUSED
            assert (await peer.end_of("old")).finish is Finish.LENGTH
            assert peer.batches[-1].load.draining
            await drain
            assert here.worker.ready == "draining"

    run(test())


def test_what_a_drain_can_not_wait_for_is_handed_back() -> None:
    async def test() -> None:
        async with place() as here:
            peer = here.peer()
            await peer.greet()
            await peer.say(generate("r", 4000))
            await peer.until(lambda b: bool(b.deltas))
            await here.drain(0.05)
            ended = await peer.end_of("r")
            assert ended.finish is Finish.ERROR, "its router tries it elsewhere"
            assert ended.error
            assert here.worker.load.blocks_free == here.worker.load.blocks_total

    run(test())


def test_a_drain_waits_for_leases_that_are_still_to_be_read() -> None:
    async def test() -> None:
        async with place(Role.PREFILL) as here:
            peer = here.peer()
            await peer.greet()
            await peer.say(generate("r/p", phase=Phase.PREFILL))
            done = await peer.end_of("r/p")
            assert done.ticket is not None
            drain = asyncio.create_task(here.drain(WAIT_S))
            await asyncio.sleep(0.2)
            assert not drain.done()
            await peer.say(Release([done.ticket]))
            async with asyncio.timeout(WAIT_S):
                await drain

    run(test())
