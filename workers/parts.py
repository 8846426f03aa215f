"""A batch as frames that the router takes: none is larger than both sides have agreed on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from workers.api import Batch, Delta, Finish, encode

if TYPE_CHECKING:
    from collections.abc import Iterator


def parts(batch: Batch, bytes_max: int) -> Iterator[bytes]:
    """The batch's frames, in order: one where that fits, else its deltas in several.

    What changed in the cache goes with the first, whose number it has. A single delta that does not
    fit (logprobs, for all that is known) can't be told: its request is failed, and the reason names
    the setting.
    """
    frame = encode(batch)
    if len(frame) <= bytes_max:
        yield frame
        return
    deltas = batch.deltas
    if batch.kv and deltas:
        yield from parts(msgspec.structs.replace(batch, deltas=[]), bytes_max)
        rest = msgspec.structs.replace(batch, kv=[], kv_seq=batch.kv_seq + len(batch.kv))
        yield from parts(rest, bytes_max)
    elif len(deltas) > 1:
        half = len(deltas) // 2
        for some in (deltas[:half], deltas[half:]):
            yield from parts(msgspec.structs.replace(batch, deltas=some), bytes_max)
    elif deltas:
        yield encode(msgspec.structs.replace(batch, deltas=[_too_large(deltas[0], bytes_max)]))
    else:  # Changes that the router can't be told: it notices the gap, and asks for all.
        yield encode(msgspec.structs.replace(batch, kv=[]))


def _too_large(delta: Delta, bytes_max: int) -> Delta:
    size = len(delta.extras or b"")
    reason = (
        f"what comes with its tokens, such as logprobs, has {size} bytes: "
        f"more than --message-bytes-max {bytes_max}"
    )
    return Delta(delta.request_id, [], Finish.INVALID, error=reason)
