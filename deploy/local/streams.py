"""Streamed completions of token ids, sent when they are due, and when each token came."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

import httpx

if TYPE_CHECKING:
    from collections.abc import Sequence

    from router.twin.traces import Request

_DATA: Final = "data: "
TIMEOUT_S: Final = 300.0


class StreamFailed(Exception):
    """Not a 200, or an error on the way; the message is the server's."""


@dataclass(slots=True)
class Heard:
    """Seconds."""

    ttft_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    """Between events, each of which has a token."""
    late_s: float = 0.0
    """That it was sent after it was due."""


async def play(url: str, model: str, requests: Sequence[Request], seed: int) -> list[Heard]:
    """Each at its time from now on, of a prompt that nobody has seen. Raises `StreamFailed`."""
    rng = random.Random(seed)
    bodies = [_body(model, r, rng) for r in requests]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits) as client:
        began = perf_counter()

        async def one(request: Request, body: dict[str, Any]) -> Heard:
            await asyncio.sleep(max(0.0, began + request.at_s - perf_counter()))
            late_s = perf_counter() - began - request.at_s
            heard = await _stream(client, f"{url}/v1/completions", body)
            heard.late_s = late_s
            return heard

        async with asyncio.TaskGroup() as tasks:
            made = [
                tasks.create_task(one(r, body)) for r, body in zip(requests, bodies, strict=True)
            ]
    return [task.result() for task in made]


def _body(model: str, request: Request, rng: random.Random) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": [rng.randrange(1000, 40_000) for _ in range(request.input_tokens)],
        "temperature": 0,
        "max_tokens": request.output_tokens,
        "ignore_eos": True,
        "stream": True,
    }


async def _stream(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> Heard:
    heard, last = Heard(), 0.0
    began = perf_counter()
    async with client.stream("POST", url, json=body) as response:
        if response.status_code != 200:
            raise StreamFailed(f"{response.status_code}: {(await response.aread())[:300]!r}")
        async for line in response.aiter_lines():
            if not line.startswith(_DATA) or line.endswith("[DONE]"):
                continue
            now = perf_counter()
            if "error" in json.loads(line[len(_DATA) :]):
                raise StreamFailed(line)
            if last:
                heard.gaps_s.append(now - last)
            else:
                heard.ttft_s = now - began
            last = now
    return heard
