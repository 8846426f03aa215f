"""Who may work with whom while old and new live side by side."""

from __future__ import annotations

import msgspec
import pytest

from router.core.compat import RouterFacts, can_hand_off, refusal
from tests.unit.test_dispatch import hello
from workers.api import Role

ROUTER = RouterFacts("r", "m", "td", "md", 1024, vllm_version="0.32.0")
WORKER = msgspec.structs.replace(
    hello("w", Role.DECODE), engine="vllm", engine_version="0.32.0+cu129"
)


def test_a_router_serves_workers_of_its_own_release_whatever_they_were_built_for() -> None:
    assert refusal(ROUTER, WORKER) is None


@pytest.mark.parametrize(
    "other",
    [
        {"engine_version": "0.33.0"},
        {"model_digest": "other"},
        {"tokenizer_digest": "other"},
        {"protocol": "other"},
        {"max_model_len": 512},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_worker_that_would_misunderstand_is_refused_and_both_are_named(
    other: dict[str, object],
) -> None:
    reason = refusal(ROUTER, msgspec.structs.replace(WORKER, **other))
    assert reason is not None
    for name in ("router r", "worker w"):
        assert name in reason


def test_another_engine_s_version_is_its_own_affair() -> None:
    simulated = msgspec.structs.replace(WORKER, engine="sim", engine_version="9")
    assert refusal(ROUTER, simulated) is None


@pytest.mark.parametrize("other", [{"kv_digest": "new"}, {"model_digest": "new"}])
def test_kv_goes_between_equals_only(other: dict[str, str]) -> None:
    old_p, old_d = hello("p", Role.PREFILL), hello("d", Role.DECODE)
    new_p, new_d = (msgspec.structs.replace(w, **other) for w in (old_p, old_d))
    assert can_hand_off(old_p, old_d)
    assert can_hand_off(new_p, new_d)
    assert not can_hand_off(old_p, new_d)
    assert not can_hand_off(new_p, old_d)
