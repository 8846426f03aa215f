"""A router's process with keys over simulated workers' processes, and what clients ask of it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Self

import httpx

from deploy.local.models import prepare
from deploy.local.parts import Part, end
from tests.asking import MODEL

if TYPE_CHECKING:
    from pathlib import Path

CLIENT_KEY, OTHER_KEY, ADMIN_KEY = "key-one", "key-two", "the-admin-key-of-a-router"
USER = {"role": "user", "content": "Tell me a story"}
ENDPOINTS = {
    "/v1/chat/completions": {"messages": [USER], "max_tokens": 8},
    "/v1/completions": {"prompt": "Once upon a time", "max_tokens": 8},
    "/v1/responses": {"input": "Tell me a story", "max_output_tokens": 8},
    "/v1/messages": {"messages": [USER], "max_tokens": 8},
}
"""The endpoints that stream text, each with a body that it takes."""


class RouterRig:
    """One mixed worker and a router, each a process; ended with the context."""

    def __init__(self, folder: Path, *flags: str, worker_flags: tuple[str, ...] = ()) -> None:
        prepare(MODEL)
        self._folder = folder
        self._flags = flags
        self.worker = self._part(
            "worker",
            *("--engine", "sim", "--role", "mixed", "--worker-id", "mixed-1"),
            *("--kv-connector", "none", "--max-model-len", "2048", *worker_flags),
        )
        self.router = self._part("router", "--port", "0", "--max-model-len", "2048")

    def __enter__(self) -> Self:
        try:
            self._start(self.worker)
            self.router.command += ["--workers", self.worker.channel, *self._flags]
            self._start(self.router)
        except BaseException:
            end([self.router, self.worker])
            raise
        return self

    def __exit__(self, *_: object) -> None:
        end([self.router, self.worker])

    def _part(self, kind: str, *flags: str) -> Part:
        file = self._folder / f"{kind}.json"
        run = [sys.executable, "-m", "tandem", kind, "--model", MODEL, "--address-file", str(file)]
        return Part(kind, [*run, *flags], self._folder / f"{kind}.log", file)

    def _start(self, part: Part) -> None:
        part.spawn()
        part.await_address(part.check)
        part.await_ready(part.check)

    def client(self, key: str | None = None, **headers: str) -> httpx.Client:
        sent = {**headers, **({"x-api-key": key} if key else {})}
        return httpx.Client(base_url=self.router.http, headers=sent, timeout=60)


def body_for(path: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, **ENDPOINTS[path], **fields}


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error object, in OpenAI's shape or in Anthropic's."""
    found: dict[str, Any] = answer.json()["error"]
    return found
