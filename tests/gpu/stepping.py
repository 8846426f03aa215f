"""Steps that are over, and blocks copied to the host, while the device computes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from kvtransfer.device_pieces import DevicePieces
from kvtransfer.step_events import StepEvents
from tests.gpu.machine import await_device
from tests.gpu.transport import UNIT, Kv

if TYPE_CHECKING:
    from tests.gpu.machine import Machine
    from tests.gpu.report import Rows

BUSY_STEPS = 40


def run(rows: Rows, machine: Machine) -> None:
    with rows.row("events") as row:
        steps: StepEvents[int] = StepEvents(machine.device)
        compute = _compute(machine)
        began = time.perf_counter()
        compute()
        steps.record(1)
        asked = steps.over()
        row.figures["host_us"] = (time.perf_counter() - began) * 1e6
        assert machine.dry or asked == [], "a step was told to be over that had just begun"
        await_device(machine.device)
        row.figures["step_ms"] = (time.perf_counter() - began) * 1e3
        assert asked + steps.over() == [1]
    with rows.row("pieces") as row:
        kv = Kv(machine.device, 4, 64, filled=True)
        pieces = DevicePieces(kv.memory)
        asked_for = [(layer, list(range(layer, 64, 3))) for layer in range(4)]
        for warm in (True, False):
            compute()
            began = time.perf_counter()
            copy = pieces.start(asked_for)
            assert copy is not None
            started = time.perf_counter()
            while not copy.ready():
                time.sleep(0.0001)
            came = time.perf_counter()
            await_device(machine.device)
            computed = time.perf_counter()
            found = copy.take()
            if not warm:
                row.figures |= {
                    "start_us": (started - began) * 1e6,
                    "copy_ms": (came - began) * 1e3,
                    "compute_ms": (computed - began) * 1e3,
                }
        units = kv.units().cpu().numpy().view(np.uint8)
        for (layer, blocks), got in zip(asked_for, found, strict=True):
            assert np.array_equal(got, units[[layer * 64 + b for b in blocks]]), "other bytes"
            assert got.shape[1] == UNIT


def _compute(machine: Machine) -> Any:
    """Tens of milliseconds of matrix products on the compute stream; little on a CPU."""
    import torch

    size = 64 if machine.dry else 4096
    matrix = torch.ones(size, size, dtype=torch.float32 if machine.dry else torch.bfloat16,
                        device=machine.device)  # fmt: skip
    for _ in range(2):
        matrix @ matrix
    await_device(machine.device)

    def compute() -> None:
        for _ in range(BUSY_STEPS):
            matrix @ matrix

    return compute
