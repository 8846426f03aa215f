"""Who is there, and who may be given work: sightings in, changes out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from controller.core.slices import Endpoint

DEBOUNCE_S: Final = 1.0
"""How long a ready peer may seem out of service or absent and yet count as ready."""
_ONE_OF_SEVERAL: Final = re.compile(r"-[0-9]+-([0-9]+)$")
"""The name of a pod in a leader-worker instance; the leader's number is 0."""


class Kind(StrEnum):
    """What a peer became."""

    JOINED = "joined"
    """It exists. It may not be able to work yet."""
    READY = "ready"
    DRAINING = "draining"
    """No new work: it is leaving, or out of service for a while and then ready again."""
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Peer:
    """One process of the group."""

    uid: str
    """A replacement under the same name has another."""
    name: str
    role: str
    address: str
    """`tcp://host:port`."""


@dataclass(frozen=True, slots=True)
class Change:
    """One element of the stream."""

    kind: Kind
    peer: Peer


@dataclass(frozen=True, slots=True)
class Sighting:
    """A peer as a source sees it now."""

    peer: Peer
    serving: bool = True
    terminating: bool = False


@dataclass(frozen=True, slots=True)
class RoleFacts:
    """What slices do not say about a role."""

    port: int
    leaders_only: bool = False
    """Of pods named `…-<i>-<j>`, only those with `j` = 0 are peers."""


def sightings(endpoints: Iterable[Endpoint], roles: Mapping[str, RoleFacts]) -> list[Sighting]:
    """The peers among the endpoints: known roles only, of leader-worker roles the leaders only."""
    found = []
    for endpoint in endpoints:
        facts = roles.get(endpoint.role)
        if facts is None or (facts.leaders_only and not _leads(endpoint.name)):
            continue
        peer = Peer(
            endpoint.uid, endpoint.name, endpoint.role, tcp_address(endpoint.address, facts.port)
        )
        found.append(Sighting(peer, endpoint.serving, endpoint.terminating))
    return found


def tcp_address(ip: str, port: int) -> str:
    """A token channel's address; an IPv6 address goes in brackets."""
    return f"tcp://[{ip}]:{port}" if ":" in ip else f"tcp://{ip}:{port}"


def _leads(name: str) -> bool:
    found = _ONE_OF_SEVERAL.search(name)
    return found is None or int(found[1]) == 0


@dataclass(slots=True)
class _Known:
    peer: Peer
    state: Kind
    sighting: Sighting | None
    out_since: float | None = None
    """Since when it has been ready by our word and not by its source's."""


class Membership:
    """All peers of one group. A peer becomes ready, leaves or ends at once; doubt is debounced."""

    def __init__(self, debounce_s: float = DEBOUNCE_S) -> None:
        self._debounce_s = debounce_s
        self._known: dict[str, _Known] = {}

    def __len__(self) -> int:
        return len(self._known)

    def count(self, state: Kind) -> int:
        """Peers in a state now."""
        return sum(known.state is state for known in self._known.values())

    @property
    def due_at(self) -> float | None:
        """When `tick` has something to say if nothing is seen before."""
        since = [k.out_since for k in self._known.values() if k.out_since is not None]
        return min(since) + self._debounce_s if since else None

    def observe(self, seen: Iterable[Sighting], now: float) -> list[Change]:
        """These, and no others, are there now. What changed by that, ends first."""
        by_uid = {sighting.peer.uid: sighting for sighting in seen}
        changes = []
        for uid, known in list(self._known.items()):
            sighting = by_uid.get(uid)
            if sighting and sighting.peer != known.peer:
                changes.append(self._end(uid))
            elif sighting is None:
                known.sighting = None
                changes += self._judge(known, now)
        for uid, sighting in by_uid.items():
            if uid not in self._known:
                self._known[uid] = _Known(sighting.peer, Kind.JOINED, sighting)
                changes.append(Change(Kind.JOINED, sighting.peer))
            known = self._known[uid]
            known.sighting = sighting
            changes += self._judge(known, now)
        return changes

    def tick(self, now: float) -> list[Change]:
        """What has been in doubt for long enough by now."""
        doubtful = [k for k in self._known.values() if k.out_since is not None]
        return [change for known in doubtful for change in self._judge(known, now)]

    def _judge(self, known: _Known, now: float) -> list[Change]:
        sighting, ready = known.sighting, known.state is Kind.READY
        if sighting and sighting.terminating:
            known.out_since = None
            return self._become(known, Kind.DRAINING)
        if sighting and sighting.serving:
            known.out_since = None
            return self._become(known, Kind.READY)
        if sighting and not ready:
            return []
        # One that was draining ends when it is absent; a ready one may be moving between slices.
        if ready and known.out_since is None:
            known.out_since = now
        if ready and known.out_since is not None and now < known.out_since + self._debounce_s:
            return []
        known.out_since = None
        return self._become(known, Kind.DRAINING) if sighting else [self._end(known.peer.uid)]

    def _become(self, known: _Known, state: Kind) -> list[Change]:
        if known.state is state:
            return []
        known.state = state
        return [Change(state, known.peer)]

    def _end(self, uid: str) -> Change:
        return Change(Kind.GONE, self._known.pop(uid).peer)
