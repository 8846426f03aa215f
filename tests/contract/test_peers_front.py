"""vLLM's own server over a simulated engine, as an HTTP router sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import pytest

from deploy.local.models import prepare
from deploy.local.parts import Part, end
from deploy.local.peers.fleet import Fleet
from deploy.local.peers.sides import Plan, make_front
from tests.asking import MODEL

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BODY: dict[str, Any] = {"model": MODEL, "prompt": "Once upon a time " * 20, "temperature": 0}


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Part]:
    folder: Path = tmp_path_factory.mktemp("front")
    part = make_front(Plan(MODEL, prepare(MODEL), Fleet(instant=True)), "front", folder)
    part.spawn()
    try:
        part.await_address(part.check)
        part.await_ready(part.check)
        yield part
    finally:
        end([part])


def test_it_streams_a_token_an_event(front: Part) -> None:
    body = {**BODY, "max_tokens": 5, "stream": True}
    with httpx.stream("POST", f"{front.http}/v1/completions", json=body, timeout=30) as response:
        events = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    assert sum('"text":" a"' in event for event in events) == 5


def test_a_prefills_parameters_carry_its_prompt_to_a_decode(front: Part) -> None:
    url = f"{front.http}/v1/completions"
    remote = {"do_remote_decode": True, "do_remote_prefill": False}
    asked = {**BODY, "max_tokens": 1, "kv_transfer_params": remote}
    params = httpx.post(url, json=asked, timeout=30).json()["kv_transfer_params"]
    assert params["do_remote_prefill"] is True
    answer = httpx.post(
        url, json={**BODY, "max_tokens": 3, "kv_transfer_params": params}, timeout=30
    )
    assert answer.json()["usage"]["completion_tokens"] == 3
