"""The connector's half in vLLM's scheduler: what is computed, what is wanted, what is kept."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.v1.request import RequestStatus

from kvtransfer.core.geometry import described
from kvtransfer.core.items import items_of
from kvtransfer.core.manifest import chain
from kvtransfer.orders import Order, Pulled
from kvtransfer.protocol import LINK_BYTES, Manifest
from kvtransfer.releases import ReleaseClient
from kvtransfer.sender import Offered, Sender
from kvtransfer.vllm_cache_events import told
from kvtransfer.vllm_groups import Columns, groups_of, kept_from
from kvtransfer.vllm_keys import keys_of
from kvtransfer.vllm_records import Computed, HandoffStats, StepPlan, StepReport, account
from kvtransfer.vllm_step_work import step_work

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from kvtransfer.vllm_groups import Tables
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
    tokens: int = 0
    """Prompt tokens that are handed over; the receiver computes the others."""
    planned: int = 0
    """Columns of this generation that some step completes, the present one included."""
    block_ids: list[list[int]] = field(default_factory=list)
    """The blocks of those columns."""
    after: int = 0
    """Tokens that are computed after the present step; 0 before the first."""
    told: bool = False
    """That its last step has come."""
    manifest: Manifest | None = None
    """Set when the request has finished; sealed once every block is announced."""

    @property
    def columns(self) -> int:
        return len(self.links) // LINK_BYTES


class SchedulerHalf:
    """Lives in the engine core's process, beside the block tables."""

    def __init__(self, vllm_config: VllmConfig, cache: KVCacheConfig) -> None:
        extra = vllm_config.kv_transfer_config.get_from_extra_config
        self._host: str = extra("host", "127.0.0.1")
        self._epoch: str = extra("epoch", "")
        self._model_digest: str = extra("model_digest", "")
        self._tokenizer_digest: str = extra("tokenizer_digest", "")
        self._lease_s = float(extra("lease_s", 30.0))
        self._checksums: str = extra("checksums", "sampled")
        self._keys = keys_of(extra)
        self._cache_config = vllm_config.cache_config
        groups = groups_of(cache)
        self._groups, self._columns = groups, Columns(groups)
        self._step_tokens: int = vllm_config.scheduler_config.max_num_batched_tokens
        self._facts: WorkerFacts | None = None
        self._block_bytes = self._ranks = 0
        self._announcing: dict[tuple[str, int, int], Computed] = {}
        """By handle, generation and first column: what some ranks have told, and not all."""
        self._blocks: KVCacheManager | None = None
        self._sender: Sender | None = None
        self._releases = ReleaseClient(self._keys)
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
        self._block_bytes, self._ranks = sum(f.block_bytes for f in ranks), len(ranks)
        offered = Offered(ranks[0].layout, self._checksums, [f.regions for f in ranks])
        self._sender = Sender(self._host, self._epoch, self._lease_s, offered, keys=self._keys)

    def bind(self, blocks: KVCacheManager) -> None:
        self._blocks = blocks

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()
        self._releases.close()

    # ------------------------------------------------------------ receiving

    def match(self, request: Request, computed: int) -> tuple[int, bool]:
        """How many prompt tokens beyond `computed` the handoff will bring: all it has."""
        fetch = _param(request, "tandem_fetch")
        if fetch is None:
            return 0, False
        reason = fetch.get("unreadable")
        if reason is None and computed % self._columns.tokens:
            reason = f"{computed} cached tokens are no whole columns of {self._columns.tokens}"
        whole = fetch.get("tokens") == request.num_prompt_tokens
        if whole and not fetch.get("relay") and self._columns.forget:
            reason = "a window or state of the whole prompt can't give its last token again"
        if reason is None and fetch["tokens"] > computed:
            return fetch["tokens"] - computed, True
        request.kv_transfer_params["tandem_fetch"] = None
        if "handle" in fetch:
            self._releases.release_handle(fetch["endpoint"], fetch["epoch"], fetch["handle"])
        if reason is not None:
            self._failures.append(account(Pulled(request.request_id, reason)))
        return 0, False

    def allocated(self, request: Request, blocks: KVCacheBlocks, external: int) -> None:
        """The engine has reserved blocks. A handle is single use: it is spent here."""
        fetch = _param(request, "tandem_fetch")
        if fetch is None or not external:
            return
        request.kv_transfer_params["tandem_fetch"] = None
        tokens, tables = fetch["tokens"], blocks.get_block_ids()
        columns = range(self._columns.count(tokens))
        self._pulling[request.request_id] = request
        self._pulls.append(
            Order(
                request_id=request.request_id,
                handle=fetch["handle"],
                epoch=fetch["epoch"],
                endpoint=fetch["endpoint"],
                token_ids=list(request.prompt_token_ids[:tokens]),
                salt=request.cache_salt,
                lora=_lora(request),
                model_digest=self._model_digest,
                tokenizer_digest=self._tokenizer_digest,
                cached_tokens=tokens - external,
                # Null where the engine has it null: before the window of the next token.
                local_blocks=self._columns.ids(tables, tokens, columns, [0] * len(tables)),
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
        handle, tokens = produce["handle"], produce["tokens"]
        links = chain(
            request.prompt_token_ids[:tokens],
            self._columns.tokens,
            salt=request.cache_salt,
            lora=_lora(request),
            items=items_of(request.mm_features),
        )
        if not self._sender.expect(handle, links):
            return
        if self._columns.has_state and tokens != request.num_prompt_tokens:
            reason = f"the state after {tokens} of {request.num_prompt_tokens} tokens is not kept"
            self._sender.cancel(handle, reason)
            return
        self._produced[request.request_id] = _Produced(request, handle, links, tokens=tokens)

    def finished(self, request: Request, tables: Tables) -> tuple[bool, dict[str, Any] | None]:
        """Whether to keep a finished request's blocks."""
        if self._pulling.pop(request.request_id, None) is not None:
            self._cancelled.append(request.request_id)
        produced = self._produced.get(request.request_id)
        if produced is None:
            return False, None
        assert self._sender is not None
        produce = _param(request, "tandem_produce")
        reason = None
        if request.status != RequestStatus.FINISHED_LENGTH_CAPPED or not produce["keep"]:
            reason = f"the prefill ended with {request.status.name}"
        elif self._moved(produced, tables):
            reason = "the window has left blocks that the receiver needs"
        if reason is not None:
            del self._produced[request.request_id]
            self._sender.cancel(produced.handle, reason)
            return False, None
        produced.manifest = Manifest(
            num_tokens=produced.tokens,
            columns=produced.columns,
            chain=produced.links[-LINK_BYTES:],
            model_digest=self._model_digest,
            tokenizer_digest=self._tokenizer_digest,
            first_token=request.output_token_ids[0] if produce["relay"] else None,
        )
        self._seal_if_whole(produced)
        return True, None

    def _moved(self, produced: _Produced, tables: Tables) -> bool:
        """Some announced block is the request's no longer.

        The token after the prompt's last needs less than the last itself (prompt logprobs).
        """
        columns = range(len(produced.block_ids))
        now = self._columns.ids(tables, produced.tokens, columns, self._kept_from(produced))
        return now != produced.block_ids

    def _kept_from(self, produced: _Produced) -> list[int]:
        assert self._blocks is not None
        return kept_from(self._blocks, produced.tokens)

    def _seal_if_whole(self, produced: _Produced) -> None:
        assert self._sender is not None
        handle = produced.handle
        whole = self._sender.computed(handle, produced.generation, [], []) == produced.columns
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
        self._tallies.append(step_work(scheduled))
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
                produced.block_ids = []
                self._sender.restart(produced.handle, produced.generation)
            after = begun[request_id] + tokens
            produced.after = after
            whole = after >= produced.tokens
            columns = produced.columns if whole else after // self._columns.tokens
            if columns > produced.planned:
                tables = self._blocks.get_block_ids(request_id)
                span = range(produced.planned, columns)
                kept = self._kept_from(produced)
                ids = self._columns.ids(tables, produced.tokens, span, kept)
                plan.computed.append(
                    Computed(produced.handle, produced.generation, produced.planned, ids)
                )
                produced.block_ids += ids
                produced.planned = columns

    def reported(self, output: KVConnectorOutput) -> None:
        """A step is over: announce what it completed, go on with what has arrived."""
        report = output.kv_connector_worker_meta
        if isinstance(report, StepReport):
            by_handle = {p.handle: p for p in self._produced.values()}
            for done in filter(None, map(self._known_of_all, report.computed)):
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

    def _known_of_all(self, done: Computed) -> Computed | None:
        """The same columns with every rank's checksums, once the last rank has told its own."""
        key = done.handle, done.generation, done.first
        known = self._announcing.setdefault(key, done)
        known.sums.update(done.sums)
        if len(known.sums) < self._ranks:
            return None
        return self._announcing.pop(key)

    def _cache_changes(self) -> list[list[Any]]:
        """Taken before vLLM would publish them, and so with the very step that they are of."""
        if self._blocks is None:
            return []
        events, pool = self._blocks.take_events() or (), self._blocks.block_pool
        held, size = pool.cached_block_hash_to_block, self._index_tokens
        group = self._columns.indexed_group
        found = (told(event, size, held, group) for event in events)
        return [change for change in found if change is not None]

    @property
    def _tokens_max(self) -> int:
        """Tokens that the cache holds, where its blocks are several groups'; else 0."""
        hybrid = len(self._groups) > 1 or self._columns.has_state
        return int(self._cache_config.kv_cache_size_tokens or 0) if hybrid else 0

    @property
    def _index_tokens(self) -> int:
        return self._groups[self._columns.indexed_group].block_tokens

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
        dead = sender.dead if sender else None
        return HandoffStats(
            ({"dead": dead} if dead else {})
            | {
                "pulls": failures,
                "last_steps": last_steps,
                "step": self._tallies.popleft() if self._tallies else [],
                "cache": self._cache_changes(),
                "leases_open": sender.leases_open if sender else 0,
                "leases_expired": sender.leases_expired_total if sender else 0,
                "endpoint": sender.endpoint if sender else "",
                "layout": _family(facts) if facts else "",
                "block_bytes": self._block_bytes,
                "block_tokens": self._index_tokens,
                "tokens_max": self._tokens_max,
                "transports": [r.transport for r in facts.regions] if facts else [],
            }
        )


def _family(facts: WorkerFacts) -> str:
    """What two workers must have in common to hand off at all: told to the router."""
    layout = facts.layout
    parts = [layout.content, layout.dtype, layout.kv_heads, layout.head_token_bytes]
    if not (layout.by_head and layout.head_token_bytes):
        parts.append(f"ranks {layout.ranks}")
    if not layout.by_token:
        parts.append(described(layout))
    return "/".join(str(p) for p in parts)


def _lora(request: Request) -> str | None:
    return request.lora_request.lora_name if request.lora_request else None


def _param(request: Request, name: str) -> Any:
    params = request.kv_transfer_params
    return params.get(name) if params else None
