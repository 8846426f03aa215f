"""What the image promises, by its own steps run in a folder: no container engine is needed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable
from importlib.metadata import Distribution
from pathlib import Path

import pytest

import tandem
from tests.dockerfile import TOP, Stage, copy_context, lineage, sent, stages, tracked

UID = 10001
NOT_SHIPPED = ("tests/", "loadtests/", "requirements/")
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def read(accelerator: str = "cpu") -> dict[str, Stage]:
    text = (TOP / "Dockerfile").read_text(encoding="utf-8")
    return stages(text, {"ACCELERATOR": accelerator})


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for /: the build stage's own command, run over this environment's packages."""
    root = tmp_path_factory.mktemp("image")
    prefix, source = root / "opt/tandem", root / "src"
    copy_context(source)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", prefix], check=True)
    site = prefix / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    # Our packages come from what was built and the pinned ones from here. This environment's own
    # editable Tandem does not: a .pth in a folder that a .pth names is not read.
    (site / "site-packages/pinned.pth").write_text(sysconfig.get_path("purelib"))
    (step,) = read()["build"].all("RUN")
    command = step.rest.replace("/opt/tandem", str(prefix)).replace("/src", str(source))
    env = {**os.environ, "PIP_NO_INDEX": "1"}
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, env=env, cwd=root, check=False
    )
    assert done.returncode == 0, done.stderr
    (root / "cache").mkdir()
    if os.geteuid() == 0:
        os.chown(root / "cache", UID, UID)
    subprocess.run(["chmod", "-R", "a-w", prefix, source], check=True)
    return root


@pytest.fixture(scope="session")
def run(image: Path) -> Run:
    """Run a command as the image would: its environment, a uid without a name, read-only code."""
    places = {"/opt/tandem": str(image / "opt/tandem"), "/cache": str(image / "cache")}
    env = {"PATH": os.environ["PATH"]}
    for step in [i for stage in lineage("image", read()) for i in stage.all("ENV")]:
        for name, value in step.pairs.items():
            here = value.replace("$PATH", env["PATH"])
            for inside, outside in places.items():
                here = here.replace(inside, outside)
            env[name] = here

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*_unprivileged(), *command],
            capture_output=True, text=True, env=env, cwd=image / "cache", timeout=60, check=False,
        )  # fmt: skip

    return run


def _unprivileged() -> list[str]:
    """Root turns into the image's uid, which may read (Python may lie in root's home), no more."""
    if os.geteuid() != 0:
        return []
    return [
        "setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--no-new-privs",
        "--bounding-set=-all,+dac_read_search", "--inh-caps=-all,+dac_read_search",
        "--ambient-caps=-all,+dac_read_search",
    ]  # fmt: skip


# ------------------------------------------------------------ what goes in


def test_the_image_carries_every_module_that_is_tracked(image: Path) -> None:
    (info,) = image.glob("opt/tandem/lib/*/site-packages/tandem_serve-*.dist-info")
    carried = {str(f) for f in Distribution.at(info).files or [] if f.suffix == ".py"}
    ours = {f for f in tracked("*.py") if not f.startswith(NOT_SHIPPED)}
    assert carried == ours, "see `packages` in pyproject.toml, and .dockerignore"


@pytest.mark.parametrize(
    "file",
    [
        ".git/config", ".venv/bin/python", ".env", "id_ed25519", "docs/image.md",
        "tests/unit/test_image.py", "requirements/pip.conf", "router/__pycache__/engine.pyc",
        "deploy/local/__pycache__/up.cpython-311.pyc", "tandem_serve.egg-info/PKG-INFO",
    ],
)  # fmt: skip
def test_a_builder_is_not_sent_what_the_image_needs_not(file: str) -> None:
    ignore = (TOP / ".dockerignore").read_text(encoding="utf-8")
    assert not sent(file, ignore)


def test_a_builder_is_sent_what_the_image_needs() -> None:
    ignore = (TOP / ".dockerignore").read_text(encoding="utf-8")
    for file in (
        "tandem.py",
        "router/core/errors.py",
        "requirements/install.sh",
        "LICENSE",
        "requirements/torchvision_without_operators.py",
    ):
        assert sent(file, ignore), file


@pytest.mark.parametrize(("accelerator", "what"), [("cpu", "runtime"), ("gpu", "gpu")])
def test_each_accelerator_installs_its_own_pins(accelerator: str, what: str) -> None:
    found = read(accelerator)
    steps = [i.rest for stage in lineage("build", found) for i in stage.all("RUN")]
    assert [s.split()[-1] for s in steps if "install.sh" in s] == [what]
    lock = (TOP / f"requirements/{what}.lock").read_text(encoding="utf-8")
    project = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = [p for p in project["optional-dependencies"][accelerator] if "==" in p]
    assert len(pinned) >= 2
    assert [p for p in pinned if f"\n{p} " not in lock] == []


def test_the_label_tells_the_version_that_is_inside() -> None:
    project = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    labels = read()["image"].last("LABEL").pairs
    assert labels["org.opencontainers.image.version"] == project["version"]


# ------------------------------------------------------------ how it runs


def test_the_image_names_a_uid_that_kubernetes_can_tell_from_root() -> None:
    user = read()["image"].last("USER").rest
    assert user == f"{UID}:{UID}"


@pytest.mark.parametrize("command", ["version", *(f"{c} --help" for c in tandem._COMMANDS)])
def test_every_role_answers_as_an_unprivileged_user_with_its_code_read_only(
    command: str, run: Run
) -> None:
    words = read()["image"].last("ENTRYPOINT").words
    done = run(*words, *command.split())
    assert done.returncode == 0, done.stderr
    assert "tandem" in done.stdout


def test_only_the_cache_can_be_written(image: Path, run: Run) -> None:
    assert run("touch", f"{image}/opt/tandem/new").returncode != 0
    assert run("touch", f"{image}/cache/new").returncode == 0


def test_models_are_made_under_the_cache(image: Path, run: Run) -> None:
    place = "from workers.models import *; print(prepared_folder('m'))"
    done = run("python", "-c", place)
    assert done.stdout.strip() == f"{image}/cache/tandem/models/m", done.stderr


def test_the_first_process_leaves_on_sigterm_while_it_still_loads() -> None:
    """The kernel gives PID 1 no signal that it has no handler for, and imports take seconds."""
    slow = (
        "import sys, time, types, tandem\n"
        "slow = types.ModuleType('slow')\n"
        "slow.main = lambda args: print('loading', flush=True) or time.sleep(20)\n"
        "sys.modules['slow'] = slow\n"
        "tandem._COMMANDS['slow'] = ('slow', '')\n"
        "tandem.main(['slow'])\n"
    )
    namespace = ["unshare", "--map-root-user"] if os.geteuid() else ["unshare"]
    first = subprocess.Popen(
        [*namespace, "--pid", "--fork", "--kill-child", sys.executable, "-c", slow],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=TOP,
    )  # fmt: skip
    with first:
        assert first.stdout is not None
        assert first.stderr is not None
        if first.stdout.readline() != "loading\n":
            first.kill()
            pytest.skip(f"no process namespaces here: {first.stderr.read()}")
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGTERM)
        try:
            assert first.wait(timeout=10) == 128 + signal.SIGTERM
        finally:
            first.kill()
