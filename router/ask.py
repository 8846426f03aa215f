"""What the front asks of the dispatch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from workers.api import Item

TOKEN_BYTES: Final = 5
"""Bytes of one token id on the wire, at most."""
OTHER_BYTES: Final = 16_384
"""The message's other fields, and what tries add to the prompt. Each is bounded by itself."""


class Reserve(StrEnum):
    """When the decode worker sets blocks aside for a prompt that another computes."""

    AT_DISPATCH = "at_dispatch"
    """At once: what is computed is read while the rest is being computed."""
    AT_LAST_STEP = "at_last_step"
    """When the step begins that completes the prompt: all that came before is read meanwhile. For
    prompts of one step it is as `AT_PREFILL_DONE`."""
    AT_PREFILL_DONE = "at_prefill_done"
    """Afterwards: its memory serves others meanwhile, and the whole prompt is read at the end."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request for one sequence, as the front hands it over."""

    request_id: str
    prompt_token_ids: list[int]
    max_tokens: int
    params: bytes = b""
    cache_salt: str | None = None
    lora_name: str | None = None
    items: tuple[Item, ...] = ()
    """Images and the like in the prompt."""
    contents: bytes = b""
    """The items' contents, in the engine's encoding."""
    priority: int = 0
    relay: bool = False
    """The prefill worker may sample the first token: what follows stays what it would be."""
    generated: int = 0
    """Tokens at the prompt's end that the client has already."""
    tenant: str = ""
    """Whom it is charged to."""
    ttft_s: float | None = None
    """Its objective; None for the router's own."""
    name: str = ""
    """What the client calls the request; for `explain`, several asks may share it."""

    @property
    def identity(self) -> tuple[list[int], str | None, str | None, tuple[Item, ...]]:
        """Tokens, salt, adapter and items: equal prefixes have them in common."""
        return self.prompt_token_ids, self.cache_salt, self.lora_name, self.items

    @property
    def message_bytes(self) -> int:
        """An upper bound of the message that a worker gets for it, at any try."""
        items = sum(len(item.identifier) + 32 for item in self.items)
        opaque = len(self.params) + len(self.contents)
        return TOKEN_BYTES * len(self.prompt_token_ids) + items + opaque + OTHER_BYTES

    @property
    def only_one(self) -> bool:
        """The prefill worker says all there is to say: nothing is handed off."""
        return self.relay and self.max_tokens == 1

    def after(self, token: int) -> Ask:
        """The same, from a token on that the client has: it is part of the prompt now."""
        return replace(
            self,
            prompt_token_ids=[*self.prompt_token_ids, token],
            max_tokens=self.max_tokens - 1,
            generated=self.generated + 1,
        )
