"""Which of an engine's steps are over on its device, asked without ever waiting for one."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS_MAX: Final = 64
"""vLLM plans a handful of steps before the first of them is over."""


class Event(Protocol):
    """The part of `torch.cuda.Event` that is used."""

    def record(self) -> None:
        """Mark this point of the current stream."""

    def query(self) -> bool:
        """Whether the device has passed the last mark."""


What = TypeVar("What")


class StepEvents(Generic[What]):
    """Remembers something for each step, and gives it back once the step's kernels have run.

    For one thread, the one that the engine steps in: an event marks that thread's current stream.
    Where a step is over when its call returns (on a CPU), everything comes back at once.
    """

    def __init__(self, device: str, make: Callable[[], Event] | None = None) -> None:
        """`make` makes events in place of CUDA's."""
        self._make = make or (None if device == "cpu" else lambda: _event(device))
        self._steps: deque[tuple[What, Event | None]] = deque()
        self._spare: list[Event] = []

    def __len__(self) -> int:
        """Steps that were recorded and not given back."""
        return len(self._steps)

    def record(self, what: What) -> None:
        """All that the current stream has been handed so far belongs to the step of `what`.

        Raises `RuntimeError` with `STEPS_MAX` steps outstanding: the device has hung.
        """
        if len(self._steps) >= STEPS_MAX:
            raise RuntimeError(f"{len(self._steps)} steps are not over on the device")
        event = None
        if self._make is not None:
            event = self._spare.pop() if self._spare else self._make()
            event.record()
        self._steps.append((what, event))

    def over(self) -> list[What]:
        """Give back what was recorded for steps that are over since the last call, oldest first.

        A stream runs in order, so nothing comes before what was recorded earlier.
        """
        found = []
        while self._steps:
            what, event = self._steps[0]
            if event is not None:
                if not event.query():
                    break
                self._spare.append(event)
            self._steps.popleft()
            found.append(what)
        return found


def _event(device: str) -> Any:
    import torch

    with torch.cuda.device(device):
        return torch.cuda.Event()  # Without timing: recording one costs about a microsecond.
