"""vLLM's prefill and decode engines on one device: equal tokens, times, what a transfer hides."""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.gpu.report import Skip
from tests.gpu.shapes import SHAPES, VOCABULARY, write_weights

if TYPE_CHECKING:
    from tests.gpu.fleet import Answer, Fleet
    from tests.gpu.machine import Machine
    from tests.gpu.report import Rows

GRAPHS = ("llama-1b", "llama-8b")
"""Shapes with CUDA graphs and compiling, as one serves them; the others start faster without."""


@dataclass(frozen=True)
class Sizes:
    equal: tuple[int, ...]
    """Prompt tokens."""
    answers: int
    long: tuple[int, ...]
    repeats: int
    streams: int
    stream_tokens: int
    beside: int
    """Long prompts beside the streams."""


FULL = Sizes((1, 15, 16, 17, 100, 255, 1000, 1024, 1025, 2049, 4100), 24, (2000, 16_000), 3, 8, 256,
             4)  # fmt: skip
TINY = Sizes((1, 31, 32, 33, 100, 300), 6, (64, 200), 1, 2, 24, 2)


DUMMY = ("llama-8b",)
"""Shapes with vLLM's dummy weights: 15 GiB take too long to write, and times are the same."""


def flags_for(name: str, machine: Machine) -> list[str]:
    """vLLM's own. Memory is set by bytes: two engines share the device, and neither profiles it."""
    found = ["--seed", "0", *(["--load-format", "dummy"] if name in DUMMY else [])]
    if machine.dry:
        return [
            *found, "--dtype", "float32", "--max-model-len", "512", "--enforce-eager",
            "--num-gpu-blocks-override", "64", "--max-num-batched-tokens", "128",
        ]  # fmt: skip
    found += [
        "--max-model-len", "20000", "--max-num-seqs", "32", "--max-num-batched-tokens", "4096",
        "--gpu-memory-utilization", "0.4", "--kv-cache-memory-bytes", str(16 << 30),
    ]  # fmt: skip
    if name in GRAPHS:
        return [*found, "--cudagraph-capture-sizes", "1", "2", "4", "8", "16", "32"]
    return [*found, "--enforce-eager"]


def run(rows: Rows, machine: Machine, name: str) -> None:
    from kvtransfer.protocol import VERSION  # What can't be imported costs this group alone.
    from tests.gpu.fleet import Fleet

    assert VERSION
    sizes = TINY if machine.dry else FULL
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        fleet: Fleet | None = None
        with rows.row("start") as row:
            if machine.dry and name == "mla":
                raise Skip("latent attention is refused on CPUs (docs/models.md)")
            began = time.perf_counter()
            model = SHAPES[name].write(Path(folder) / name, dry=machine.dry)
            if name not in DUMMY:
                write_weights(model, machine.device)
            row.figures["weights_s"] = time.perf_counter() - began
            began = time.perf_counter()
            fleet = Fleet(str(model), flags_for(name, machine))
            try:
                runner.run(fleet.start())
            except BaseException:
                fleet.close()
                fleet = None
                raise
            row.figures |= {"start_s": time.perf_counter() - began, **_described(fleet)}
        try:
            _rows(rows, fleet, runner, sizes, name)
        finally:
            if fleet is not None:
                fleet.close()


def _rows(rows: Rows, fleet: Fleet | None, runner: asyncio.Runner, sizes: Sizes, name: str) -> None:
    measures = {"equal": _equal}
    if name in GRAPHS:
        measures |= {
            "first tokens": _first_tokens, "transfer": _transfer, "intervals": _intervals,
        }  # fmt: skip
    for row_name, measure in measures.items():
        with rows.row(row_name) as row:
            if fleet is None:
                raise Skip("the engines were not started")
            runner.run(measure(fleet, sizes, row.figures))
            if measure is _equal and name not in DUMMY:
                assert row.figures["sensitive"], "these answers do not depend on the KV cache"


def _described(fleet: Fleet) -> dict[str, Any]:
    """The settings that vLLM made of the flags."""
    config, facts = fleet.decode.config, fleet.decode.facts
    compiled = config.compilation_config
    return {
        "async_scheduling": config.scheduler_config.async_scheduling,
        "cudagraph_mode": str(compiled.cudagraph_mode),
        "attention": str(config.attention_config.backend or "vLLM's default"),
        "block_tokens": facts.block_tokens,
        "block_kib": facts.block_bytes / 1024,
        "blocks": facts.blocks_total,
        "transports": facts.transports,
    }


def prompt_of(tokens: int, seed: int) -> list[int]:
    draw = random.Random(seed * 100_003 + tokens)
    return [draw.randrange(20, VOCABULARY - 20) for _ in range(tokens)]


async def _equal(fleet: Fleet, sizes: Sizes, figures: dict[str, Any]) -> None:
    """Greedy tokens, one by one and together, disaggregated and of one engine."""
    prompts = [prompt_of(n, 1) for n in sizes.equal]
    alone = [await _one(fleet, fleet.aggregated(p, sizes.answers)) for p in prompts]
    apart = [await _one(fleet, fleet.apart(p, sizes.answers)) for p in prompts]
    together = [fleet.apart(p, sizes.answers, salt="together") for p in prompts]
    await fleet.wait(together)
    figures["prompts"] = len(prompts)
    figures["equal_one_by_one"] = _same(alone, apart)
    figures["equal_together"] = _same(alone, together)
    figures["by_kv"] = sum(bool(a.pulled.kv_tokens) for a in apart)
    failed = {a.pulled.kv_failed for a in (*apart, *together)} - {None}
    if failed:
        figures["kv_failed"] = sorted(map(str, failed))[:3]
    # Does what stands in the cache change tokens at all?
    changed = [await _one(fleet, fleet.aggregated(_other_half(p), sizes.answers)) for p in prompts]
    figures["sensitive"] = len(prompts) - _same(alone, changed)
    assert not failed, f"pulls failed: {sorted(map(str, failed))[0]}"
    assert figures["equal_one_by_one"] == len(prompts), (
        f"{figures['equal_one_by_one']} of {len(prompts)} answers equal one engine's"
    )


def _other_half(prompt: list[int]) -> list[int]:
    half = len(prompt) // 2
    return [(t + 7) % VOCABULARY for t in prompt[:half]] + prompt[half:]


def _same(one: list[Answer], other: list[Answer]) -> int:
    return sum(a.tokens == b.tokens for a, b in zip(one, other, strict=True))


async def _one(fleet: Fleet, answer: Answer) -> Answer:
    await fleet.wait([answer])
    return answer


async def _first_tokens(fleet: Fleet, sizes: Sizes, figures: dict[str, Any]) -> None:
    """Milliseconds to the first and the second token, medians."""
    for tokens in sizes.long:
        for name, ask in (("aggregated", fleet.aggregated), ("apart", fleet.apart)):
            taken = []
            for turn in range(sizes.repeats):
                answer = await _one(fleet, ask(prompt_of(tokens, 10 + turn), 4, f"{name}{turn}"))
                taken.append((answer.after_s(0) * 1e3, answer.after_s(1) * 1e3))
            for number, which in enumerate(("first", "second")):
                figures[f"{name}_{tokens}_{which}_ms"] = statistics.median(t[number] for t in taken)


async def _transfer(fleet: Fleet, sizes: Sizes, figures: dict[str, Any]) -> None:
    """A long prompt's transfer: its time, and the share of it while the prompt was computed."""
    for tokens in sizes.long:
        told = []
        for turn in range(sizes.repeats):
            answer = await _one(fleet, fleet.apart(prompt_of(tokens, 20 + turn), 4))
            told.append(answer.pulled)
        assert all(d.kv_tokens for d in told), f"a pull failed: {told[0].kv_failed}"
        figures["transport"] = told[0].kv_transport
        seconds = statistics.median(d.kv_s for d in told)
        figures[f"{tokens}_mib"] = told[0].kv_bytes / 2**20
        figures[f"{tokens}_ms"] = seconds * 1e3
        figures[f"{tokens}_gb_s"] = told[0].kv_bytes / max(seconds, 1e-9) / 1e9
        figures[f"{tokens}_hidden_share"] = statistics.median(
            d.kv_hidden_s / d.kv_s if d.kv_s else 1.0 for d in told
        )


async def _intervals(fleet: Fleet, sizes: Sizes, figures: dict[str, Any]) -> None:
    """Milliseconds between the tokens of running streams: alone, and beside long prompts."""
    for name, ask in (("aggregated", fleet.aggregated), ("apart", fleet.apart)):
        for beside in (0, sizes.beside):
            turn = f"{name}{beside}"
            streams = [
                ask(prompt_of(100, 30 + i), sizes.stream_tokens, turn) for i in range(sizes.streams)
            ]
            await _begun(fleet, streams)
            long = [ask(prompt_of(sizes.long[-1], 40 + i), 2, turn) for i in range(beside)]
            await fleet.wait([*streams, *long])
            gaps = sorted(b - a for s in streams for a, b in zip(s.at[2:], s.at[3:], strict=False))
            said = f"{name}_{'beside' if beside else 'alone'}"
            figures[f"{said}_p50_ms"] = gaps[len(gaps) // 2] * 1e3
            figures[f"{said}_p99_ms"] = gaps[int(len(gaps) * 0.99)] * 1e3


async def _begun(fleet: Fleet, streams: list[Answer]) -> None:
    until = time.monotonic() + 60
    while any(len(s.tokens) < 4 and not s.over.is_set() for s in streams):
        fleet.decode.check()
        if time.monotonic() > until:
            raise TimeoutError("the streams do not begin")
        await asyncio.sleep(0.002)
