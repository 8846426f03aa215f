"""Checks of a worker's messages: only numbers that a worker can have, about what it was asked.

Checked once, before anything acts upon a message, so that a worker which lies or is broken changes
nothing: no state, no memory, no client's stream. Bounds are wide: what they refuse is no worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Final

from workers.api import KvCleared, KvRemoved, KvStored

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from workers.api import Batch, Delta, KvEvent, Load, WorkerHello

COUNT_MAX: Final = 1 << 40
"""The largest believable count of tokens, blocks, a step's work or leases at one moment."""
TOKEN_MAX: Final = (1 << 31) - 1
"""A token's id."""
BLOCK_TOKENS_MAX: Final = 1 << 20
BLOCK_BYTES_MAX: Final = 1 << 40
BLOCKS_MAX: Final = 1 << 32
LENGTH_MAX: Final = 1 << 31
SECONDS_MAX: Final = 1e6
NAME_MAX: Final = 512
TEXT_MAX: Final = 16_384
TRANSPORTS_MAX: Final = 32
TICKET_MAX: Final = 65_536
RANKS_MAX: Final = 65_536
VIEW_FACTOR: Final = 8
"""A cache may show more blocks than its worker has room for: several groups of layers cache the
same tokens, and a snapshot also names parents that have gone."""
VIEW_SPARE: Final = 1024
ASIDE_S: Final = 60.0
"""A worker that was not believed is asked nothing for so long, unless it restarts."""
ASIDE_MAX: Final = 4096


def hello_doubt(hello: WorkerHello) -> str | None:
    """Why this is no worker's hello; None when it may be one."""
    names = (hello.worker_id, hello.epoch, hello.engine, hello.engine_version, hello.kv_digest)
    texts = (hello.model, hello.model_digest, hello.tokenizer_digest, hello.constraints)
    if not hello.worker_id or not hello.epoch:
        return "worker_id and epoch are empty"
    if max(map(len, (*names, hello.handoff_endpoint, *hello.transports))) > NAME_MAX:
        return f"a name has more than {NAME_MAX} characters"
    if max(map(len, texts)) > TEXT_MAX or len(hello.transports) > TRANSPORTS_MAX:
        return f"a text has more than {TEXT_MAX} characters, or there are too many transports"
    for name, least, most in (
        ("block_tokens", 1, BLOCK_TOKENS_MAX),
        ("block_bytes", 0, BLOCK_BYTES_MAX),
        ("blocks_total", 0, BLOCKS_MAX),
        ("max_model_len", 1, LENGTH_MAX),
        ("step_tokens", 0, LENGTH_MAX),
        ("dp_rank", 0, RANKS_MAX),
        ("dp_size", 1, RANKS_MAX),
        ("lease_s", 0, SECONDS_MAX),
    ):
        value = getattr(hello, name)
        if not least <= value <= most:  # NaN is in no range.
            return f"{name} is {value}, not {least} to {most:g}"
    return None


def batch_doubt(batch: Batch, tokens_left: Mapping[str, int]) -> str | None:
    """Why this is no step's batch. `tokens_left`: of requests in it, what may still come."""
    if reason := _load_doubt(batch.load):
        return reason
    if not 0 <= batch.heard <= COUNT_MAX or not batch.kv_seq >= 0:
        return f"heard is {batch.heard}, kv_seq {batch.kv_seq}"
    said: dict[str, int] = {}
    for delta in batch.deltas:
        if reason := _delta_doubt(delta):
            return f"of request {delta.request_id[:NAME_MAX]}: {reason}"
        left = tokens_left.get(delta.request_id)
        if left is not None:
            total = said[delta.request_id] = said.get(delta.request_id, 0) + len(delta.token_ids)
            if total > left:
                return f"of request {delta.request_id}: {total} tokens where {left} may come"
    return None


def _load_doubt(load: Load) -> str | None:
    for name in ("running", "waiting", "prefill_tokens_queued", "leases_open", "blocks_total"):
        if not 0 <= getattr(load, name) <= COUNT_MAX:
            return f"load.{name} is {getattr(load, name)}"
    if not 0 <= load.blocks_free <= load.blocks_total:
        return f"load.blocks_free is {load.blocks_free} of {load.blocks_total}"
    if load.steps < 0 or load.leases_expired < 0:
        return f"load.steps is {load.steps}, load.leases_expired {load.leases_expired}"
    step = load.step
    if step is None:
        return None
    if not 0 <= step.seconds <= SECONDS_MAX:
        return f"load.step.seconds is {step.seconds}"
    counts = step.prefill_tokens, step.prefill_pairs, step.decodes, step.context_tokens
    if min(counts) < 0 or max(counts) > COUNT_MAX:
        return f"load.step counts {counts}"
    return None


def _delta_doubt(delta: Delta) -> str | None:
    ids = delta.token_ids
    if ids and (min(ids) < 0 or max(ids) > TOKEN_MAX):
        return f"token ids from {min(ids)} to {max(ids)}"
    cached = delta.cached_tokens
    if cached is not None and not 0 <= cached <= LENGTH_MAX:
        return f"cached_tokens is {cached}"
    if delta.kv_transport or delta.kv_tokens or delta.kv_bytes or delta.kv_s or delta.kv_hidden_s:
        seconds = delta.kv_s, delta.kv_hidden_s
        if not (all(map(isfinite, seconds)) and min(seconds) >= 0 and max(seconds) <= SECONDS_MAX):
            return f"its pull took {seconds} seconds"
        if not (0 <= delta.kv_tokens <= LENGTH_MAX and 0 <= delta.kv_bytes <= BLOCK_BYTES_MAX):
            return f"its pull brought {delta.kv_tokens} tokens, {delta.kv_bytes} bytes"
        if len(delta.kv_transport) > NAME_MAX:
            return "its transport's name is too long"
    texts = delta.error, delta.kv_failed, delta.stop_reason
    if any(isinstance(text, str) and len(text) > TEXT_MAX for text in texts):
        return f"a text has more than {TEXT_MAX} characters"
    if delta.ticket is not None and len(delta.ticket) > TICKET_MAX:
        return f"a ticket of {len(delta.ticket)} bytes"
    return None


def events_doubt(events: Sequence[KvEvent]) -> str | None:
    """Why these are no changes of a prefix cache: names too long, items that overlap everything."""
    for event in events:
        if not isinstance(event, KvStored):
            if isinstance(event, KvRemoved) and event.ids and min(event.ids) < 0:
                return f"a block is numbered {min(event.ids)}"
            continue
        if len(event.salt or "") > TEXT_MAX or len(event.lora or "") > TEXT_MAX:
            return f"a salt or an adapter has more than {TEXT_MAX} characters"
        tokens = len(event.token_ids)
        if any(
            item.length < 1 or item.offset >= tokens or len(item.identifier) > TEXT_MAX
            for item in event.items
        ):
            return "an item is none of these blocks'"
        # Each block's name takes every item on it: with many long ones it is their product.
        covered = sum(min(item.length, tokens) for item in event.items)
        if covered > VIEW_FACTOR * tokens + VIEW_SPARE:
            return f"items cover {covered} tokens of {tokens}"
    return None


def view_doubt(held: int, events: Sequence[KvEvent], blocks_total: int) -> str | None:
    """Why a worker of so many blocks, known to have cached `held`, can't tell of these changes."""
    most = VIEW_FACTOR * blocks_total + VIEW_SPARE
    for event in events:
        match event:
            case KvStored(ids):
                held += len(ids)
            case KvRemoved(ids):
                held = max(0, held - len(ids))
            case KvCleared():
                held = 0
        if held > most:
            return f"{held} blocks cached, of {blocks_total} that it has"
    return None


@dataclass(frozen=True, slots=True)
class _Aside:
    epoch: str
    reason: str
    until: float


class Doubts:
    """Workers that were not believed, until their time is over or they have restarted."""

    def __init__(self) -> None:
        self._aside: dict[str, _Aside] = {}
        """By worker, the first first."""
        self.total = 0

    def put_aside(self, hello: WorkerHello, reason: str, now: float) -> None:
        self.total += 1
        self._aside.pop(hello.worker_id, None)
        self._aside[hello.worker_id] = _Aside(hello.epoch, reason, now + ASIDE_S)
        if len(self._aside) > ASIDE_MAX:
            del self._aside[next(iter(self._aside))]

    def about(self, hello: WorkerHello, now: float) -> str | None:
        """Why it is asked nothing yet."""
        aside = self._aside.get(hello.worker_id)
        if aside is None or aside.epoch != hello.epoch or now >= aside.until:
            self._aside.pop(hello.worker_id, None)
            return None
        return aside.reason
