"""Requests are prepared in turns with the loop's other work, and no more wait than may."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from router.core.errors import GrammarTooSlow, PreparingFull
from router.preparing import SLICE_S, STUCK_MAX, BoundedPool, GrammarCheck, Places, SubmissionTurns


def test_sequences_of_one_request_let_other_work_of_the_loop_in_between() -> None:
    async def test() -> None:
        turns, rounds, done = SubmissionTurns(), [0], []

        async def others() -> None:
            while len(done) < 40:
                rounds[0] += 1
                await asyncio.sleep(0)

        async def sequence() -> None:
            await turns.take()
            until = time.monotonic() + SLICE_S / 2
            while time.monotonic() < until:
                pass
            done.append(rounds[0])

        await asyncio.gather(others(), *(sequence() for _ in range(40)))
        # A slice has room for two or three; one more begins before its end.
        assert all(done.count(each) <= 4 for each in set(done))

    asyncio.run(test())


def test_one_request_that_waited_for_its_turn_in_vain_leaves_the_turn_to_others() -> None:
    async def test() -> None:
        turns = SubmissionTurns()
        gone = asyncio.create_task(turns.take())
        await asyncio.sleep(0)
        gone.cancel()
        async with asyncio.timeout(5):
            await turns.take()

    asyncio.run(test())


def test_work_beyond_the_bound_is_refused_until_some_of_it_is_done() -> None:
    async def test() -> None:
        executor, go = ThreadPoolExecutor(1), threading.Event()
        BoundedPool(executor, 2, lambda error: error)
        loop = asyncio.get_running_loop()
        waiting = [loop.run_in_executor(executor, go.wait) for _ in range(2)]
        with pytest.raises(PreparingFull) as caught:
            loop.run_in_executor(executor, go.wait)
        assert (caught.value.status, caught.value.code) == (503, "preparing_full")
        go.set()
        await asyncio.gather(*waiting)
        assert await loop.run_in_executor(executor, go.wait)
        executor.shutdown()

    asyncio.run(test())


def test_work_that_is_cancelled_or_fails_makes_room_too() -> None:
    async def test() -> None:
        executor, go = ThreadPoolExecutor(1), threading.Event()
        BoundedPool(executor, 2, lambda error: error)
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(executor, go.wait)
        loop.run_in_executor(executor, go.wait).cancel()
        await asyncio.sleep(0.01)
        failing = loop.run_in_executor(executor, int, "no number")
        go.set()
        await running
        with pytest.raises(ValueError, match="invalid literal"):
            await failing
        await asyncio.sleep(0.01)
        both = [loop.run_in_executor(executor, go.wait) for _ in range(2)]
        assert await asyncio.gather(*both) == [True, True]
        executor.shutdown()

    asyncio.run(test())


def test_a_grammar_is_checked_off_the_loop_and_its_trouble_is_told() -> None:
    async def test() -> None:
        checks = GrammarCheck(10, 8)
        assert await checks.run(threading.get_ident) != threading.get_ident()
        with pytest.raises(ValueError, match="invalid literal"):
            await checks.run(lambda: int("no number"))

    asyncio.run(test())


def test_a_grammar_that_takes_too_long_is_refused_and_others_are_checked_meanwhile() -> None:
    async def test() -> None:
        checks, go = GrammarCheck(0.05, 8), threading.Event()
        for _ in range(STUCK_MAX):
            with pytest.raises(GrammarTooSlow, match="--grammar-s"):
                await checks.run(go.wait)
            if _ < STUCK_MAX - 1:
                assert await checks.run(lambda: 5) == 5
        with pytest.raises(PreparingFull):  # No more threads are left to such.
            await checks.run(lambda: 5)
        go.set()
        async with asyncio.timeout(10):
            while True:
                try:
                    assert await checks.run(lambda: 5) == 5
                    return
                except PreparingFull:
                    await asyncio.sleep(0.01)

    asyncio.run(test())


def test_the_time_that_a_grammar_waits_for_its_turn_is_not_its_own() -> None:
    async def test() -> None:
        checks = GrammarCheck(1.0, 8)
        slow = [checks.run(lambda: time.sleep(0.3)) for _ in range(5)]
        await asyncio.gather(*slow)

    asyncio.run(test())


def test_a_client_gone_while_its_grammar_waits_lets_others_through() -> None:
    async def test() -> None:
        checks, go = GrammarCheck(10, 2), threading.Event()
        running, waiting = (asyncio.create_task(checks.run(go.wait)) for _ in range(2))
        await asyncio.sleep(0)
        with pytest.raises(PreparingFull):
            await checks.run(go.wait)
        running.cancel()
        waiting.cancel()
        await asyncio.gather(running, waiting, return_exceptions=True)
        assert await checks.run(lambda: 5) == 5
        go.set()

    asyncio.run(test())


def test_few_requests_have_a_place_at_once_and_the_others_come_in_their_order() -> None:
    async def test() -> None:
        places, begun = Places(at_once=2, held_s=60.0), []
        resume = asyncio.Event()

        async def request(number: int) -> None:
            mine = await places.take()
            begun.append(number)
            await resume.wait()
            mine.leave()
            mine.leave()  # At the end of the request again.

        asked = [asyncio.create_task(request(n)) for n in range(6)]
        await asyncio.sleep(0.01)
        assert begun == [0, 1]
        resume.set()
        await asyncio.gather(*asked)
        assert begun == [0, 1, 2, 3, 4, 5]
        await places.take()
        await places.take()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await places.take()

    asyncio.run(test())


def test_place_of_a_request_that_waits_for_long_is_given_on() -> None:
    async def test() -> None:
        places = Places(at_once=1, held_s=0.01)
        slow = await places.take()
        await places.take()
        slow.leave()  # It has none to give any more.
        third = asyncio.create_task(places.take())
        await asyncio.sleep(0)
        assert not third.done()
        await third

    asyncio.run(test())


def test_request_that_gives_up_waiting_for_a_place_takes_none() -> None:
    async def test() -> None:
        places = Places(at_once=1, held_s=60.0)
        first = await places.take()
        waiting = asyncio.create_task(places.take())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        first.leave()
        async with asyncio.timeout(1):
            await places.take()

    asyncio.run(test())
