"""The whole path over real engines: right tokens, nothing kept, clear errors."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest

from tests.asking import LEASE_S, MODEL, await_free, complete
from tests.integration.conftest import FLAGS

if TYPE_CHECKING:
    from pathlib import Path

    from deploy.local.group import LocalGroup
    from tests.integration.conftest import Compiled

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]


def test_nothing_is_left_to_compile_when_a_worker_is_ready(
    group: LocalGroup, compiled: Compiled
) -> None:
    """It takes some ten seconds, in which nobody's tokens come and leases end."""
    for number, options in enumerate([{"logprobs": 2}, {"top_p": 0.5}, {"top_k": 5}, {"seed": 3}]):
        for many in (1, 3):
            body = {"temperature": 0.9, "n": many, "max_tokens": 4, **options}
            salt = f"compiled-{number}-{many}"
            answer = complete(group.url, prompt=[9, 8, 7], cache_salt=salt, **body)
            assert answer.status_code == 200, answer.text
    assert compiled.when_ready  # What is seen here is what they compile.
    assert compiled.now() == compiled.when_ready


def test_clients_that_leave_at_any_moment_leave_no_block_behind(group: LocalGroup) -> None:
    rng = random.Random(7)
    for number in range(20):
        body = {
            "model": MODEL, "prompt": [rng.randrange(20, 40_000) for _ in range(300)],
            "max_tokens": 200, "stream": True, "ignore_eos": True, "cache_salt": f"cut-{number}",
        }  # fmt: skip
        try:
            with httpx.stream(
                "POST", f"{group.url}/v1/completions", json=body,
                timeout=httpx.Timeout(10, read=rng.choice([0.01, 0.05, 0.2, 0.5, 5])),
            ) as response:  # fmt: skip
                for count, _ in enumerate(response.iter_lines()):
                    if count > rng.randrange(10):
                        break
        except httpx.ReadTimeout:
            pass
    await_free(group, LEASE_S + 5)


@pytest.mark.parametrize(
    "options",
    [
        {"n": 2, "temperature": 0.8, "seed": 3},
        {"logprobs": True, "top_logprobs": 2},
        {"stop": ["Paris"]},
        {"presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"extra_body": {"min_tokens": 20}},
        {"extra_body": {"prompt_logprobs": 2}},
        {"response_format": {"type": "json_schema", "json_schema": {
            "name": "a", "schema": {"type": "object", "properties": {"city": {
                "type": "string", "maxLength": 20}}, "required": ["city"],
                "additionalProperties": False}}}},
    ],
)  # fmt: skip
def test_the_official_client_through_each_feature(
    group: LocalGroup, options: dict[str, Any]
) -> None:
    import openai

    with openai.OpenAI(base_url=f"{group.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            max_tokens=40,
            **{"temperature": 0, **options},
        )
    assert len(answer.choices) == options.get("n", 1)
    text = answer.choices[0].message.content or ""
    extra = options.get("extra_body", {})
    if "stop" in options:
        assert text == "The capital of France is "
    if "response_format" in options:
        assert set(json.loads(text)) == {"city"}
    if "logprobs" in options:
        assert answer.choices[0].logprobs is not None
        assert len(answer.choices[0].logprobs.content or []) == answer.usage.completion_tokens
    if "min_tokens" in extra:
        assert answer.usage.completion_tokens >= 20
    if "prompt_logprobs" in extra:
        assert len(answer.prompt_logprobs) == answer.usage.prompt_tokens


def test_a_stream_ends_with_its_usage(group: LocalGroup) -> None:
    import openai

    with openai.OpenAI(base_url=f"{group.url}/v1", api_key="none", max_retries=0) as client:
        chunks = list(
            client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "What is the capital of France?"}],
                stream=True,
                stream_options={"include_usage": True},
                temperature=0,
            )
        )
    assert "Paris" in "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert chunks[-1].usage.completion_tokens == 8


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_forced_tool_is_called_as_one_engine_calls_it(
    group: LocalGroup, aggregated: str, choice: Any
) -> None:
    import openai

    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    calls = []
    for url in (group.url, aggregated):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            answer = client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "What is the weather in Paris?"}],
                tools=[
                    {"type": "function", "function": {"name": "weather", "parameters": parameters}}
                ],
                tool_choice=choice,
                temperature=0,
                max_tokens=60,
            )
        (call,) = answer.choices[0].message.tool_calls
        calls.append((call.function.name, call.function.arguments, answer.choices[0].finish_reason))
    assert calls[0] == calls[1]
    assert calls[0][0] == "weather"


def test_a_killed_decode_worker_ends_the_stream_with_an_error_and_its_successor_serves(
    group: LocalGroup,
) -> None:
    body = {
        "model": MODEL, "prompt": "Once upon a time", "max_tokens": 1000,
        "stream": True, "ignore_eos": True,
    }  # fmt: skip
    worker = group.worker("decode-0").process
    assert worker is not None
    engine = psutil.Process(worker.pid).children(recursive=True)
    assert len(engine) >= 2
    events = []
    with httpx.stream("POST", f"{group.url}/v1/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if line:
                events.append(line.removeprefix("data: "))
            if len(events) == 5:
                group.kill("decode-0")
    errors = [json.loads(e)["error"] for e in events if e.startswith('{"error"')]
    assert len(errors) == 1, events[-3:]
    assert "decode-0" in errors[0]["message"]
    assert group.router is not None
    assert '"message": "worker lost"' in group.router.log.read_text()
    assert psutil.wait_procs(engine, timeout=5)[1] == []
    refused = complete(group.url, prompt="x", max_tokens=2)
    assert refused.status_code == 503
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.json()["error"]["code"] == "no_workers"
    group.restart("decode-0")
    until = time.monotonic() + 15
    while (answer := complete(group.url, prompt="x", max_tokens=2)).status_code != 200:
        assert answer.status_code == 503, answer.text
        assert time.monotonic() < until
        time.sleep(0.3)
    await_free(group, LEASE_S + 5)


def test_a_worker_that_does_not_load_in_time_ends_and_leaves_nothing_behind(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-m", "tandem", "worker", "--role", "mixed", "--model", MODEL]
    everyone: set[psutil.Process] = set()
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen([*command, "--load-s", "0.5", *FLAGS], stderr=out)
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            everyone.update(psutil.Process(process.pid).children(recursive=True))
        time.sleep(0.05)
    assert "the engine is not loaded after 0.5 s" in log.read_text()
    assert process.returncode == 1
    assert psutil.wait_procs(list(everyone), timeout=5)[1] == []
