"""Messages of many links share the event loop with each other and with all else."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from router.core.parts import BLOCKS_MAX, DELTAS_MAX, parts
from router.turns import Turns
from workers.api import Batch, Delta, KvEvent, KvRemoved, KvStored, Load
from workers.loop_hold import RECENT_S, TURN_S, LoopHold

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

LOAD = Load(1, True, 1, 0, 0, 10, 10, 0)


class Queue:
    """A link with some messages, each of which takes time to handle."""

    def __init__(self, name: str, count: int, seconds: float, world: World) -> None:
        self.name = name
        self.left = count
        self._seconds, self._world = seconds, world

    def take_next(self) -> bool:
        if not self.left:
            return False
        self.left -= 1
        self._world.now += self._seconds
        self._world.taken.append(self.name)
        return True


class World:
    def __init__(self) -> None:
        self.now = 0.0
        self.taken: deque[str] = deque()
        self.turns = Turns(lambda: self.now)

    def queue(self, name: str, count: int, seconds: float) -> Queue:
        made = Queue(name, count, seconds, self)
        self.turns.wake(made)
        return made


def run(test: Callable[[World], Coroutine[None, None, None]]) -> None:
    async def begin() -> None:
        await test(World())

    asyncio.run(begin())


def test_a_turn_is_bounded_by_time_whatever_waits() -> None:
    async def test(world: World) -> None:
        flood = world.queue("flood", 1000, TURN_S / 4)
        while flood.left:
            before, taken = world.now, len(world.taken)
            await asyncio.sleep(0)
            assert world.now - before < 2 * TURN_S
            assert len(world.taken) - taken <= 5  # The last may begin a rounding error early.

    run(test)


def test_messages_of_all_links_are_taken_in_rotation() -> None:
    async def test(world: World) -> None:
        world.queue("flood", 1000, TURN_S / 10)
        world.queue("other", 3, TURN_S / 10)
        await asyncio.sleep(0)
        assert list(world.taken)[:6] == ["flood", "other"] * 3

    run(test)


def test_message_longer_than_a_turn_does_not_starve_other_links() -> None:
    async def test(world: World) -> None:
        world.queue("slow", 1000, 3 * TURN_S)
        world.queue("quick", 2, TURN_S / 10)
        for _ in range(4):
            await asyncio.sleep(0)
        assert world.taken.count("quick") == 2

    run(test)


def test_a_closed_link_is_asked_nothing_more() -> None:
    async def test(world: World) -> None:
        closed = world.queue("closed", 5, 0.0)
        world.turns.forget(closed)
        await asyncio.sleep(0)
        assert closed.left == 5

    run(test)


events = st.lists(
    st.builds(lambda n: KvStored(list(range(n)), -1, []), st.integers(1, 2 * BLOCKS_MAX))
    | st.just(KvRemoved([1])),
    max_size=8,
)


@given(st.integers(0, 5 * DELTAS_MAX), events)
def test_parts_of_a_message_say_what_it_says_in_its_order(count: int, kv: list[KvEvent]) -> None:
    deltas = [Delta(f"r{n}", [n]) for n in range(count)]
    whole = Batch(LOAD, deltas, heard=7, kv_seq=100, kv=kv)
    split = list(parts(whole))
    assert split
    assert [d for part in split for d in part.deltas] == deltas
    assert [e for part in split for e in part.kv] == kv
    seq = 100
    for part in split:
        assert (part.load, part.heard) == (LOAD, 7)
        assert len(part.deltas) <= DELTAS_MAX
        if part.kv:
            assert part.kv_seq == seq
            seq += len(part.kv)
        blocks = [len(e.ids) for e in part.kv if isinstance(e, KvStored)]
        assert sum(blocks[:-1]) < BLOCKS_MAX


def test_the_longest_hold_is_told_for_a_minute_and_then_forgotten() -> None:
    seen: list[float] = []
    hold = LoopHold(seen.append)
    hold.sample(3.0, now=100.0)
    hold.sample(0.1, now=101.0)
    assert seen == [3.0, 0.1]
    assert hold.longest_s == 3.0
    hold.sample(0.2, now=100.0 + RECENT_S)
    assert hold.longest_s == 3.0
    hold.sample(0.1, now=100.0 + 2 * RECENT_S)
    assert hold.longest_s == 0.2


def test_a_hold_of_the_loop_is_measured() -> None:
    async def test() -> None:
        seen: list[float] = []
        running = asyncio.create_task(LoopHold(seen.append).run())
        await asyncio.sleep(0.01)
        loop = asyncio.get_running_loop()
        until = loop.time() + 0.3
        while loop.time() < until:
            pass
        await asyncio.sleep(0.01)
        running.cancel()
        assert max(seen) > 0.2

    asyncio.run(test())
