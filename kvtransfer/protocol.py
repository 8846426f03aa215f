"""What crosses the wire in a KV handoff: the ticket, and the sender's control channel.

The prefill side (*sender*) keeps a finished prompt's blocks under a lease and describes them in a
`Ticket`. The decode side (*receiver*) checks the ticket against its own request, asks the sender
to hold the lease, reads the blocks one-sidedly into blocks of its own, and releases. The answer
to its `Release` proves that the lease outlived the read: only then are the blocks good.

Control frames are msgpack, one frame a message, over a ZeroMQ REQ/REP-like DEALER to ROUTER pair
with a sequence number, so that late or repeated answers are recognized. Version 1.
"""

from __future__ import annotations

import msgspec

VERSION = 1

MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError)
"""What decoding a peer's bytes may raise: msgspec lets bad UTF-8 through as Python's own error."""


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """Whose KV this is and where it is. Single use; worthless once its lease has ended.

    `decode_ticket` refuses another `version` before it looks at anything else.
    """

    version: int
    epoch: str
    """Of the sending process; a restart at the same address has another."""
    handle: str
    """Names the lease at the sender; unique within the epoch."""
    endpoints: list[str]
    """Control channel of each tensor-parallel rank, `tcp://host:port`, by rank."""
    kv_digest: str
    """The sender's KV layout; must equal the receiver's."""
    model_digest: str
    num_tokens: int
    """Prompt tokens covered."""
    block_ids: list[int]
    """The sender's blocks, in prompt order."""
    chain: bytes
    """Tail of the prompt's chain of block hashes (`kvtransfer.core.manifest`)."""


class Open(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Receiver to sender: who are you, and where is your memory?"""

    seq: int
    version: int
    kv_digest: str


class Opened(msgspec.Struct, frozen=True, array_like=True, tag=True):
    seq: int
    epoch: str
    kv_digest: str
    transport: str
    region: bytes
    """The transport's own description of the sender's memory."""


class Renew(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Hold this lease: I am about to read, or still reading."""

    seq: int
    epoch: str
    handle: str


class Release(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """I am done with this handle, or never wanted it."""

    seq: int
    epoch: str
    handle: str


class Held(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """To `Renew` and `Release`: the lease was alive until now."""

    seq: int
    handle: str
    remaining_s: float


class Gone(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """To `Renew` and `Release`: no such lease; whatever was read may be another's."""

    seq: int
    handle: str
    reason: str


class Rejected(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """To anything: the two can't speak; `reason` names both sides."""

    seq: int
    reason: str


ToSender = Open | Renew | Release
ToReceiver = Opened | Held | Gone | Rejected
