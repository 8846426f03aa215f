"""What a worker asks of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

    from workers.api import Delta, Generate, Item, Load

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
    tells_cache: bool = True
    step_tokens: int = 0
    constraints: str = ""
    dp_rank: int = 0
    dp_size: int = 1
    max_num_seqs: int = 0


@dataclass(frozen=True, slots=True)
class Stored:
    """Full blocks, each the next one's parent, that the prefix cache now has."""

    keys: list[Hashable]
    """The engine's own."""
    parent: Hashable | None
    token_ids: list[int]
    """`block_tokens` for each."""
    salt: str | None = None
    lora: str | None = None
    items: tuple[Item, ...] = ()
    """As far as these blocks show them; offsets from the first one's first token."""


@dataclass(frozen=True, slots=True)
class Removed:
    keys: list[Hashable]


@dataclass(frozen=True, slots=True)
class Cleared:
    """The prefix cache is empty."""


CacheChange = Stored | Removed | Cleared


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

    @property
    def dead(self) -> str | None:
        """Why a part of it serves nobody any more, such as its handoff; None while all is well."""

    def cache_changes(self) -> list[CacheChange]:
        """Of the prefix cache since the last call, in order."""

    def close(self) -> None: ...
