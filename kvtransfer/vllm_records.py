"""What the connector's two halves tell each other and the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

if TYPE_CHECKING:
    from kvtransfer.orders import Order, Pulled
    from kvtransfer.protocol import Layout, Region


@dataclass
class WorkerFacts(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """One rank's KV memory, once it is registered."""

    layout: Layout
    regions: list[Region]
    block_bytes: int
    """One block of every layer of this rank's."""


@dataclass
class Computed:
    """Columns of a prompt that a step completes, in the prompt's order."""

    handle: str
    generation: int
    first: int
    block_ids: list[list[int]]
    """By column."""
    sums: dict[int, list[int]] = field(default_factory=dict)
    """By rank, one a column or none at all; set by a worker half once its device is done."""


@dataclass
class StepPlan(KVConnectorMetadata):  # type: ignore[misc]
    """Scheduler to worker, at each step."""

    pulls: list[Order] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    """Requests whose pull nobody wants any more."""
    computed: list[Computed] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)
    """Requests whose lease has ended: their blocks may go."""
    idle: bool = False
    """The step computes nothing: it may wait a little for a pull to end."""


@dataclass
class StepReport(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """Worker to scheduler, after each step that has something to tell."""

    computed: list[Computed] = field(default_factory=list)
    """By rank, what is over on its device, each with that rank's checksums."""
    first_tokens: dict[str, int] = field(default_factory=dict)
    """By request: the token that the sender sampled for the client."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, StepReport)
        computed = [*self.computed, *other.computed]
        return StepReport(computed, {**self.first_tokens, **other.first_tokens})


class HandoffStats(KVConnectorStats):  # type: ignore[misc]
    """`pulls`: one `account` each; the rest are facts."""

    data: dict[str, Any]

    def reset(self) -> None:
        self.data.clear()

    def is_empty(self) -> bool:
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        pulls = [*self.data.get("pulls", []), *other.data.get("pulls", [])]
        cache = [*self.data.get("cache", []), *other.data.get("cache", [])]
        self.data = {**self.data, **other.data, "pulls": pulls, "cache": cache}
        return self

    def reduce(self) -> dict[str, Any]:
        pulls = self.data.get("pulls", [])
        return {
            "pulls": len(pulls),
            "pulls_failed": sum(p["error"] is not None for p in pulls),
            "bytes": sum(p["bytes"] for p in pulls),
        }


def account(pulled: Pulled, tokens: int = 0) -> dict[str, Any]:
    """One pull, for the worker's metrics and the router's records. `tokens`: what it brought."""
    failed = pulled.error is not None
    return {
        "request_id": pulled.request_id,
        "error": pulled.error,
        "mismatched": pulled.mismatched,
        "transport": pulled.transport,
        "tokens": 0 if failed else tokens,
        "bytes": 0 if failed else pulled.bytes,
        "seconds": pulled.read_s,
        "hidden_s": pulled.hidden_s,
        "first_token": pulled.first_token,
    }
