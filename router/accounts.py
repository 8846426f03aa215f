"""Which workers count a live request, and for how much."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from zlib import crc32

from router.core import lifecycle as life
from router.core.placement import Prompt

if TYPE_CHECKING:
    from collections.abc import Mapping

    from router.ask import Ask
    from router.core.fleet import Fleet, WorkerView
    from router.live import Live
    from workers.api import Delta

OUTPUT_TOKENS_PRIOR: Final = 256.0
OUTPUTS_KEPT: Final = 0.98
"""The mean hangs on the last fifty requests that finished."""


class Accounts:
    """A worker counts what it is yet to compute, and the KV blocks that it was promised to give."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.output_tokens_mean = OUTPUT_TOKENS_PRIOR
        """Of requests that finished lately: what any is expected to generate."""

    def prompt(self, ask: Ask, cached_tokens: Mapping[str, int]) -> Prompt:
        """What placement is told."""
        return Prompt(
            len(ask.prompt_token_ids),
            ask.max_tokens,
            cached_tokens,
            output_tokens_expected=max(1, round(self.output_tokens_mean)),
            tie=crc32(ask.request_id.encode()),
        )

    def settle(self, live: Live) -> None:
        """Count it where it now is, and nowhere else."""
        request_id, state = live.wire_id, live.state  # Of a request, each try has its own.
        for worker_id in live.counted_on:
            if view := self._fleet.get(worker_id):
                view.leave(request_id)
        live.counted_on = ()
        if not isinstance(state, (life.Prefilling, life.Decoding)):
            return
        live.counted_on = (state.decode, state.prefill or state.decode)
        if decode := self._fleet.get(state.decode):
            decode.promise(request_id, _blocks_to_come(live, decode))
        computing = None
        if isinstance(state, life.Prefilling):
            computing = self._fleet.get(state.prefill)
        elif state.prefill is None:
            computing = decode
        if computing:
            tokens = len(live.ask.prompt_token_ids) - live.predicted_tokens
            computing.place(request_id, max(1, tokens))

    def said(self, live: Live, worker_id: str, delta: Delta) -> None:
        """A worker answered: what it was to compute is computed, and it has taken blocks."""
        view, request_id = self._fleet.get(worker_id), live.wire_id
        if view is None:
            return
        if view.unheard:
            view.answered(request_id)
        if request_id not in view.promised:
            return
        if delta.kv_bytes and delta.kv_failed is None:
            view.rates.pulled(delta.kv_bytes, delta.kv_s)
        live.kv_tokens = live.kv_tokens or len(live.ask.prompt_token_ids)
        live.kv_tokens += len(delta.token_ids)
        if live.kv_tokens > live.kv_tokens_counted:
            size = view.hello.block_tokens
            live.kv_tokens_counted = -(-live.kv_tokens // size) * size
            view.promise(request_id, _blocks_to_come(live, view))

    def finished(self, output_tokens: int) -> None:
        """A request generated all that it was to."""
        mean = self.output_tokens_mean
        self.output_tokens_mean = mean * OUTPUTS_KEPT + output_tokens * (1 - OUTPUTS_KEPT)


def _blocks_to_come(live: Live, view: WorkerView) -> int:
    size = view.hello.block_tokens
    expected = min(live.kv_tokens_expected, view.hello.max_model_len)
    return max(0, -(-expected // size) - -(-live.kv_tokens // size))
