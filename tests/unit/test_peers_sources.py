"""Peers by file and by DNS, and what the router's links make of them."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from controller.core.listing import ListingBad, read_listing
from controller.core.names import MISSES_MAX, Lookups
from controller.core.peers import Change, Kind, Peer
from controller.discovery import Discovery
from controller.file import FileOfPeers
from controller.names import Names
from router.discover import Follower
from tests.virtual_time import VirtualLoop

if TYPE_CHECKING:
    from collections.abc import Coroutine


def run(coroutine: Coroutine) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(coroutine)


# ---------------------------------------------------------------- a file


def test_a_listing_has_a_peer_a_line() -> None:
    found = read_listing(
        "# workers\n\ntcp://a:1\ntcp://b.c-d:2 decode  # the big one\n"
        "tcp://[::1]:3 decode draining\ntcp://e:4 draining\n"
    )
    assert [(s.peer.address, s.peer.role, s.terminating) for s in found] == [
        ("tcp://a:1", "", False),
        ("tcp://b.c-d:2", "decode", False),
        ("tcp://[::1]:3", "decode", True),
        ("tcp://e:4", "", True),
    ]
    assert read_listing("") == []


@pytest.mark.parametrize(
    "line",
    ["a:1", "tcp://a", "tcp://a:0", "tcp://a:65536", "tcp://a:1 b c", "tcp://x:9 draining b"],
)
def test_a_bad_line_is_named_and_nothing_counts(line: str) -> None:
    with pytest.raises(ListingBad, match="line 2"):
        read_listing(f"tcp://x:9\n{line}\n")


def test_an_address_is_listed_once() -> None:
    with pytest.raises(ListingBad, match="twice"):
        read_listing("tcp://x:9\ntcp://x:9 decode\n")


class Told:
    """The stream, as short words."""

    def __init__(self) -> None:
        self.changes: list[str] = []

    def __call__(self, change: Change) -> None:
        self.changes.append(f"{change.kind} {change.peer.address.removeprefix('tcp://')}")

    def take(self) -> list[str]:
        changes, self.changes = self.changes, []
        return changes


def test_a_file_is_followed_and_what_is_wrong_with_it_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "peers"

    async def play() -> None:
        told = Told()
        discovery = Discovery(FileOfPeers(file, every_s=0.01), told, debounce_s=0.01)
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(discovery.run())

        async def after(content: str | None) -> list[str]:
            if content is None:
                file.unlink()
            else:
                file.write_text(content)
            await asyncio.sleep(0.2)
            return told.take()

        await asyncio.sleep(0.1)
        assert discovery.age_s(loop.time()) is None
        assert await after("tcp://a:1\n") == ["joined a:1", "ready a:1"]
        assert discovery.age_s(loop.time()) < 0.1
        assert await after("tcp://a:1 draining\ntcp://b:1\n") == [
            "draining a:1",
            "joined b:1",
            "ready b:1",
        ]
        for bad in ("tcp://b", "\0", None):
            assert await after(bad) == []
        assert discovery.age_s(loop.time()) > 0.3
        assert await after("tcp://b:1\n") == ["gone a:1"]
        assert await after("") == ["gone b:1"]
        task.cancel()

    asyncio.run(play())


def test_a_file_that_is_half_written_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, half = "tcp://a:1\ntcp://b:1\n", "tcp://a:1\n"
    reads = [whole, whole, half, whole, "", whole, half, half]
    monkeypatch.setattr(FileOfPeers, "_read", lambda _: reads.pop(0) if reads else half)

    async def play() -> None:
        told = Told()
        discovery = Discovery(FileOfPeers(Path("peers"), every_s=0.01), told, debounce_s=0.001)
        task = asyncio.create_task(discovery.run())
        while reads:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        task.cancel()
        assert told.take() == ["joined a:1", "ready a:1", "joined b:1", "ready b:1", "gone b:1"]

    asyncio.run(play())


# ---------------------------------------------------------------- DNS


def test_an_address_that_several_answers_lack_is_gone() -> None:
    lookups = Lookups({"decode": 7, "prefill": 8})
    lookups.found("decode", ["10.0.0.2", "10.0.0.1", "fd00::1"])
    lookups.found("prefill", ["fd00::2"])
    assert [s.peer.address for s in lookups.sightings()] == [
        "tcp://10.0.0.1:7",
        "tcp://10.0.0.2:7",
        "tcp://[fd00::2]:8",
    ]
    for _ in range(MISSES_MAX - 1):
        lookups.found("decode", ["10.0.0.1"])
    lookups.found("decode", ["10.0.0.1", "10.0.0.2"])
    for _ in range(MISSES_MAX - 1):
        lookups.found("decode", ["10.0.0.1"])
    assert len(lookups.sightings()) == 3
    lookups.found("decode", ["10.0.0.1"])
    assert [s.peer.name for s in lookups.sightings()] == ["10.0.0.1", "fd00::2"]


def test_when_dns_does_not_answer_the_last_set_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play() -> None:
        told, loop = Told(), asyncio.get_running_loop()
        answer: list[str] | int = ["10.0.0.1", "10.0.0.2"]

        async def getaddrinfo(name: str, *_: object, **__: object) -> list:
            assert name == "decode.default.svc"
            if isinstance(answer, int):
                raise socket.gaierror(answer, "no")
            return [(socket.AF_INET, 1, 6, "", (ip, 0)) for ip in answer]

        monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
        discovery = Discovery(Names({"decode": "decode.default.svc"}, {"decode": 7}), told)
        task = asyncio.create_task(discovery.run())
        await asyncio.sleep(1.0)
        assert len(told.take()) == 4
        answer = socket.EAI_AGAIN
        await asyncio.sleep(600.0)
        assert told.take() == []
        assert discovery.age_s(loop.time()) > 590
        answer = ["10.0.0.2"]
        await asyncio.sleep(60.0)
        assert told.take() == ["gone 10.0.0.1:7"]
        answer = socket.EAI_NONAME
        await asyncio.sleep(60.0)
        assert told.take() == ["gone 10.0.0.2:7"]
        assert discovery.age_s(loop.time()) < 10
        task.cancel()

    run(play())


# ---------------------------------------------------------------- the router's links


class Links:
    def __init__(self) -> None:
        self.said: list[str] = []

    def connect(self, address: str) -> None:
        self.said.append(f"connect {address}")

    def rest(self, address: str) -> None:
        self.said.append(f"rest {address}")

    def disconnect(self, address: str) -> None:
        self.said.append(f"disconnect {address}")


def test_a_replacement_at_the_same_address_stays_connected() -> None:
    """Host networking, or a file: the new one is seen before the old one is known to be gone."""
    links = Links()
    follower = Follower(links, fixed=["tcp://f:1"])
    old, new = (Peer(uid, "p", "decode", "tcp://a:1") for uid in "ab")
    for kind, peer in (
        (Kind.JOINED, old),
        (Kind.READY, old),
        (Kind.DRAINING, old),
        (Kind.JOINED, new),
        (Kind.READY, new),
        (Kind.GONE, old),
        (Kind.GONE, new),
        (Kind.GONE, Peer("c", "f", "decode", "tcp://f:1")),
    ):
        follower.on_change(Change(kind, peer))
    assert [said.split()[0] for said in links.said] == [
        "rest",
        "connect",
        "rest",
        "rest",
        "connect",
        "connect",
        "disconnect",
    ]
