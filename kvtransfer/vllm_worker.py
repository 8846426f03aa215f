"""The connector's half in vLLM's worker: the KV memory, and the pulls into it."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from kvtransfer.core.manifest import decode_ticket
from kvtransfer.receiver import Pulled, Receiver, Timeouts
from kvtransfer.transports.api import Memory, Segment
from kvtransfer.transports.ucx import NAME, UcxOffer, UcxTransport
from kvtransfer.vllm_records import HandoffStats, PullOrder, StepPlan, WorkerFacts

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig


class WorkerHalf:
    """Lives in the process that holds the KV cache."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        extra = vllm_config.kv_transfer_config.get_from_extra_config
        self._timeouts = Timeouts(
            answer_s=float(extra("connect_timeout_s", 5.0)),
            read_s=float(extra("read_timeout_s", 30.0)),
        )
        self._block_tokens: int = vllm_config.cache_config.block_size
        self.facts: WorkerFacts | None = None
        self._receiver: Receiver | None = None
        self._offer: UcxOffer | None = None
        self._orders: dict[str, PullOrder] = {}
        self._sent: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._pulls: list[list[Any]] = []

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Offer the engine's KV memory: tensors of (blocks, …), one a layer."""
        segments = tuple(_segment(tensor) for tensor in kv_caches.values())
        memory = Memory(segments)
        self._offer = UcxTransport().offer(memory)
        self.facts = WorkerFacts(
            kv_digest=_digest(kv_caches, self._block_tokens),
            transport=NAME,
            description=self._offer.description,
            block_bytes=sum(s.block_bytes for s in segments),
        )
        self._receiver = Receiver(memory, self.facts.kv_digest, self._timeouts)

    def begin(self, plan: StepPlan) -> None:
        """Start what the scheduler half ordered; nothing here waits."""
        assert self._receiver is not None
        self._sent.update(plan.sent)
        for order in plan.pulls:
            if order.local_block_ids:
                self._orders[order.request_id] = order
            self._receiver.start(
                order.request_id,
                decode_ticket(order.ticket),
                order.local_block_ids,
                order.remote_block_ids,
            )

    def results(self) -> KVConnectorTransferResults:
        """Requests whose blocks were sent, or have arrived, or never will."""
        assert self._receiver is not None
        results = KVConnectorTransferResults(finished_sending=self._sent)
        self._sent = set()
        for pulled in self._receiver.poll():
            order = self._orders.pop(pulled.request_id, None)
            if order is None:
                continue  # Released unread.
            results.finished_recving.add(pulled.request_id)
            if pulled.error is not None:
                results.failed_recving.add(pulled.request_id)
                self._failed_blocks.update(order.local_block_ids)
            self._pulls.append(self._account(order, pulled))
        return results

    def take_failed_blocks(self) -> set[int]:
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_stats(self) -> HandoffStats | None:
        if not self._pulls:
            return None
        pulls, self._pulls = self._pulls, []
        return HandoffStats({"pulls": pulls})

    def close(self) -> None:
        if self._receiver is not None:
            self._receiver.close()
        if self._offer is not None:
            self._offer.close()

    def _account(self, order: PullOrder, pulled: Pulled) -> list[Any]:
        assert self.facts is not None
        if pulled.error is not None:
            return [order.request_id, 0, 0, pulled.seconds, pulled.error]
        moved = pulled.blocks * self.facts.block_bytes
        return [order.request_id, order.tokens, moved, pulled.seconds, None]


def _segment(tensor: torch.Tensor) -> Segment:
    if not tensor[0].is_contiguous():
        raise ValueError(
            f"a KV block of shape {tuple(tensor.shape[1:])} is not contiguous in memory; "
            "this attention backend's layout can't be handed off"
        )
    size = tensor.element_size()
    return Segment(
        base=tensor.data_ptr(),
        stride=tensor.stride(0) * size,
        block_bytes=tensor[0].numel() * size,
        blocks=tensor.shape[0],
    )


def _digest(kv_caches: dict[str, torch.Tensor], block_tokens: int) -> str:
    """Of all that must be equal for a block's bytes to mean the same: not of how many there are."""
    layers = [[name, str(t.dtype), list(t.shape[1:])] for name, t in kv_caches.items()]
    content = json.dumps(["tandem kv 1", block_tokens, layers])
    return hashlib.sha256(content.encode()).hexdigest()[:32]
