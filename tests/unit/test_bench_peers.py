"""What `make bench-peers` concludes, what it tells each side, and its engines' handover."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from deploy.local.peers.engine import EngineFailed, PeerEngine, Piece, read_params
from deploy.local.peers.fleet import Fleet, shown
from deploy.local.peers.load import Shape, shaped
from deploy.local.peers.sides import SIDES, NotStarted, Plan
from loadtests.peers_figures import COLUMNS, Slo, quantile, row_of
from loadtests.replay import Outcome
from workers.api import Phase
from workers.engines.sim import sim_settings

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from router.twin.traces import Trace

SLO = Slo(ttft_s=1.0, itl_s=0.02)
QUICK = [
    "--sim-step-ms", "0.1", "--sim-prefill-tokens-per-s", "1e7", "--max-model-len", "256",
]  # fmt: skip
PROMPT = list(range(100, 164))


def answered(ttft_s: float = 0.5, gap_s: float = 0.01, tokens: int = 3) -> Outcome:
    return Outcome(None, ttft_s, [gap_s] * (tokens - 1), tokens, 100, 25, ended_s=2.0)


def test_a_quantile_is_one_of_the_values() -> None:
    assert quantile([3.0, 1.0, 2.0, 4.0], 0.5) == 2.0
    assert quantile([float(n) for n in range(1, 101)], 0.99) == 99.0
    assert quantile([], 0.5) == inf


@pytest.mark.parametrize(
    ("outcome", "met"),
    [
        (answered(), True),
        (answered(tokens=1), True),
        (answered(ttft_s=1.1), False),
        (answered(gap_s=0.03), False),
        (Outcome("503: refused"), False),
    ],
)
def test_a_request_meets_the_slo_in_both_or_not_at_all(outcome: Outcome, met: bool) -> None:
    assert SLO.met(outcome) is met


def test_tokens_that_come_together_are_as_slow_as_their_stream() -> None:
    assert SLO.met(Outcome(None, 0.5, [0.04], tokens=3))


def test_a_refused_request_is_failed_in_every_figure() -> None:
    row = row_of([answered(), Outcome("503", ended_s=1.0)], 4.0, SLO, (0.3, 0.1))
    assert (row.requests_per_s, row.failed, row.met, row.goodput_per_s) == (0.5, 1, 0.5, 0.25)
    assert (row.ttft_ms_p50, row.ttft_ms_p99) == (500, inf)
    assert (row.hits, row.cpu_ms_per_request, row.router_cpu_ms_per_request) == (0.25, 300, 100)
    assert len(row.cells("x")) == len(COLUMNS)
    assert row.cells("x")[3] == "never"
    assert json.loads(json.dumps(row.as_json(), allow_nan=False))["ttft_ms_p99"] is None


def test_a_side_that_answers_nothing_has_a_row_all_the_same() -> None:
    assert row_of([Outcome("refused")], 0.0, SLO, (0.0, 0.0)).cells("x")[1] == "0"


def test_dynamos_mocker_is_told_the_engines_own_step_times() -> None:
    fleet = Fleet(step_ms=10, prefill_tokens_per_s=1000, stream_us=100)
    profile = fleet.mocker_profile(points=9)
    assert profile["prefill_ttft_ms"][0] == 10
    assert profile["prefill_ttft_ms"][-1] == pytest.approx(10 + fleet.max_model_len)
    # A column's every entry is of as many sequences as its tokens are contexts.
    tokens, context = profile["decode_active_kv_tokens"], profile["decode_context_length"]
    assert profile["decode_itl"][4, 8] == pytest.approx(10 + 0.1 * tokens[4] / context[8])
    assert np.all(profile["decode_itl"] >= 10.1 - 1e-9)


def test_an_instant_fleet_is_told_to_every_kind_of_engine() -> None:
    fleet = replace(Fleet(), instant=True)
    assert sim_settings(fleet.sim_flags()).instant
    flags = fleet.mocker_flags("profile")
    assert flags[flags.index("--speedup-ratio") + 1] == "1000000"
    assert "profile" not in flags


def test_a_shown_command_names_no_place_of_this_machine() -> None:
    command = ["/a/python", "--model", "/b/model", "--port", "7"]
    assert shown(command, {"/a/": "", "/b/model": "MODEL"}) == "python --model MODEL --port 7"


@pytest.mark.parametrize("name", ["vllm-router", "vllm-router kv", "sglang-router", "dynamo"])
def test_without_its_package_a_peer_says_so_before_anything_starts(
    name: str, tmp_path: Path
) -> None:
    plan = Plan("m", tmp_path, Fleet(), tmp_path / "bin" / "python")
    with pytest.raises(NotStarted, match="make bench-peers"), SIDES[name](plan):
        pass
    bare = replace(plan, peers=Path(sys.executable))  # Ours, which has none of them.
    with pytest.raises(NotStarted, match="No module named"), SIDES[name](bare):
        pass


def shared(trace: Trace) -> float:
    seen: set[int] = set()
    found = total = 0
    for request in trace.requests:
        total += len(request.blocks)
        found += sum(block in seen for block in request.blocks)
        seen.update(request.blocks)
    return found / total


def test_a_short_trace_shares_as_much_as_the_whole_published_one() -> None:
    shape = Shape(requests=400)
    assert shared(shaped(shape)) == pytest.approx(0.366, abs=0.05)
    assert shared(shaped(replace(shape, reuse_sooner=1))) < 0.2


# ---------------------------------------------------------------- the handover


async def asked(engine: PeerEngine, tokens: int, params: Mapping[str, Any] | None) -> list[Piece]:
    return [piece async for piece in engine.generate(PROMPT, tokens, params)]


def test_a_decode_takes_what_a_prefill_answered_and_lets_it_go() -> None:
    async def both() -> None:
        prefill, decode = PeerEngine(sim_settings(QUICK)), PeerEngine(sim_settings(QUICK))
        await prefill.start("p")
        await decode.start("d")
        [done] = await asked(prefill, 1, {"do_remote_decode": True})
        assert done.last
        assert done.kv_transfer_params is not None
        assert read_params(done.kv_transfer_params).phase is Phase.DECODE
        assert prefill.leases_open() == 1
        over_http = json.loads(json.dumps(done.kv_transfer_params))
        pieces = await asked(decode, 4, over_http)
        assert sum(p.tokens for p in pieces) == 4
        assert [p.last for p in pieces] == [False, False, False, True]
        # The prompt is in the prefill engine's cache by now, and the decode says so.
        [again] = await asked(prefill, 1, {"do_remote_decode": True})
        assert prefill.leases_open() == 1, "the first was not let go"
        pieces = await asked(decode, 1, again.kv_transfer_params)
        assert pieces[0].cached_tokens == 48
        prefill.close()
        decode.close()

    asyncio.run(asyncio.wait_for(both(), 10))


def test_without_parameters_one_engine_does_both() -> None:
    async def alone() -> None:
        engine = PeerEngine(sim_settings(QUICK))
        await engine.start("e")
        pieces = await asked(engine, 3, None)
        assert sum(p.tokens for p in pieces) == 3
        assert pieces[-1].last
        with pytest.raises(EngineFailed, match="at most 256"):
            [p async for p in engine.generate([1] * 300, 1, None)]
        engine.close()

    asyncio.run(asyncio.wait_for(alone(), 10))
