"""A start that can't be ends with one line that says what, and what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from deploy.local.models import prepare
from deploy.local.parts import ENVIRONMENT
from tests.asking import MODEL

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]

TRANSLATOR = {
    "architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper",
    "vocab_size": 100, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 1, "decoder_attention_heads": 1,
}  # fmt: skip
EMBEDDER = {
    "architectures": ["BertModel"], "model_type": "bert", "vocab_size": 100, "hidden_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8,
}  # fmt: skip


def start(*flags: str, path: Path | None = None, process: str = "worker") -> tuple[int, list[str]]:
    """Its status and its lines, once it has ended; modules in `path` go before others."""
    environment = {**ENVIRONMENT, **os.environ}
    if path is not None:
        paths = [str(path), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    command = [sys.executable, "-m", "tandem", process, *flags]
    ended = subprocess.run(
        command, check=False, timeout=300, capture_output=True, text=True, env=environment
    )
    return ended.returncode, ended.stderr.splitlines()


@pytest.mark.parametrize("config", [TRANSLATOR, EMBEDDER], ids=lambda c: str(c["model_type"]))
def test_a_kind_of_model_that_is_not_served_is_named_before_its_weights_are_read(
    config: dict[str, object], tmp_path: Path
) -> None:
    prepared = prepare(MODEL)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((prepared / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "weights.bin").write_bytes(b"none")
    status, lines = start("--role", "mixed", "--model", str(tmp_path))
    assert status == 2
    kind = "an encoder-decoder" if config is TRANSLATOR else "a pooling model"
    assert lines[-1].startswith(f"tandem worker: {tmp_path} (")
    assert f"is {kind}" in lines[-1]
    assert "run vLLM's own server for it" in lines[-1]


def test_a_parallel_size_that_is_not_served_is_refused_in_the_last_line() -> None:
    status, lines = start("--role", "decode", "--model", MODEL, "--pipeline-parallel-size", "2")
    assert status == 2
    assert lines[-1] == (
        "tandem worker: --pipeline-parallel-size 2 is not served: the KV of its stages can't be "
        "handed off; use --tensor-parallel-size"
    )


def test_a_refusal_in_one_of_the_engine_s_processes_is_the_worker_s_last_line(
    tmp_path: Path,
) -> None:
    """Without NIXL the process with the KV memory finds that nobody could read it."""
    (tmp_path / "nixl.py").write_text("raise ImportError('taken away')\n")
    flags = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    status, lines = start(
        "--role", "prefill", "--model", MODEL, "--kv-transports", "ucx", *flags, path=tmp_path
    )
    assert status == 1
    assert lines[-1].startswith("tandem worker: no KV transport can be used here: ")
    assert lines[-1].endswith("see --kv-transports")


def test_vllms_own_failure_is_in_the_last_line() -> None:
    flags = ["--dtype", "float32", "--enforce-eager", "--num-gpu-blocks-override", "2"]
    status, lines = start("--role", "prefill", "--model", MODEL, *flags)
    assert status == 1
    assert lines[-1].startswith("tandem worker: vLLM's engine did not start: ValueError: To serve")
    assert "decreasing `max_model_len`" in lines[-1]
    assert lines[-1].endswith("the traceback is above")


def test_a_router_too_ends_with_one_line() -> None:
    flags = ["--workers", "tcp://127.0.0.1:1", "--port", "0", "--max-model-len", "99999"]
    status, lines = start("--model", MODEL, *flags, process="router")
    assert status == 2
    assert lines[-1].startswith("tandem router: User-specified max_model_len (99999) is greater")
