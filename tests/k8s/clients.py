"""Clients that stream from whichever router a service names, and miss nothing of what they get."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.k8s.pods import Node

TOKENS = (20, 60, 150)
"""Of a third of the prompts each: some streams are longer than a debounce."""
KNOWN = 5
"""Prompts that are asked again and again, in every second request; the others are new."""
LAG_S = 0.5
"""A service's nodes learn of its endpoints so much later."""
PATIENCE_S = 60.0


def tokens(prompt: int) -> int:
    """That are asked for with it."""
    return TOKENS[prompt % len(TOKENS)]


@dataclass(slots=True)
class Answer:
    prompt: int
    router: str
    began: float
    ended: float = 0.0
    id: str = ""
    text: str = ""
    tokens: int = 0
    finish: str | None = None
    done: bool = False
    error: str | None = None

    def trouble(self, text: str | None) -> str | None:
        """Why it is not whole; `text`: what an answer to this prompt is."""
        if self.error:
            return self.error
        if (self.done, self.tokens, self.finish) != (True, tokens(self.prompt), "length"):
            return f"ended with {self.finish} after {self.tokens} tokens, done: {self.done}"
        if text is not None and text != self.text:
            return f"said {self.text!r}, not {text!r}"
        return None


class Service:
    """The routers that are in service, as the nodes know them."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._known: list[tuple[float, tuple[str, ...]]] = []
        self._next = 0

    async def run(self) -> None:
        while True:
            now = asyncio.get_running_loop().time()
            urls = tuple(p.http for p in self._node.of("router") if p.serving and not p.terminating)
            if not self._known or self._known[-1][1] != urls:
                self._known.append((now, urls))
            await asyncio.sleep(0.02)

    def pick(self) -> str:
        """In turn."""
        then = asyncio.get_running_loop().time() - LAG_S
        old = [urls for at, urls in self._known if at <= then] or [self._known[0][1]]
        self._next += 1
        return old[-1][self._next % len(old[-1])]


@dataclass(slots=True)
class Load:
    """Answers, and of each record who served it."""

    model: str
    service: Service
    answers: list[Answer] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    """By prompt, of the first that was asked."""

    async def ask(self, client: httpx.AsyncClient, prompt: int) -> Answer:
        loop = asyncio.get_running_loop()
        answer = Answer(prompt, self.service.pick(), loop.time())
        self.answers.append(answer)
        body = {
            "model": self.model, "prompt": f"Story {prompt} of many. " * 12,
            "max_tokens": tokens(prompt),
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        try:
            async with (
                asyncio.timeout(PATIENCE_S),
                client.stream("POST", f"{answer.router}/v1/completions", json=body) as response,
            ):
                if response.status_code != 200:
                    answer.error = f"{response.status_code}: {(await response.aread()).decode()}"
                async for line in response.aiter_lines():
                    _take(answer, line)
        except (httpx.HTTPError, TimeoutError) as error:
            answer.error = repr(error)
        answer.ended = loop.time()
        if not answer.error:
            self.texts.setdefault(prompt, answer.text)
        return answer

    @property
    def failed(self) -> list[str]:
        """Of the answers that are not whole, what is wrong with each."""
        found = [(a, a.trouble(self.texts.get(a.prompt))) for a in self.answers if a.ended]
        return [f"{a.id} of {a.router} at {a.began:.2f} s: {why}" for a, why in found if why]

    @asynccontextmanager
    async def running(self, clients: int) -> AsyncIterator[None]:
        """So many clients that ask without a pause. Those that ask at the end are waited for."""
        over = asyncio.Event()

        async def go_on(first: int) -> None:
            async with httpx.AsyncClient(timeout=PATIENCE_S, trust_env=False) as client:
                for n in itertools.count(first, clients):
                    if over.is_set():
                        return
                    await self.ask(client, n % KNOWN if n // clients % 2 else KNOWN + n)

        async with asyncio.TaskGroup() as tasks:
            for number in range(clients):
                tasks.create_task(go_on(number))
            try:
                yield
            finally:
                over.set()

    async def used(self, client: httpx.AsyncClient, since: float, until: float) -> Counter[str]:
        """The workers that served what began in that time. Its routers must still be there."""
        found: Counter[str] = Counter()
        for answer in list(self.answers):
            if answer.id and since <= answer.began < until:
                told = await client.get(f"{answer.router}/tandem/requests/{answer.id}")
                record = told.json()[-1]
                found.update({record["prefill_worker"] or "", record["decode_worker"]})
        return found


def _take(answer: Answer, line: str) -> None:
    if not line.startswith("data: "):
        return
    if line == "data: [DONE]":
        answer.done = True
        return
    event = json.loads(line.removeprefix("data: "))
    if "error" in event:
        answer.error = str(event["error"])
        return
    answer.id = event["id"]
    for choice in event["choices"]:
        answer.text += choice["text"]
        answer.finish = choice["finish_reason"] or answer.finish
    if event.get("usage"):
        answer.tokens = event["usage"]["completion_tokens"]
