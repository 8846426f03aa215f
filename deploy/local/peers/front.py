"""vLLM's OpenAI server over a simulated engine, for HTTP routers that split prefill and decode.

    python -m deploy.local.peers.front --model FOLDER --address-file F [vLLM's flags]
        -- [--kv-events ENDPOINT] [--sim-…]

The application is vLLM's own; the engine is the one of `tandem worker --engine sim`, in the same
process. A real vLLM has an engine process and a detokenizer besides: these fronts cost less.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    ZmqEventPublisher,
)
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind

from deploy.local.peers.engine import PeerEngine
from deploy.local.vllm_front import FrontEngine, serve
from workers.engines.base import Removed, Stored
from workers.engines.sim import sim_settings

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

    from workers.engines.base import CacheChange
    from workers.engines.sim_settings import SimSettings

_TOKEN_ID, _TEXT = 253, " a"


class SimulatedVllm(FrontEngine):
    """Answers with as many tokens as were asked for, when the simulated engine has them."""

    def __init__(
        self, settings: SimSettings, kv_events: str | None, vllm_config: VllmConfig
    ) -> None:
        super().__init__(vllm_config)
        self._engine = PeerEngine(settings)
        if kv_events is not None:
            self._events = ZmqEventPublisher(0, endpoint=kv_events)
            self._engine.on_changes = self._publish

    async def start(self) -> None:
        await self._engine.start(f"front-{os.getpid()}")

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **_: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        ids = prompt["prompt_token_ids"]
        params = (sampling_params.extra_args or {}).get("kv_transfer_params")
        by_step = sampling_params.output_kind is RequestOutputKind.DELTA
        tokens = 0
        async for piece in self._engine.generate(ids, sampling_params.max_tokens or 1, params):
            tokens += piece.tokens
            if not by_step and not piece.last:
                continue
            output = CompletionOutput(
                index=0, text=_TEXT * tokens, token_ids=[_TOKEN_ID] * tokens,
                cumulative_logprob=None, logprobs=None,
                finish_reason="length" if piece.last else None,
            )  # fmt: skip
            tokens = 0
            yield RequestOutput(
                request_id, prompt.get("prompt"), ids, None, [output], piece.last,
                num_cached_tokens=piece.cached_tokens, kv_transfer_params=piece.kv_transfer_params,
            )  # fmt: skip

    def _publish(self, changes: list[CacheChange]) -> None:
        size = self._engine.settings.block_tokens
        self._events.publish(KVEventBatch(time.time(), [_event(c, size) for c in changes]))


def _event(change: CacheChange, block_tokens: int) -> Any:
    """As vLLM's own engine publishes it."""
    if isinstance(change, Stored):
        return BlockStored(
            change.keys, change.parent, list(change.token_ids), block_tokens,
            lora_id=None, medium="GPU", lora_name=None,
        )  # fmt: skip
    if isinstance(change, Removed):
        return BlockRemoved(change.keys, medium="GPU")
    return AllBlocksCleared()


def main() -> None:
    """Serve on a free port of 127.0.0.1 until SIGTERM."""
    at = sys.argv.index("--")
    parser = argparse.ArgumentParser(prog="front", allow_abbrev=False, add_help=False)
    parser.add_argument("--kv-events", help="where vLLM's KV events are published")
    args, flags = parser.parse_known_args(sys.argv[at + 1 :])
    serve("front", sys.argv[1:at], partial(SimulatedVllm, sim_settings(flags), args.kv_events))


if __name__ == "__main__":
    main()
