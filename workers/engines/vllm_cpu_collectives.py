"""Two collectives that vLLM lacks on a CPU, without which ranks can't share experts.

vLLM 0.32 moves each rank's tokens to the experts and back by `all_gatherv` and `reduce_scatterv`.
On a CPU both raise NotImplementedError, although its expert layers ask for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

if TYPE_CHECKING:
    from collections.abc import Sequence


def all_gatherv(
    self: Any,
    input_: torch.Tensor | list[torch.Tensor],
    dim: int = 0,
    sizes: list[int] | None = None,
) -> torch.Tensor | list[torch.Tensor]:
    """Every rank's rows, (sum(sizes), …): rank r gives `sizes[r]`; without it all give alike."""
    if isinstance(input_, list):
        return [_gathered(self, each, sizes) for each in input_]
    assert dim == 0, "rows only"
    return _gathered(self, input_, sizes)


def reduce_scatterv(
    self: Any, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
) -> torch.Tensor:
    """The ranks' sum of (sum(sizes), …), of which this rank keeps its `sizes[rank]` rows."""
    assert dim == 0, "rows only"
    summed = input_.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(summed, group=self.device_group)
    sizes = sizes or _alike(self, summed.shape[0] // self.world_size)
    first = sum(sizes[: self.rank_in_group])
    return summed[first : first + sizes[self.rank_in_group]].clone()


def _gathered(self: Any, rows: torch.Tensor, sizes: Sequence[int] | None) -> torch.Tensor:
    sizes = sizes or _alike(self, rows.shape[0])
    assert rows.shape[0] == sizes[self.rank_in_group], "the rows that were announced"
    # Gloo gathers equal shapes only: all send as many rows as the longest has.
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=self.device_group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _alike(self: Any, rows: int) -> list[int]:
    return [rows] * int(self.world_size)


def add() -> None:
    """Give them to vLLM's communicator, if it still has none of its own."""
    for ours in (all_gatherv, reduce_scatterv):
        if ours.__name__ not in vars(CpuCommunicator):
            setattr(CpuCommunicator, ours.__name__, ours)
