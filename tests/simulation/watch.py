"""The laws of one worker's conversation, seen by someone who sits between it and its channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.simulation.violation import Violation
from workers.api import ROUTER_SILENCE_S, Abort, Batch, Finish, Generate, Refused, RouterHello

if TYPE_CHECKING:
    from tests.simulation.network import SimChannel
    from workers.api import Load, ToRouter, ToWorker
    from workers.server import Worker

ANSWER_S = 1.0
"""Within this, an idle worker has answered whatever it was asked, or else says so when it next
hears from the router."""


@dataclass(frozen=True, slots=True)
class Owed:
    """A request that a worker was given and that it has neither ended nor been told to drop."""

    request_id: str
    router: bytes
    at: float

    @property
    def asked_by(self) -> str:
        """The client's request, whatever the try and phase."""
        return self.request_id.split("/")[0]


class Watch:
    """The worker's channel to the worker, the worker to its channel."""

    def __init__(self, worker: Worker) -> None:
        self.owed: dict[str, Owed] = {}
        self._worker = worker
        self._channel: SimChannel
        self._heard_at: dict[bytes, float] = {}
        self._hellos: dict[bytes, RouterHello] = {}
        self._refused: list[str] = []
        self._silent_s = 0.0
        """Of the router that speaks now: how long it had not."""

    def attach(self, channel: SimChannel) -> None:
        self._channel = channel
        self._worker.attach(self)  # type: ignore[arg-type]

    def on_message(self, router: bytes, message: ToWorker) -> None:
        now = self._channel.now
        self._silent_s = now - self._heard_at.get(router, -ROUTER_SILENCE_S)
        self._heard_at[router] = now
        if isinstance(message, RouterHello):
            self._hellos[router] = message
            for owed in [o for o in self.owed.values() if self._replaced(o.router, message)]:
                del self.owed[owed.request_id]
        if isinstance(message, Abort):
            for request_id in message.request_ids:
                owed = self.owed.get(request_id)
                if owed and owed.router == router:
                    del self.owed[request_id]
        if not isinstance(message, Generate):
            self._worker.on_message(router, message)
            if forgotten := self._forgotten(router):
                raise Violation(f"{self._channel.address} heard {message}, but forgot {forgotten}")
            return
        if message.request_id in self.owed:
            raise Violation(f"{message.request_id} is asked twice of {self._channel.address}")
        before = self._worker.load
        self.owed[message.request_id] = Owed(message.request_id, router, now)
        self._refused.clear()
        self._worker.on_message(router, message)
        if message.request_id in self._refused and _held(self._worker.load) != _held(before):
            raise Violation(f"{message.request_id} was refused, and work was done: {before}")
        if message.request_id in self.owed and self._worker.ready == "draining":
            raise Violation(f"{message.request_id} was taken on by a draining worker")

    def send(self, router: bytes, message: ToRouter) -> bool:
        sent = self._channel.send(router, message)
        if sent and isinstance(message, Refused):
            forgot = "say hello first" in message.reason  # Else it can't serve that router at all.
            anew = any(self._replaced(router, hello) for hello in self._hellos.values())
            if forgot and not anew and self._silent_s < ROUTER_SILENCE_S:
                raise Violation(f"a router that spoke {self._silent_s:.1f} s ago was given up")
            self._heard_at.pop(router)
        if not sent or isinstance(message, Refused):
            for owed in [o for o in self.owed.values() if o.router == router]:
                del self.owed[owed.request_id]
        elif isinstance(message, Batch):
            for delta in message.deltas:
                if delta.request_id not in self.owed:
                    raise Violation(f"nobody asked for {delta}")
                if delta.finish is not None:
                    if delta.finish is Finish.REFUSED:
                        self._refused.append(delta.request_id)
                    del self.owed[delta.request_id]
        return sent

    def all_silent(self, for_s: float) -> bool:
        """None of the routers that it works for has spoken in that time."""
        since = self._channel.now - for_s
        return all(self._heard_at.get(o.router, 0.0) < since for o in self.owed.values())

    def still_owed(self) -> list[Owed]:
        """What routers that are there wait for."""
        since = self._channel.now - ROUTER_SILENCE_S
        return [o for o in self.owed.values() if self._heard_at.get(o.router, 0.0) > since]

    def _replaced(self, router: bytes, hello: RouterHello) -> bool:
        """It has greeted anew over another connection: nobody waits at this one."""
        former = self._hellos.get(router, hello)
        return former.router_id == hello.router_id and former.connection < hello.connection

    def _forgotten(self, router: bytes) -> list[Owed]:
        """What this router waits for and an idle worker knows nothing of."""
        if self._worker.load.busy:
            return []
        since = self._channel.now - ANSWER_S
        return [o for o in self.owed.values() if o.router == router and o.at < since]


def _held(load: Load) -> tuple[int, ...]:
    return load.running, load.waiting, load.prefill_tokens_queued, load.blocks_free
