"""Streamed completions sent when they are due, whatever has become of those before."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp

from loadtests.sse import StreamFailed, stream

if TYPE_CHECKING:
    from collections.abc import Sequence

TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Due:
    """`at_s` after the replay's start."""

    at_s: float
    body: dict[str, Any]


@dataclass(slots=True)
class Outcome:
    """Seconds. `ttft_s` counts from when the request was due, so a late client hides nothing."""

    error: str | None = None
    """Why it failed; refused is failed."""
    ttft_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    late_s: float = 0.0
    """That it was sent after it was due."""
    ended_s: float = 0.0
    """Since the replay's start."""


async def replay(url: str, requests: Sequence[Due]) -> list[Outcome]:
    """In the order of `requests`."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        began = time.perf_counter()

        async def one(request: Due) -> Outcome:
            await asyncio.sleep(max(0.0, began + request.at_s - time.perf_counter()))
            outcome = Outcome(late_s=time.perf_counter() - began - request.at_s)
            try:
                heard = await stream(session, url, request.body)
            except (StreamFailed, aiohttp.ClientError, TimeoutError) as error:
                outcome.error = f"{type(error).__name__}: {error}"
            else:
                outcome.ttft_s = heard.ttft_s + outcome.late_s
                outcome.gaps_s, outcome.tokens = heard.gaps_s, heard.tokens
                outcome.prompt_tokens = heard.prompt_tokens
                outcome.cached_tokens = heard.cached_tokens
            outcome.ended_s = time.perf_counter() - began
            return outcome

        async with asyncio.TaskGroup() as tasks:
            made = [tasks.create_task(one(r)) for r in requests]
    return [task.result() for task in made]
