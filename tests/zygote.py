"""A process that has imported vLLM, and forks into routers, workers, and plain engines.

A worker imports vLLM three times over, in its own process and its engine's two, ten seconds each;
forked from here it starts in a second or two. It runs the same mains with the same arguments.

`zygote DESCRIPTOR` takes requests on that socket, one JSON line each, and answers each by a line.
`Start`'s fields are answered by the new process's `pid`, `{"poll": pid}` by its `status`, null
while it runs. When the socket closes, everything that it has started is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import itertools
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import traceback
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable

_PR_SET_PDEATHSIG = 1

_IMPORTED = (
    "vllm",
    "vllm.entrypoints.launchers.api_server.app_state",
    "vllm.entrypoints.launchers.app",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models.llama",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "transformers",
    "nixl",
    "kvtransfer.vllm_connector",
    "router.__main__",
    "router.engine",
    "router.front",
    "workers.__main__",
    "workers.engines.vllm",
    "workers.engines.vllm_config",
)
_START_PROCESSES = (
    "vllm.utils.system_utils",
    "vllm.v1.engine.coordinator",
    "vllm.v1.engine.core_client",
    "vllm.v1.engine.utils",
    "vllm.v1.executor.multiproc_executor",
)
"""vLLM's modules that ask `get_mp_context` how; on a CPU it answers `spawn`."""


@dataclass(frozen=True, slots=True)
class Start:
    """One process: as `python -m MODULE ARGUMENTS`, its output appended to `log`."""

    module: str
    arguments: list[str]
    log: str
    core: int | None = None
    change: str | None = None
    """One of `CHANGES`, made in this process alone."""


def _kernel_blocks_of_32() -> None:
    """Kernels that take 32 tokens a block at most, as FlashInfer and FlashMLA take 64 on GPUs."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes: Any = staticmethod(lambda *_, **__: [32])
    CPUAttentionBackend.get_supported_kernel_block_sizes = sizes


def _every_third_pull_fails() -> None:
    """By the receiver's word alone: what it read lies in blocks that must not be used."""
    from kvtransfer.receiver import Receiver

    ended, count = Receiver.ended, itertools.count(1)

    def some_fail(receiver: Receiver, wait_s: float = 0.0) -> list[Any]:
        return [
            pulled if next(count) % 3 else replace(pulled, error=PLANTED, first_token=None)
            for pulled in ended(receiver, wait_s)
        ]

    Receiver.ended = some_fail  # type: ignore[method-assign]


PLANTED = "a planted failure"
CHANGES: dict[str, Callable[[], None]] = {
    "kernel blocks of 32": _kernel_blocks_of_32,
    "every third pull fails": _every_third_pull_fails,
}


def main(argv: list[str]) -> int:
    with socket.socket(fileno=int(argv[0])) as channel:
        _import()
        serve(channel)
    return 0


def _import() -> None:
    for name in _IMPORTED:
        importlib.import_module(name)
    for name in _START_PROCESSES:
        module = importlib.import_module(name)
        module.get_mp_context = lambda: multiprocessing.get_context("fork")  # type: ignore[attr-defined]
    # It looks at a model's class in a process of its own, lest CUDA be initialized in this one.
    registry = importlib.import_module("vllm.model_executor.models.registry")
    registry._run_in_subprocess = lambda look: look()  # type: ignore[attr-defined]
    os.register_at_fork(after_in_child=_forget_signals)
    gc.freeze()  # Collections in children would copy every page.


def _forget_signals() -> None:
    """As in a new interpreter: a signal to an engine's process must not wake its parent's loop."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def serve(channel: socket.socket) -> None:
    """Answer requests until the other end is closed."""
    running: set[int] = set()
    stream = channel.makefile("rw")
    print(json.dumps({"ready": os.getpid()}), file=stream, flush=True)
    for line in stream:
        asked = json.loads(line)
        answer: dict[str, Any] = {}
        if "poll" in asked:
            pid, status = os.waitpid(asked["poll"], os.WNOHANG)
            answer["status"] = os.waitstatus_to_exitcode(status) if pid else None
            running.discard(pid)
        else:
            answer["pid"] = _start(Start(**asked), channel)
            running.add(answer["pid"])
        print(json.dumps(answer), file=stream, flush=True)
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _start(start: Start, channel: socket.socket) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    channel.detach()
    _be(start, parent)


def _be(start: Start, parent: int) -> NoReturn:
    """In the child: never returns."""
    status = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)
        if start.core is not None:
            os.sched_setaffinity(0, {start.core})
        log = os.open(start.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if start.change is not None:
            CHANGES[start.change]()
        sys.argv = [start.module, *start.arguments]
        runpy.run_module(start.module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001  # The process's edge: as the interpreter does.
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
