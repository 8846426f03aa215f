"""One streamed completion as a client sees it: when each event came, and what was in it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import aiohttp

REST_S = 1.5
"""Between two sides' turns: a vLLM worker goes on to spin for a second after its last step, on a
core that the next side would need."""
_DATA, _DONE = b"data: ", b"data: [DONE]"


class StreamFailed(Exception):
    """Not a 200, or an error event under way; the message is the server's."""


@dataclass(slots=True)
class Stream:
    """Times are seconds: `ttft_s` from the request's start, `gaps_s` between events with text."""

    ttft_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    events: int = 0
    """Events that carried text."""
    tokens: int = 0
    """As the server counted them in its usage, else one an event."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt. Both from the usage, 0 where it does not say."""


async def stream(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Stream:
    """Post `body` with `stream` set and read to the end. Raises `StreamFailed`.

    Events are told apart without parsing: what is parsed is the last, for the usage.
    """
    result = Stream()
    began = time.perf_counter()
    last = began
    usage = b""
    ended = False
    content = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with session.post(url, json=content) as response:
        if response.status != 200:
            raise StreamFailed(f"{response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            if not line.startswith(_DATA):
                continue
            if line.startswith(_DONE):
                ended = True
            elif b'"choices":[]' in line:
                usage = line
            elif line.startswith(b'data: {"error"'):
                raise StreamFailed(line.decode(errors="replace").strip())
            elif b'"role":"assistant"' not in line and not _only_ends(line):
                now = time.perf_counter()
                if result.events:
                    result.gaps_s.append(now - last)
                else:
                    result.ttft_s = now - began
                result.events += 1
                last = now
    if not ended:
        raise StreamFailed("the stream broke off")
    result.tokens = result.events
    if usage:
        counts = json.loads(usage[len(_DATA) :])["usage"]
        result.tokens = counts["completion_tokens"]
        result.prompt_tokens = counts["prompt_tokens"]
        details = counts.get("prompt_tokens_details") or {}
        result.cached_tokens = details.get("cached_tokens") or 0
    return result


def _only_ends(line: bytes) -> bool:
    """An event for the finish reason alone, as Dynamo sends it."""
    return b'"text":""' in line and b'"finish_reason":"' in line
