"""Arrays and tensors over KV memory whose bytes are another's to keep alive: nothing is copied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kvtransfer.transports.api import Segment


class _AtAddress:
    """What numpy asks of an object whose bytes it may share."""

    def __init__(self, address: int, size: int) -> None:
        self.__array_interface__ = _interface(address, size)


class _AtDeviceAddress:
    """The same for a GPU's memory: the public way to a tensor over a pointer without a copy.

    `torch.from_blob` exists only in C++.
    """

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = _interface(address, size)


def _interface(address: int, size: int) -> dict[str, Any]:
    return {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


def array(address: int, size: int) -> NDArray[np.uint8]:
    """Host memory as an array, writable."""
    import numpy as np

    return np.asarray(_AtAddress(address, size))


def tensor(device: str, address: int, size: int) -> Any:
    """Memory of `device` as a torch tensor of bytes, writable."""
    import torch

    if device == "cpu":
        return torch.from_numpy(array(address, size))
    return torch.as_tensor(_AtDeviceAddress(address, size), device=device)


def span_bytes(segment: Segment) -> int:
    """From the first byte of a segment's first block to the last of its last."""
    return segment.stride * (segment.blocks - 1) + segment.block_bytes
