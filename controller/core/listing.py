"""A file that lists peers, one a line."""

from __future__ import annotations

import re
from typing import Final

from controller.core.peers import Peer, Sighting

_ADDRESS: Final = re.compile(r"tcp://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")
_FORM: Final = "want `tcp://host:port [role] [draining]`"


class ListingBad(ValueError):
    """The text is no such list: nothing of it counts."""


def read_listing(text: str) -> list[Sighting]:
    """The peers of a text. Empty lines and what follows `#` are nothing. Raises `ListingBad`."""
    found: dict[str, Sighting] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        address, *rest = words
        draining = rest[-1:] == ["draining"]
        roles = rest[: len(rest) - draining]
        matched = _ADDRESS.fullmatch(address)
        if len(roles) > 1 or not matched or not 0 < int(matched[1]) <= 65535:
            raise ListingBad(f"line {number}: {_FORM}")
        if address in found:
            raise ListingBad(f"line {number}: {address} is there twice")
        peer = Peer(address, address, roles[0] if roles else "", address)
        found[address] = Sighting(peer, terminating=draining)
    return list(found.values())
