"""The simulated engine: the contract's timing and accounts without a model."""

from __future__ import annotations

import argparse
import asyncio
from importlib.metadata import version
from typing import TYPE_CHECKING

from workers.engines.base import EngineFacts
from workers.engines.sim_blocks import Handoffs
from workers.engines.sim_model import SimModel
from workers.engines.sim_settings import SimSettings

if TYPE_CHECKING:
    from collections.abc import Iterable

    from workers.api import Generate, Load
    from workers.engines.base import CacheChange, OnStep


class SimEngine:
    """Time is the event loop's own, so it runs on a virtual one unchanged."""

    def __init__(self, settings: SimSettings, epoch: str, handoffs: Handoffs | None = None) -> None:
        """`handoffs`: one for all engines that share this process; else tickets are trusted."""
        self._settings = settings
        self._streams = settings.streams and handoffs is not None and not settings.instant
        self._epoch = epoch
        self._handoffs = handoffs or Handoffs()
        self._model = SimModel(settings, epoch, self._handoffs)
        self._work = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> EngineFacts:
        s = self._settings
        self._loop = asyncio.get_running_loop()
        self._handoffs.join(self._epoch, s.lease_s)
        return EngineFacts(
            engine="sim",
            version=version("tandem-serve"),
            kv_digest=f"sim-{s.block_tokens}-{s.token_bytes}",
            transports=["memory"],
            block_tokens=s.block_tokens,
            block_bytes=s.block_tokens * s.token_bytes,
            blocks_total=s.blocks_total,
            max_model_len=s.max_model_len,
            handoff_endpoint="sim" if self._streams else "",
            step_tokens=s.chunk_tokens,
            max_num_seqs=0 if s.instant else s.running_max,
        )

    async def run(self, on_step: OnStep) -> None:
        while True:
            await self._work.wait()
            # With zero seconds it still lets everything else have a turn.
            await asyncio.sleep(self._model.begin(self._now()))
            deltas = self._model.finish(self._now())
            if not self._model.busy:
                self._work.clear()
            on_step(self.load(), deltas)

    def submit(self, generate: Generate) -> None:
        self._model.submit(generate)
        self._work.set()

    def abort(self, request_ids: Iterable[str]) -> None:
        self._model.abort(request_ids)

    def release(self, tickets: Iterable[bytes]) -> None:
        self._model.release(tickets, self._now())

    def load(self) -> Load:
        return self._model.load(self._now())

    @property
    def dead(self) -> str | None:
        return None

    def cache_changes(self) -> list[CacheChange]:
        return self._model.cache_changes()

    def close(self) -> None:
        self._handoffs.leave(self._epoch)

    def _now(self) -> float:
        return 0.0 if self._loop is None else self._loop.time()


def sim_settings(flags: list[str], lease_s: float = 30.0) -> SimSettings:
    """From the flags that the worker does not know itself; a bad one ends the process with 2."""
    d = SimSettings()
    parser = argparse.ArgumentParser(prog="tandem worker --engine sim", allow_abbrev=False)
    add = parser.add_argument
    add("--sim-prefill-tokens-per-s", type=_positive, default=d.prefill_tokens_per_s)
    add("--sim-step-ms", type=_positive, default=d.step_s * 1000)
    add(
        "--sim-pair-ns",
        type=_not_negative,
        default=0,
        help="attention, a prompt token and one before",
    )
    add("--sim-stream-us", type=_not_negative, default=0, help="a step, for each sequence in it")
    add("--sim-context-ns", type=_not_negative, default=0, help="and for each token before those")
    add("--sim-blocks", type=_positive, default=d.blocks_total)
    add("--sim-instant", action="store_true", help="nothing takes time, no lease keeps anything")
    add("--block-size", type=_positive, default=d.block_tokens)
    add("--max-model-len", type=_positive, default=d.max_model_len)
    add("--max-num-batched-tokens", type=_positive, default=d.chunk_tokens)
    add("--max-num-seqs", type=_positive, default=d.running_max)
    args = parser.parse_args(flags)
    return SimSettings(
        prefill_tokens_per_s=args.sim_prefill_tokens_per_s,
        step_s=args.sim_step_ms / 1000,
        pair_s=args.sim_pair_ns / 1e9,
        stream_s=args.sim_stream_us / 1e6,
        context_token_s=args.sim_context_ns / 1e9,
        blocks_total=int(args.sim_blocks),
        block_tokens=int(args.block_size),
        max_model_len=int(args.max_model_len),
        chunk_tokens=int(args.max_num_batched_tokens),
        running_max=int(args.max_num_seqs),
        lease_s=lease_s,
        instant=args.sim_instant,
    )


def _positive(text: str) -> float:
    number = float(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above zero")
    return number


def _not_negative(text: str) -> float:
    number = float(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below zero")
    return number
