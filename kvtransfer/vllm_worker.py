"""The connector's half in vLLM's worker: the KV memory, its checksums, and the pulls into it."""

from __future__ import annotations

import hashlib
import json
import logging
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from kvtransfer import checksums, huge_pages
from kvtransfer.orders import Mine, Order
from kvtransfer.protocol import Layout, Region
from kvtransfer.receiver import Receiver, Timeouts
from kvtransfer.refusal import Unserved
from kvtransfer.transports.api import Memory, Segment
from kvtransfer.transports.choose import PREFERRED, available
from kvtransfer.vllm_records import HandoffStats, StepPlan, StepReport, WorkerFacts, account

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

    from kvtransfer.transports.api import Offer

log = logging.getLogger(__name__)

IDLE_WAIT_S = 0.01
"""How long a step without work waits for a pull: as long may a new request wait for its step."""


class WorkerHalf:
    """Lives in each process that holds a part of the KV cache."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        extra = vllm_config.kv_transfer_config.get_from_extra_config
        self._config = vllm_config
        self._timeouts = Timeouts(
            answer_s=float(extra("answer_timeout_s", 5.0)),
            read_s=float(extra("read_timeout_s", 30.0)),
        )
        self._names: list[str] = [n for n in extra("transports", "").split(",") if n]
        self._host: str = extra("host", "127.0.0.1")
        self._mode = checksums.Mode(extra("checksums", "sampled"))
        self.facts: WorkerFacts | None = None
        self._memory: Memory | None = None
        self._receiver: Receiver | None = None
        self._offers: list[Offer] = []
        self._plan = StepPlan()
        self._orders: dict[str, Order] = {}
        self._cancelled: set[str] = set()
        self._sent: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._first_tokens: dict[str, int] = {}
        self._pulls: list[dict[str, Any]] = []

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Offer the engine's KV memory: tensors of (blocks, …), one a layer.

        Raises Unserved when no transport can serve it.
        """
        tensors = list(kv_caches.values())
        self._memory = memory = Memory(
            tuple(_segment(t) for t in tensors), _device(tensors[0])
        )  # fmt: skip
        log.info("KV memory", extra={"huge_bytes": huge_pages.advise(memory)})
        transports, missing = available(memory, self._names or PREFERRED, host=self._host)
        if not transports:
            raise Unserved(f"no KV transport can be used here: {missing}; see --kv-transports")
        for name, reason in missing.items():
            log.warning("KV transport left out", extra={"transport": name, "reason": reason})
        blocks = memory.segments[0].blocks
        regions = []
        for transport in transports:
            offer = transport.offer(memory)
            self._offers.append(offer)
            regions.append(Region(transport.name, offer.description, blocks))
        layout = _layout(kv_caches, self._config)
        block_bytes = sum(s.block_bytes for s in memory.segments)
        self.facts = WorkerFacts(layout, regions, block_bytes)
        self._receiver = Receiver(Mine(memory, layout, self._rank, transports), self._timeouts)

    # ------------------------------------------------------------ a step

    def begin(self, plan: StepPlan) -> None:
        """Before the step: start what the scheduler half ordered; nothing here waits."""
        assert self._receiver is not None
        self._plan = plan
        self._sent.update(plan.sent)
        for order in plan.pulls:
            self._orders[order.request_id] = order
            self._receiver.start(order)
        for request_id in plan.cancelled:
            self._cancelled.add(request_id)
            self._receiver.cancel(request_id)

    def results(self) -> KVConnectorTransferResults:
        """After the step: requests whose blocks were sent, or have arrived, or never will."""
        assert self._receiver is not None
        results = KVConnectorTransferResults(finished_sending=self._sent)
        self._sent = set()
        # With nothing to compute, waiting here is what keeps the engine from spinning.
        wait_s = IDLE_WAIT_S if self._plan.idle and self._orders else 0.0
        for pulled in self._receiver.ended(wait_s):
            order = self._orders.pop(pulled.request_id)
            results.finished_recving.add(pulled.request_id)
            if pulled.error is not None:
                results.failed_recving.add(pulled.request_id)
                if pulled.request_id not in self._cancelled:  # Those are freed, not recomputed.
                    own = order.local_blocks[order.cached_tokens // self._block_tokens :]
                    self._failed_blocks.update(own)
            self._cancelled.discard(pulled.request_id)
            if pulled.first_token is not None:
                self._first_tokens[pulled.request_id] = pulled.first_token
            tokens = len(order.token_ids) - order.cached_tokens
            self._pulls.append(account(pulled, tokens))
        return results

    def report(self) -> StepReport | None:
        """After the step: what it computed, with checksums, and first tokens that have come."""
        computed, tokens = self._plan.computed, self._first_tokens
        self._plan = StepPlan()
        if not computed and not tokens:
            return None
        self._first_tokens = {}
        assert self._memory is not None
        if self._memory.device != "cpu":
            _await_device(self._memory.device)
        if self._mode is not checksums.Mode.OFF:
            for done in computed:
                seed = done.handle.encode()
                done.sums[self._rank] = checksums.sums(
                    self._memory, done.block_ids, self._mode, seed, first=done.first
                )
        return StepReport(computed, tokens)

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
        for offer in self._offers:
            offer.close()

    @property
    def _rank(self) -> int:
        parallel = self._config.parallel_config
        return int(parallel.rank % parallel.tensor_parallel_size)

    @property
    def _block_tokens(self) -> int:
        return int(self._config.cache_config.block_size)


def _await_device(device: str) -> None:
    """Kernels may still run when a step's call returns; what is announced must be there."""
    import torch

    torch.cuda.current_stream(device).synchronize()


def _device(tensor: torch.Tensor) -> str:
    return "cpu" if tensor.device.type == "cpu" else str(tensor.device)


def _segment(tensor: torch.Tensor) -> Segment:
    if not tensor[0].is_contiguous():
        raise Unserved(
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


def _layout(kv_caches: dict[str, torch.Tensor], config: VllmConfig) -> Layout:
    """How this memory is cut. What is not known to be apart is taken to be one piece."""
    block_tokens = int(config.cache_config.block_size)
    ranks = config.parallel_config.tensor_parallel_size
    heads = config.model_config.get_total_num_kv_heads()
    held = max(1, heads // ranks)
    first = next(iter(kv_caches.values()))
    shape = tuple(first.shape[1:])
    by_head = first.ndim == 4 and shape[0] == held
    backends = [str(first.device.type), list(shape[1:]) if by_head else list(shape)]
    content = json.dumps(["tandem kv 2", sorted(kv_caches), backends])
    return Layout(
        content=hashlib.sha256(content.encode()).hexdigest()[:32],
        dtype=str(first.dtype),
        layers=len(kv_caches),
        kv_heads=heads,
        head_token_bytes=first[0].numel() * first.element_size() // (held * block_tokens),
        block_tokens=block_tokens,
        ranks=ranks,
        by_head=by_head,
        # The CPU's attention kernels pack a block's tokens in an order of their own.
        by_token=False,
    )
