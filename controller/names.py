"""Peers by DNS: the addresses of headless services, where the API may not be asked."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from typing import TYPE_CHECKING, Final

from controller.core.names import Lookups

if TYPE_CHECKING:
    from collections.abc import Mapping

    from controller.sources import Observe

log = logging.getLogger(__name__)

LOOKUP_S: Final = 5.0
"""Between two rounds; CoreDNS keeps an answer for that long, too."""
ANSWER_S: Final = 10.0


class Names:
    """One name a role. DNS says who exists; who is ready, and who leaves, it does not."""

    def __init__(
        self, names: Mapping[str, str], ports: Mapping[str, int], every_s: float = LOOKUP_S
    ) -> None:
        """`names` and `ports` by role."""
        self.heard_at: float | None = None
        self._names = names
        self._every_s = every_s
        self._lookups = Lookups(ports)
        self._failing = False

    async def run(self, observe: Observe) -> None:
        """Until cancelled."""
        now = asyncio.get_running_loop().time
        while True:
            found = await asyncio.gather(*(self._look_up(n) for n in self._names.values()))
            for role, addresses in zip(self._names, found, strict=True):
                if addresses is not None:
                    self._lookups.found(role, addresses)
            if None not in found:
                self.heard_at = now()
            if any(addresses is not None for addresses in found):
                observe(self._lookups.sightings())
            await asyncio.sleep(self._every_s * random.uniform(0.8, 1.2))

    async def _look_up(self, name: str) -> list[str] | None:
        """None where there was no answer; a name without addresses, or unknown, is an answer."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(ANSWER_S):
                found = await loop.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        except (OSError, TimeoutError) as error:
            code = error.errno if isinstance(error, socket.gaierror) else None
            if code in (socket.EAI_NONAME, socket.EAI_NODATA):
                return []
            if not self._failing:
                log.warning("no answer from DNS", extra={"of": name, "reason": str(error)})
            self._failing = True
            return None
        self._failing = False
        return [str(address[4][0]) for address in found]
