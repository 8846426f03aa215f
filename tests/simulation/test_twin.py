"""The twin's laws: it replays exactly, loses nothing, and a lone request takes what it should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from router.twin.compare import POLICIES, Comparison
from router.twin.fleet import FleetPlan, WorkerPlan, read
from router.twin.generate import generate
from router.twin.outcomes import NEVER, name_of
from router.twin.report import Objective
from router.twin.run import Options, Twin
from router.twin.traces import Request, Trace
from workers.api import Role
from workers.engines.sim_settings import SimSettings

ENGINE = SimSettings(
    prefill_tokens_per_s=2000.0, step_s=0.01, pair_s=2e-8, stream_s=5e-4, context_token_s=2e-7,
    block_tokens=64, blocks_total=512, chunk_tokens=1024, streams=True, lease_s=5.0,
)  # fmt: skip
OBJECTIVE = Objective(ttft_s=1.5, itl_s=0.03)


def fleet(**counts: int) -> FleetPlan:
    return FleetPlan(
        tuple(
            WorkerPlan(f"{role}-{n}", Role(role), ENGINE)
            for role, count in counts.items()
            for n in range(count)
        )
    )


def busy_trace(requests: int = 300, seed: int = 3, time: float = 0.25) -> Trace:
    return generate("mooncake-conversation", seed, requests).scaled(lengths=16, time=time)


def comparison(plan: FleetPlan, trace: Trace | None = None, seed: int = 0) -> Comparison:
    return Comparison(trace or busy_trace(), plan, OBJECTIVE, seed=seed)


# ---------------------------------------------------------------- one request


def prompt_s(tokens: int) -> float:
    """Of its steps on `ENGINE`, which it has for itself."""
    steps = -(-tokens // ENGINE.chunk_tokens)
    pairs = tokens * (tokens + 1) / 2
    return steps * ENGINE.step_s + tokens / ENGINE.prefill_tokens_per_s + pairs * ENGINE.pair_s


@pytest.mark.parametrize("tokens", [1, 64, 1000, 1024, 1025, 5000])
@pytest.mark.parametrize("policy", ["round-robin", "ours"])
@pytest.mark.parametrize("alike_s", [0.0, 0.5])
def test_a_lone_request_takes_what_the_formula_says(
    tokens: int, policy: str, alike_s: float
) -> None:
    plan, blocks = fleet(prefill=1, decode=1), (7,) * -(-tokens // 512)
    trace = Trace("lone", [Request(1.0, tokens, 40, blocks)])
    twin = Twin(trace, plan, Options(alike_s=alike_s))
    twin.run(comparison(plan, trace).policy(policy, twin))
    ttft_s = plan.front_s + 2 * plan.latency_s + prompt_s(tokens)
    assert twin.outcomes.ttft_s(0) == pytest.approx(ttft_s, abs=1e-6)
    steps_s = 39 * (ENGINE.step_s + ENGINE.stream_s)
    context_s = ENGINE.context_token_s * sum(tokens + n for n in range(39))
    (record,) = twin.dispatch.journal.find(name_of(0))
    handed_off = record.prefill_worker is not None
    assert handed_off or policy == "ours"
    # The last chunk is read, and looked at when the sender has sealed it; nothing else is slower.
    most_s = 0.02 + ENGINE.chunk_tokens * ENGINE.token_bytes / ENGINE.pull_bytes_per_s
    decode_s = twin.outcomes.last_s[0] - twin.outcomes.first_s[0]
    assert -1e-6 <= decode_s - steps_s - context_s <= most_s * handed_off + 1e-6
    assert twin.outcomes.tokens[0] == 40


def on_one_host(beside: float, ats: tuple[float, ...], tokens: int) -> list[float]:
    """When prompts that two engines of one host share in turn get their one token."""
    plan = FleetPlan(
        tuple(WorkerPlan(f"mixed-{n}", Role.MIXED, ENGINE, "one", beside) for n in range(2))
    )
    requests = [Request(at, tokens, 1, (n,) * 9) for n, at in enumerate(ats)]
    twin = Twin(Trace("shared", requests), plan)
    twin.run(comparison(plan, twin.trace).policy("round-robin", twin))
    assert {w.heard for w in twin.workers.values()} == {1}
    return [at - plan.front_s - 2 * plan.latency_s for at in twin.outcomes.first_s]


def test_engines_of_one_host_slow_each_other_only_while_both_compute() -> None:
    alone_s = prompt_s(1000)
    assert on_one_host(1.5, (1.0, 9.0), 1000) == pytest.approx([1 + alone_s, 9 + alone_s])
    both = on_one_host(1.5, (1.0, 1.0), 1000)
    assert both == pytest.approx([1 + 1.5 * alone_s] * 2, abs=1e-4)
    # The second comes when the first is half done: that one has half left, at a time and a half.
    first, second = on_one_host(1.5, (1.0, 1.0 + alone_s / 2), 1000)
    together_s = 1.5 * alone_s / 2
    assert first == pytest.approx(1 + alone_s / 2 + together_s)
    assert second == pytest.approx(first + alone_s - together_s / 1.5)


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("counts", [{"prefill": 2, "decode": 2}, {"mixed": 3}], ids=str)
def test_every_request_ends_once_and_nothing_is_kept(name: str, counts: dict[str, int]) -> None:
    trace, plan = busy_trace(), fleet(**counts)
    sides = comparison(plan, trace)
    twin = Twin(trace, plan, sides.options_of(name))
    twin.run(sides.policy(name, twin))
    outcomes = twin.outcomes
    assert 0 not in outcomes.ended
    refused = sum(outcomes.refused.values()) + sum(outcomes.failed.values())
    assert outcomes.ended.count(2) == refused
    assert refused == 0 or name == "ours-refusing"
    for n, request in enumerate(trace.requests):
        if outcomes.ended[n] == 1:
            assert outcomes.tokens[n] == request.output_tokens
            assert outcomes.arrived_s[n] < outcomes.first_s[n] <= outcomes.last_s[n]
        else:
            assert outcomes.first_s[n] == NEVER
    assert len(twin.dispatch) == 0
    for worker in twin.workers.values():
        load = worker.model.load(twin.now + ENGINE.lease_s)
        assert (load.blocks_free, load.running, load.waiting) == (ENGINE.blocks_total, 0, 0)
    for view in twin.dispatch.fleet:
        assert (view.promised, view.unheard) == ({}, {})
    assert twin.dispatch.caches.disbelieved_total == 0


def test_the_index_is_what_the_caches_hold_at_rest() -> None:
    trace, plan = busy_trace(), fleet(prefill=2, decode=2)
    twin = Twin(trace, plan)
    twin.run()
    for worker in twin.workers.values():
        view = twin.dispatch.caches.view(worker.worker_id)
        told = worker.report(twin.now)
        twin.dispatch.on_batch(worker.worker_id, told)
        assert view is not None
        assert view.in_step
        assert len(view) == worker.cached_blocks


def test_steps_told_together_change_nobody_s_tokens_and_hardly_their_times() -> None:
    trace, plan = busy_trace(200), fleet(prefill=2, decode=2)
    exact, told = Twin(trace, plan, Options(alike_s=0.0)), Twin(trace, plan)
    # Round robin looks at nothing that is told later, so placements are the same ones.
    for twin in (exact, told):
        twin.run(comparison(plan, trace).policy("round-robin", twin))
    assert told.events < exact.events / 2
    assert told.outcomes.tokens == exact.outcomes.tokens
    for n in range(len(trace.requests)):
        assert told.outcomes.ttft_s(n) == pytest.approx(exact.outcomes.ttft_s(n), abs=0.05)
        assert told.outcomes.last_s[n] == pytest.approx(exact.outcomes.last_s[n], abs=0.1)


# ---------------------------------------------------------------- figures


def test_a_seed_is_the_same_json_byte_for_byte(tmp_path: Path) -> None:
    top, found = Path(__file__).parents[2], []
    for hash_seed in ("1", "2"):
        file = tmp_path / f"{hash_seed}.json"
        subprocess.run(
            [
                sys.executable, "-m", "router.twin", "--trace", "mooncake-conversation",
                "--requests", "150", "--divide-lengths", "16", "--stretch-time", "0.2",
                "--engine", "smollm2-cpu", "--policies", ",".join(POLICIES), "--seed", "5",
                "--json", str(file), "--plot", str(file.with_suffix(".svg")), "--quiet",
            ],
            cwd=top, env={**os.environ, "PYTHONHASHSEED": hash_seed}, check=True,
            capture_output=True,
        )  # fmt: skip
        found.append((file.read_bytes(), file.with_suffix(".svg").read_bytes()))
    assert found[0] == found[1]
    assert set(json.loads(found[0][0])["policies"]) == set(POLICIES)


@pytest.mark.parametrize("name", ["prefix-tree", "ours"])
def test_more_workers_serve_no_fewer(name: str) -> None:
    met = [comparison(fleet(prefill=n, decode=n)).run(name).figures.met / 300 for n in (1, 2, 4, 8)]
    for fewer, more in pairwise(met):
        assert more >= fewer - 0.02
    assert met[-1] > met[0] + 0.3  # Else it would say nothing.


def test_ours_beats_its_peers_and_is_near_the_oracle() -> None:
    sides = comparison(fleet(prefill=2, decode=2), busy_trace(time=0.5))
    met = {name: sides.run(name).figures.met for name in POLICIES}
    peers = ("round-robin", "power-of-two", "session-hash", "prefix-tree")
    assert met["ours"] >= 1.2 * max(met[name] for name in peers)
    assert met["ours"] >= 0.9 * met["oracle"]


def test_a_fleet_of_unlike_workers_needs_no_configuration() -> None:
    slow = SimSettings(
        prefill_tokens_per_s=500.0, step_s=0.04, block_tokens=64, blocks_total=512, streams=True
    )
    plan = FleetPlan(
        (
            WorkerPlan("fast-p", Role.PREFILL, ENGINE), WorkerPlan("slow-p", Role.PREFILL, slow),
            WorkerPlan("fast-d", Role.DECODE, ENGINE), WorkerPlan("slow-d", Role.DECODE, slow),
        )
    )  # fmt: skip
    sides = comparison(plan, busy_trace(time=0.5))
    assert sides.run("ours").figures.met > sides.run("round-robin").figures.met * 1.3


def test_the_presets_serve() -> None:
    for text, engine in (("prefill=1,decode=1", "llama70b-8xh100"), ("mixed=2", "smollm2-cpu")):
        trace = generate("azure-code", 1, 20)
        assert Comparison(trace, read(text, engine)).run("ours").figures.finished == 20
