"""What the dispatch tells whoever asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from router.core.errors import RouterError
    from workers.api import Delta


class Sink(Protocol):
    """Where tokens and failures go: the front, or the simulator's bookkeeping."""

    def deliver(self, deltas: list[Delta], prompt_extras: dict[str, bytes]) -> None:
        """Deltas of one engine step. `prompt_extras` has, by request id and only with the first
        delta, what the prefill worker said of the prompt (`Delta.extras`). A first delta's
        `cached_tokens` are those that no worker had to compute."""

    def fail(self, request_id: str, error: RouterError) -> None: ...
