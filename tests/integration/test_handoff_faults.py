"""Workers stopped and killed at every moment of a handoff: right tokens, or a clear error."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from tests.asking import (
    ANSWER_S,
    EVERYTHING,
    LEASE_S,
    READ_S,
    OneEngine,
    await_free,
    complete,
    metrics,
)
from tests.integration.test_equivalence import body_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

    from deploy.local.group import LocalGroup

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]

LONG = 1200
ERRORS = {"no_workers", "worker_lost", "worker_failed"}
FREE_S = LEASE_S + ANSWER_S + READ_S
"""Whatever died, all blocks are free again by then."""
PREFILL, DECODE = "prefill-0", "decode-0"

Stop = tuple[str, float, float]
"""A worker, the moment as a share of the request's usual time, and for how many seconds: 1 is
within everybody's patience, 7 beyond it."""
Kill = tuple[str, float]
WORKERS, MOMENTS = (PREFILL, DECODE), (0.0, 0.2, 0.4, 0.6, 0.8, 0.95)

# `make test` has time for some of each; `make test-long` tries all.
SOME_STOPS: dict[str, list[Stop]] = {
    "ucx": [(PREFILL, 0.4, 7.0)],
    "tcp": [(DECODE, 0.4, 7.0)],
    "collective": [],
}
ALL_STOPS: list[Stop] = [(w, m, s) for w in WORKERS for m in MOMENTS for s in (1.0, 7.0)]
SOME_KILLS: dict[str, list[Kill]] = {
    "ucx": [],  # `test_serving` kills its decode worker.
    "tcp": [(DECODE, 0.8)],
    "collective": [(PREFILL, 0.3)],
}
ALL_KILLS: list[Kill] = [(w, m) for w in WORKERS for m in MOMENTS]


PROMPTS = 9
Expected = Callable[[int], list[int]]


@pytest.fixture(scope="module")
def expected(one_engine: OneEngine) -> Expected:
    """What one engine says to each prompt, by seed."""
    return lambda seed: list(one_engine.choice(ask(seed))["token_ids"])


def ask(seed: int, salt: str = "") -> dict[str, Any]:
    """Even seeds may relay their first token, odd ones may not."""
    body = body_of(LONG + seed, f"fault-{seed}-{salt}", temperature=0, max_tokens=24)
    return {**body, "logprobs": 1} if seed % 2 else body


def processes(group: LocalGroup, name: str) -> list[psutil.Process]:
    worker = psutil.Process(group.worker(name).pid)
    return [worker, *worker.children(recursive=True)]


@contextlib.contextmanager
def stopped(group: LocalGroup, name: str) -> Iterator[None]:
    """All of a worker's processes, truly stopped inside."""
    everyone = processes(group, name)
    for process in everyone:
        process.send_signal(signal.SIGSTOP)
    until = time.monotonic() + 5
    while any(p.status() != psutil.STATUS_STOPPED for p in everyone):
        assert time.monotonic() < until, "a signal takes a moment, not seconds"
        time.sleep(0.005)
    try:
        yield
    finally:
        for process in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


class Asked(threading.Thread):
    """One request under way."""

    def __init__(self, group: LocalGroup, seed: int, salt: str) -> None:
        super().__init__(daemon=True)
        self._group, self._seed, self._salt = group, seed, salt
        self.answer: httpx.Response | None = None
        self.start()

    def run(self) -> None:
        self.answer = complete(self._group.url, **ask(self._seed, self._salt))

    def outcome(self, expected: Expected, within_s: float) -> str:
        """`tokens` or an error's code. Wrong tokens, or none in time, fail the test."""
        self.join(within_s)
        assert self.answer is not None, f"no answer within {within_s} s"
        if self.answer.status_code == 200:
            assert self.answer.json()["choices"][0]["token_ids"] == expected(self._seed)
            return "tokens"
        code = self.answer.json()["error"]["code"]
        assert code in ERRORS, self.answer.text
        return str(code)


def must_serve(group: LocalGroup, expected: Expected, seed: int, salt: str) -> None:
    """Without any restart. Whoever was away may take a moment to be known again."""
    until = time.monotonic() + 20
    while (code := Asked(group, seed, salt).outcome(expected, 60)) != "tokens":
        assert code == "no_workers", code
        assert time.monotonic() < until
        time.sleep(0.5)


def usual_s(group: LocalGroup, expected: Expected) -> float:
    """How long a request takes here, now."""
    began = time.monotonic()
    assert Asked(group, 0, f"{began}").outcome(expected, 60) == "tokens"
    return time.monotonic() - began


def faults(some: dict[str, list[Any]], every: list[Any]) -> list[Any]:
    """By transport, for the `over` fixture."""
    return [
        pytest.param(transport, fault, id="-".join(str(f) for f in (transport, *fault)))
        for transport, few in some.items()
        for fault in (every if EVERYTHING else few)
    ]


@pytest.mark.parametrize(("over", "stop"), faults(SOME_STOPS, ALL_STOPS), indirect=["over"])
def test_a_worker_that_stops_and_wakes_costs_time_and_no_token(
    over: tuple[str, LocalGroup], expected: Expected, stop: Stop
) -> None:
    (transport, group), (name, moment, away_s) = over, stop
    salt = f"{transport}-stop-{name}-{moment}-{away_s}"
    seed = random.Random(salt).randrange(PROMPTS)
    usual = usual_s(group, expected)
    if moment:
        asked = Asked(group, seed, salt)
        time.sleep(moment * usual)
        with stopped(group, name):
            time.sleep(away_s)
    else:
        with stopped(group, name):
            asked = Asked(group, seed, salt)
            time.sleep(away_s)
    outcome = asked.outcome(expected, 60)
    if away_s < ANSWER_S:
        assert outcome == "tokens"
    must_serve(group, expected, seed, salt + "-after")
    await_free(group, FREE_S)


@pytest.mark.parametrize(("over", "kill"), faults(SOME_KILLS, ALL_KILLS), indirect=["over"])
def test_a_killed_worker_costs_its_requests_at_most_and_its_successor_serves(
    over: tuple[str, LocalGroup], expected: Expected, kill: Kill
) -> None:
    """A restart takes the same address, with another epoch."""
    (transport, group), (name, moment) = over, kill
    salt = f"{transport}-kill-{name}-{moment}"
    seed = random.Random(salt).randrange(PROMPTS)
    usual = usual_s(group, expected)
    asked = Asked(group, seed, salt)
    time.sleep(moment * usual)
    group.kill(name)
    outcome = asked.outcome(expected, 60)
    if name == PREFILL:
        assert outcome == "tokens", "the decode worker can do it all by itself"
        must_serve(group, expected, seed, salt + "-alone")
        await_worker_free(group, DECODE)
    else:
        await_worker_free(group, PREFILL)
    group.restart(name)
    must_serve(group, expected, seed, salt + "-after")
    await_free(group, FREE_S)


def await_worker_free(group: LocalGroup, name: str) -> None:
    """The survivor holds nothing for the one that is gone."""
    until = time.monotonic() + FREE_S
    while True:
        now = metrics(group, name)
        values = [now[f"tandem_worker_{n}"] for n in ("blocks_free", "blocks_total", "leases_open")]
        if values[0] == values[1] and not values[2]:
            return
        assert time.monotonic() < until, values
        time.sleep(0.2)


def test_without_memory_requests_wait_and_none_is_answered_wrong(
    group: LocalGroup, expected: Expected
) -> None:
    """Prompts of ten blocks each, where either worker has room for six."""
    asked = [Asked(group, seed, "full") for seed in range(PROMPTS)]
    assert [a.outcome(expected, 110) for a in asked] == ["tokens"] * PROMPTS
    await_free(group, FREE_S)
