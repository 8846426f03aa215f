"""A thread's CUDA device: every thread of ours that touches device memory says which one it is.

A thread that says nothing is on device 0, where CUDA then makes a context of its own (half a GiB),
and libraries that look for the current device find the wrong one. For `cpu` all of it is nothing.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

HOST = "cpu"


@contextmanager
def on(device: str) -> Iterator[None]:
    """This device is the thread's for as long as the block lasts."""
    if device == HOST:
        yield
        return
    import torch

    with torch.cuda.device(device):
        yield


def use(device: str) -> None:
    """This device is the thread's from here on: for threads of ours, as they begin."""
    if device == HOST:
        return
    import torch

    torch.cuda.set_device(device)


def settle(device: str) -> None:
    """Returns when all that was handed to the device is done, whoever handed it over.

    What a library has queued there goes on when the library is gone: `cuStreamDestroy` does not
    wait. As long as the engine's queued steps last, tens of milliseconds mostly.
    """
    if device == HOST:
        return
    import torch

    torch.cuda.synchronize(device)
