"""A locust user that chats: each turn sends the whole history and reads the answer as it streams.

    locust -f loadtests/chat.py --host http://ROUTER --headless -u 4 -t 60s

Beside each request locust's tables show `time to first token`, `inter-token latency` (one entry a
gap between two events with text) and `whole answer`. A refused request, an error event and a stream
that breaks off are failures.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from typing import TYPE_CHECKING, Any

from locust import HttpUser, between, events, task

if TYPE_CHECKING:
    from argparse import ArgumentParser

_QUESTIONS = (
    "What is the capital of {place}?",
    "Tell me a short story about a {animal} in {place}.",
    "Why is that?",
    "List three facts about the {animal}.",
    "Say it in one sentence.",
    "What would a traveller see in {place}?",
)
_PLACES = ("France", "Kenya", "Norway", "Peru", "Japan", "Portugal")
_ANIMALS = ("fox", "heron", "badger", "whale", "goat", "lynx")
_TEXT, _DONE = "content", "[DONE]"


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def _options(parser: ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2-135m", help="as the router serves it")
    parser.add_argument("--answer-tokens", type=int, default=64, help="at most, for each turn")
    parser.add_argument("--history-tokens", type=int, default=1500, help="then a new chat begins")
    parser.add_argument("--seed", type=int, default=0, help="of what users ask")


class Chat(HttpUser):  # type: ignore[misc]
    """One person, one conversation at a time."""

    wait_time = between(0.5, 2.0)
    _numbers = itertools.count()

    def on_start(self) -> None:
        options = self.environment.parsed_options
        self._random = random.Random(f"{options.seed}-{next(self._numbers)}")
        self._history: list[dict[str, str]] = []

    @task  # type: ignore[untyped-decorator]
    def turn(self) -> None:
        """Ask, and read the answer to its end."""
        options = self.environment.parsed_options
        ask = self._random.choice(_QUESTIONS).format(
            place=self._random.choice(_PLACES), animal=self._random.choice(_ANIMALS)
        )
        self._history.append({"role": "user", "content": ask})
        body = {
            "model": options.model, "messages": self._history, "stream": True,
            "max_tokens": options.answer_tokens, "stream_options": {"include_usage": True},
        }  # fmt: skip
        began = time.perf_counter()
        with self.client.post(
            "/v1/chat/completions",
            json=body,
            stream=True,
            catch_response=True,
            name="chat",
            timeout=120,
        ) as response:
            try:
                answer, tokens = self._read(response, began)
            except _Failed as failure:
                response.failure(str(failure))
                self._history = []
                return
        self._tell("whole answer", time.perf_counter() - began, len(answer))
        self._history.append({"role": "assistant", "content": answer})
        if tokens > options.history_tokens:
            self._history = []

    def _read(self, response: Any, began: float) -> tuple[str, int]:
        """The answer and how many tokens prompt and answer have. Raises `_Failed`."""
        if response.status_code != 200:
            raise _Failed(f"{response.status_code}: {response.text[:200]}")
        answer, tokens, last = "", 0, began
        for line in response.iter_lines(decode_unicode=True):
            if not line.startswith("data: "):
                continue
            data = line.removeprefix("data: ").strip()
            if data == _DONE:
                return answer, tokens
            event = json.loads(data)
            if "error" in event:
                raise _Failed(event["error"]["message"])
            if usage := event.get("usage"):
                tokens = usage["total_tokens"]
            text = "".join(c["delta"].get(_TEXT) or "" for c in event["choices"])
            if not text:
                continue
            now = time.perf_counter()
            what = "inter-token latency" if answer else "time to first token"
            self._tell(what, now - last, len(text))
            answer, last = answer + text, now
        raise _Failed("the stream broke off")

    def _tell(self, name: str, seconds: float, length: int) -> None:
        self.environment.events.request.fire(
            request_type="SSE", name=name, response_time=seconds * 1e3, response_length=length,
            exception=None, context={},
        )  # fmt: skip


class _Failed(Exception):
    """What the failures table will say."""
