"""The clients of one router: they ask, listen to every token, and leave when they like."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from router.core.errors import RouterError
from tests.simulation.violation import Violation
from workers.api import Finish, Generate, Phase
from workers.engines.sim_blocks import Handoffs
from workers.engines.sim_model import SimModel
from workers.engines.sim_settings import SimSettings

if TYPE_CHECKING:
    from router.dispatch import Dispatch
    from tests.simulation.events import Events
    from tests.simulation.plan import Call, Plan
    from workers.api import Delta


@lru_cache(maxsize=4096)
def alone(prompt: tuple[int, ...], outputs: int, max_model_len: int) -> tuple[int, ...]:
    """What one engine with nothing else to do says, nobody near it; empty when it refuses."""
    settings = SimSettings(instant=True, max_model_len=max_model_len)
    engine = SimModel(settings, "alone", Handoffs())
    engine.submit(Generate("r", Phase.BOTH, list(prompt), outputs, b""))
    said: list[int] = []
    while engine.busy:
        engine.begin(0.0)
        for delta in engine.finish(0.0):
            said += delta.token_ids
    return tuple(said)


@dataclass(slots=True)
class Request:
    """One call and what became of it."""

    call: Call
    expected: tuple[int, ...]
    asked_at: float
    got: list[int] = field(default_factory=list)
    ended: str | None = None
    """finished, enough, cancelled, refused, or failed."""
    ended_at: float = 0.0
    error: RouterError | None = None

    @property
    def id(self) -> str:
        return self.call.ask.request_id


class Clients:
    """A router's sink, as its front is: it may answer a token with `enough` at once."""

    def __init__(self, plan: Plan, events: Events) -> None:
        self.requests: dict[str, Request] = {}
        self.open = 0
        self.heard_at = 0.0
        self.dispatch: Dispatch
        self._max_model_len = plan.workers[0].settings.max_model_len
        self._events = events

    def ask(self, call: Call, now: float) -> Request:
        ask = call.ask
        expected = alone(tuple(ask.prompt_token_ids), ask.max_tokens, self._max_model_len)
        request = self.requests[ask.request_id] = Request(call, expected, now)
        self._events.note("ask", request.id, len(ask.prompt_token_ids), ask.max_tokens)
        self.open += 1
        try:
            self.dispatch.submit(ask)
        except RouterError as error:
            self._end(request, "refused", error)
        self._agree()
        return request

    def leave(self, request: Request) -> None:
        if request.ended is None:
            self._end(request, "cancelled")
        self.dispatch.cancel([request.id])  # A front may also say it of what has ended.
        self._agree()

    def router_died(self) -> None:
        for request in self.requests.values():
            if request.ended is None:
                self._end(request, "router died")

    # ------------------------------------------------------------ the dispatch's sink

    def deliver(self, deltas: list[Delta], prompt_extras: dict[str, bytes]) -> None:
        self.heard_at = self._events.now
        enough = []
        for delta in deltas:
            request = self._still_open(delta.request_id, "tokens")
            begin = len(request.got)
            request.got += delta.token_ids
            if tuple(request.got[begin:]) != request.expected[begin : len(request.got)]:
                raise Violation(
                    f"{request.id}: token {begin} is {delta.token_ids}, alone an engine says "
                    f"{request.expected[begin:begin + 3]}"
                )  # fmt: skip
            stop = request.call.departure.at_token
            if stop is not None and len(request.got) >= stop:
                self._end(request, "enough")
                enough.append(request.id)
            elif delta.finish is not None:
                whole = len(request.got) == len(request.expected)
                if delta.finish is not Finish.LENGTH or not whole:
                    raise Violation(f"{request.id} ended early: {delta}")
                self._end(request, "finished")
        if enough:
            self.dispatch.enough(enough)

    def fail(self, request_id: str, error: RouterError) -> None:
        self.heard_at = self._events.now
        self._end(self._still_open(request_id, f"{error!r}"), "failed", error)

    def _still_open(self, request_id: str, what: str) -> Request:
        request = self.requests.get(request_id)
        if request is None or request.ended is not None:
            raise Violation(f"{what} for {request_id} after its end: {request}")
        return request

    def _end(self, request: Request, how: str, error: RouterError | None = None) -> None:
        request.ended, request.error = how, error
        request.ended_at = self._events.now
        self.open -= 1
        self._events.note("end", request.id, how, len(request.got), error or "")

    def _agree(self) -> None:
        if len(self.dispatch) != self.open:
            raise Violation(
                f"the router holds {len(self.dispatch)} requests, its clients wait for {self.open}"
            )
