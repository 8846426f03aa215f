"""The short form of `make attack` on real processes: a test an attack, times not judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from deploy.local.models import prepare
from loadtests.attack.__main__ import attacks_of
from tests.asking import MODEL

if TYPE_CHECKING:
    from pathlib import Path

SHORT = [attack.name for attack in attacks_of("", short=True)]
RUN_S = 290.0


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By attack, what `--json` has of it."""
    prepare(MODEL)
    file: Path = tmp_path_factory.mktemp("attack") / "attack.json"
    command = [sys.executable, "-m", "loadtests.attack", "--short", "--json", str(file)]
    ran = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=RUN_S, env=dict(os.environ)
    )
    assert file.exists(), ran.stderr[-3000:]
    print(ran.stdout)
    return {found["name"]: found for found in json.loads(file.read_text())["attacks"]}


@pytest.mark.parametrize("name", SHORT)
def test_attack_breaks_no_bound(name: str, report: dict[str, Any]) -> None:
    assert report[name]["broken"] == []


def test_bystanders_streamed_all_the_while(report: dict[str, Any]) -> None:
    assert sum(found["others"].get("streams", 0) for found in report.values()) > len(SHORT)
