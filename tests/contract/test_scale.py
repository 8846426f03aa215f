"""Scales over real HTTP: what is sent is as recorded, and every failure has its name."""

from __future__ import annotations

import asyncio
import json
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from controller.access import Access
from controller.scale import Failure, Scale, ScaleFailed, Scales
from tests.apiserver.server import ApiServer
from tests.apiserver.store import ADAPTERS, Refusal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

RECORDINGS = Path(__file__).parents[1] / "data" / "k8s"


def recorded(name: str) -> Any:
    return json.loads((RECORDINGS / name).read_text())


async def with_scales(play: Callable[[ApiServer, Scales], Awaitable[None]]) -> None:
    async with ApiServer() as server, asyncio.timeout(20):
        content = deepcopy(recorded("scalingadapter-get.json")["body"])
        server.store.put(ADAPTERS, "default", content)
        await play(server, Scales(Access(server.url, "default"), "tandem", gap_s=0.01))


def test_a_scale_is_read_and_written_as_recorded() -> None:
    async def play(server: ApiServer, scales: Scales) -> None:
        assert await scales.read("prefill") == Scale(2, 2)
        assert await scales.write("prefill", 3) == Scale(3, 2)
        wanted = recorded("scale-patch.json")["request"]
        assert server.written == [(wanted["method"], wanted["path"], wanted["body"], "")]

    asyncio.run(with_scales(play))


async def fails(asked: Awaitable[Scale]) -> Failure:
    with pytest.raises(ScaleFailed) as failed:
        await asked
    return failed.value.failure


def test_every_failure_has_its_name() -> None:
    async def play(server: ApiServer, scales: Scales) -> None:
        assert await fails(scales.read("other")) is Failure.MISSING
        server.forbidden = {("patch", "rolebasedgroupscalingadapters/scale")}
        assert await scales.read("prefill") == Scale(2, 2)
        assert await fails(scales.write("prefill", 3)) is Failure.FORBIDDEN
        server.tokens = {"t"}
        assert await fails(scales.read("prefill")) is Failure.UNAUTHORIZED
        for code, failure in (
            (409, Failure.CONFLICT),
            (422, Failure.INVALID),
            (500, Failure.REFUSED),
        ):
            server.refusal = Refusal(code, "Some", "thing"), {}
            assert await fails(scales.write("prefill", 3)) is failure
        server.refusal, server.tokens = None, None
        server.hangs = True
        assert await fails(scales.write("prefill", 3, lambda: 0.1)) is Failure.SILENT
        assert await fails(scales.write("prefill", 3, lambda: 0.0)) is Failure.NO_LEADER
        await server.stop()
        assert await fails(scales.read("prefill")) is Failure.UNREACHABLE

    asyncio.run(with_scales(play))


def test_a_server_that_asks_to_be_left_alone_is() -> None:
    async def play(server: ApiServer, scales: Scales) -> None:
        server.refusal = Refusal(429, "TooManyRequests", "later"), {"Retry-After": "1"}
        assert await fails(scales.read("prefill")) is Failure.THROTTLED
        server.refusal, asked = None, len(server.asked)
        assert await fails(scales.read("prefill")) is Failure.THROTTLED
        assert len(server.asked) == asked
        await asyncio.sleep(1.0)
        assert await scales.read("prefill") == Scale(2, 2)

    asyncio.run(with_scales(play))


def test_requests_keep_their_distance() -> None:
    async def play(server: ApiServer, scales: Scales) -> None:
        slow = Scales(Access(server.url, "default"), "tandem", gap_s=0.1)
        await asyncio.gather(*(slow.read("prefill") for _ in range(4)))
        at = [when for when, *_ in server.asked]
        assert all(b - a > 0.09 for a, b in pairwise(at))

    asyncio.run(with_scales(play))


def test_a_rotated_token_is_read_again(tmp_path: Path) -> None:
    token = tmp_path / "token"

    async def play(server: ApiServer, _: Scales) -> None:
        scales = Scales(Access(server.url, "default", token), "tandem", gap_s=0.01)
        token.write_text("old")
        server.tokens = {"new"}
        assert await fails(scales.read("prefill")) is Failure.UNAUTHORIZED
        token.write_text("new\n")
        assert await scales.read("prefill") == Scale(2, 2)
        token.unlink()
        assert await fails(scales.read("prefill")) is Failure.UNREACHABLE

    asyncio.run(with_scales(play))


def test_a_lead_that_ends_while_the_connection_is_made_sends_nothing() -> None:
    async def play(server: ApiServer, scales: Scales) -> None:
        left = iter([5.0, 5.0, 0.0])
        assert await fails(scales.write("prefill", 3, lambda: next(left))) is Failure.NO_LEADER
        assert server.written == []
        assert await scales.read("prefill") == Scale(2, 2)

    asyncio.run(with_scales(play))
