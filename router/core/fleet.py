"""The router's view of its workers: what they said, and what it has placed on them since."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from workers.api import ACCEPTS, SILENCE_S, Load, Phase

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workers.api import WorkerHello

STALL_S = 60.0
"""A busy worker whose step counter stands still for this long is dead. Longer than any single
step: a GPU's chunk takes a second at most, a CPU's 8,192-token chunk some ten."""


@dataclass(slots=True)
class WorkerView:
    """One worker as the router knows it."""

    hello: WorkerHello
    load: Load
    heard_at: float
    stepped_at: float
    """When `load.steps` last moved, or the worker was last idle."""
    sent: int = 0
    """`Generate`s that this router has sent here."""
    unheard: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By request that is to be computed here and that `load` does not know of yet: which of `sent`
    it is, and its uncached prompt tokens."""
    streams: set[str] = field(default_factory=set)
    """Requests of this router that decode here or will."""

    @property
    def id(self) -> str:
        return self.hello.worker_id

    def accepts(self, phase: Phase) -> bool:
        return phase in ACCEPTS[self.hello.role] and not self.load.draining

    @property
    def prefill_tokens_queued(self) -> int:
        """What the worker says, other routers' included, and what it had not heard of then."""
        return self.load.prefill_tokens_queued + sum(tokens for _, tokens in self.unheard.values())

    def place(self, request_id: str, prompt_tokens: int) -> None:
        """The next `Generate` sent here is this one; the worker computes so much of it."""
        self.unheard[request_id] = self.sent + 1, prompt_tokens

    @property
    def streams_held(self) -> int:
        return max(self.load.running + self.load.waiting, len(self.streams))


class Fleet:
    """All workers that said hello and have not been lost."""

    def __init__(self) -> None:
        self._views: dict[str, WorkerView] = {}

    def __iter__(self) -> Iterator[WorkerView]:
        return iter(self._views.values())

    def __len__(self) -> int:
        return len(self._views)

    def get(self, worker_id: str) -> WorkerView | None:
        return self._views.get(worker_id)

    def join(self, hello: WorkerHello, now: float) -> None:
        """A worker is ready. One that joins again under a new epoch starts from nothing."""
        load = Load(0, False, 0, 0, 0, hello.blocks_total, hello.blocks_total, 0)
        self._views[hello.worker_id] = WorkerView(hello, load, heard_at=now, stepped_at=now)

    def report(self, worker_id: str, load: Load, heard: int, now: float) -> None:
        """A worker's load arrived, with how many of our `Generate`s it accounts for.

        Of an unknown worker it is ignored: it was lost meanwhile.
        """
        if view := self._views.get(worker_id):
            if load.steps != view.load.steps or not load.busy:
                view.stepped_at = now
            view.load = load
            if view.unheard:
                view.unheard = {r: p for r, p in view.unheard.items() if p[0] > heard}
            view.heard_at = now

    def remove(self, worker_id: str) -> None:
        self._views.pop(worker_id, None)

    def dead(self, now: float) -> list[tuple[str, str]]:
        """Workers to give up, each with the reason: silent, or busy without stepping."""
        found = []
        for view in self:
            if now - view.heard_at > SILENCE_S:
                found.append((view.id, f"silent for {now - view.heard_at:.1f} s"))
            elif view.load.busy and now - view.stepped_at > STALL_S:
                found.append((view.id, f"busy but not stepping for {now - view.stepped_at:.0f} s"))
        return found
