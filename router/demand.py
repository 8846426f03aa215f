"""What this router was asked for, and how much of it came in time: what sizing is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from router.core.errors import RequestInvalid, TenantOverRate

if TYPE_CHECKING:
    from router.core.errors import RouterError
    from router.journal import Record

UNCACHED_KEPT: Final = 0.98
"""The mean hangs on the last fifty requests that were let in."""


class Demand:
    """Counters since the start. Who asks for more than it may have is no demand."""

    __slots__ = (
        "computed_tokens", "first_in_time", "judged", "met", "requests", "uncached_mean",
        "uncached_tokens",
    )  # fmt: skip

    def __init__(self) -> None:
        self.requests = 0
        """That arrived, refused ones too."""
        self.uncached_tokens = 0.0
        """Of their prompts, as foretold on arrival."""
        self.uncached_mean = 0.0
        """What a request counts for that was refused before its prompt was looked at."""
        self.computed_tokens = 0
        """Of prompts that have their first token, what workers computed."""
        self.judged = self.first_in_time = self.met = 0
        """Requests that ended and of which it is known whether they met the objectives; whose first
        token came in time; and those that met both."""

    def arrived(self, uncached: int) -> None:
        """It is let in."""
        self.requests += 1
        self.uncached_tokens += uncached
        mean = self.uncached_mean or uncached
        self.uncached_mean = mean * UNCACHED_KEPT + uncached * (1 - UNCACHED_KEPT)

    def turned_away(self, error: RouterError, uncached: int | None = None) -> None:
        """It is refused at once."""
        if isinstance(error, TenantOverRate):
            return
        self.requests += 1
        self.uncached_tokens += self.uncached_mean if uncached is None else uncached
        self.judged += 1

    def ended(self, record: Record, ttft_s: float, itl_s: float) -> None:
        """It was let in and is over; the objectives are its own."""
        first_s = record.ttft_s
        in_time = first_s is not None and first_s <= ttft_s
        match record.outcome:
            case "finished":
                met = in_time and _itl_s(record) <= itl_s
            case "failed" if record.error_code != RequestInvalid.code:
                met = False
            case "cancelled" if not in_time and _lasted_s(record) > ttft_s:
                met = False
            case _:
                return  # How it would have gone on nobody knows.
        self.judged += 1
        self.first_in_time += in_time
        self.met += met


def _itl_s(record: Record) -> float:
    """Mean time between its tokens; a stream of one token has none."""
    first, last = record.first_token_at, record.last_token_at
    if first is None or last is None or record.output_tokens < 2:
        return 0.0
    return (last - first) / (record.output_tokens - 1)


def _lasted_s(record: Record) -> float:
    return (record.ended_at or record.started_at) - record.started_at
