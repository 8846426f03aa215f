"""`tandem calibrate` finds the rates of engines whose rates are known."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from deploy.local.parts import Part, end
from router.twin import calibrate
from router.twin.fleet import read
from router.twin.sweeps import Sweep
from tests.asking import LEASE_S, await_free

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from deploy.local.group import LocalGroup

MODEL = "smollm2-135m"
PACE = (
    "--sim-prefill-tokens-per-s 8000 --sim-step-ms 20 --sim-pair-ns 40 --sim-stream-us 1500 "
    "--sim-context-ns 900 --max-num-batched-tokens 1024"
)
QUICK = Sweep(prompts=(64, 512, 1500, 3000), repeats=1, contexts=(64, 1500), outputs=8)


@pytest.fixture
def channels(tmp_path: Path) -> Iterator[list[str]]:
    with ExitStack() as stack:
        parts = []
        for role in ("prefill", "decode"):
            address = tmp_path / f"{role}.json"
            command = [
                sys.executable, "-m", "tandem", "worker", "--engine", "sim", "--role", role,
                "--model", MODEL, "--worker-id", role, "--address-file", str(address),
                "--drain-s", "1", *PACE.split(),
            ]  # fmt: skip
            parts.append(Part(role, command, tmp_path / f"{role}.log", address))
        stack.callback(end, parts)
        for part in parts:
            part.spawn()
        for part in parts:
            part.await_address(part.check)
            part.await_ready(part.check)
        yield [part.channel for part in parts]


def test_the_rates_of_an_engine_are_found(
    channels: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "Sweep", lambda repeats=1: QUICK)
    out = tmp_path / "new" / "fleet.toml"
    assert calibrate.main([*channels, "--out", str(out), "--one-host"]) == 0
    prefill, decode = read(str(out)).workers
    # They sleep and do not compute, so neither minds the other.
    assert [w.beside < 1.1 for w in (prefill, decode)] == [True, True]
    assert (str(prefill.role), str(decode.role)) == ("prefill", "decode")
    for worker in (prefill, decode):
        s = worker.settings
        assert s.chunk_tokens == 1024
        assert s.step_s == pytest.approx(0.020, rel=0.25)
        # Each by itself may stand for a little of another; what they come to may not.
        took_s = 2 * s.step_s + 2000 / s.prefill_tokens_per_s + 2000 * 2001 / 2 * s.pair_s
        assert took_s == pytest.approx(2 * 0.020 + 2000 / 8000 + 2_001_000 * 40e-9, rel=0.1)
    s = decode.settings
    step_s = s.step_s + 8 * s.stream_s + 8 * 800 * s.context_token_s
    assert step_s == pytest.approx(0.020 + 8 * 1500e-6 + 6400 * 900e-9, rel=0.1)
    # The pull's own 2 ms, and up to a step until the engine looks.
    assert s.pull_latency_s == pytest.approx(0.002, abs=0.01)


@pytest.mark.real
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Torch's, while vLLM imports it.
def test_vllm_s_workers_are_measured_too(group: LocalGroup) -> None:
    sweep = Sweep(
        prompts=(32, 200, 600), repeats=1, batches=(1, 2), contexts=(64, 300), outputs=4,
        handoffs=(64, 300),
    )  # fmt: skip
    channels = [worker.channel for worker in group.workers]
    found = calibrate.measure(channels, sweep, lambda _: None)
    assert [x.hello.engine for x in found] == ["vllm", "vllm"]
    # 600 tokens took three steps of either.
    assert [each.settings["chunk_tokens"] for each in found] == [256, 256]
    for each in found:
        assert 100 < each.settings["prefill_tokens_per_s"] < 1e5
        assert each.fit.error_p50 < 0.5
    await_free(group, LEASE_S + 5)


def test_a_worker_that_is_not_there_is_said_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.twin.probe.HELLO_S", 0.5)
    assert calibrate.main(["tcp://127.0.0.1:9", "--out", str(tmp_path / "f.toml")]) == 1
    assert "no worker answered" in capsys.readouterr().err


def test_help_says_what_it_needs() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "tandem", "calibrate", "--help"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "tcp://HOST:PORT" in told
