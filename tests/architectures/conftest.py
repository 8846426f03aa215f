"""One zygote, models and references a session; one group a row and variant, asked once."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.architectures.runs import Bench, Run, results
from tests.forks import Zygote

if TYPE_CHECKING:
    from collections.abc import Iterator

REPORT = Path(__file__).parents[2] / "reports" / "architectures.json"


@pytest.fixture(scope="session")
def bench() -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="architectures-") as name, Zygote(Path(name)) as zygote:
        yield Bench(zygote, Path(name))


@pytest.fixture
def run(request: pytest.FixtureRequest, bench: Bench) -> Run:
    """The run of the row and variant that a test names."""
    family, variant = request.param
    return bench.run(family, variant)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    found = results()
    if not found:
        return
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(json.dumps(found, indent=1))
    terminalreporter.section("families")
    for row in found:
        terminalreporter.line(f"{row['family']} ({row['variant']}): {row['said']}")
