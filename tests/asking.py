"""What the tests ask of a running group, over HTTP."""

from __future__ import annotations

import json
import os
import random
import time
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from deploy.local.group import LocalGroup

MODEL = "smollm2-135m"
BLOCK = 128
EVERYTHING = os.environ.get("TANDEM_LONG") == "1"
"""As `make test-long` wants it."""
LEASE_S, ANSWER_S, READ_S = 8.0, 2.0, 4.0
"""The group's patience, short so that a test can wait for its end."""


def complete(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={"model": MODEL, **body}, timeout=120)


class OneEngine:
    """What one engine answers, each question asked once: a salt changes no token."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._choices: dict[str, Any] = {}

    def choice(self, body: dict[str, Any]) -> Any:
        key = json.dumps({**body, "cache_salt": None}, sort_keys=True)
        if key not in self._choices:
            answer = complete(self._url, **body)
            assert answer.status_code == 200, answer.text
            self._choices[key] = answer.json()["choices"][0]
        return self._choices[key]


def random_prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(20, 40_000) for _ in range(length)]


def metrics(group: LocalGroup, worker: str) -> dict[str, float]:
    """A worker's samples by name, labels included."""
    text = httpx.get(f"{group.worker(worker).http}/metrics", timeout=10).text
    samples = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in samples}


def blocks(group: LocalGroup) -> dict[str, tuple[int, int, int]]:
    """By worker: free and total blocks, and open leases."""
    names = ("blocks_free", "blocks_total", "leases_open")
    found = {}
    for worker in group.workers:
        values = metrics(group, worker.name)
        free, total, leases = (int(values[f"tandem_worker_{name}"]) for name in names)
        found[worker.name] = (free, total, leases)
    return found


def await_free(group: LocalGroup, seconds: float) -> None:
    until = time.monotonic() + seconds
    while True:
        now = blocks(group)
        if all(free == total and not leases for free, total, leases in now.values()):
            return
        assert time.monotonic() < until, now
        time.sleep(0.2)
