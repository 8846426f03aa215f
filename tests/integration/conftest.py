"""Real engines, once a session."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from deploy.local.aggregated import Aggregated
from deploy.local.group import LocalGroup
from deploy.local.models import prepare
from tests.integration.asking import LEASE_S, MODEL

if TYPE_CHECKING:
    from collections.abc import Iterator

FLAGS = ["--max-model-len", "2048", "--dtype", "float32", "--enforce-eager"]
# Chunks smaller than the longer prompts, so that these are handed off in pieces.
OURS = [
    "--max-num-batched-tokens", "256", "--kv-checksums", "full", "--lease-s", f"{LEASE_S:g}",
]  # fmt: skip
FRONT_FLAGS = [
    "--tool-call-parser", "hermes", "--enable-auto-tool-choice", "--enable-prompt-tokens-details",
]  # fmt: skip


@pytest.fixture(scope="session")
def group() -> Iterator[LocalGroup]:
    """A router with one prefill and one decode worker, in float32."""
    prepare(MODEL)
    with LocalGroup(MODEL, flags=[*FLAGS, *OURS], router_flags=FRONT_FLAGS) as running:
        yield running


@pytest.fixture(scope="session")
def aggregated() -> Iterator[str]:
    """What every answer is compared with. Its address."""
    model = str(prepare(MODEL))
    with Aggregated(model, served_as=MODEL, flags=[*FLAGS, *FRONT_FLAGS]) as running:
        yield running.url
