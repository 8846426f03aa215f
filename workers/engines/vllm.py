"""vLLM's engine core, one request a phase, embedded below its `AsyncLLM`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import vllm
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError

from kvtransfer.refusal import Causes, one_line
from kvtransfer.releases import ReleaseClient
from kvtransfer.vllm_keys import keys_of
from workers.api import Delta, Finish, Item, Load, Phase, Step
from workers.constraints import constraints
from workers.engines.base import Cleared, EngineDead, EngineFacts, Removed, Stored
from workers.engines.vllm_core_process import executor_class
from workers.engines.vllm_requests import (
    BadRequest,
    core_request,
    delta_of,
    embeddings_max,
    warm_up_request,
)
from workers.loop_hold import TURN_S

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.metrics.stats import SchedulerStats

    from workers.api import Generate
    from workers.engines.base import CacheChange, OnStep

log = logging.getLogger(__name__)

_WARM_UP = "tandem-warm-up"
WARM_UP_TOGETHER = 3
ABORTED_MAX = 4096


class VllmEngine:
    """Commands go in by one task, in order; each step comes out as one call."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._config = vllm_config
        self._commands: asyncio.Queue[Generate | list[str]] = asyncio.Queue()
        transfer = vllm_config.kv_transfer_config
        extra = transfer.get_from_extra_config if transfer else lambda _, otherwise: otherwise
        self._releases = ReleaseClient(keys_of(extra))
        self._live: dict[str, Generate] = {}
        self._uncomputed: dict[str, int] = {}
        """Prompt tokens of requests that have not answered yet."""
        self._aborted: OrderedDict[str, bytes] = OrderedDict()
        """Tickets of prefills that were aborted last."""
        self._pulled: dict[str, dict[str, Any]] = {}
        """Pulls that are over, until their request's first delta tells of them."""
        self._last_steps: list[str] = []
        self._changes: list[CacheChange] = []
        self._rejected: list[Delta] = []
        self._rejected_now = asyncio.Event()
        self._steps = 0
        self._step: Step | None = None
        self._step_began = time.perf_counter()
        self._connector: dict[str, Any] = {}
        self._stats: SchedulerStats | None = None
        self._causes = Causes()
        self._core: Any = None
        self._embeddings_max = 0

    async def start(self) -> EngineFacts:
        # It takes as long as the model takes to load, and probes must be answered meanwhile.
        try:
            self._core = await asyncio.to_thread(
                EngineCoreClient.make_async_mp_client,
                self._config,
                executor_class(self._config),
                log_stats=True,
            )
        except Exception as error:  # Whatever it is, it is the engine's end.
            raise self._dead("did not start", error) from error
        self._embeddings_max = await asyncio.to_thread(embeddings_max, self._config)
        try:
            # vLLM compiles for a batch of one, and once more for all larger ones.
            await self._warm_up(1)
            await self._warm_up(WARM_UP_TOGETHER)
        except EngineDeadError as error:
            raise self._dead("died of its first requests", error) from error
        self._step = None  # What it took was the start.
        parallel = self._config.parallel_config
        transfer = self._config.kv_transfer_config
        connector = self._connector
        nixl = transfer is not None and transfer.kv_connector == "NixlConnector"
        return EngineFacts(
            engine="vllm",
            version=vllm.__version__,
            kv_digest="nixl" if nixl else connector.get("layout", ""),
            transports=["nixl"] if nixl else connector.get("transports", []),
            block_tokens=self._block_tokens,
            block_bytes=connector.get("block_bytes", 0),
            blocks_total=self._blocks_total,
            max_model_len=self._config.model_config.max_model_len,
            handoff_endpoint=connector.get("endpoint", ""),
            tells_cache="cache" in connector,
            step_tokens=self._config.scheduler_config.max_num_batched_tokens,
            max_num_seqs=self._config.scheduler_config.max_num_seqs,
            constraints=constraints(self._config),
            dp_rank=parallel.data_parallel_rank,
            dp_size=parallel.data_parallel_size,
        )

    async def _warm_up(self, together: int) -> None:
        began = time.perf_counter()
        for number in range(together):
            await self._core.add_request_async(warm_up_request(f"{_WARM_UP}-{together}-{number}"))
        left = together
        while left:
            outputs = await self._core.get_output_async()
            self._count(outputs)
            left -= sum(o.finished for o in outputs.outputs)
        took_s = time.perf_counter() - began
        log.info("warmed up", extra={"requests": together, "seconds": round(took_s, 1)})

    async def run(self, on_step: OnStep) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._send())
                tasks.create_task(self._tell_rejected(on_step))
                while True:
                    outputs = await self._core.get_output_async()
                    self._count(outputs)
                    on_step(self.load(), self._deltas(outputs))
        except* EngineDeadError as dead:
            raise self._dead("died", dead.exceptions[0]) from dead

    def _dead(self, what: str, seen: BaseException) -> EngineDead:
        """`seen` is what came of it here; the engine's processes may have told the cause."""
        cause = self._causes.first()
        if cause is not None and cause.unserved:
            return EngineDead(cause.text)
        text = cause.text if cause else one_line(seen)
        return EngineDead(f"vLLM's engine {what}: {text.rstrip('.')}; the traceback is above")

    def submit(self, generate: Generate) -> None:
        if not self._live:  # Until now no step was under way.
            self._step_began = time.perf_counter()
        self._live[generate.request_id] = generate
        # What another worker computes is not queued here.
        computes = generate.phase is not Phase.DECODE
        self._uncomputed[generate.request_id] = len(generate.prompt_token_ids) if computes else 0
        self._commands.put_nowait(generate)

    def abort(self, request_ids: Iterable[str]) -> None:
        known = []
        for request_id in request_ids:
            if generate := self._live.pop(request_id, None):
                known.append(request_id)
                self._uncomputed.pop(request_id, None)
                if generate.phase is Phase.PREFILL and generate.ticket is not None:
                    self._let_go(request_id, generate.ticket)
        if known:
            self._commands.put_nowait(known)

    def _let_go(self, request_id: str, ticket: bytes) -> None:
        """Its prefill may be done before the abort gets there: then its KV is kept for nobody."""
        self._aborted[request_id] = ticket
        if len(self._aborted) > ABORTED_MAX:
            self._aborted.popitem(last=False)

    def release(self, tickets: Iterable[bytes]) -> None:
        for ticket in tickets:
            self._releases.release(ticket)

    @property
    def dead(self) -> str | None:
        """Why no KV is handed off any more, by the engine's last step; None while it is."""
        return self._connector.get("dead")

    def load(self) -> Load:
        stats, total = self._stats, self._blocks_total
        usage = stats.kv_cache_usage if stats else 0.0
        return Load(
            steps=self._steps,
            busy=bool(self._live),
            running=stats.num_running_reqs if stats else 0,
            waiting=stats.num_waiting_reqs + stats.num_skipped_waiting_reqs if stats else 0,
            prefill_tokens_queued=sum(self._uncomputed.values()),
            blocks_free=round(total * (1 - usage)),
            blocks_total=total,
            leases_open=self._connector.get("leases_open", 0),
            leases_expired=self._connector.get("leases_expired", 0),
            step=self._step,
        )

    def cache_changes(self) -> list[CacheChange]:
        changes, self._changes = self._changes, []
        return changes

    def close(self) -> None:
        if self._core is not None:
            self._core.shutdown()
        self._releases.close()
        self._causes.close()

    # ------------------------------------------------------------ in

    async def _send(self) -> None:
        until = time.monotonic() + TURN_S
        while True:
            command = await self._commands.get()
            # Neither this queue nor the engine's socket ever waits while there is work: a flood of
            # prompts would hold all streams up.
            if time.monotonic() >= until:
                await asyncio.sleep(0)
                until = time.monotonic() + TURN_S
            if isinstance(command, list):
                await self._core.abort_requests_async(command)
                continue
            try:
                request = core_request(command, self._config, self._embeddings_max)
            except BadRequest as bad:
                self._reject(command.request_id, str(bad))
            else:
                await self._core.add_request_async(request)

    def _reject(self, request_id: str, reason: str) -> None:
        if self._live.pop(request_id, None):
            self._uncomputed.pop(request_id, None)
            self._rejected.append(Delta(request_id, [], Finish.INVALID, error=reason))
            self._rejected_now.set()

    async def _tell_rejected(self, on_step: OnStep) -> None:
        """An idle engine does not step, and the client must not wait for it."""
        while True:
            await self._rejected_now.wait()
            self._rejected_now.clear()
            rejected, self._rejected = self._rejected, []
            on_step(self.load(), rejected)

    # ------------------------------------------------------------ out

    @property
    def _block_tokens(self) -> int:
        return int(self._connector.get("block_tokens") or self._config.cache_config.block_size)

    @property
    def _blocks_total(self) -> int:
        if tokens := self._connector.get("tokens_max"):  # Several groups share the blocks.
            return int(tokens // self._block_tokens)
        # vLLM keeps one block for itself: the null block.
        return (self._config.cache_config.num_gpu_blocks or 1) - 1

    def _count(self, outputs: EngineCoreOutputs) -> None:
        stats = outputs.scheduler_stats
        if stats is None:
            return
        self._steps += 1
        self._stats = stats
        # Where the next step runs while this one's outputs travel, it began with the former's.
        began, self._step_began = self._step_began, time.perf_counter()
        work = (stats.kv_connector_stats or {}).get("step", ())
        self._step = Step(self._step_began - began, *work) if any(work) else None
        if self._step is not None:
            self._computed(self._step.prefill_tokens)
        if stats.kv_connector_stats:
            self._connector = {**self._connector, **stats.kv_connector_stats}
            self._changes += map(_change, stats.kv_connector_stats.get("cache", []))
            self._last_steps += stats.kv_connector_stats.get("last_steps", [])
            for pull in stats.kv_connector_stats.get("pulls", []):
                if (request_id := pull["request_id"]) in self._live:
                    self._pulled[request_id] = _merged(self._pulled.get(request_id), pull)

    def _computed(self, tokens: int) -> None:
        """Which prompts' they are is not told: vLLM takes them in the order in which they came."""
        for request_id, queued in self._uncomputed.items():
            took = min(queued, tokens)
            self._uncomputed[request_id] = queued - took
            tokens -= took
            if not tokens:
                return

    def _deltas(self, outputs: EngineCoreOutputs) -> list[Delta]:
        last_steps, self._last_steps = self._last_steps, []
        deltas = [Delta(r, [], last_step=True) for r in last_steps if r in self._live]
        for output in outputs.outputs:
            generate = self._live.get(output.request_id)
            if generate is None:
                if ticket := self._aborted.pop(output.request_id, None):
                    self._releases.release(ticket)
                continue
            first = self._uncomputed.pop(output.request_id, None) is not None
            pulled = self._pulled.pop(output.request_id, None) if first else None
            delta = delta_of(output, generate, first=first, pulled=pulled)
            if delta.finish is not None:
                del self._live[output.request_id]
            deltas.append(delta)
        return deltas


def _change(told: list[Any]) -> CacheChange:
    """As the connector's scheduler half writes it (`kvtransfer.vllm_scheduler`)."""
    match told:
        case [keys, parent, token_ids, salt, lora, items]:
            return Stored(keys, parent, token_ids, salt, lora, tuple(Item(*i) for i in items))
        case [keys]:
            return Removed(keys)
    return Cleared()


def _merged(one: dict[str, Any] | None, other: dict[str, Any]) -> dict[str, Any]:
    """Of one request's pulls by several ranks: bytes add up, the slowest and the failed count."""
    if one is None:
        return other
    return {
        **one,
        "bytes": one["bytes"] + other["bytes"],
        "seconds": max(one["seconds"], other["seconds"]),
        "hidden_s": min(one["hidden_s"], other["hidden_s"]),
        "error": one["error"] or other["error"],
        "mismatched": one["mismatched"] or other["mismatched"],
        "tokens": min(one["tokens"], other["tokens"]),
        "first_token": one["first_token"] if other["first_token"] is None else other["first_token"],
    }
