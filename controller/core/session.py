"""A reflector's decisions: what to ask the API server next, and what its answers mean.

A session keeps the set of EndpointSlices that a label selector names. It speaks through a shell
that has sockets and a clock:

1. `next(now)` gives the query to send, or None before `next_at`.
2. The answer is told by `refused` (any status but 200), or, with status 200, by `opened` and then
   `feed` for each chunk.
3. `ended` says that the answer's body is complete, `failed` that there was none, that it broke off
   or that `give_up_at` passed. Once `done` is true, which any of these may bring about, the
   exchange is over and the shell closes the connection.

A snapshot comes from a watch that begins with all objects (WatchList), or from a paged list where
the server has no such watch; from then on changes come from a watch. The set is replaced as a
whole, and never while there is only a part of the new one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final

import msgspec

from controller.core.patience import Backoff, Patience
from controller.core.slices import INITIAL_EVENTS_END, Event, Slice, SliceList, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PAGE: Final = 500
PIECE_MAX: Final = 16 << 20
"""Bytes of one event or page; a slice of 1,000 endpoints has half a megabyte."""
_DECODE_EVENT: Final = msgspec.json.Decoder(Event)
_DECODE_SLICE: Final = msgspec.json.Decoder(Slice)
_DECODE_LIST: Final = msgspec.json.Decoder(SliceList)
_DECODE_STATUS: Final = msgspec.json.Decoder(Status)


class Phase(StrEnum):
    """What is asked for."""

    SNAPSHOT = "snapshot"
    LIST = "list"
    WATCH = "watch"


class Failure(StrEnum):
    """Why an exchange came to nothing: a closed set, for a metric's label."""

    UNREACHABLE = "unreachable"
    SILENT = "silent"
    BROKEN_OFF = "broken_off"
    MALFORMED = "malformed"
    ENDED_EARLY = "ended_early"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    THROTTLED = "throttled"
    EXPIRED = "expired"
    REFUSED = "refused"


_BY_STATUS: Final = {
    401: Failure.UNAUTHORIZED,
    403: Failure.FORBIDDEN,
    429: Failure.THROTTLED,
}


@dataclass(slots=True)
class _Exchange:
    """The request under way, and what has come of it."""

    phase: Phase
    asked_at: float
    opened_at: float | None = None
    in_snapshot: bool = False
    buffer: bytearray = field(default_factory=bytearray)


class Session:
    """One watch of one set."""

    def __init__(
        self,
        selector: str,
        uniform: Callable[[float, float], float],
        patience: Patience | None = None,
        page: int = PAGE,
    ) -> None:
        """`uniform` draws a number between two: a session has no chance of its own."""
        self.slices: Mapping[str, Slice] | None = None
        """By name, the set as last known, however long ago; None before it was ever known."""
        self.heard_at: float | None = None
        """When the server last said something that makes `slices` its own set."""
        self.give_up_at = 0.0
        self.requests = dict.fromkeys(Phase, 0)
        self.failures = dict.fromkeys(Failure, 0)
        self.trouble: str | None = None
        """What went wrong since the server last said something good."""
        self._selector = selector
        self._uniform = uniform
        self._patience = patience or Patience()
        self._backoff = Backoff(self._patience, uniform)
        self._page = page
        self._exchange: _Exchange | None = None
        self._lists = False
        """The server has no watches that begin with a snapshot."""
        self._version: str | None = None
        """Where a watch goes on from; None where a snapshot is needed."""
        self._snapshot_at = 0.0
        self._staged: dict[str, Slice] = {}
        self._more = ""
        """Names the next page of a list that is under way."""
        self._listed_at = 0.0
        """When its first page was asked for: all pages are of that moment."""

    @property
    def next_at(self) -> float:
        return self._backoff.next_at

    @property
    def done(self) -> bool:
        return self._exchange is None

    # ------------------------------------------------------------ what to ask

    def next(self, now: float) -> dict[str, str] | None:
        """The query of the request to send now, if any."""
        assert self._exchange is None, "one request at a time"
        if now < self.next_at:
            return None
        exchange = self._exchange = _Exchange(self._phase(now), now)
        self.requests[exchange.phase] += 1
        self._backoff.sent(now)
        self.give_up_at = now + self._patience.answer_s
        query = {"labelSelector": self._selector}
        if exchange.phase is Phase.LIST:
            if not self._more:
                self._staged, self._listed_at = {}, now
                return query | {"limit": str(self._page)}
            return query | {"limit": str(self._page), "continue": self._more}
        seconds = self._uniform(self._patience.watch_min_s, self._patience.watch_max_s)
        query |= {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(max(1, int(seconds))),
        }
        if exchange.phase is Phase.WATCH and self._version is not None:
            return query | {"resourceVersion": self._version}
        exchange.in_snapshot = True
        self._staged = {}
        return query | {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}

    def _phase(self, now: float) -> Phase:
        if now >= self._snapshot_at + self._patience.resync_s:
            self._version = None
        if self._version is not None:
            return Phase.WATCH
        return Phase.LIST if self._lists else Phase.SNAPSHOT

    # ------------------------------------------------------------ what came of it

    def opened(self, now: float) -> None:
        """The answer has begun, with status 200."""
        self._under_way().opened_at = now
        self._be_patient(now)

    def feed(self, chunk: bytes, now: float) -> bool:
        """Some bytes of the body; True when `slices` changed."""
        exchange = self._under_way()
        exchange.buffer += chunk
        lines: list[bytes] = []
        if exchange.phase is not Phase.LIST and b"\n" in chunk:
            *lines, rest = bytes(exchange.buffer).split(b"\n")
            exchange.buffer = bytearray(rest)
        if len(exchange.buffer) > PIECE_MAX:
            self._fail(Failure.MALFORMED, f"more than {PIECE_MAX} bytes in one piece", now)
            return False
        self._be_patient(now)
        changed = False
        for line in lines:
            if not self.done and line.strip():
                changed |= self._on_line(exchange, line, now)
        return changed

    def ended(self, now: float) -> bool:
        """The body is complete; True when `slices` changed."""
        exchange = self._under_way()
        if exchange.phase is Phase.LIST:
            return self._on_page(bytes(exchange.buffer), now)
        if not self._was_steady(exchange, now):
            self._fail(Failure.ENDED_EARLY, "the watch ended as soon as it began", now)
        else:
            self._backoff.steady()
            self._over(now)
        return False

    def refused(self, status: int, body: bytes, retry_after_s: float | None, now: float) -> None:
        """Any status but 200."""
        exchange = self._under_way()
        try:
            said = _DECODE_STATUS.decode(body)
        except msgspec.DecodeError:
            said = Status()
        if status == 410 or said.expired:
            self._expired(said.message, now)
            return
        if exchange.phase is Phase.SNAPSHOT and status in (400, 422):
            self._lists = True
        failure = _BY_STATUS.get(status, Failure.REFUSED)
        self._fail(failure, f"HTTP {status} {said.message}".strip(), now)
        if retry_after_s is not None:
            self._backoff.told(retry_after_s, now)

    def failed(self, failure: Failure, reason: str, now: float) -> None:
        """The connection was not made, broke off, or said nothing until `give_up_at`."""
        exchange = self._under_way()
        if failure is Failure.SILENT and exchange.in_snapshot and exchange.opened_at is not None:
            # A server that knows of no such snapshot sends everything, and no end of it.
            self._lists = True
        if exchange.opened_at is not None and self._was_steady(exchange, now):
            self._backoff.steady()
        self._fail(failure, reason, now)

    # ------------------------------------------------------------ inside an answer

    def _on_line(self, exchange: _Exchange, line: bytes, now: float) -> bool:
        try:
            event = _DECODE_EVENT.decode(line)
            if event.type == "ERROR":
                self._on_error(_DECODE_STATUS.decode(event.object), now)
                return False
            part = _DECODE_SLICE.decode(event.object)
        except msgspec.DecodeError as error:
            self._fail(Failure.MALFORMED, str(error), now)
            return False
        if exchange.in_snapshot:
            self._staged = _changed(self._staged, event.type, part)
            annotations = part.metadata.annotations or {}
            if event.type != "BOOKMARK" or annotations.get(INITIAL_EVENTS_END) != "true":
                return False
            exchange.in_snapshot = False
            self._take(part.metadata.resource_version, now)
            self._be_patient(now)
            return True
        assert self.slices is not None
        assert exchange.opened_at is not None
        self._version = part.metadata.resource_version or self._version
        self.trouble = None
        # What a watch begins with is what was missed: only then it is the present.
        if event.type == "BOOKMARK" or now >= exchange.opened_at + self._patience.gap_s:
            self.heard_at = now
        self.slices = _changed(self.slices, event.type, part)
        return event.type != "BOOKMARK"

    def _on_page(self, body: bytes, now: float) -> bool:
        try:
            page = _DECODE_LIST.decode(body)
        except msgspec.DecodeError as error:
            self._fail(Failure.MALFORMED, str(error), now)
            return False
        self._staged |= {part.metadata.name: part for part in page.items or ()}
        self._more = page.metadata.more
        if not self._more:
            self._take(page.metadata.resource_version, self._listed_at)
        self._over(now)
        return not self._more

    def _take(self, version: str, of: float) -> None:
        """The staged set is the server's `of` a moment."""
        self.slices, self._staged = self._staged, {}
        self._version = version or None
        self._snapshot_at = of
        self.heard_at = of
        self.trouble = None

    def _on_error(self, said: Status, now: float) -> None:
        if said.expired:
            self._expired(said.message, now)
        else:
            failure = _BY_STATUS.get(said.code, Failure.REFUSED)
            self._fail(failure, f"ERROR event {said.code} {said.message}".strip(), now)

    def _expired(self, message: str, now: float) -> None:
        self._version, self._more = None, ""
        self._backoff.answers()
        self._fail(Failure.EXPIRED, message, now)

    # ------------------------------------------------------------ how it ends

    def _be_patient(self, now: float) -> None:
        exchange = self._under_way()
        if exchange.phase is Phase.LIST:
            self.give_up_at = exchange.asked_at + self._patience.answer_s
        elif exchange.in_snapshot:
            self.give_up_at = exchange.asked_at + self._patience.snapshot_s
        else:
            self.give_up_at = now + self._patience.silence_s

    def _was_steady(self, exchange: _Exchange, now: float) -> bool:
        """It was a watch, and for a while a good one."""
        if exchange.phase is Phase.LIST or exchange.in_snapshot:
            return False
        return now >= exchange.asked_at + self._patience.steady_s

    def _fail(self, failure: Failure, reason: str, now: float) -> None:
        self.failures[failure] += 1
        self.trouble = f"{failure}: {reason}"
        self._backoff.failed(now)
        self._over(now)

    def _over(self, now: float) -> None:
        self._exchange = None
        self._backoff.ended(now)

    def _under_way(self) -> _Exchange:
        assert self._exchange is not None, "no request is under way"
        return self._exchange


def _changed(slices: Mapping[str, Slice], kind: str, part: Slice) -> dict[str, Slice]:
    after = dict(slices)
    if kind == "DELETED":
        after.pop(part.metadata.name, None)
    elif kind in ("ADDED", "MODIFIED"):
        after[part.metadata.name] = part
    return after
