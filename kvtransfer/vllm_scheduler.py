"""The connector's half in vLLM's scheduler: what is computed, what is wanted, what is kept."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.request import RequestStatus

from kvtransfer.core.items import items_of
from kvtransfer.core.manifest import chain
from kvtransfer.orders import Order, Pulled
from kvtransfer.protocol import LINK_BYTES, Manifest
from kvtransfer.sender import Offered, Sender
from kvtransfer.vllm_cache_events import told
from kvtransfer.vllm_records import Computed, HandoffStats, StepPlan, StepReport, account

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from kvtransfer.vllm_records import WorkerFacts


STEPS_AHEAD_MAX = 8
"""More than vLLM plans before the first of them is over."""


@dataclass(slots=True)
class _Produced:
    """One prompt that is computed for a receiver."""

    request: Request
    handle: str
    links: bytes
    generation: int = 0
    planned: int = 0
    """Blocks of this generation that some step completes, the present one included."""
    after: int = 0
    """Tokens that are computed after the present step; 0 before the first."""
    told: bool = False
    """That its last step has come."""
    manifest: Manifest | None = None
    """Set when the request has finished; sealed once every block is announced."""

    @property
    def blocks(self) -> int:
        return len(self.links) // LINK_BYTES


class SchedulerHalf:
    """Lives in the engine core's process, beside the block tables."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        extra = vllm_config.kv_transfer_config.get_from_extra_config
        self._host: str = extra("host", "127.0.0.1")
        self._epoch: str = extra("epoch", "")
        self._model_digest: str = extra("model_digest", "")
        self._tokenizer_digest: str = extra("tokenizer_digest", "")
        self._lease_s = float(extra("lease_s", 30.0))
        self._checksums: str = extra("checksums", "sampled")
        self._block_tokens: int = vllm_config.cache_config.block_size
        self._step_tokens: int = vllm_config.scheduler_config.max_num_batched_tokens
        self._facts: WorkerFacts | None = None
        self._block_bytes = 0
        self._blocks: KVCacheManager | None = None
        self._sender: Sender | None = None
        self._produced: dict[str, _Produced] = {}
        """By request, while it is computed and until it is sealed."""
        self._kept: dict[str, str] = {}
        """Sealed handle -> request whose blocks it keeps."""
        self._pulling: dict[str, Request] = {}
        self._first_tokens: dict[str, int] = {}
        """By request, until all ranks have read: each of them says it when it has."""
        self._pulls: list[Order] = []
        self._cancelled: list[str] = []
        self._failures: list[dict[str, Any]] = []
        self._tallies: deque[list[int]] = deque(maxlen=STEPS_AHEAD_MAX)
        """Of steps that were planned and are not over."""

    def open(self, facts: dict[int, WorkerFacts]) -> None:
        """The worker halves have registered their memory: receivers may come."""
        ranks = [facts[rank] for rank in sorted(facts)]
        self._facts = ranks[0]
        self._block_bytes = sum(f.block_bytes for f in ranks)
        offered = Offered(ranks[0].layout, self._checksums, [f.regions for f in ranks])
        self._sender = Sender(self._host, self._epoch, self._lease_s, offered)

    def bind(self, blocks: KVCacheManager) -> None:
        self._blocks = blocks

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()

    # ------------------------------------------------------------ receiving

    def match(self, request: Request, computed: int) -> tuple[int, bool]:
        """How many prompt tokens beyond `computed` the handoff will bring: all of them."""
        fetch = _param(request, "tandem_fetch")
        if fetch is None:
            return 0, False
        if reason := fetch.get("unreadable"):
            request.kv_transfer_params["tandem_fetch"] = None
            self._failures.append(account(Pulled(request.request_id, reason)))
            return 0, False
        return request.num_prompt_tokens - computed, True

    def allocated(self, request: Request, blocks: KVCacheBlocks, external: int) -> None:
        """The engine has reserved blocks. A handle is single use: it is spent here."""
        fetch = _param(request, "tandem_fetch")
        if fetch is None or not external:
            return
        request.kv_transfer_params["tandem_fetch"] = None
        (ids,) = blocks.get_block_ids()
        self._pulling[request.request_id] = request
        self._pulls.append(
            Order(
                request_id=request.request_id,
                handle=fetch["handle"],
                epoch=fetch["epoch"],
                endpoint=fetch["endpoint"],
                token_ids=list(request.prompt_token_ids),
                salt=request.cache_salt,
                lora=_lora(request),
                model_digest=self._model_digest,
                tokenizer_digest=self._tokenizer_digest,
                cached_tokens=request.num_prompt_tokens - external,
                local_blocks=list(ids),
                items=items_of(request.mm_features),
            )
        )

    def _adopt(self, request: Request, token: int) -> None:
        """Go on from a first token that the client has from the sender already.

        It joins the prompt, which for these requests makes no difference to what follows
        (docs/handoff.md has the rule), and the request has one token less to generate.
        """
        request.prompt_token_ids.append(token)
        request._all_token_ids.append(token)
        request.num_prompt_tokens += 1
        request.update_block_hashes()
        request.max_tokens -= 1
        params = request.sampling_params
        params.max_tokens = request.max_tokens
        params.min_tokens = max(0, params.min_tokens - 1)

    # ------------------------------------------------------------ sending

    def arrived(self, request: Request) -> None:
        """A request was queued: whoever follows its handle may know."""
        produce = _param(request, "tandem_produce")
        if not produce:
            return
        assert self._sender is not None
        links = chain(
            request.prompt_token_ids,
            self._block_tokens,
            salt=request.cache_salt,
            lora=_lora(request),
            items=items_of(request.mm_features),
        )
        if self._sender.expect(produce["handle"], links):
            self._produced[request.request_id] = _Produced(request, produce["handle"], links)

    def finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Whether to keep a finished request's blocks."""
        if self._pulling.pop(request.request_id, None) is not None:
            self._cancelled.append(request.request_id)
        produced = self._produced.get(request.request_id)
        if produced is None:
            return False, None
        assert self._sender is not None
        capped = request.status == RequestStatus.FINISHED_LENGTH_CAPPED
        if not capped or not _param(request, "tandem_produce")["keep"]:
            del self._produced[request.request_id]
            self._sender.cancel(produced.handle, f"the prefill ended with {request.status.name}")
            return False, None
        relay = _param(request, "tandem_produce")["relay"]
        produced.manifest = Manifest(
            num_tokens=request.num_prompt_tokens,
            blocks=produced.blocks,
            chain=produced.links[-LINK_BYTES:],
            model_digest=self._model_digest,
            tokenizer_digest=self._tokenizer_digest,
            first_token=request.output_token_ids[0] if relay else None,
        )
        self._seal_if_whole(produced)
        return True, None

    def _seal_if_whole(self, produced: _Produced) -> None:
        assert self._sender is not None
        handle = produced.handle
        whole = self._sender.computed(handle, produced.generation, [], []) == produced.blocks
        if produced.manifest is not None and whole:
            request_id = produced.request.request_id
            del self._produced[request_id]
            self._kept[handle] = request_id
            self._sender.seal(handle, produced.manifest)

    # ------------------------------------------------------------ every step

    def plan(self, scheduled: SchedulerOutput) -> StepPlan:
        """What the worker half must do now."""
        plan = StepPlan(
            pulls=self._pulls,
            cancelled=self._cancelled,
            idle=not scheduled.total_num_scheduled_tokens,
        )
        self._pulls, self._cancelled = [], []
        self._tallies.append(_tally(scheduled))
        if self._sender is not None:
            plan.sent = [self._kept.pop(handle) for handle in self._sender.ended()]
        if self._produced:
            self._plan_computed(plan, scheduled)
        return plan

    def _plan_computed(self, plan: StepPlan, scheduled: SchedulerOutput) -> None:
        assert self._blocks is not None
        assert self._sender is not None
        resumed = scheduled.scheduled_cached_reqs.resumed_req_ids
        begun = {r.req_id: r.num_computed_tokens for r in scheduled.scheduled_new_reqs}
        cached = scheduled.scheduled_cached_reqs
        begun |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for request_id, tokens in scheduled.num_scheduled_tokens.items():
            produced = self._produced.get(request_id)
            if produced is None:
                continue
            if request_id in resumed:  # Its blocks went with the preemption.
                produced.generation += 1
                produced.planned = 0
                self._sender.restart(produced.handle, produced.generation)
            after = begun[request_id] + tokens
            produced.after = after
            whole = after >= produced.request.num_prompt_tokens
            blocks = produced.blocks if whole else after // self._block_tokens
            if blocks > produced.planned:
                ids = self._blocks.get_block_ids(request_id)[0][produced.planned : blocks]
                plan.computed.append(
                    Computed(produced.handle, produced.generation, produced.planned, ids)
                )
                produced.planned = blocks

    def reported(self, output: KVConnectorOutput) -> None:
        """A step is over: announce what it completed, go on with what has arrived."""
        report = output.kv_connector_worker_meta
        if isinstance(report, StepReport):
            by_handle = {p.handle: p for p in self._produced.values()}
            for done in report.computed:
                assert self._sender is not None
                sums = [
                    list(s) for s in zip(*(done.sums[r] for r in sorted(done.sums)), strict=True)
                ]
                self._sender.computed(done.handle, done.generation, done.block_ids, sums)
                if produced := by_handle.get(done.handle):
                    self._seal_if_whole(produced)
            self._first_tokens |= report.first_tokens
        for request_id in output.finished_recving or ():
            request = self._pulling.pop(request_id, None)
            token = self._first_tokens.pop(request_id, None)
            if request is not None and token is not None:
                self._adopt(request, token)

    def _cache_changes(self) -> list[list[Any]]:
        """Taken before vLLM would publish them, and so with the very step that they are of."""
        if self._blocks is None:
            return []
        events, pool = self._blocks.take_events() or (), self._blocks.block_pool
        held, size = pool.cached_block_hash_to_block, self._block_tokens
        found = (told(event, size, held) for event in events)
        return [change for change in found if change is not None]

    def _in_last_step(self, produced: _Produced) -> bool:
        """News: the present step, or the next, completes this prompt."""
        left = produced.request.num_prompt_tokens - produced.after
        begun = produced.after > 0 and produced.manifest is None
        return begun and not produced.told and left <= self._step_tokens

    def take_stats(self) -> HandoffStats:
        facts, sender = self._facts, self._sender
        failures, self._failures = self._failures, []
        last_steps = [r for r, p in self._produced.items() if self._in_last_step(p)]
        for request_id in last_steps:
            self._produced[request_id].told = True
        return HandoffStats(
            {
                "pulls": failures,
                "last_steps": last_steps,
                "step": self._tallies.popleft() if self._tallies else [],
                "cache": self._cache_changes(),
                "leases_open": sender.leases_open if sender else 0,
                "leases_expired": sender.leases_expired_total if sender else 0,
                "endpoint": sender.endpoint if sender else "",
                "layout": _family(facts) if facts else "",
                "block_bytes": self._block_bytes,
                "transports": [r.transport for r in facts.regions] if facts else [],
            }
        )


def _tally(scheduled: SchedulerOutput) -> list[int]:
    """A step's work: `workers.api.Step` without the seconds."""
    cached = scheduled.scheduled_cached_reqs
    begun = {r.req_id: (r.num_computed_tokens, 0) for r in scheduled.scheduled_new_reqs}
    ahead = zip(cached.num_computed_tokens, cached.num_output_tokens, strict=True)
    begun |= dict(zip(cached.req_ids, ahead, strict=True))
    prefill_tokens = prefill_pairs = decodes = context_tokens = 0
    for request_id, tokens in scheduled.num_scheduled_tokens.items():
        context, outputs = begun[request_id]
        if tokens == 1 and outputs:
            decodes += 1
            context_tokens += context
        else:
            prefill_tokens += tokens
            prefill_pairs += tokens * context + tokens * (tokens + 1) // 2
    return [prefill_tokens, prefill_pairs, decodes, context_tokens]


def _family(facts: WorkerFacts) -> str:
    """What two workers must have in common to hand off at all: told to the router."""
    layout = facts.layout
    parts = [layout.content, layout.dtype, layout.kv_heads, layout.head_token_bytes]
    if not layout.by_head:
        parts.append(f"ranks {layout.ranks}")
    if not layout.by_token:
        parts.append(f"blocks {layout.block_tokens}")
    return "/".join(str(p) for p in parts)


def _lora(request: Request) -> str | None:
    return request.lora_request.lora_name if request.lora_request else None


def _param(request: Request, name: str) -> Any:
    params = request.kv_transfer_params
    return params.get(name) if params else None
