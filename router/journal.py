"""What became of recent requests: where they ran, what was moved, how long it took."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol

import msgspec

if TYPE_CHECKING:
    from router.ask import Ask
    from router.core.errors import RouterError
    from router.core.lifecycle import Outcome
    from router.core.placement import Placement
    from workers.api import Delta

RECORDS_MAX = 4096
_PREFIXES = ("chatcmpl-", "generate-tokens-")
"""The front's, before what a client calls its request."""


class Record(msgspec.Struct):
    """One request for one sequence. Times ending in `_at` are the router's clock, in seconds."""

    request_id: str
    name: str
    prompt_tokens: int
    started_at: float
    tenant: str = ""
    outcome: str = "running"
    error_code: str | None = None
    waited_s: float = 0.0
    """For a turn and for room, before anything was started."""
    attempts: int = 0
    hedged: bool = False
    """Two tries ran at once, since the first token was overdue. What is told below is of the one
    that brought it."""
    prefill_worker: str | None = None
    """None when the decode worker computed the prompt itself."""
    decode_worker: str | None = None
    cached_tokens: int = 0
    """Prompt tokens that nobody had to compute: the prefill worker's cache held them, or, where
    one worker did both, its own. The client's usage says the same."""
    predicted_tokens: int = 0
    """What the index said of `cached_tokens` when it was placed."""
    candidates: int = 0
    """Workers that placement looked at."""
    estimated_ttft_s: float | None = None
    """At placement, from then on; beside `ttft_s`, which is from the start. The next two are
    beside the time from the first token to the last, and beside nothing that can be measured."""
    estimated_decode_s: float | None = None
    estimated_damage_s: float | None = None
    kv_tokens: int = 0
    kv_bytes: int = 0
    kv_s: float = 0.0
    kv_hidden_s: float = 0.0
    """Of `kv_s`, what passed while the prompt was still being computed."""
    kv_transport: str = ""
    kv_failed: str | None = None
    output_tokens: int = 0
    first_token_at: float | None = None
    last_token_at: float | None = None
    ended_at: float | None = None

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_at is None else self.first_token_at - self.started_at


class Observer(Protocol):
    """Told of what is counted (`router.metrics`)."""

    def token_gap(self, seconds: float) -> None: ...

    def ended(self, record: Record) -> None: ...


class Journal:
    """Records of live and recent requests, the oldest forgotten first."""

    def __init__(self, observer: Observer | None = None) -> None:
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._observer = observer

    def start(self, ask: Ask, now: float) -> None:
        tokens = len(ask.prompt_token_ids)
        self._records[ask.request_id] = Record(ask.request_id, ask.name, tokens, now, ask.tenant)
        if len(self._records) > RECORDS_MAX:
            self._records.popitem(last=False)

    def placed(
        self, request_id: str, placement: Placement, predicted_tokens: int, now: float
    ) -> None:
        if record := self._records.get(request_id):
            if not record.attempts:
                record.waited_s = now - record.started_at
            record.attempts += 1
            _write(record, placement, predicted_tokens)

    def won(self, request_id: str, placement: Placement, predicted_tokens: int) -> None:
        """Keep the try on this worker, out of two at once."""
        if record := self._records.get(request_id):
            record.hedged = True
            _write(record, placement, predicted_tokens)

    def pulled(self, request_id: str, delta: Delta) -> None:
        """The decode worker's first delta says how the prompt's KV got there."""
        if record := self._records.get(request_id):
            record.cached_tokens = delta.cached_tokens or 0
            record.kv_tokens = delta.kv_tokens
            record.kv_bytes = delta.kv_bytes
            record.kv_s = delta.kv_s
            record.kv_hidden_s = delta.kv_hidden_s
            record.kv_transport = delta.kv_transport
            record.kv_failed = delta.kv_failed

    def tokens(self, request_id: str, count: int, now: float) -> None:
        record = self._records.get(request_id)
        if record is None or not count:
            return
        if record.last_token_at is None:
            record.first_token_at = now
        elif self._observer:
            self._observer.token_gap((now - record.last_token_at) / count)
        record.last_token_at = now
        record.output_tokens += count

    def failed(self, request_id: str, error: RouterError) -> None:
        if record := self._records.get(request_id):
            record.error_code = error.code

    def end(self, request_id: str, outcome: Outcome, now: float) -> Record | None:
        """Its record, if it is not forgotten."""
        if record := self._records.get(request_id):
            record.outcome = outcome.value
            record.ended_at = now
            if self._observer:
                self._observer.ended(record)
        return record

    def find(self, name: str, tenant: str | None = None) -> list[Record]:
        """Records of requests that are called exactly `name`, oldest first.

        A request is called by its answer's id, by the client's own `X-Request-Id`, and by its id
        inside the router. `tenant`: only this one's; None for everybody's.
        """
        names = _Names(name)
        return [
            r
            for r in self._records.values()
            if (tenant is None or r.tenant == tenant) and (r.request_id == name or r.name in names)
        ]


def _write(record: Record, placement: Placement, predicted_tokens: int) -> None:
    record.prefill_worker = placement.prefill
    record.decode_worker = placement.decode
    record.predicted_tokens = predicted_tokens
    record.candidates = placement.candidates
    if made := placement.estimate:
        record.estimated_ttft_s = made.ttft_s
        record.estimated_decode_s = made.decode_s
        record.estimated_damage_s = made.damage_s


class _Names:
    """The front's names of requests that a client knows by one id.

    The front puts the endpoint before the client's `X-Request-Id` (`chatcmpl-…`), and numbers a
    completion's prompts (`cmpl-…-0`) and a response's turns (`resp_…_0`).
    """

    def __init__(self, known_as: str) -> None:
        self._exact = {known_as, *(prefix + known_as for prefix in _PREFIXES)}
        self._numbered = [f"cmpl-{known_as}-"]
        if known_as.startswith("cmpl-"):
            self._numbered.append(f"{known_as}-")
        if known_as.startswith("resp_"):
            self._numbered.append(f"{known_as}_")

    def __contains__(self, name: str) -> bool:
        if name in self._exact:
            return True
        return any(
            name.startswith(whole) and name[len(whole) :].isdecimal() for whole in self._numbered
        )
