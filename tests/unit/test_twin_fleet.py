"""How a fleet is described, and what is wrong with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from router.twin.fleet import CPU, GPU, FleetInvalid, read
from workers.api import Role

if TYPE_CHECKING:
    from pathlib import Path

TOML = """
engine = "smollm2-cpu"
latency_ms = 1
front_ms = 4.5
[settings]
stream_s = 0.001
batch_s = [0, 0.004, -1e-3]
[[workers]]
role = "prefill"
count = 2
[workers.settings]
step_s = 0.5
kv_tokens = 6400
block_tokens = 64
[[workers]]
role = "decode"
name = "slow"
engine = "llama70b-8xh100"
"""


def test_counts_by_role_are_a_fleet() -> None:
    plan = read("prefill=2, decode=1,mixed=1", "llama70b-8xh100")
    assert [w.worker_id for w in plan.workers] == ["prefill-0", "prefill-1", "decode-0", "mixed-0"]
    assert {w.settings for w in plan.workers} == {GPU}


def test_a_file_says_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(TOML)
    plan = read(str(path))
    assert (plan.latency_s, plan.front_s) == (0.001, 0.0045)
    first, second, slow = plan.workers
    assert first.settings == second.settings
    assert (first.settings.step_s, first.settings.stream_s) == (0.5, 0.001)
    assert first.settings.batch_s == (0.0, 0.004, -0.001)
    assert (first.settings.blocks_total, first.settings.block_tokens) == (100, 64)
    assert first.settings.chunk_tokens == CPU.chunk_tokens
    assert (slow.worker_id, slow.role, slow.settings) == ("slow-0", Role.DECODE, GPU)


def test_workers_of_one_host_are_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text('[[workers]]\nrole = "mixed"\ncount = 2\nhost = "a"\nbeside = 1.5\n')
    assert [(w.host, w.beside) for w in read(str(path)).workers] == [("a", 1.5)] * 2
    path.write_text('[[workers]]\nrole = "mixed"\nhost = "a"\nbeside = 0.5\n')
    with pytest.raises(FleetInvalid, match="beside is below 1"):
        read(str(path))


def test_json_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "fleet.json"
    path.write_text('{"workers": [{"role": "mixed", "count": 3, "settings": {"step_s": 1}}]}')
    assert [w.settings.step_s for w in read(str(path)).workers] == [1.0, 1.0, 1.0]


def test_other_blocks_hold_as_much() -> None:
    plan = read("mixed=1").with_blocks_of(32)
    assert plan.workers[0].settings.block_tokens == 32
    assert plan.workers[0].settings.blocks_total == CPU.blocks_total * CPU.block_tokens // 32


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("prefill", "no ROLE=COUNT"),
        ("cook=1", "role is 'cook'"),
        ("prefill=1", "it needs a decode or mixed worker"),
        ("decode=20000", "count"),
        ("missing.toml", "No such file"),
    ],
)
def test_what_is_wrong_with_counts_is_said(text: str, told: str) -> None:
    with pytest.raises(FleetInvalid, match=told):
        read(text)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("workers = 1 1", "fleet.toml"),
        ("colour = 1", "colour is not known"),
        ('engine = "steam"', "no engine is called 'steam'"),
        ('[[workers]]\nrole="decode"\nsettings={speed=1}', "workers 1, settings: speed"),
        ('[[workers]]\nrole="decode"\nsettings={step_s=-1}', "step_s is -1"),
        ('[[workers]]\nrole="decode"\nsettings={chunk_tokens=1.5}', "chunk_tokens is 1.5"),
        ('[[workers]]\nrole="decode"\nsettings={batch_s=0.1}', "batch_s is 0.1"),
        ('[[workers]]\nrole="decode"\nsettings={batch_s=["a"]}', "batch_s is"),
        ('[[workers]]\nrole="decode"\nsettings={block_tokens=0}', "above 0"),
        ('[[workers]]\nrole="decode"\n[[workers]]\nrole="decode"', "two workers have one name"),
        ('latency_ms = -1\n[[workers]]\nrole="decode"', "latency_ms is -1"),
    ],
)
def test_what_is_wrong_in_a_file_is_said(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(content)
    with pytest.raises(FleetInvalid, match=told):
        read(str(path))


def test_no_engine_of_that_name() -> None:
    with pytest.raises(FleetInvalid, match="no engine"):
        read("decode=1", "steam")
