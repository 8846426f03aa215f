"""The stream of peers: a source's sightings, debounced, as changes."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from controller.core.peers import DEBOUNCE_S, Kind, Membership

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from controller.core.peers import Change, Sighting
    from controller.sources import Source

log = logging.getLogger(__name__)


class Discovery:
    """Who is there. While its source is away, the last that it said holds."""

    def __init__(
        self, source: Source, on_change: Callable[[Change], None], debounce_s: float = DEBOUNCE_S
    ) -> None:
        self.source = source
        self._membership = Membership(debounce_s)
        self._on_change = on_change
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._membership)

    def count(self, state: Kind) -> int:
        """Peers in a state now."""
        return self._membership.count(state)

    def age_s(self, now: float) -> float | None:
        """How old, at most, what is known is; None while nothing was ever known."""
        heard_at = self.source.heard_at
        return None if heard_at is None else max(0.0, now - heard_at)

    async def run(self) -> None:
        """Until cancelled."""
        try:
            await self.source.run(self._observe)
        finally:
            if self._timer:
                self._timer.cancel()

    def _observe(self, seen: Iterable[Sighting]) -> None:
        self._tell(self._membership.observe(seen, asyncio.get_running_loop().time()))

    def _tick(self) -> None:
        self._tell(self._membership.tick(asyncio.get_running_loop().time()))

    def _tell(self, changes: Iterable[Change]) -> None:
        for change in changes:
            peer = change.peer
            log.info(
                "peer changed",
                extra={"kind": change.kind, "peer": peer.name, "address": peer.address},
            )
            self._on_change(change)
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if (due := self._membership.due_at) is not None:
            self._timer = asyncio.get_running_loop().call_at(due, self._tick)
