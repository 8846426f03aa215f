"""What requests share: the prefix cache, within a salt, and the queue, by priority."""

from __future__ import annotations

import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

from tests.asking import BLOCK, MODEL, complete, metrics, random_prompt

if TYPE_CHECKING:
    from deploy.local.group import LocalGroup

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]


def cached(answer: httpx.Response) -> int:
    details: dict[str, int] = answer.json()["usage"]["prompt_tokens_details"]
    return details["cached_tokens"]


def test_a_prompt_is_computed_once_for_each_salt(group: LocalGroup, aggregated: str) -> None:
    prompt = random_prompt(3 * BLOCK + 20, seed=3)
    run = uuid.uuid4().hex
    told: dict[str, list[int]] = {group.url: [], aggregated: []}
    tokens = []
    for salt in ("mine", "mine", "another's"):
        for url, counts in told.items():
            answer = complete(
                url, prompt=prompt, max_tokens=4, temperature=0, ignore_eos=True,
                cache_salt=f"{salt} {run}", return_token_ids=True,
            )  # fmt: skip
            counts.append(cached(answer))
            tokens.append(answer.json()["choices"][0]["token_ids"])
    assert told[group.url] == told[aggregated] == [0, 3 * BLOCK, 0]
    assert all(each == tokens[0] for each in tokens)


def test_what_a_cache_will_save_is_foretold(group: LocalGroup) -> None:
    prompt = random_prompt(3 * BLOCK + 20, seed=8)
    run = uuid.uuid4().hex
    told = []
    for salt, tokens in (("a", prompt), ("a", prompt[: 2 * BLOCK + 1]), ("b", prompt)):
        answer = complete(group.url, prompt=tokens, max_tokens=4, cache_salt=f"{salt} {run}")
        record = httpx.get(f"{group.url}/tandem/requests/{answer.json()['id']}").json()[0]
        told.append((record["predicted_tokens"], record["cached_tokens"]))
    assert told == [(0, 0), (2 * BLOCK, 2 * BLOCK), (0, 0)]
    text = httpx.get(f"{group.url}/metrics", timeout=10).text
    assert "tandem_router_index_workers 2.0" in text


def test_a_stream_s_usage_tells_the_cached_tokens_too(group: LocalGroup) -> None:
    salt = uuid.uuid4().hex
    told = []
    with openai.OpenAI(base_url=f"{group.url}/v1", api_key="none", max_retries=0) as client:
        for _ in range(2):
            chunks = list(
                client.chat.completions.create(
                    model=MODEL,
                    messages=[{"role": "user", "content": "far and wide " * BLOCK}],
                    max_tokens=2,
                    stream=True,
                    stream_options={"include_usage": True},
                    extra_body={"cache_salt": salt},
                )
            )
            told.append(chunks[-1].usage.prompt_tokens_details.cached_tokens)
            prompt_tokens = chunks[-1].usage.prompt_tokens
    assert told == [0, (prompt_tokens - 1) // BLOCK * BLOCK]


class Queue:
    """Completions sent one after another, and when the first token of each came."""

    def __init__(self, group: LocalGroup, pool: ThreadPoolExecutor) -> None:
        self._group, self._pool = group, pool
        self._run = uuid.uuid4().hex
        self._sent: dict[str, Any] = {}
        self._taken_before = self._taken()

    def send(self, name: str, tokens: int, priority: int) -> None:
        self._sent[name] = self._pool.submit(
            httpx.post,
            f"{self._group.url}/v1/completions",
            json={
                "model": MODEL, "prompt": random_prompt(tokens, seed=len(self._sent)),
                "max_tokens": 2, "ignore_eos": True, "priority": priority,
                "cache_salt": f"{name} {self._run}",
            },
            headers={"X-Request-Id": f"{self._run}-{name}"},
            timeout=300,
        )  # fmt: skip
        # The order of arrival is to be the order of sending.
        until = time.monotonic() + 30
        while self._taken() < self._taken_before + len(self._sent):
            assert time.monotonic() < until, "the prefill worker does not take it"
            time.sleep(0.02)

    def _taken(self) -> float:
        name = 'tandem_worker_requests_total{phase="prefill"}'
        return metrics(self._group, "prefill-0").get(name, 0)

    def order(self) -> list[str]:
        """Names by their first token."""
        began = {}
        for name, sent in self._sent.items():
            answer = sent.result()
            assert answer.status_code == 200, answer.text
            found = httpx.get(f"{self._group.url}/tandem/requests/{answer.json()['id']}").json()
            assert found[0]["prefill_worker"] == "prefill-0"
            began[name] = found[0]["first_token_at"]
        return sorted(began, key=lambda name: began[name])


def test_a_request_of_better_priority_is_prefilled_before_worse_ones_that_wait(
    group: LocalGroup,
) -> None:
    with ThreadPoolExecutor(8) as pool:
        queue = Queue(group, pool)
        for number in range(4):
            queue.send(f"worse-{number}", tokens=1000, priority=10)
        queue.send("as-bad", tokens=100, priority=10)
        queue.send("better", tokens=100, priority=0)
        order = queue.order()
    # A step computes 2,048 tokens: two prompts, and the third begun, may have gone before.
    assert order.index("better") <= 3, order
    assert order.index("as-bad") >= 4, order
