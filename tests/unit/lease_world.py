"""Contenders for one Lease, each with a clock of its own, and a server that may be late."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from controller.core.lease import (
    Answered,
    Due,
    Election,
    Leave,
    NoAnswer,
    Request,
    State,
    Terms,
)

if TYPE_CHECKING:
    from collections.abc import Callable

WALL = "2026-11-23T00:00:00.000000Z"


class Server:
    """One Lease, as Kubernetes keeps it: a write to another version than it names is refused."""

    def __init__(self) -> None:
        self.version = 7
        self.spec: dict[str, Any] | None = None

    def answer(self, request: Request) -> Answered:
        match request.method:
            case "GET" if self.spec is None:
                return _refusal(404, "not found")
            case "GET":
                return Answered(200, self._lease())
            case "POST" if self.spec is not None:
                return _refusal(409, "already exists")
            case "PUT" if self.spec is None:
                return _refusal(404, "not found")
        assert request.body is not None
        based_on = request.body["metadata"].get("resourceVersion")
        if request.method == "PUT" and based_on != str(self.version):
            return _refusal(409, "the object has been modified")
        self.version += 1
        self.spec = request.body["spec"]
        return Answered(201 if request.method == "POST" else 200, self._lease())

    def delete(self) -> None:
        self.version += 1
        self.spec = None

    def _lease(self) -> bytes:
        about = {"name": "l", "namespace": "n", "resourceVersion": str(self.version)}
        return json.dumps({"metadata": about, "spec": self.spec}).encode()


def _refusal(status: int, message: str) -> Answered:
    return Answered(status, json.dumps({"message": message}).encode())


@dataclass
class Contender:
    """A process. `rate` and `offset` make its clock of the true time."""

    terms: Terms
    rate: float = 1.0
    offset: float = 0.0
    uniform: Callable[[float, float], float] = max
    state: State = field(default_factory=State)
    sent: Request | None = None
    """Under way, and not yet carried out."""
    answer: Answered | None = None
    """On its way back."""
    stopped: bool = False

    def __post_init__(self) -> None:
        self.election = Election(self.terms, self.uniform)

    def clock(self, time: float) -> float:
        return self.offset + time * self.rate

    def leads(self, time: float) -> bool:
        return self.state.leads(self.clock(time))


class World:
    """What may happen, one thing at a time; `check` is the law."""

    def __init__(self, contenders: list[Contender]) -> None:
        self.time = 0.0
        self.server = Server()
        self.contenders = contenders
        self.late: deque[Request] = deque()
        """Whoever sent them waits no more, and yet they may be carried out."""
        self.led: set[str] = set()
        """All who ever led."""

    def check(self) -> None:
        leaders = [c.terms.identity for c in self.contenders if c.leads(self.time)]
        assert len(leaders) <= 1, leaders
        self.led |= set(leaders)

    def wake(self, c: Contender) -> None:
        """Its process runs for a moment: it gives up what takes too long, and asks what is due."""
        if c.stopped:
            return
        now = c.clock(self.time)
        if c.state.asked and now >= c.state.give_up_at:
            self.lose(c)
        c.state, request = c.election.step(c.state, Due(WALL), now)
        if request:
            c.sent = request

    def carry_out(self, c: Contender) -> None:
        if c.sent:
            c.answer, c.sent = self.server.answer(c.sent), None

    def deliver(self, c: Contender) -> None:
        if c.answer and not c.stopped:
            answer, c.answer = c.answer, None
            c.state, _ = c.election.step(c.state, answer, c.clock(self.time))

    def lose(self, c: Contender) -> None:
        """The connection breaks; what it carried may arrive all the same."""
        if not c.state.asked or c.stopped:
            return
        if c.sent:
            self.late.append(c.sent)
        c.sent = c.answer = None
        c.state, _ = c.election.step(c.state, NoAnswer("broken"), c.clock(self.time))

    def carry_out_late(self) -> None:
        if self.late:
            self.server.answer(self.late.popleft())

    def leave(self, c: Contender) -> None:
        if not c.stopped and not c.state.leaving:
            self.lose(c)
            c.state, _ = c.election.step(c.state, Leave(), c.clock(self.time))

    def well(self, seconds: float, step_s: float, latency_s: float) -> float | None:
        """Everybody runs and every answer comes; since when somebody led without a break."""
        self.late.clear()
        since, end = None, self.time + seconds
        due: dict[str, float] = {}
        for c in self.contenders:
            c.stopped = False
        while self.time < end:
            for c in self.contenders:
                self.wake(c)
                if c.sent:
                    self.carry_out(c)
                    due[c.terms.identity] = self.time + latency_s
                if c.answer and self.time >= due.get(c.terms.identity, 0.0):
                    self.deliver(c)
            self.check()
            if any(c.leads(self.time) for c in self.contenders):
                since = self.time if since is None else since
            else:
                since = None
            self.time += step_s
        return since
