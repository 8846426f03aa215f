"""What a worker asks of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from workers.api import Delta, Generate, Load

    OnStep = Callable[[Load, list[Delta]], None]


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """For `WorkerHello`; known once the engine is ready. Field meanings are there."""

    engine: str
    version: str
    kv_digest: str
    transports: list[str]
    block_tokens: int
    block_bytes: int
    blocks_total: int
    max_model_len: int
    handoff_endpoint: str = ""


class EngineDead(Exception):
    """The engine is gone for good, and the worker with it."""


class Engine(Protocol):
    """What drives one model. All methods but `start` and `run` return at once."""

    async def start(self) -> EngineFacts:
        """Load, and step once. Raises when it can't."""

    async def run(self, on_step: OnStep) -> None:
        """Call `on_step` after each engine step, until cancelled. Raises `EngineDead`."""

    def submit(self, generate: Generate) -> None:
        """Take a request on. What is wrong with it comes as a delta of the next step."""

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drop requests and free what they hold; no delta follows. Unknown ids are ignored."""

    def release(self, tickets: Iterable[bytes]) -> None:
        """Give up the KV of finished prefills. Late or repeated is harmless."""

    def load(self) -> Load:
        """As of the last step."""

    def close(self) -> None: ...
