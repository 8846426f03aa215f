"""House rules that no linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from controller.settings import ControllerSettings
from router.settings import RouterSettings
from workers.flags import choices, default_text, flag, variable
from workers.settings import WorkerSettings

if TYPE_CHECKING:
    from pydantic_settings import BaseSettings

TOP = Path(__file__).parents[2]
LINES_MAX = 500
FUNCTION_LINES_MAX = 60
PARAMETERS_MAX = 5
BANNED_NAMES = {"utils", "common", "helpers", "misc"}
MAY_IMPORT_VLLM = re.compile(
    r"kvtransfer/vllm_\w+\.py|workers/engines/vllm\w*\.py|workers/vllm_codec\.py"
    r"|router/(front|engine|no_engine|plain)\.py"
    r"|deploy/local/(vllm_front|bare_front|peers/front)\.py"
)
MACHINE_PATH = re.compile("/" + r"(work|root|farm)/|/tmp/" + r"[a-z]+/")


def tracked(pattern: str) -> list[Path]:
    """Files that git knows or would add."""
    found = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern],
        cwd=TOP,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    return [Path(f) for f in found if (TOP / f).is_file()]


CODE = [f for f in tracked("*.py") if f.parts[0] != "tests"]


def test_there_is_code_to_look_at() -> None:
    assert len(CODE) > 10


@pytest.mark.parametrize("file", CODE, ids=str)
def test_a_module_has_one_concept(file: Path) -> None:
    source = (TOP / file).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LINES_MAX
    assert not BANNED_NAMES & {file.stem, *file.parts}
    tree = ast.parse(source)
    assert ast.get_docstring(tree), "a module says in one sentence what it is"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < FUNCTION_LINES_MAX, node.name
            parameters = [a for a in node.args.args if a.arg not in ("self", "cls")]
            assert len(parameters) <= PARAMETERS_MAX, node.name


@pytest.mark.parametrize("file", CODE, ids=str)
def test_only_the_modules_named_for_it_import_vllm(file: Path) -> None:
    if MAY_IMPORT_VLLM.fullmatch(file.as_posix()):
        return
    for node in ast.parse((TOP / file).read_text(encoding="utf-8")).body:
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not {n.split(".")[0] for n in names} & {"vllm", "torch"}


def test_no_file_carries_a_path_of_a_machine() -> None:
    for file in tracked("*"):
        if file.suffix == ".lock":
            continue
        text = (TOP / file).read_text(encoding="utf-8", errors="replace")
        assert not MACHINE_PATH.search(text), file


def test_every_relative_link_in_the_docs_leads_somewhere() -> None:
    for file in tracked("*.md"):
        text = (TOP / file).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (TOP / file.parent / target).exists(), f"{file}: {target}"


def test_every_error_code_is_documented() -> None:
    codes = re.findall(r'"([a-z_]+)"', "\n".join(
        line for line in (TOP / "router/core/errors.py").read_text().splitlines()
        if "status, code" in line or "code: ClassVar" in line
    ))  # fmt: skip
    page = (TOP / "docs/errors.md").read_text(encoding="utf-8")
    assert len(codes) > 5
    assert [c for c in codes if f"`{c}`" not in page] == []


@pytest.mark.parametrize("kind", [WorkerSettings, RouterSettings, ControllerSettings])
def test_every_setting_is_documented_with_its_default_and_its_range(
    kind: type[BaseSettings],
) -> None:
    page = (TOP / "docs/settings.md").read_text(encoding="utf-8")
    prefix = kind.model_config["env_prefix"]
    documented = re.findall(rf"^\| `--[a-z-]+` \| `({prefix}\w+)` \|", page, re.MULTILINE)
    assert documented == [variable(prefix, name) for name in kind.model_fields]
    for name, field in kind.model_fields.items():
        start = f"| `{flag(name)}` | `{variable(prefix, name)}` |"
        rows = [line for line in page.splitlines() if line.startswith(start)]
        assert len(rows) == 1, start
        _, _, _, values, default, what, _ = rows[0].split("|")
        assert default.strip().strip("`") == default_text(field), name
        assert what.strip()
        bounds = {
            getattr(m, b) for m in field.metadata for b in ("gt", "ge", "le") if hasattr(m, b)
        }
        assert bounds <= {int(n) for n in re.findall(r"\b\d+\b", values)}, name
        assert [c for c in choices(field) if f"`{c}`" not in values] == [], name


def test_every_metric_is_documented() -> None:
    page = (TOP / "docs/metrics.md").read_text(encoding="utf-8")
    names: set[str] = set()
    for file in CODE:
        if file.parts[0] in ("router", "workers", "controller"):
            names |= set(
                re.findall(r'"(tandem_(?:router|worker|controller)_\w+)"', (TOP / file).read_text())
            )
    assert [n for n in sorted(names) if f"`{n}`" not in page] == []
