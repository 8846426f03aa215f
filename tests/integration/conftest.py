"""Real engines, once a session."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from deploy.local.aggregated import Aggregated
from deploy.local.group import LocalGroup
from deploy.local.keys import make as make_keys
from deploy.local.models import prepare
from tests.asking import ANSWER_S, LEASE_S, MODEL, READ_S, OneEngine
from tests.forks import ForkedGroup, Zygote

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FLAGS = ["--max-model-len", "2048", "--dtype", "float32", "--enforce-eager"]
# Chunks smaller than the longer prompts, so that these are handed off in pieces; room for six long
# prompts a worker; short patience, so that faults show in seconds.
OURS = [
    "--max-num-batched-tokens", "256", "--num-gpu-blocks-override", "64",
    "--kv-checksums", "full", "--lease-s", f"{LEASE_S:g}",
    "--kv-answer-s", f"{ANSWER_S:g}", "--kv-read-s", f"{READ_S:g}",
]  # fmt: skip
FRONT_FLAGS = [
    "--tool-call-parser", "hermes", "--enable-auto-tool-choice", "--enable-prompt-tokens-details",
]  # fmt: skip

# On a CPU vLLM dies of a seeded prompt that it cuts in two, as it does under load.
WHOLE = ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "2048"]
# What is tested is the handoff, however cheap it would be to do without.
# A busy machine makes first tokens late: who computes a prompt must not depend on it.
APART = ["--disaggregate", "always", "--hedge-ratio", "0"]


@pytest.fixture(scope="session")
def starting() -> Iterator[Aggregated]:
    """The engine that answers are compared with: it starts while the first group does."""
    model = str(prepare(MODEL))
    with Aggregated(model, served_as=MODEL, flags=[*FLAGS, *FRONT_FLAGS, *WHOLE]) as running:
        yield running


class Compiled:
    """What vLLM's engines have compiled, in a folder that is empty at first: a new machine's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.when_ready: set[Path] = set()

    def now(self) -> set[Path]:
        return set(self.folder.rglob("*.so"))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """By `group`'s engines."""
    return Compiled(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="session")
def group(starting: Aggregated, compiled: Compiled) -> Iterator[LocalGroup]:
    """A router with one prefill and one decode worker, in float32."""
    flags, router_flags = [*FLAGS, *OURS], [*FRONT_FLAGS, *APART]
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled.folder))
            group = LocalGroup(MODEL, flags=flags, router_flags=router_flags)
            running = stack.enter_context(group)
        compiled.when_ready = compiled.now()
        yield running


@pytest.fixture(scope="session")
def aggregated(starting: Aggregated) -> str:
    """What every answer is compared with. Its address."""
    starting.await_ready()
    return starting.url


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """It forks all groups after the first, which shows that a real start works."""
    with Zygote(tmp_path_factory.mktemp("zygote")) as running:
        yield running


@pytest.fixture(scope="session", params=["ucx", "tcp", "collective"])
def over(request: pytest.FixtureRequest) -> Iterator[tuple[str, LocalGroup]]:
    """A group for each transport, and its name. `ucx` is what `group` picks by itself."""
    name = request.param
    if name == "ucx":
        yield name, request.getfixturevalue("group")
        return
    flags, front = [*FLAGS, *OURS, "--kv-transports", name], [*APART]
    if name == "tcp":  # One of them has keys, which vLLM's own processes must be given as well.
        keys: Path = request.getfixturevalue("tmp_path_factory").mktemp("keys") / "curve"
        make_keys(keys)
        flags += ["--curve-secret-file", f"{keys}/worker.secret"]
        flags += ["--curve-routers-file", f"{keys}/router.public"]
        front += ["--curve-secret-file", f"{keys}/router.secret"]
        front += ["--curve-workers-file", f"{keys}/worker.public"]
    zygote: Zygote = request.getfixturevalue("zygote")
    with ForkedGroup(zygote, MODEL, flags=flags, router_flags=front) as running:
        yield name, running


@pytest.fixture(scope="session")
def one_engine(aggregated: str) -> OneEngine:
    return OneEngine(aggregated)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of a transport's tests together: a group takes half a minute to start."""
    order = {"ucx": 0, "tcp": 1, "collective": 2}

    def transport(item: pytest.Item) -> int:
        callspec = getattr(item, "callspec", None)
        return order[callspec.params.get("over", "ucx")] if callspec else 0

    items.sort(key=transport)
