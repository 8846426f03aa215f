"""Peers by a file, which whoever starts workers writes."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from controller.core.listing import ListingBad, read_listing

if TYPE_CHECKING:
    from pathlib import Path

    from controller.sources import Observe

log = logging.getLogger(__name__)

LOOK_S: Final = 0.5
SIZE_MAX: Final = 1 << 20
"""Bytes; some ten thousand peers."""


class FileOfPeers:
    """A file of `core/listing.py`'s form, read twice a second.

    Its content counts once it was the same twice in a row: a writer may be in the middle of it.
    """

    def __init__(self, path: Path, every_s: float = LOOK_S) -> None:
        self.heard_at: float | None = None
        self._path = path
        self._every_s = every_s
        self._told: str | None = None

    async def run(self, observe: Observe) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        before = taken = None
        while True:
            # In a thread: the file may be on a network's disk that hangs.
            text = await asyncio.to_thread(self._read)
            if text is not None and text == before:
                if text == taken:
                    self.heard_at = loop.time()
                elif self._take(text, observe):
                    taken, self.heard_at = text, loop.time()
            before = text
            await asyncio.sleep(self._every_s)

    def _read(self) -> str | None:
        try:
            with self._path.open("rb") as file:
                content = file.read(SIZE_MAX + 1)
            if len(content) > SIZE_MAX:
                raise ListingBad(f"more than {SIZE_MAX} bytes")
            return content.decode()
        except (OSError, ValueError) as error:
            self._tell(str(error))
            return None

    def _take(self, text: str, observe: Observe) -> bool:
        try:
            found = read_listing(text)
        except ListingBad as error:
            self._tell(str(error))
            return False
        self._told = None
        observe(found)
        return True

    def _tell(self, reason: str) -> None:
        if reason != self._told:
            log.warning("the file of peers is of no use", extra={"reason": reason})
        self._told = reason
