"""What DNS answers are worth: addresses come at once and go slowly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from controller.core.peers import Peer, Sighting, tcp_address

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MISSES_MAX: Final = 5
"""An answer may lack an address by accident (truncation, a replica that lags). One that so many in
a row lack is gone; meanwhile the data plane knows by itself who answers."""


class Lookups:
    """The addresses of each role's name, as last seen."""

    def __init__(self, ports: Mapping[str, int]) -> None:
        self._ports = ports
        self._misses: dict[tuple[str, str], int] = {}
        """In a row, by role and address."""

    def found(self, role: str, addresses: Sequence[str]) -> None:
        """One answer. A round without an answer says nothing, and is not told."""
        # With both families a pod would be two peers.
        addresses = [a for a in addresses if ":" not in a] or addresses
        for key in [key for key in self._misses if key[0] == role]:
            self._misses[key] += 1
            if self._misses[key] >= MISSES_MAX:
                del self._misses[key]
        for address in addresses:
            self._misses[role, address] = 0

    def sightings(self) -> list[Sighting]:
        """All peers: their names are their addresses, for DNS tells no others."""
        return [
            Sighting(Peer(f"{role}/{ip}", ip, role, tcp_address(ip, self._ports[role])))
            for role, ip in sorted(self._misses)
        ]
