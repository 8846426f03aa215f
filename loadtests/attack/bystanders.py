"""Ordinary clients beside an attack, in a process of their own.

    python -m loadtests.attack.bystanders --url URL --model MODEL --key KEY --streams 20

Reads one JSON request a line from standard input and writes one JSON answer a line. `{"from": t0,
"until": t1}` (seconds of CLOCK_MONOTONIC, which all processes share) is answered once every stream
that began before `until` has ended. The first streams of all are the undisturbed ones: each
later stream's text must be the one that its prompt had then. `"wait": false` is answered at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp

TOKENS = 40
LOOK_PATH = "/readyz"
LOOK_S = 0.005
"""Between two looks at it: what it waits for is the router's event loop."""
PATIENCE_S = 60.0
"""A stream that is not over after so long is lost."""
ENDS_S = 45.0
"""How long an answer waits for streams that have begun."""
KEPT_S = 300.0


@dataclass(slots=True)
class _Told:
    """One stream that ended."""

    began: float
    ended: float
    ttft_s: float
    trouble: str = ""


@dataclass(slots=True)
class Log:
    """Observations of the last `KEPT_S`, newest last."""

    gaps: list[tuple[float, float]] = field(default_factory=list)
    """(when, seconds since the event before)"""
    streams: list[_Told] = field(default_factory=list)
    holds: list[tuple[float, float]] = field(default_factory=list)
    """(when `LOOK_PATH` was asked, seconds until it answered)"""
    looks_failed: list[tuple[float, str]] = field(default_factory=list)

    def figures(self, since: float, until: float) -> dict[str, Any]:
        gaps = sorted(gap for at, gap in self.gaps if at >= since and at - gap <= until)
        streams = [s for s in self.streams if s.ended >= since and s.began <= until]
        troubles = sorted({s.trouble for s in streams if s.trouble})
        holds = [held for at, held in self.holds if at + held >= since and at <= until]
        return {
            "itl_ms_p50": _share(gaps, 0.5) * 1e3,
            "itl_ms_p99": _share(gaps, 0.99) * 1e3,
            "itl_ms_max": _share(gaps, 1.0) * 1e3,
            "events": len(gaps),
            "ttft_ms_max": max((s.ttft_s for s in streams), default=0.0) * 1e3,
            "streams": len(streams),
            "bad": sum(bool(s.trouble) for s in streams),
            "troubles": troubles[:3],
            "hold_ms_max": max(holds, default=0.0) * 1e3,
            "looks_failed": [
                what for at, what in self.looks_failed if since <= at <= until
            ][:3],
        }  # fmt: skip

    def forget(self) -> None:
        before = time.monotonic() - KEPT_S
        self.gaps = [g for g in self.gaps if g[0] > before]
        self.holds = [h for h in self.holds if h[0] > before]
        self.streams = [s for s in self.streams if s.ended > before]


def _share(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


class Client:
    """One client: asks the same again and again."""

    def __init__(self, args: argparse.Namespace, number: int, log: Log) -> None:
        self._url = f"{args.url}/v1/completions"
        self._headers = {"Authorization": f"Bearer {args.key}"} if args.key else {}
        self._body = {
            "model": args.model, "prompt": f"Client {number} asks for a story of number {number}.",
            "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": True,
        }  # fmt: skip
        self._log = log
        self._text: str | None = None
        self.began = 0.0
        """0 between two streams."""

    async def run(self, session: aiohttp.ClientSession) -> None:
        while True:
            began = self.began = time.monotonic()
            told = _Told(began, 0.0, 0.0)
            try:
                async with asyncio.timeout(PATIENCE_S):
                    text = await self._stream(session, told)
                if self._text is None:
                    self._text = text
                elif text != self._text:
                    told.trouble = f"other text: {len(text)} characters of {len(self._text)}"
            except TimeoutError:
                told.trouble = f"not over after {PATIENCE_S:.0f} s"
            except (aiohttp.ClientError, _Failed) as error:
                told.trouble = f"{type(error).__name__}: {error}"[:200]
            told.ended = time.monotonic()
            self._log.streams.append(told)
            self.began = 0.0
            if told.trouble:
                await asyncio.sleep(0.25)

    async def _stream(self, session: aiohttp.ClientSession, told: _Told) -> str:
        parts, last, done = [], 0.0, False
        async with session.post(self._url, json=self._body, headers=self._headers) as response:
            if response.status != 200:
                raise _Failed(f"{response.status}: {(await response.text())[:120]}")
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue
                if line.startswith(b"data: [DONE]"):
                    done = True
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise _Failed(str(event["error"])[:120])
                now = time.monotonic()
                if last:
                    self._log.gaps.append((now, now - last))
                else:
                    told.ttft_s = now - told.began
                last = now
                parts += [choice["text"] for choice in event["choices"]]
        if not done:
            raise _Failed("the stream broke off")
        return "".join(parts)


class _Failed(Exception):
    """A stream that did not come whole."""


async def _watch_loop(url: str, log: Log) -> None:
    """Ask without a pause but `LOOK_S`, over one connection, bare: it costs the least."""
    where = urlsplit(url)
    ask = f"GET {LOOK_PATH} HTTP/1.1\r\nHost: {where.netloc}\r\n\r\n".encode()
    while True:
        at = time.monotonic()
        try:
            reader, writer = await asyncio.open_connection(where.hostname, where.port)
            while True:
                at = time.monotonic()
                writer.write(ask)
                head = await reader.readuntil(b"\r\n\r\n")
                length = 0
                for line in head.lower().split(b"\r\n"):
                    if line.startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                await reader.readexactly(length)
                log.holds.append((at, time.monotonic() - at))
                status = head[9:12].decode()
                if status != "200":
                    log.looks_failed.append((at, status))
                await asyncio.sleep(LOOK_S)
        except (OSError, asyncio.IncompleteReadError) as error:
            log.looks_failed.append((at, type(error).__name__))
            log.holds.append((at, time.monotonic() - at))
            await asyncio.sleep(0.1)


async def _answer(clients: list[Client], log: Log) -> None:
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while line := await lines.readline():
        asked = json.loads(line)
        since, until = asked["from"], asked["until"]
        patience = time.monotonic() + (ENDS_S if asked.get("wait", True) else 0.0)
        while any(0 < c.began <= until for c in clients) and time.monotonic() < patience:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        hung = sum(0 < c.began <= until for c in clients) if asked.get("wait", True) else 0
        figures = log.figures(since, until)
        figures["bad"] += hung
        figures["troubles"] += [f"{hung} hang"] if hung else []
        print(json.dumps(figures), flush=True)
        log.forget()


async def _main(args: argparse.Namespace) -> None:
    log = Log()
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        clients = [Client(args, n, log) for n in range(args.streams)]
        tasks = [asyncio.create_task(c.run(session)) for c in clients]
        tasks.append(asyncio.create_task(_watch_loop(args.url, log)))
        await _answer(clients, log)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--key", default="")
    parser.add_argument("--streams", type=int, default=20)
    asyncio.run(_main(parser.parse_args()))


if __name__ == "__main__":
    main()
