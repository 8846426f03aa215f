"""What became of each request of a run, as its client saw it."""

from __future__ import annotations

from array import array
from collections import Counter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from router.core.errors import RouterError
    from workers.api import Delta

GAP_GRAIN_S: Final = 1e-5
"""Gaps between tokens are counted to this."""
NEVER: Final = -1.0


class Outcomes:
    """The dispatch's sink. Requests have numbers from 0 on; their ids are `name_of` those."""

    def __init__(self, arrivals: array[float], clock: Callable[[], float]) -> None:
        """`arrivals`: in seconds, by number."""
        count = len(arrivals)
        self.arrived_s = arrivals
        self.first_s = array("d", [NEVER]) * count
        """When its first token was there; `NEVER` without one."""
        self.last_s = array("d", [NEVER]) * count
        self.tokens = array("q", [0]) * count
        self.cached_tokens = array("q", [0]) * count
        self.refused: Counter[str] = Counter()
        """By error code: refused before any token."""
        self.failed: Counter[str] = Counter()
        """By error code, after the first."""
        self.gaps: Counter[int] = Counter()
        """Between tokens, in `GAP_GRAIN_S`."""
        self.ended = bytearray(count)
        """1 for those that finished, 2 for those refused or failed."""
        self._clock = clock

    def __len__(self) -> int:
        return len(self.arrived_s)

    def deliver(self, deltas: list[Delta], prompt_extras: dict[str, bytes]) -> None:
        now = self._clock()
        for delta in deltas:
            number, count = number_of(delta.request_id), len(delta.token_ids)
            if count:
                self._tokens(number, count, now)
            if delta.cached_tokens is not None:
                self.cached_tokens[number] = delta.cached_tokens
            if delta.finish is not None:
                self.ended[number] = 1

    def _tokens(self, number: int, count: int, now: float) -> None:
        last_s = self.last_s[number]
        if last_s == NEVER:
            self.first_s[number] = now
            if count > 1:
                self.gaps[0] += count - 1
        else:
            # Several at once were computed one after the other.
            self.gaps[round((now - last_s) / count / GAP_GRAIN_S)] += count
        self.last_s[number] = now
        self.tokens[number] += count

    def fail(self, request_id: str, error: RouterError) -> None:
        number = number_of(request_id)
        told = self.refused if self.first_s[number] == NEVER else self.failed
        told[error.code] += 1
        self.ended[number] = 2

    # ------------------------------------------------------------ of one request

    def ttft_s(self, number: int) -> float:
        """From its arrival; `NEVER` without a first token."""
        first_s = self.first_s[number]
        return first_s if first_s == NEVER else first_s - self.arrived_s[number]

    def itl_s(self, number: int) -> float:
        """The mean over its tokens; 0 with one alone."""
        tokens = self.tokens[number]
        return 0.0 if tokens < 2 else (self.last_s[number] - self.first_s[number]) / (tokens - 1)


_DIGITS: Final = "0123456789abcdefghijklmnopqrstuvwxyz"
REQUESTS_MAX: Final = len(_DIGITS) ** 4


def name_of(number: int) -> str:
    """Four characters: no two such have one CRC-32, by which placement tells requests apart."""
    name = ""
    for _ in range(4):
        number, digit = divmod(number, len(_DIGITS))
        name = _DIGITS[digit] + name
    return name


def number_of(name: str) -> int:
    return int(name, 36)
