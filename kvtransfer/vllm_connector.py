"""vLLM's connector interface over the handoff's two halves.

Scheduler side (`vllm_scheduler`): knows what is computed and wanted, keeps leases, tells receivers.
Worker side (`vllm_worker`): owns the KV memory, checks what it computed, pulls.

Loaded by vLLM through `kv_connector_module_path`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

from kvtransfer.refusal import Unserved, carried
from kvtransfer.vllm_records import HandoffStats, StepPlan, StepReport, WorkerFacts
from kvtransfer.vllm_scheduler import SchedulerHalf
from kvtransfer.vllm_worker import WorkerHalf

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class TandemConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """One class because vLLM asks for one; each process holds one half of it."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._scheduler_half: SchedulerHalf | None = None
        self._worker_half: WorkerHalf | None = None
        with carried():
            if (groups := len(kv_cache_config.kv_cache_groups)) != 1:
                raise Unserved(
                    f"this model's KV cache has {groups} groups, and handoffs serve one: "
                    "try --disable-hybrid-kv-cache-manager, or a mixed worker with "
                    "--kv-connector none"
                )
            if role == KVConnectorRole.SCHEDULER:
                self._scheduler_half = SchedulerHalf(vllm_config)
            else:
                self._worker_half = WorkerHalf(vllm_config)

    @property
    def _scheduler(self) -> SchedulerHalf:
        assert self._scheduler_half is not None, "asked of the worker side"
        return self._scheduler_half

    @property
    def _worker(self) -> WorkerHalf:
        assert self._worker_half is not None, "asked of the scheduler side"
        return self._worker_half

    # ------------------------------------------------------------ scheduler side

    def set_xfer_handshake_metadata(
        self, metadata: dict[int, KVConnectorHandshakeMetadata]
    ) -> None:
        facts = {rank: f for rank, f in metadata.items() if isinstance(f, WorkerFacts)}
        assert len(facts) == len(metadata), "every rank registers its own memory"
        self._scheduler.open(facts)

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self._scheduler.bind(kv_cache_manager)

    def on_new_request(self, request: Request) -> None:
        self._scheduler.arrived(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self._scheduler.match(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        self._scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self._scheduler.plan(scheduler_output)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._scheduler.finished(request, block_ids)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._scheduler.finished(request, block_ids[0])

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self._scheduler.reported(connector_output)

    # ------------------------------------------------------------ worker side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        with carried():
            self._worker.register(kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self._worker.facts

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        # Not in `start_load_kv`, which comes after the step: pulls go on beside it.
        assert isinstance(connector_metadata, StepPlan)
        self._worker.begin(connector_metadata)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Nothing: see `bind_connector_metadata`."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: a request runs only once its whole prompt has arrived."""

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the receiver reads from the KV cache itself."""

    def wait_for_save(self) -> None:
        """Nothing: see `save_kv_layer`."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        return self._worker.results()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_failed_blocks()

    def build_connector_worker_meta(self) -> StepReport | None:
        return self._worker.report()

    # ------------------------------------------------------------ both

    def get_kv_connector_stats(self) -> HandoffStats | None:
        half = self._scheduler_half or self._worker_half
        return None if half is None else half.take_stats()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> HandoffStats:
        return HandoffStats(data or {})

    def shutdown(self) -> None:
        half = self._scheduler_half or self._worker_half
        if half is not None:
            half.close()
