"""The keys of a worker's end of the token channel."""

from __future__ import annotations

from dataclasses import dataclass, field

# For routers, which may not import them from there.
from kvtransfer.keys import KeyFileBad as KeyFileBad  # noqa: PLC0414
from kvtransfer.keys import read_key_file as read_key_file  # noqa: PLC0414
from kvtransfer.keys import read_public as read_public  # noqa: PLC0414
from kvtransfer.keys import read_secret as read_secret  # noqa: PLC0414


@dataclass(frozen=True, slots=True)
class WorkerKeys:
    """The workers' secret key and the public keys of the routers that may connect, all Z85."""

    secret: bytes = field(repr=False)
    routers: frozenset[bytes]
