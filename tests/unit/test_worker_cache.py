"""How a worker tells routers of its prefix cache, while it serves others."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from router.core.blocks import links
from router.core.cache_view import CacheView
from router.core.prefix_index import PrefixIndex
from tests.virtual_time import VirtualLoop
from workers.api import (
    LOAD_INTERVAL_S,
    PROTOCOL,
    Batch,
    Generate,
    KvAsk,
    KvSnapshot,
    Phase,
    Role,
    RouterHello,
)
from workers.cache_mirror import PART_TOKENS
from workers.engines.sim import SimEngine
from workers.engines.sim_settings import SimSettings
from workers.metrics import Metrics
from workers.server import Identity, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    import pytest

    from workers.api import ToRouter, ToWorker
    from workers.channel import Channel

SIZE = 16
SETTINGS = SimSettings(
    blocks_total=20_000, max_model_len=3 * PART_TOKENS, prefill_tokens_per_s=1e6, step_s=0.01
)
LONG = [n % 251 for n in range(2 * PART_TOKENS + SIZE)]


class Place:
    """A worker, and in order what it says to whom."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.said: list[tuple[bytes, ToRouter]] = []
        self.dead: set[bytes] = set()

    def send(self, router: bytes, message: ToRouter) -> bool:
        self.said.append((router, message))
        return router not in self.dead

    def hear(self, router: bytes, *messages: ToWorker) -> None:
        for message in messages:
            self.worker.on_message(router, message)

    def greet(self, router: bytes) -> None:
        self.hear(router, RouterHello(PROTOCOL, router.decode(), None, None))

    def ask(self, router: bytes, request_id: str, prompt: list[int], outputs: int = 1) -> None:
        self.hear(router, Generate(request_id, Phase.BOTH, prompt, outputs, b""))

    async def fill(self) -> None:
        """Router `a` comes, and has a large prompt computed."""
        self.greet(b"a")
        self.ask(b"a", "r", LONG)
        await asyncio.sleep(1)

    def heard(self, router: bytes) -> list[ToRouter]:
        return [message for to, message in self.said if to == router]


class Known:
    """A router's view of the cache, kept from what was said to it."""

    def __init__(self) -> None:
        self.index = PrefixIndex()
        self.view = CacheView("w", SIZE, self.index)

    def take(self, messages: list[ToRouter]) -> bool:
        for message in messages:
            match message:
                case KvSnapshot():
                    in_order = self.view.snapshot(message)
                case Batch(kv=[_, *_]):
                    in_order = self.view.events(message.kv_seq, message.kv)
                case _:
                    continue
            if not in_order:
                return False
        return self.view.in_step

    def blocks(self, prompt: list[int]) -> int:
        return self.index.cached(links(prompt, SIZE)).get("w", 0)


def run(test: Callable[[Place], Coroutine[None, None, None]]) -> None:
    async def all_of_it() -> None:
        loop = asyncio.get_running_loop()
        engine = SimEngine(SETTINGS, "e")
        identity = Identity("w", "e", Role.MIXED, "m", "model", "tokenizer", 5.0)
        worker = Worker(engine, identity, Metrics(), loop.time)
        place = Place(worker)
        worker.attach(cast("Channel", place))
        running = asyncio.create_task(worker.run())
        try:
            await asyncio.sleep(0.1)
            await test(place)
        finally:
            running.cancel()
            await asyncio.wait([running])
            engine.close()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(all_of_it())


def test_who_asks_is_told_what_was_there_before_it_came() -> None:
    async def test(place: Place) -> None:
        await place.fill()
        place.greet(b"b")
        place.hear(b"b", KvAsk())
        await asyncio.sleep(1)
        known = Known()
        assert known.take(place.heard(b"b"))
        assert known.blocks(LONG) == (len(LONG) - 1) // SIZE

    run(test)


def test_a_large_cache_does_not_hold_up_streams() -> None:
    async def test(place: Place) -> None:
        await place.fill()
        place.greet(b"b")
        place.hear(b"b", KvAsk())
        turns = 0
        while not any(isinstance(m, KvSnapshot) and m.last for m in place.heard(b"b")):
            told = sum(isinstance(m, KvSnapshot) for m in place.heard(b"b"))
            await asyncio.sleep(0)
            turns += 1
            assert sum(isinstance(m, KvSnapshot) for m in place.heard(b"b")) <= told + 1
        assert turns >= len(LONG) // PART_TOKENS

    run(test)


def test_what_is_stored_while_one_is_told_follows() -> None:
    """And a router that has no requests here hears of it all the same, by the next load."""

    async def test(place: Place) -> None:
        await place.fill()
        place.greet(b"b")
        place.hear(b"b", KvAsk())
        await asyncio.sleep(0)
        other = [7] * 100
        place.ask(b"a", "r2", other)
        await asyncio.sleep(2 * LOAD_INTERVAL_S)
        known = Known()
        assert known.take(place.heard(b"b"))
        assert known.blocks(other) == 99 // SIZE
        assert known.blocks(LONG) == (len(LONG) - 1) // SIZE

    run(test)


def test_who_asks_again_meanwhile_is_told_from_the_beginning() -> None:
    async def test(place: Place) -> None:
        await place.fill()
        place.hear(b"a", KvAsk())
        await asyncio.sleep(0)
        place.hear(b"a", KvAsk())
        place.ask(b"a", "r2", [7] * 100)
        await asyncio.sleep(2)
        known = Known()
        assert known.take(place.heard(b"a"))
        assert known.blocks([7] * 100) == 99 // SIZE

    run(test)


def test_nothing_more_is_told_to_a_router_that_takes_no_more() -> None:
    async def test(place: Place) -> None:
        await place.fill()
        place.greet(b"b")
        place.dead.add(b"b")
        place.hear(b"b", KvAsk())
        place.hear(b"a", KvAsk())
        await asyncio.sleep(1)
        assert sum(isinstance(m, KvSnapshot) for m in place.heard(b"b")) == 1
        assert Known().take(place.heard(b"a"))

    run(test)


def test_who_is_further_behind_than_changes_are_kept_is_told_all_unasked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("workers.cache_mirror.EVENTS_KEPT", 2)
    prompts = [[n] * 100 for n in range(1, 9)]

    async def test(place: Place) -> None:
        for router in (b"a", b"b"):
            place.greet(router)
            place.hear(router, KvAsk())
        await asyncio.sleep(1)
        known = Known()
        assert known.take(place.heard(b"b"))
        told = len(place.heard(b"b"))
        for number, prompt in enumerate(prompts):
            place.ask(b"a", f"r{number}", prompt)
        await asyncio.sleep(3 * LOAD_INTERVAL_S)
        news = place.heard(b"b")[told:]
        assert known.take(news)
        assert any(isinstance(message, KvSnapshot) for message in news)
        assert [known.blocks(prompt) for prompt in prompts] == [99 // SIZE] * len(prompts)

    run(test)
