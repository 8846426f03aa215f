"""`tandem calibrate`: measures real workers over the token channel and writes the twin's fleet."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from router.twin.batches import fit_batches, of_batch
from router.twin.compare import to_stderr
from router.twin.fit import Fit, fit, seconds_of
from router.twin.probe import Probe, ProbeFailed
from router.twin.sweeps import Sweep, Sweeper
from workers.api import Role

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from router.twin.probe import Line
    from workers.api import WorkerHello


@dataclass(frozen=True, slots=True)
class Calibrated:
    """One worker, as the twin's file has it."""

    hello: WorkerHello
    settings: dict[str, Any]
    fit: Fit
    beside: float = 1.0
    """What its steps' times are multiplied by while the other one computes."""


def main(argv: list[str] | None = None) -> int:
    """0 when a fleet was written; 1 when a worker could not be measured."""
    args = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    try:
        sweep = Sweep(repeats=args.repeats)
        found = measure(args.workers, sweep, to_stderr, one_host=args.one_host)
    except ProbeFailed as error:
        to_stderr(f"tandem calibrate: {error}")
        return 1
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(as_toml(found, args.latency_ms, args.front_ms), encoding="utf-8")
    to_stderr(f"written: {args.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tandem calibrate",
        description="Measure idle workers over the token channel, and write a fleet for `tandem "
        "twin --fleet FILE`. Takes a small CPU engine some minutes.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "workers",
        nargs="+",
        metavar="tcp://HOST:PORT",
        help="a worker's token channel; with a prefill and a decode worker the handoff too",
    )
    add("--out", type=Path, required=True, metavar="FILE.toml", help="where the fleet is written")
    add("--repeats", type=int, default=Sweep().repeats, help="of each prompt; default: %(default)s")
    add(
        "--one-host",
        action="store_true",
        help="the workers share a machine: measure how much a prefill and a decode worker slow "
        "each other",
    )
    add("--latency-ms", type=float, default=0.2, help="router to worker; default: %(default)s")
    add(
        "--front-ms",
        type=float,
        default=2.0,
        help="from the client to the dispatch; default: %(default)s",
    )
    return parser  # fmt: skip


def measure(
    addresses: Sequence[str], sweep: Sweep, say: Callable[[str], None], *, one_host: bool = False
) -> list[Calibrated]:
    """Each of these workers, which have nothing else to do. Raises `ProbeFailed`."""
    with Probe(addresses) as probe:
        engines = {line.hello.engine for line in probe.lines}
    # vLLM's import takes longer than a worker waits for a router that says nothing.
    params = _params(engines)
    with Probe(addresses) as probe:
        sweeper = Sweeper(probe, sweep, params)
        found = [_one(sweeper, line, say) for line in probe.lines]
        prefill = next((x for x in probe.lines if x.hello.role is Role.PREFILL), None)
        decode = next((x for x in probe.lines if x.hello.role is not Role.PREFILL), None)
        if prefill and decode:
            say("handoffs")
            pull = _pull(sweeper, prefill, decode)
            for each in found:
                each.settings.update(pull)
            if one_host:
                say("both at once")
                found = _together(sweeper, prefill, decode, found)
        return found


def _together(
    sweeper: Sweeper, prefill: Line, decode: Line, found: Sequence[Calibrated]
) -> list[Calibrated]:
    of = {each.hello.worker_id: each for each in found}
    first, second = (of[line.hello.worker_id] for line in (prefill, decode))
    samples = sweeper.beside(prefill, decode, int(first.settings["chunk_tokens"]))
    for each, seen in zip((first, second), samples, strict=True):
        slow = [
            y / (seconds_of(each.fit.rates, row) + of_batch(each.settings["batch_s"], row))
            for row, y in zip(seen.rows, seen.seconds, strict=True)
        ]
        of[each.hello.worker_id] = replace(each, beside=max(1.0, median(slow)) if slow else 1.0)
    return list(of.values())


def _one(sweeper: Sweeper, line: Line, say: Callable[[str], None]) -> Calibrated:
    say(f"{line.hello.worker_id}: prompts")
    samples, chunk = sweeper.prompts(line)
    if line.hello.role is not Role.PREFILL:
        say(f"{line.hello.worker_id}: generating")
        more = sweeper.decodes(line)
        samples.rows += more.rows
        samples.seconds += more.seconds
    found, batch_s = fit_batches(samples)
    say(
        f"{line.hello.worker_id}: {found.samples} samples, off by {found.error_p50:.1%} in the "
        f"median and {found.error_p90:.1%} at p90"
    )
    step_s, token_s, pair_s, stream_s, context_token_s = found.rates
    hello = line.hello
    settings: dict[str, Any] = {
        "step_s": step_s,
        "prefill_tokens_per_s": 1 / max(token_s, 1e-9),
        "pair_s": pair_s,
        "stream_s": stream_s,
        "context_token_s": context_token_s,
        "batch_s": batch_s,
        "noise": found.noise,
        "chunk_tokens": chunk,
        "block_tokens": hello.block_tokens,
        "blocks_total": hello.blocks_total,
        "token_bytes": hello.block_bytes // hello.block_tokens,
        "max_model_len": hello.max_model_len,
        "lease_s": hello.lease_s,
        "streams": bool(hello.handoff_endpoint),
    }
    return Calibrated(hello, settings, found)


def _pull(sweeper: Sweeper, prefill: Line, decode: Line) -> dict[str, float]:
    """What lies between the prompt's end and the decode worker's first token, but for its step."""
    rows, seconds = [], []
    token_bytes = decode.hello.block_bytes / decode.hello.block_tokens
    for tokens, took_s, step_s in sweeper.handoffs(prefill, decode):
        rows.append((1.0, tokens * token_bytes))
        seconds.append(max(1e-4, took_s - step_s))
    latency_s, byte_s = fit(rows, seconds).rates
    return {"pull_latency_s": latency_s, "pull_bytes_per_s": min(1e15, 1 / max(byte_s, 1e-15))}


def _params(engines: set[str]) -> Callable[[int], bytes]:
    if engines == {"vllm"}:
        from workers.vllm_codec import greedy

        return greedy
    return lambda outputs: str(outputs).encode()


def as_toml(found: Sequence[Calibrated], latency_ms: float, front_ms: float) -> str:
    """For `tandem twin --fleet`. Of each worker one; `count` makes it more."""
    # Who is not slowed may still slow another.
    on_one_host = any(each.beside > 1 for each in found)
    lines = [f"latency_ms = {_number(latency_ms)}", f"front_ms = {_number(front_ms)}"]
    for each in found:
        lines += [
            "",
            f"# {each.hello.worker_id}, {each.hello.engine} {each.hello.engine_version}: "
            f"{each.fit.samples} samples, off by {each.fit.error_p50:.1%} in the median, "
            f"{each.fit.error_p90:.1%} at p90",
            "[[workers]]",
            f'role = "{each.hello.role}"',
            "count = 1",
            *(['host = "one"', f"beside = {_number(each.beside)}"] if on_one_host else []),
            "[workers.settings]",
            *(f"{name} = {_number(value)}" for name, value in each.settings.items()),
        ]
    return "\n".join(lines) + "\n"


def _number(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_number(v) for v in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int) else f"{float(value):.6g}"


if __name__ == "__main__":
    sys.exit(main())
