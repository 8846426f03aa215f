"""What a transition of a request's life asks the shell to do (`router.core.lifecycle`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from router.core.errors import RouterError


@dataclass(frozen=True, slots=True)
class Enqueue:
    """Keep it until `Turn`; one that is kept already keeps its place."""


@dataclass(frozen=True, slots=True)
class Place:
    """Find workers, rather not `avoid`; answer with `Placed`, `NotPlaced` or `NoRoom`."""

    avoid: str | None = None
    after: int | None = None
    """A token that the client has, and that is part of the prompt from now on."""


@dataclass(frozen=True, slots=True)
class SendPrefill:
    worker: str
    ticket: bytes | None


@dataclass(frozen=True, slots=True)
class SendDecode:
    worker: str
    ticket: bytes


@dataclass(frozen=True, slots=True)
class SendBoth:
    worker: str


@dataclass(frozen=True, slots=True)
class AbortOn:
    worker: str


@dataclass(frozen=True, slots=True)
class ReleaseKV:
    worker: str
    ticket: bytes


@dataclass(frozen=True, slots=True)
class Deliver:
    """Hand the delta that caused this to the client."""


@dataclass(frozen=True, slots=True)
class FailClient:
    error: RouterError


Effect = (
    Enqueue
    | Place
    | SendPrefill
    | SendDecode
    | SendBoth
    | AbortOn
    | ReleaseKV
    | Deliver
    | FailClient
)
