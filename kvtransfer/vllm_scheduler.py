"""The connector's half in vLLM's scheduler: tickets in, leases out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from vllm.v1.request import RequestStatus

from kvtransfer.core.manifest import (
    Expectation,
    TicketUnreadable,
    chain_tail,
    decode_ticket,
    mismatch,
)
from kvtransfer.protocol import VERSION, Ticket
from kvtransfer.sender import LeaseServer, Region
from kvtransfer.vllm_records import HandoffStats, PullOrder, StepPlan

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.request import Request

    from kvtransfer.vllm_records import WorkerFacts


class SchedulerHalf:
    """Lives in the engine core's process, beside the block tables."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        extra = vllm_config.kv_transfer_config.get_from_extra_config
        self._host: str = extra("host", "127.0.0.1")
        self._epoch: str = extra("epoch", "")
        self._model_digest: str = extra("model_digest", "")
        self._lease_s = float(extra("lease_s", 30.0))
        self._block_tokens: int = vllm_config.cache_config.block_size
        self._facts: WorkerFacts | None = None
        self._leases: LeaseServer | None = None
        self._sending: dict[str, str] = {}
        """Handle -> request whose blocks it keeps."""
        self._tickets: dict[str, Ticket] = {}
        """Checked tickets by request, from match to allocation."""
        self._pulls: list[PullOrder] = []
        self._failures: list[list[Any]] = []

    def open(self, facts: WorkerFacts) -> None:
        """The worker half has registered its memory: receivers may come."""
        self._facts = facts
        region = Region(facts.kv_digest, facts.transport, facts.description)
        self._leases = LeaseServer(self._host, self._epoch, self._lease_s, region)

    def close(self) -> None:
        if self._leases is not None:
            self._leases.close()

    # ------------------------------------------------------------ receiving

    def match(self, request: Request, computed: int) -> tuple[int, bool]:
        """How many prompt tokens beyond `computed` the ticket brings. A bad one brings none."""
        content = _param(request, "tandem_ticket")
        if content is None:
            return 0, False
        try:
            ticket = decode_ticket(content)
        except TicketUnreadable as error:
            self._refuse(request, str(error))
            return 0, False
        if reason := mismatch(ticket, self._expectation(request)):
            self._refuse(request, reason)
            return 0, False
        if computed // self._block_tokens >= len(ticket.block_ids):
            return 0, False
        self._tickets[request.request_id] = ticket
        return request.num_prompt_tokens - computed, True

    def allocated(self, request: Request, blocks: KVCacheBlocks, external: int) -> None:
        """The engine has reserved blocks. The ticket is single use: it is spent here."""
        content = _param(request, "tandem_ticket")
        if content is None:
            return
        request.kv_transfer_params["tandem_ticket"] = None
        ticket = self._tickets.pop(request.request_id, None)
        order = PullOrder(request.request_id, content, [], [], external)
        if ticket is not None and external:
            cached = (request.num_prompt_tokens - external) // self._block_tokens
            order.remote_block_ids = ticket.block_ids[cached:]
            free = blocks.get_unhashed_block_ids()
            order.local_block_ids = free[: len(order.remote_block_ids)]
            assert len(order.local_block_ids) == len(order.remote_block_ids), "blocks are missing"
        self._pulls.append(order)

    def _refuse(self, request: Request, reason: str) -> None:
        request.kv_transfer_params["tandem_ticket"] = None
        self._failures.append([request.request_id, 0, 0, 0.0, reason])

    def _expectation(self, request: Request) -> Expectation:
        assert self._facts is not None
        return Expectation(
            kv_digest=self._facts.kv_digest,
            model_digest=self._model_digest,
            block_tokens=self._block_tokens,
            num_tokens=request.num_prompt_tokens,
            chain=self._chain(request),
        )

    # ------------------------------------------------------------ sending

    def finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Whether to keep a finished request's blocks, and the ticket to them."""
        self._tickets.pop(request.request_id, None)
        if not _param(request, "tandem_produce"):
            return False, None
        if request.status != RequestStatus.FINISHED_LENGTH_CAPPED:
            return False, None
        assert self._facts is not None
        assert self._leases is not None
        handle = self._leases.grant()
        self._sending[handle] = request.request_id
        blocks = -(-request.num_prompt_tokens // self._block_tokens)
        ticket = Ticket(
            version=VERSION,
            epoch=self._epoch,
            handle=handle,
            endpoints=[self._leases.endpoint],
            kv_digest=self._facts.kv_digest,
            model_digest=self._model_digest,
            num_tokens=request.num_prompt_tokens,
            block_ids=block_ids[:blocks],
            chain=self._chain(request),
        )
        return True, {"tandem_ticket": msgspec.msgpack.encode(ticket)}

    def _chain(self, request: Request) -> bytes:
        lora = request.lora_request.lora_name if request.lora_request else None
        return chain_tail(
            request.prompt_token_ids, self._block_tokens, salt=request.cache_salt, lora=lora
        )

    # ------------------------------------------------------------ every step

    def plan(self) -> StepPlan:
        """What the worker half must do now."""
        plan = StepPlan(pulls=self._pulls)
        self._pulls = []
        if self._leases is not None:
            for handle in self._leases.ended():
                plan.sent.append(self._sending.pop(handle))
        return plan

    def take_stats(self) -> HandoffStats:
        failures, self._failures = self._failures, []
        facts = self._facts
        return HandoffStats(
            {
                "pulls": failures,
                "leases_open": len(self._sending),
                "kv_digest": facts.kv_digest if facts else "",
                "block_bytes": facts.block_bytes if facts else 0,
                "transport": facts.transport if facts else "",
            }
        )


def _param(request: Request, name: str) -> Any:
    params = request.kv_transfer_params
    return params.get(name) if params else None
