"""Looks at a group: who serves, what each one's /metrics say, and what was last asked for."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import httpx
from prometheus_client.parser import text_string_to_metric_families

from controller.api import beginning
from controller.core.demand import Size
from controller.core.peers import Kind
from controller.core.sums import OF_ROUTERS, OF_WORKERS, READ, Group, Sums
from controller.scale import ScaleFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    from controller.core.demand import Observed
    from controller.core.peers import Change, Peer
    from controller.core.sums import Samples
    from controller.scale import Scales

POLL_S: Final = 0.1
PEERS_AGE_S_MAX: Final = 180.0
"""What is known of peers may be so old: up to 60 s are normal at rest."""
_NAME: Final = re.compile(r"[{ ]")
TOLD_MAX: Final = 3
"""Processes that a look names as missing; the others it counts."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of one look."""

    at_once: int = 32
    """Scrapes under way at a time."""
    scrape_s: float = 3.0
    tries: int = 2
    bytes_max: int = 4 << 20
    """Of one process's metrics."""
    look_s: float = 10.0
    """What is not known by then is missing."""


@dataclass(frozen=True, slots=True)
class RoleNames:
    """What the group calls them."""

    router: str
    prefill: str
    decode: str


@dataclass(frozen=True, slots=True)
class Look:
    """A whole one has `observed`; of any other it is told what is missing."""

    observed: Observed | None
    missing: str = ""


Found = tuple["Peer", Kind, "Samples | str"]
"""A process, and what it says or why it says nothing."""


class Observer:
    """Follows who is there, and looks when it is asked to."""

    def __init__(self, roles: RoleNames, scales: Scales, bounds: Bounds | None = None) -> None:
        self.bounds = bounds or Bounds()
        self.scrapes_failed: Counter[str] = Counter()
        """By role."""
        self.scales_failed: Counter[str] = Counter()
        """By reason, of reads."""
        self.age_s: Callable[[float], float | None] = lambda now: None
        """How old what is known of peers is: discovery's own."""
        self._roles = roles
        self._scales = scales
        self._peers: dict[str, tuple[Peer, Kind]] = {}
        self._sums = Sums()
        self._at_once = asyncio.Semaphore(self.bounds.at_once)

    def on_change(self, change: Change) -> None:
        """Told by discovery."""
        uid = change.peer.uid
        if change.kind is Kind.GONE:
            self._peers.pop(uid, None)
            self._sums.forget(uid)
        else:
            self._peers[uid] = change.peer, change.kind

    async def look(self) -> Look:
        """Raises nothing that the group or the API server could bring about."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self.bounds.look_s
        await self._first_news(until)
        age_s = self.age_s(loop.time())
        if age_s is None or age_s > PEERS_AGE_S_MAX:
            told = "never heard of" if age_s is None else f"not heard of for {age_s:.0f} s"
            return Look(None, f"peers were {told}")
        found, wanted = await asyncio.gather(self._scrape_all(until), self._wanted(until))
        if missing := self._missing(found):
            return Look(None, missing)
        if isinstance(wanted, str):
            return Look(None, wanted)
        roles = self._roles
        serve: dict[str, list[Samples]] = {}
        for peer, kind, samples in found:
            if kind is Kind.READY and not isinstance(samples, str):
                serve.setdefault(peer.role, []).append(samples)
        group = Group(*(serve.get(r, []) for r in (roles.router, roles.prefill, roles.decode)))
        if not group.routers:
            return Look(None, "no router is ready")
        return Look(self._sums.observed(group, wanted, loop.time()))

    async def _first_news(self, until: float) -> None:
        """Right after the start peers are only being asked for."""
        loop = asyncio.get_running_loop()
        if self.age_s(loop.time()) is None:
            while self.age_s(loop.time()) is None and loop.time() < until:  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)
            await asyncio.sleep(POLL_S)  # What has just come is shown a moment later.

    # ------------------------------------------------------------ metrics

    def _missing(self, found: list[Found]) -> str:
        """Of those that serve, who could not be read."""
        told = []
        for peer, kind, samples in found:
            if kind is Kind.READY and isinstance(samples, str):
                self.scrapes_failed[peer.role] += 1
                told.append(f"{peer.name} ({samples})")
        if not told:
            return ""
        more = f" and {len(told) - TOLD_MAX} more" if len(told) > TOLD_MAX else ""
        return f"no metrics of {', '.join(told[:TOLD_MAX])}{more}"

    async def _scrape_all(self, until: float) -> list[Found]:
        """Whoever serves, and whoever leaves and still counts."""
        peers = [known for known in self._peers.values() if known[1] is not Kind.JOINED]
        # New connections: what is idle between two looks servers close, some of them just then.
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=None, trust_env=False, limits=limits) as client:
            said = await asyncio.gather(*(self._scrape(client, peer, until) for peer, _ in peers))
        return [(peer, kind, samples) for (peer, kind), samples in zip(peers, said, strict=True)]

    async def _scrape(self, client: httpx.AsyncClient, peer: Peer, until: float) -> Samples | str:
        bounds, roles, reason = self.bounds, self._roles, "there was no time"
        needed = OF_ROUTERS if peer.role == roles.router else OF_WORKERS
        url = f"http://{urlsplit(peer.address).netloc}/metrics"
        for _ in range(bounds.tries):
            try:
                async with (
                    asyncio.timeout_at(until),
                    self._at_once,
                    asyncio.timeout(bounds.scrape_s),
                ):
                    samples = read_samples(await _get(client, url, bounds.bytes_max))
            except TimeoutError:
                reason = "no answer in time"
            except (httpx.HTTPError, ValueError) as error:
                reason = f"{type(error).__name__}: {error}".rstrip(": ")
            else:
                if lacks := sorted(needed - samples.keys()):
                    return f"it has no {lacks[0]}: another version?"
                if peer.uid in self._peers and peer.role != roles.prefill:
                    self._sums.count(peer.uid, samples)
                return samples
        return reason

    # ------------------------------------------------------------ replicas

    async def _wanted(self, until: float) -> Size | str:
        sizes = []
        for role in (self._roles.prefill, self._roles.decode):
            try:
                async with asyncio.timeout_at(until):
                    sizes.append((await self._scales.read(role)).wanted)
            except TimeoutError:
                return f"no scale of {role}: no answer in time"
            except ScaleFailed as error:
                self.scales_failed[error.failure] += 1
                return f"no scale of {error}"
        return Size(*sizes)


async def _get(client: httpx.AsyncClient, url: str, bytes_max: int) -> str:
    """Raises ValueError for an answer that is none, and httpx.HTTPError."""
    async with client.stream("GET", url) as response:
        if response.status_code != 200:
            raise ValueError(f"HTTP {response.status_code}")
        body = await beginning(response, bytes_max + 1)
        if len(body) > bytes_max:
            raise ValueError(f"more than {bytes_max} bytes")
        return body.decode()


def read_samples(text: str) -> Samples:
    """Those that sizing knows, each summed over its labels. Raises ValueError."""
    lines = [line for line in text.splitlines() if _NAME.split(line, maxsplit=1)[0] in READ]
    samples: Samples = {}
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            if not isfinite(sample.value):
                raise ValueError(f"{sample.name} is {sample.value}")
            samples[sample.name] = samples.get(sample.name, 0.0) + sample.value
    return samples
