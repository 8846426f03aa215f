"""The connector's half in vLLM's worker: the KV memory, its checksums, and the pulls into it."""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from kvtransfer import huge_pages
from kvtransfer.checksums import Checksums, Mode
from kvtransfer.orders import Mine, Order
from kvtransfer.protocol import Region
from kvtransfer.receiver import Receiver, Timeouts
from kvtransfer.refusal import Unserved
from kvtransfer.step_events import StepEvents
from kvtransfer.transports.api import TransferError
from kvtransfer.transports.choose import PREFERRED, available
from kvtransfer.vllm_keys import keys_of
from kvtransfer.vllm_memory import place
from kvtransfer.vllm_records import HandoffStats, StepPlan, StepReport, WorkerFacts, account

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from kvtransfer.checksums import Batch
    from kvtransfer.transports.api import Offer
    from kvtransfer.vllm_records import Computed

log = logging.getLogger(__name__)

IDLE_WAIT_S = 0.01
"""How long a step without work waits for a pull: as long may a new request wait for its step."""


class WorkerHalf:
    """Lives in each process that holds a part of the KV cache."""

    def __init__(self, vllm_config: VllmConfig, cache: KVCacheConfig) -> None:
        extra = vllm_config.kv_transfer_config.get_from_extra_config
        self._config, self._cache = vllm_config, cache
        self._timeouts = Timeouts(
            answer_s=float(extra("answer_timeout_s", 5.0)),
            read_s=float(extra("read_timeout_s", 30.0)),
        )
        self._names: list[str] = [n for n in extra("transports", "").split(",") if n]
        self._host: str = extra("host", "127.0.0.1")
        self._mode = Mode(extra("checksums", "sampled"))
        self._keys = keys_of(extra)
        self.facts: WorkerFacts | None = None
        self._steps: StepEvents[list[Computed]] | None = None
        self._checksums: Checksums | None = None
        self._hashing: deque[tuple[Computed, Batch]] = deque()
        self._receiver: Receiver | None = None
        self._offers: list[Offer] = []
        self._plan = StepPlan()
        self._orders: dict[str, Order] = {}
        self._sent: set[str] = set()
        self._first_tokens: dict[str, int] = {}
        self._pulls: list[dict[str, Any]] = []

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Offer the engine's KV memory: tensors of (kernel blocks, …), one a layer.

        Raises `Unserved` when it can't be handed off, or no transport can serve it.
        """
        placed = place(kv_caches, self._cache, self._config)
        memory, layout = placed.memory, placed.layout
        log.info("KV memory", extra={"huge_bytes": huge_pages.advise(memory)})
        transports, missing = available(memory, self._names or PREFERRED, host=self._host)
        regions = []
        for transport in transports:
            try:
                offer = transport.offer(memory)
            except TransferError as error:
                missing[transport.name] = str(error)
                continue
            self._offers.append(offer)
            regions.append(Region(transport.name, offer.description, memory.segments[0].blocks))
        if not regions:
            raise Unserved(f"no KV transport can be used here: {missing}; see --kv-transports")
        for name, reason in missing.items():
            log.warning("KV transport left out", extra={"transport": name, "reason": reason})
        block_bytes = sum(layout.segments[n] for group in layout.groups for n in group.segments)
        self.facts = WorkerFacts(layout, regions, block_bytes)
        self._steps = StepEvents(memory.device)
        self._checksums = Checksums(memory, layout.slots, self._mode)
        mine = Mine(memory, layout, self._rank, transports, self._keys)
        self._receiver = Receiver(mine, self._timeouts)

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
                # The request's alone, and not by its blocks: other requests may share some.
                results.failed_recving.add(pulled.request_id)
            if pulled.first_token is not None:
                self._first_tokens[pulled.request_id] = pulled.first_token
            tokens = len(order.token_ids) - order.cached_tokens
            self._pulls.append(account(pulled, tokens))
        return results

    def report(self) -> StepReport | None:
        """After the step: what is over on the device, with checksums, and first tokens that came.

        Nothing here waits for the device: what a step computed may be told some steps later.
        """
        assert self._steps is not None
        assert self._checksums is not None
        computed, tokens = self._plan.computed, self._first_tokens
        self._plan = StepPlan()
        if computed:
            self._steps.record(computed)
        for step in self._steps.over():
            for done in step:
                batch = self._checksums.begin(done.block_ids, done.handle.encode(), done.first)
                self._hashing.append((done, batch))
        told = []
        while self._hashing and self._hashing[0][1].ready():
            done, batch = self._hashing.popleft()
            done.sums[self._rank] = batch.sums
            told.append(done)
        if not told and not tokens:
            return None
        self._first_tokens = {}
        return StepReport(told, tokens)

    def take_stats(self) -> HandoffStats | None:
        dead = self._receiver.dead if self._receiver else None
        if not self._pulls and not dead:
            return None
        pulls, self._pulls = self._pulls, []
        return HandoffStats({"pulls": pulls, **({"dead": dead} if dead else {})})

    def close(self) -> None:
        if self._receiver is not None:
            self._receiver.close()
        for offer in self._offers:
            offer.close()

    @property
    def _rank(self) -> int:
        parallel = self._config.parallel_config
        return int(parallel.rank % parallel.tensor_parallel_size)
