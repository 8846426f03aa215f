"""Where peers are learnt from: what every source has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from controller.core.peers import Sighting

Observe = Callable[[Iterable[Sighting]], None]
"""Told all peers that are there now, each time that this may have changed."""


class Source(Protocol):
    """Kubernetes' API, DNS or a file."""

    @property
    def heard_at(self) -> float | None:
        """When what it said was last known to be so, on the event loop's clock; None: never."""

    async def run(self, observe: Observe) -> None:
        """Until cancelled. It raises nothing: a source that fails says nothing new."""
