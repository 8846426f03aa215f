"""What placement asks of every worker, as one array for each question.

A large fleet is weighed in a few dozen array operations instead of a few hundred calls a question.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from router.core.fleet import WorkerView

    Floats = npt.NDArray[np.float64]
    Integers = npt.NDArray[np.int64]

_WIDTH: Final = 11


class Columns:
    """Of `workers`, in their order. Everything is in `WorkerView`'s words and units."""

    def __init__(self, workers: list[WorkerView], matrix: Floats, slots: dict[str, int]) -> None:
        self.workers = workers
        self._slots = slots
        self.queued, self.chunk_tokens = matrix[0], matrix[1]
        self.token_s, self.pair_s, self.step_s = matrix[2], matrix[3], matrix[4]
        self.stream_s, self.context_s, self.streams_held = matrix[5], matrix[6], matrix[7]
        self.pull_token_s = matrix[8]
        self.tie: Integers = matrix[9].astype(np.int64)
        self.family: Integers = matrix[10].astype(np.int64)

    def slots(self, workers: Sequence[WorkerView]) -> Integers:
        """Where these are."""
        slots = self._slots
        return np.fromiter((slots[w.id] for w in workers), np.int64, len(workers))

    def cached_tokens(self, by_worker: Mapping[str, int]) -> Floats:
        cached = np.zeros(len(self.workers))
        for worker_id, tokens in by_worker.items():
            if (slot := self._slots.get(worker_id)) is not None:
                cached[slot] = tokens
        return cached


class ColumnsKept:
    """The columns of the workers asked about last; what a worker said since is taken over."""

    def __init__(self) -> None:
        self._workers: list[WorkerView] = []
        self._weighed: list[int] = []
        self._slots: dict[str, int] = {}
        self._matrix = np.empty((_WIDTH, 0))

    def of(self, workers: Sequence[WorkerView]) -> Columns:
        asked = list(workers)
        if asked != self._workers:
            self._workers, self._weighed = asked, [-1] * len(asked)
            self._slots = {w.id: slot for slot, w in enumerate(asked)}
            self._matrix = np.empty((_WIDTH, len(asked)))
        weighed = [w.weighed for w in asked]
        if weighed != self._weighed:
            both = enumerate(zip(weighed, self._weighed, strict=True))
            changed = [slot for slot, (now, before) in both if now != before]
            self._matrix[:, changed] = np.array([_column(asked[slot]) for slot in changed]).T
            self._weighed = weighed
        return Columns(asked, self._matrix, self._slots)


def _column(w: WorkerView) -> tuple[float, ...]:
    _, token_s, pair_s, stream_s, context_s = w.rates.step.rates
    return (
        w.prefill_tokens_queued, w.rates.chunk_tokens,
        token_s, pair_s, w.step_s,
        stream_s, context_s, w.streams_held,
        w.pull_token_s, w.tie, w.family,
    )  # fmt: skip
