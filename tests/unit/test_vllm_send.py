"""A flood of prompts into vLLM's engine leaves the event loop to streams in between."""

from __future__ import annotations

import asyncio
import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from workers.loop_hold import TURN_S

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

FLOOD = 5000
COMMAND_S = 0.0002
"""Seconds that one command takes, by a clock that only commands move."""


def test_flood_of_prompts_is_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.engines import vllm

    ticks = itertools.count()
    monkeypatch.setattr(vllm, "core_request", lambda command, *_: command)
    clock = SimpleNamespace(monotonic=lambda: next(ticks) * COMMAND_S)
    monkeypatch.setattr(vllm, "time", clock)
    taken: list[int] = []

    async def add(command: int) -> None:
        taken.append(command)

    async def test() -> list[int]:
        engine: Any = object.__new__(vllm.VllmEngine)
        engine._commands = asyncio.Queue()
        engine._core = SimpleNamespace(add_request_async=add)
        engine._config = engine._embeddings_max = None
        for number in range(FLOOD):
            engine._commands.put_nowait(number)
        sending = asyncio.create_task(engine._send())
        turns = []
        while len(taken) < FLOOD:
            turns.append(len(taken))
            await asyncio.sleep(0)
        sending.cancel()
        return turns

    loop = asyncio.new_event_loop()
    try:
        turns = loop.run_until_complete(test())
    finally:
        loop.close()
    assert taken == list(range(FLOOD))
    assert max(b - a for a, b in itertools.pairwise(turns)) <= 2 * TURN_S / COMMAND_S
