"""Workers stopped and killed at every moment of a handoff: right tokens, or a clear error."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from deploy.local.group import LocalGroup
from tests.integration.asking import LEASE_S, MODEL, await_free, complete, metrics
from tests.integration.conftest import FLAGS, OURS
from tests.integration.test_handoff_transports import body_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]

ANSWER_S, READ_S = 2.0, 4.0
LONG = 1200
ERRORS = {"no_workers", "worker_lost", "worker_failed"}


@pytest.fixture(scope="module")
def frail() -> Iterator[LocalGroup]:
    """Short patience, so that faults show in seconds, and room for three long prompts a worker."""
    flags = [
        *FLAGS, *OURS, "--num-gpu-blocks-override", "40",
        "--kv-answer-s", f"{ANSWER_S:g}", "--kv-read-s", f"{READ_S:g}",
    ]  # fmt: skip
    with LocalGroup(MODEL, flags=flags) as running:
        yield running


@pytest.fixture(scope="module")
def expected(aggregated: str) -> dict[int, list[int]]:
    """What one engine says to each prompt, by seed."""
    answers = {}
    for seed in range(8):
        answer = complete(aggregated, **ask(seed))
        assert answer.status_code == 200, answer.text
        answers[seed] = answer.json()["choices"][0]["token_ids"]
    return answers


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

    def outcome(self, expected: dict[int, list[int]], within_s: float) -> str:
        """`tokens` or an error's code. Wrong tokens, or none in time, fail the test."""
        self.join(within_s)
        assert self.answer is not None, f"no answer within {within_s} s"
        if self.answer.status_code == 200:
            assert self.answer.json()["choices"][0]["token_ids"] == expected[self._seed]
            return "tokens"
        code = self.answer.json()["error"]["code"]
        assert code in ERRORS, self.answer.text
        return str(code)


def must_serve(group: LocalGroup, expected: dict[int, list[int]], seed: int, salt: str) -> None:
    """Without any restart. Whoever was away may take a moment to be known again."""
    until = time.monotonic() + 20
    while (code := Asked(group, seed, salt).outcome(expected, 60)) != "tokens":
        assert code == "no_workers", code
        assert time.monotonic() < until
        time.sleep(0.5)


def prefill_s(group: LocalGroup, expected: dict[int, list[int]]) -> float:
    """How long a prompt takes here, now."""
    began = time.monotonic()
    assert Asked(group, 0, f"{began}").outcome(expected, 60) == "tokens"
    return time.monotonic() - began


@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
@pytest.mark.parametrize(("moment", "away_s"), [(0.0, 7.0), (0.4, 1.0), (0.4, 7.0), (0.9, 7.0)])
def test_a_worker_that_stops_and_wakes_costs_time_and_no_token(
    frail: LocalGroup, expected: dict[int, list[int]], name: str, moment: float, away_s: float
) -> None:
    """`moment`: of the request's usual time. 1 s is within everybody's patience, 7 s beyond it."""
    seed = random.Random(f"{name}-{moment}-{away_s}").randrange(8)
    salt = f"stop-{name}-{moment}-{away_s}"
    usual_s = prefill_s(frail, expected)
    if moment:
        asked = Asked(frail, seed, salt)
        time.sleep(moment * usual_s)
        with stopped(frail, name):
            time.sleep(away_s)
    else:
        with stopped(frail, name):
            asked = Asked(frail, seed, salt)
            time.sleep(away_s)
    outcome = asked.outcome(expected, 60)
    if away_s < 2:
        assert outcome == "tokens"
    must_serve(frail, expected, seed, salt + "-after")
    await_free(frail, LEASE_S + ANSWER_S + READ_S)


@pytest.mark.parametrize(
    ("name", "moment"), [("prefill-0", 0.3), ("prefill-0", 0.9), ("decode-0", 0.8)]
)
def test_a_killed_worker_costs_its_requests_at_most_and_its_successor_serves(
    frail: LocalGroup, expected: dict[int, list[int]], name: str, moment: float
) -> None:
    """A restart takes the same address, with another epoch."""
    seed, salt = 4 if name == "prefill-0" else 5, f"kill-{name}-{moment}"
    usual_s = prefill_s(frail, expected)
    asked = Asked(frail, seed, salt)
    time.sleep(moment * usual_s)
    frail.kill(name)
    outcome = asked.outcome(expected, 60)
    if name == "prefill-0":
        assert outcome == "tokens", "the decode worker can do it all by itself"
        must_serve(frail, expected, seed, salt + "-alone")
        record_free(frail, "decode-0", LEASE_S + ANSWER_S + READ_S)
    else:
        record_free(frail, "prefill-0", LEASE_S + ANSWER_S + READ_S)
    frail.restart(name)
    must_serve(frail, expected, seed, salt + "-after")
    await_free(frail, LEASE_S + ANSWER_S + READ_S)


def record_free(group: LocalGroup, name: str, seconds: float) -> None:
    """The survivor holds nothing for the one that is gone."""
    until = time.monotonic() + seconds
    while True:
        now = metrics(group, name)
        values = [now[f"tandem_worker_{n}"] for n in ("blocks_free", "blocks_total", "leases_open")]
        if values[0] == values[1] and not values[2]:
            return
        assert time.monotonic() < until, values
        time.sleep(0.2)


def test_without_memory_requests_wait_and_none_is_answered_wrong(
    frail: LocalGroup, expected: dict[int, list[int]]
) -> None:
    """Eight prompts of ten blocks each, where either worker has thirty-nine."""
    asked = [Asked(frail, seed, "full") for seed in range(8)]
    assert [a.outcome(expected, 110) for a in asked] == ["tokens"] * 8
    await_free(frail, LEASE_S + ANSWER_S + READ_S)
