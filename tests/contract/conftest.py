"""A world for each test, over each transport."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.contract.handoff_rig import World

if TYPE_CHECKING:
    from collections.abc import Iterator

TRANSPORTS = ("memory", "tcp", "ucx", "collective")


@pytest.fixture(params=TRANSPORTS)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(request.param)
    try:
        yield made
    finally:
        made.end()
