"""What the connector's two halves tell each other and the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats


@dataclass
class WorkerFacts(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """The KV memory, once it is registered."""

    kv_digest: str
    transport: str
    description: bytes
    block_bytes: int
    """One block over all layers."""


@dataclass
class PullOrder:
    """No blocks: the ticket is released unread."""

    request_id: str
    ticket: bytes
    local_block_ids: list[int]
    remote_block_ids: list[int]
    tokens: int


@dataclass
class StepPlan(KVConnectorMetadata):  # type: ignore[misc]
    """Scheduler to worker, at each step."""

    pulls: list[PullOrder] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)
    """Requests whose lease has ended: their blocks may go."""


class HandoffStats(KVConnectorStats):  # type: ignore[misc]
    """`pulls`: [request id, tokens, bytes, seconds, error or None] each; the rest are facts."""

    data: dict[str, Any]

    def reset(self) -> None:
        self.data.clear()

    def is_empty(self) -> bool:
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        pulls = [*self.data.get("pulls", []), *other.data.get("pulls", [])]
        self.data = {**self.data, **other.data, "pulls": pulls}
        return self

    def reduce(self) -> dict[str, Any]:
        pulls = self.data.get("pulls", [])
        return {
            "pulls": len(pulls),
            "pulls_failed": sum(p[4] is not None for p in pulls),
            "bytes": sum(p[2] for p in pulls),
        }
