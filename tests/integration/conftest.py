"""Real engines, once a session."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from deploy.local.aggregated import Aggregated
from deploy.local.group import LocalGroup
from deploy.local.models import prepare

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL = "smollm2-135m"
# Chunks smaller than the longer prompts, so that these are handed off in pieces.
FLAGS = [
    "--max-model-len", "2048", "--dtype", "float32", "--enforce-eager",
    "--max-num-batched-tokens", "256",
]  # fmt: skip
OURS = ["--kv-checksums", "full"]
TOOLS = ["--tool-call-parser", "hermes", "--enable-auto-tool-choice"]


@pytest.fixture(scope="session")
def group() -> Iterator[LocalGroup]:
    """A router with one prefill and one decode worker, in float32."""
    prepare(MODEL)
    with LocalGroup(MODEL, flags=[*FLAGS, *OURS], router_flags=TOOLS) as running:
        yield running


@pytest.fixture(scope="session")
def aggregated() -> Iterator[str]:
    """What every answer is compared with. Its address."""
    model = str(prepare(MODEL))
    with Aggregated(model, served_as=MODEL, flags=[*FLAGS, *TOOLS]) as running:
        yield running.url
