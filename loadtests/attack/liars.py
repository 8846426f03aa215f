"""Workers that lie to the router: what they say is not believed without measure."""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from loadtests.attack.frames import encode, nested
from loadtests.attack.registry import attack
from loadtests.attack.scene import ask
from loadtests.attack.wire_attacks import hello_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from loadtests.attack.registry import Tally
    from loadtests.attack.scene import Scene

    Frames = Callable[[list[Any]], list[list[Any] | bytes]]

_HELLO = (
    "tag", "protocol", "worker_id", "epoch", "role", "engine", "engine_version", "model",
    "model_digest", "tokenizer_digest", "kv_digest", "transports", "block_tokens", "block_bytes",
    "blocks_total",
)  # fmt: skip
"""Fields of a worker's hello, in the wire's order, as far as a liar changes them."""
LOAD = [1, False, 0, 0, 0, 2000, 2048, 0]
"""steps, busy, running, waiting, prefill_tokens_queued, blocks_free, blocks_total, leases_open"""


class Liar:
    """A worker's end of the token channel, made up."""

    def __init__(self, hello: list[Any], **lies: Any) -> None:
        self.hello = list(hello)
        self.requests: list[str] = []
        for name, lie in {"worker_id": "liar", "epoch": "liar", **lies}.items():
            self.hello[_HELLO.index(name)] = lie
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind("tcp://127.0.0.1:*")
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._peers: set[bytes] = set()

    def say(self, message: list[Any] | bytes) -> None:
        frame = message if isinstance(message, bytes) else encode(message)
        for peer in self._peers:
            self._socket.send_multipart([peer, frame])

    async def await_router(self, within_s: float) -> bool:
        """Whether a router said hello, and has had the time to take ours."""
        until = time.monotonic() + within_s
        while not self._peers and time.monotonic() < until:
            await self.run(0.2)
        await self.run(0.5)
        return bool(self._peers)

    async def run(self, seconds: float, on_request: Frames | None = None) -> None:
        """Answer hellos, beat, and answer each request with `on_request`'s frames."""
        until, beat = time.monotonic() + seconds, 0.0
        while time.monotonic() < until:
            try:
                peer, frame = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                if time.monotonic() > beat:
                    beat = time.monotonic() + 0.4
                    LOAD[0] += 1
                    self.say(["Batch", LOAD])
                await asyncio.sleep(0.005)
                continue
            said = msgspec.msgpack.decode(frame, type=list)
            if said[0] == "RouterHello":
                self._peers.add(peer)
                self.say(self.hello)
                self.say(["Batch", LOAD])
            elif said[0] == "Generate":
                self.requests.append(said[1])
                for answer in on_request(said) if on_request else []:
                    self.say(answer)

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()


async def _lie(
    scene: Scene, tally: Tally, after_hello: list[list[Any] | bytes], **lies: Any
) -> None:
    """Join the fleet with such a hello, say such things, and leave."""
    await _join(scene, tally, after_hello, None, lies)


async def _join(
    scene: Scene,
    tally: Tally,
    after_hello: list[list[Any] | bytes],
    on_request: Frames | None,
    lies: dict[str, Any],
) -> Liar:
    hello = await hello_of(scene.workers[-1].channel)
    assert hello is not None, "the worker answers no router"
    liar = Liar(hello, **lies)
    scene.peers_file.write_text(f"{liar.address} decode\n")
    try:
        tally.expect(await liar.await_router(15.0), "the router never came to the liar")
        for message in after_hello:
            liar.say(message)
        await liar.run(1.0, on_request)
        body = {"model": scene.plan.model, "prompt": "Who answers?", "max_tokens": 4}
        async with scene.session(timeout_s=20) as session:
            served = asyncio.gather(
                *(ask(session, tally, "/v1/completions", json=body) for _ in range(12))
            )
            await liar.run(4.0, on_request)
            for status, _ in await served:
                tally.expect(status == 200, f"a request beside the liar: {status or 'no answer'}")
            if on_request is not None:
                tally.expect(bool(liar.requests), "the liar was asked nothing")
    finally:
        scene.peers_file.write_text("")
        liar.close()
    scene.check()
    return liar


def _load(**lies: Any) -> list[Any]:
    names = ("steps", "busy", "running", "waiting", "queued", "free", "total", "leases")
    load: list[Any] = list(LOAD)
    for name, lie in lies.items():
        load[names.index(name)] = lie
    return load


def _step(seconds: float) -> list[Any]:
    return ["Batch", [*LOAD, False, 0, ["Step", seconds, 100, 5050, 1, 100]]]


@attack("lying-loads", "a worker whose loads are NaN, negative or huge", limit_s=45)
async def lying_loads(scene: Scene, tally: Tally) -> None:
    numbers = [math.nan, math.inf, -math.inf, -1.0, 1e308, 0.0, 1e-308]
    await _lie(
        scene, tally,
        [
            *(_step(n) for n in numbers),
            ["Batch", _load(free=-5)], ["Batch", _load(free=2**62, total=2**62)],
            ["Batch", _load(queued=2**62)], ["Batch", _load(running=-(2**62))],
            ["Batch", _load(total=0)], nested(1000), nested(100_000),
        ],
    )  # fmt: skip


@attack("lying-hello", "a worker of blocks without tokens, and one of too many", limit_s=90)
async def lying_hello(scene: Scene, tally: Tally) -> None:
    await _lie(scene, tally, [], block_tokens=0)
    await _lie(scene, tally, [], block_tokens=-16, blocks_total=-1)
    await _lie(scene, tally, [], blocks_total=2**62, block_bytes=2**62)
    await _lie(scene, tally, [], worker_id="a" * 100_000)


@attack("lying-deltas", "a worker that answers with a million tokens at once", limit_s=45)
async def lying_deltas(scene: Scene, tally: Tally) -> None:
    def answer(asked: list[Any]) -> list[list[Any] | bytes]:
        return [["Batch", LOAD, [["Delta", asked[1], [7] * 1_000_000]]]]

    await _join(scene, tally, [], answer, {})


@attack("lying-tokens", "a worker that answers with tokens that the model has not", limit_s=45)
async def lying_tokens(scene: Scene, tally: Tally) -> None:
    def answer(asked: list[Any]) -> list[list[Any] | bytes]:
        return [["Batch", LOAD, [["Delta", asked[1], [2**40, -1]]]]]

    await _join(scene, tally, [], answer, {})


@attack("lying-snapshot", "a worker whose prefix cache has two million blocks", limit_s=60)
async def lying_snapshot(scene: Scene, tally: Tally) -> None:
    block, parts = 16, 20
    each = 2_000_000 // parts
    frames: list[list[Any] | bytes] = []
    for part in range(parts):
        ids = list(range(part * each, (part + 1) * each))
        stored = ["KvStored", ids, -1, [part] * (each * block)]
        frames.append(["KvSnapshot", 0, part, part == parts - 1, [stored]])
    await _lie(scene, tally, frames)


@attack("mute-worker", "a worker that beats and answers nothing", limit_s=60)
async def mute_worker(scene: Scene, tally: Tally) -> None:
    liar = await _join(scene, tally, [], None, {})
    tally.expect(bool(liar.requests), "the mute worker was asked nothing")
