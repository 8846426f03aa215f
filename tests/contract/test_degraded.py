"""A router over workers that can't hand off is ready, and says what is wrong."""

from __future__ import annotations

import httpx
import pytest

from deploy.local.group import LocalGroup
from tests.asking import MODEL, complete

pytestmark = pytest.mark.timeout(300)

SIMULATED = ["--engine", "sim", "--max-model-len", "2048"]


def test_a_router_over_workers_that_can_t_hand_off_serves_and_says_why_it_is_degraded() -> None:
    unlike = {"decode": ["--block-size", "32"]}
    always = ["--disaggregate", "always"]
    with LocalGroup(MODEL, flags=SIMULATED, role_flags=unlike, router_flags=always) as group:
        ready = httpx.get(f"{group.url}/readyz")
        assert ready.status_code == 200
        assert ready.text.startswith("degraded: ")
        for named in ("prefill-0", "decode-0", "layout differs", "--block-size"):
            assert named in ready.text
        metrics = httpx.get(f"{group.url}/metrics").text
        assert 'tandem_router_unpaired_workers{differs="layout"} 2.0' in metrics
        assert "tandem_router_failing_pairs 0.0" in metrics
        assert complete(group.url, prompt="Once", max_tokens=3).status_code == 200
        group.kill("prefill-0")
        group.router.wait_for(  # type: ignore[union-attr]
            lambda: httpx.get(f"{group.url}/readyz").text == "ok", lambda: None
        )
