"""The reflector over real HTTP: every way in which an API server fails, and comes back."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import asdict
from random import Random
from typing import TYPE_CHECKING

import pytest

from controller.access import Access
from controller.core.patience import Patience
from controller.core.peers import Kind, RoleFacts
from controller.core.session import Failure, Phase, Session
from controller.discovery import Discovery
from controller.reflector import Reflector
from tests.apiserver.group import NAMESPACE, ROLE_LABEL, Group
from tests.apiserver.server import ApiServer
from tests.apiserver.store import SLICES, Refusal, line, status

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from controller.core.peers import Change

WAIT_S = 20.0
FASTER = 50
PATIENCE = Patience(**{name: s / FASTER for name, s in asdict(Patience()).items()})
ROLES = {role: RoleFacts(7000) for role in ("prefill", "decode")}


class Rig:
    """A server, a group on it, and discovery beside them."""

    def __init__(self, server: ApiServer, patience: Patience, token_file: Path | None) -> None:
        self.server = server
        self.group = Group(server.store)
        access = Access(server.url, NAMESPACE, token_file)
        self.reflector = Reflector(access, self.group.selector, ROLE_LABEL, ROLES, patience)
        self.discovery = Discovery(self.reflector, self._on_change, debounce_s=0.02)
        self.told: dict[str, Kind] = {}

    @property
    def session(self) -> Session:
        return self.reflector.session

    def _on_change(self, change: Change) -> None:
        if change.kind is Kind.GONE:
            del self.told[change.peer.name]
        else:
            self.told[change.peer.name] = change.kind

    @property
    def wanted(self) -> dict[str, str]:
        found = self.server.store.selected(SLICES, NAMESPACE, self.group.selector)
        return {s["metadata"]["name"]: s["metadata"]["resourceVersion"] for s in found}

    @property
    def view(self) -> dict[str, str]:
        slices = self.session.slices or {}
        return {name: s.metadata.resource_version for name, s in slices.items()}

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not true():  # noqa: ASYNC110  # It is another's state, and not ours to tell of.
                await asyncio.sleep(0.005)

    async def agrees(self) -> None:
        await self.until(lambda: self.session.slices is not None and self.view == self.wanted)

    async def follows(self) -> None:
        """What changes now arrives."""
        self.group.add_slice("prefill")
        await self.agrees()


@asynccontextmanager
async def rig(patience: Patience = PATIENCE, token_file: Path | None = None) -> AsyncIterator[Rig]:
    async with ApiServer(bookmark_s=60 / FASTER) as server:
        here = Rig(server, patience, token_file)
        task = asyncio.create_task(here.discovery.run())
        try:
            yield here
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def test_peers_come_and_go_over_http() -> None:
    async def play() -> None:
        async with rig() as here:
            slice_name = here.group.add_slice("decode")
            pod = here.group.add_pod(slice_name, serving=False)
            await here.until(lambda: here.told == {pod: Kind.JOINED})
            here.group.set(pod, serving=True)
            await here.until(lambda: here.told == {pod: Kind.READY})
            here.group.set(pod, terminating=True)
            await here.until(lambda: here.told == {pod: Kind.DRAINING})
            here.group.remove(pod)
            await here.until(lambda: here.told == {})

    asyncio.run(play())


def test_while_the_server_is_away_the_last_set_holds_and_ages() -> None:
    async def play() -> None:
        async with rig() as here:
            pod = here.group.add_pod(here.group.add_slice("decode"))
            await here.until(lambda: here.told == {pod: Kind.READY})
            await here.server.stop()
            here.group.remove(pod)
            await here.until(lambda: here.session.failures[Failure.UNREACHABLE] > 2)
            now = asyncio.get_running_loop().time()
            assert here.told == {pod: Kind.READY}
            assert here.discovery.age_s(now) > 0.05
            here.server.store.compact()
            await here.server.start()
            await here.until(lambda: here.told == {})
            assert here.discovery.age_s(asyncio.get_running_loop().time()) < 0.5

    asyncio.run(play())


BREAKS: dict[str, Callable[[ApiServer], object]] = {
    "clean end": lambda s: s.end(),
    "cut in a line": lambda s: s.cut(),
    "half open": lambda s: s.mute(),
    "expired in the stream": lambda s: s.expire(),
    "garbage": lambda s: s.say(b"}\n"),
    "error event": lambda s: s.say(line("ERROR", status(500, "InternalError", "oh"))),
    "410 as an event": lambda s: s.end(),
    "410 as a status": lambda s: (setattr(s, "expiry_is_an_event", False), s.end()),
}  # fmt: skip


@pytest.mark.parametrize("how", BREAKS)
def test_a_watch_that_breaks_goes_on(how: str) -> None:
    async def play() -> None:
        async with rig() as here:
            await here.follows()
            await here.until(lambda: len(here.server.watches) == 1)
            gone = here.group.add_slice("decode")
            await here.agrees()
            BREAKS[how](here.server)
            # Deleted while nobody looks: what a watch from the present would never tell.
            here.group.delete_slice(gone)
            if how.startswith("410"):
                here.server.store.compact()
            await here.follows()

    asyncio.run(play())


def test_a_watch_of_a_quiet_group_is_left_alone() -> None:
    async def play() -> None:
        async with rig() as here:
            await here.follows()
            here.server.end()
            await here.until(lambda: here.session.requests[Phase.WATCH] > 0)
            await here.until(lambda: len(here.server.watches) == 1)
            asked = len(here.server.asked)
            await asyncio.sleep(2 * PATIENCE.answer_s)
            assert len(here.server.asked) == asked

    asyncio.run(play())


@pytest.mark.parametrize("snapshots", ["refused", "ignored"])
def test_a_server_without_snapshots_is_listed_page_by_page(snapshots: str) -> None:
    async def play() -> None:
        async with rig() as here:
            here.server.snapshots = snapshots
            here.session._page = 2
            for _ in range(5):
                here.group.add_slice("decode")
            await here.agrees()
            assert here.session.requests[Phase.LIST] == 3
            await here.follows()
            assert here.session.requests[Phase.LIST] == 3

    asyncio.run(play())


def test_a_rotated_token_is_read_again(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("old\n")

    async def play() -> None:
        async with rig(token_file=token) as here:
            here.server.tokens = {"old"}
            await here.follows()
            here.server.tokens = {"new"}
            here.server.end()
            await here.until(lambda: here.session.failures[Failure.UNAUTHORIZED] > 0)
            token.unlink()  # Between the kubelet's two steps there may be none.
            await here.until(lambda: here.session.failures[Failure.UNREACHABLE] > 0)
            token.write_text("new\n")
            await here.follows()

    asyncio.run(play())


def test_retry_after_is_kept() -> None:
    async def play() -> None:
        async with rig(Patience(**{**asdict(PATIENCE), "retry_after_max_s": 60.0})) as here:
            throttled = Refusal(429, "TooManyRequests", "later")
            here.server.refusal = throttled, {"Retry-After": "1"}
            await here.until(lambda: len(here.server.asked) == 1)
            here.server.refusal = None
            await here.follows()
            (first, *_), (second, *_) = here.server.asked[:2]
            assert 1.0 <= second - first < 2.0

    asyncio.run(play())


OUTAGES: dict[str, Callable[[ApiServer], object]] = {
    "hangs": lambda s: setattr(s, "hangs", True),
    "500": lambda s: setattr(s, "refusal", (Refusal(500, "InternalError", "oh"), {})),
    "403": lambda s: setattr(s, "refusal", (Refusal(403, "Forbidden", "no"), {})),
    "429": lambda s: setattr(s, "refusal", (Refusal(429, "TooManyRequests", "no"), {})),
    "410": lambda s: setattr(s, "refusal", (Refusal(410, "Expired", "no"), {})),
    "422": lambda s: setattr(s, "refusal", (Refusal(422, "Invalid", "no"), {})),
}


def test_in_an_outage_a_watch_asks_less_than_once_a_gap() -> None:
    async def suffer(how: str) -> None:
        async with rig() as here:
            OUTAGES[how](here.server)
            await asyncio.sleep(0.7)
            assert 2 <= len(here.server.asked) <= 0.7 / PATIENCE.gap_s, how
            here.server.hangs, here.server.refusal = False, None
            await here.follows()

    async def play() -> None:
        await asyncio.gather(*map(suffer, OUTAGES))

    asyncio.run(play())


def test_dozens_of_watches_survive_random_faults_over_http() -> None:
    seen: Counter[str] = Counter()

    async def live(seed: int) -> None:
        random = Random(seed)
        async with rig() as here:
            for _ in range(random.randint(10, 25)):
                here.group.change(random)
                if random.random() < 0.3:
                    seen[how := random.choice(sorted(BREAKS))] += 1
                    BREAKS[how](here.server)
                if random.random() < 0.1:
                    seen["restart"] += 1
                    await here.server.stop()
                    here.group.change(random)
                    here.server.store.compact()
                    await asyncio.sleep(random.uniform(0.0, 0.3))
                    await here.server.start()
                await asyncio.sleep(random.uniform(0.0, 0.15))
            await here.agrees()

    async def play() -> None:
        await asyncio.gather(*(live(seed) for seed in range(24)))

    asyncio.run(play())
    assert set(seen) == {*BREAKS, "restart"}
