"""The router's end of the token channel: one DEALER socket a worker, kept connected."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from router.core.compat import RouterFacts, refusal
from router.core.parts import parts
from router.turns import Turns
from workers.api import (
    MALFORMED,
    PROTOCOL,
    ROUTER_SILENCE_S,
    Batch,
    Heartbeat,
    KvSnapshot,
    Refused,
    RouterHello,
    WorkerHello,
    decode_to_router,
    encode,
)
from workers.logs import LimitedLog

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from router.dispatch import Dispatch
    from workers.api import ToRouter, ToWorker

log = logging.getLogger(__name__)

BEAT_S: Final = 1.0
LINKS_MAX: Final = 4000
SOCKETS_A_LINK: Final = 3
"""Its own, and the two ends of its monitor."""
REASON_MAX: Final = 500
SEND_QUEUE_MAX: Final = 10_000
"""Messages to one worker that may wait; one that takes no more is lost."""


_EVENTS: Final = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


@dataclass(frozen=True, slots=True)
class Curve:
    """ZeroMQ CURVE keys, Z85: the router's own pair and the workers' common public key."""

    public: bytes
    secret: bytes = field(repr=False)
    server: bytes


class Link:
    """One worker's address: says hello until answered, beats, receives, and notices the end."""

    def __init__(self, address: str, links: Links) -> None:
        self.address = address
        self.worker_id: str | None = None
        self.refused: str | None = None
        self.resting = False
        """Its worker gets no new requests while another can."""
        self.leaving = False
        """It is closed as soon as no request of ours is on its worker."""
        self._deaf = False
        """The socket will never try again by itself."""
        self._links = links
        self._loop = asyncio.get_running_loop()
        self._connections = 0
        self._parts: deque[Batch] = deque()
        """Parts of a large message that are still to be handled."""
        self._open()

    def _open(self) -> None:
        socket = self._links.context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, SEND_QUEUE_MAX)
        socket.setsockopt(zmq.RCVHWM, SEND_QUEUE_MAX)
        # A worker that says more is cut off, before any of it is taken.
        socket.setsockopt(zmq.MAXMSGSIZE, self._links.facts.message_bytes_max)
        socket.setsockopt(zmq.HEARTBEAT_IVL, 1000)
        # That a worker is silent the fleet notices far sooner. A short time here would count our
        # own standstill against it: libzmq's timers go off before it reads what has come.
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, round(ROUTER_SILENCE_S * 1000))
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        if curve := self._links.curve:
            socket.curve_publickey = curve.public
            socket.curve_secretkey = curve.secret
            socket.curve_serverkey = curve.server
        if "[" in self.address:
            socket.setsockopt(zmq.IPV6, 1)
        self._socket = socket
        self._deaf = False
        self._connections += 1
        self._parts.clear()
        self._monitor = socket.get_monitor_socket(_EVENTS)
        socket.connect(self.address)
        self._loop.add_reader(_descriptor(socket), self._links.turns.wake, self)
        self._loop.add_reader(_descriptor(self._monitor), self._notice)
        self._notice()  # Until a monitor is found empty once, its descriptor tells nothing.
        self._hello()

    def close(self) -> None:
        self._links.turns.forget(self)
        self._loop.remove_reader(_descriptor(self._socket))
        self._loop.remove_reader(_descriptor(self._monitor))
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)

    def lost(self, reason: str) -> None:
        """Give the worker up and begin again: a socket may hold messages for a former process."""
        worker_id, self.worker_id = self.worker_id, None
        self.close()
        self._open()
        if worker_id is not None:
            self._links.gone(worker_id, reason)

    def rest(self, resting: bool) -> None:
        """Give its worker no new requests, or some again."""
        self.resting = resting
        if self.worker_id is not None:
            self._links.dispatch.fleet.rest(self.worker_id, resting, leaving=self.leaving)

    def beat(self) -> None:
        """Once a second: hello until there is an answer, then a sign of life."""
        if self._deaf:
            self.close()
            self._open()
        elif self.worker_id is None:
            self._hello()
        else:
            self.send(Heartbeat())

    def send(self, message: ToWorker) -> None:
        try:
            self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            if self.worker_id is not None:
                self.lost(f"takes no more than {SEND_QUEUE_MAX} messages")
        # The descriptor tells of edges only, and sending may have consumed one.
        if _readable(self._socket):
            self._links.turns.wake(self)

    def _hello(self) -> None:
        facts = self._links.facts
        self.send(
            RouterHello(
                PROTOCOL,
                facts.router_id,
                facts.model_digest,
                facts.tokenizer_digest,
                self._connections,
            )
        )

    def take_next(self) -> bool:
        """Handle one message, or a part of a large one; False when there is none."""
        try:
            if self._parts:
                self._handle(self._parts.popleft())
                return True
            frame = self._socket.recv(zmq.NOBLOCK)
            self._take(frame)
        except zmq.Again:
            return False
        except Exception as error:  # noqa: BLE001  # A worker's edge: others must be heard.
            self._links.failed(self.address)
            if self.worker_id is not None:  # What of the message was acted upon is not known.
                self.lost(f"what it said could not be taken: {error!r}"[:REASON_MAX])
        return True

    def _take(self, frame: bytes) -> None:
        try:
            message = decode_to_router(frame)
        except MALFORMED as error:
            self._links.malformed(self.address, str(error))
            return
        if reason := self._doubt(message):
            self._put_aside(reason)
            return
        if isinstance(message, Batch):
            message, *rest = parts(message)
            self._parts.extend(rest)
        self._handle(message)

    def _handle(self, message: ToRouter) -> None:
        match message:
            case Batch() if self.worker_id is not None:
                self._links.dispatch.on_batch(self.worker_id, message)
            case KvSnapshot() if self.worker_id is not None:
                self._links.dispatch.on_snapshot(self.worker_id, message)
            case Batch() | KvSnapshot():
                pass  # From before we knew each other.
            case WorkerHello():
                self._welcome(message)
            case Refused(reason):
                if self.worker_id is not None:
                    self.lost(f"it no longer knows us: {reason}")
                else:
                    self._refuse(reason)

    def _welcome(self, hello: WorkerHello) -> None:
        doubts, now = self._links.dispatch.doubts, self._loop.time()
        if reason := refusal(self._links.facts, hello) or doubts.about(hello, now):
            self._refuse(reason)
            return
        if not self._links.claim(hello.worker_id, self):
            self._refuse(f"another address already serves as worker {hello.worker_id}")
            return
        self.refused = None
        self.worker_id = hello.worker_id
        self._links.dispatch.on_hello(hello)
        if self.resting:
            self.rest(True)

    def _doubt(self, message: ToRouter) -> str | None:
        if self.worker_id is None or not isinstance(message, Batch | KvSnapshot):
            return None
        return self._links.dispatch.doubt(self.worker_id, message)

    def _put_aside(self, reason: str) -> None:
        """Put the worker aside, since its messages can't be true: its requests go elsewhere."""
        dispatch = self._links.dispatch
        view = dispatch.fleet.get(self.worker_id or "")
        if view is None:
            return
        reason = f"worker {view.id} is not believed: {reason}"
        dispatch.doubts.put_aside(view.hello, reason, self._loop.time())
        self._refuse(reason)
        self.lost(reason)

    def _refuse(self, reason: str) -> None:
        if reason != self.refused:
            log.error("worker refused", extra={"address": self.address, "reason": reason})
        self.refused = reason

    def _notice(self) -> None:
        """The connection broke: what is in flight on it is lost, now and not seconds later."""
        monitor = self._monitor
        broken = False
        while _readable(monitor):
            event = parse_monitor_message(monitor.recv_multipart(zmq.NOBLOCK))["event"]
            if event == zmq.EVENT_DISCONNECTED:
                broken = True
            else:
                self._failed_handshake(event)
        if broken and self.worker_id is not None:
            self.lost("connection closed")

    def _failed_handshake(self, event: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            # libzmq tries again by itself; without keys it is a worker that ended meanwhile.
            if self._links.curve:
                self._refuse("the handshake broke off: are the workers' keys others?")
            return
        # libzmq would never try again, but the worker's next life may have other keys.
        self._deaf = True
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._refuse("the worker does not know this router's key")
        else:
            self._refuse("one side has CURVE keys for the token channel and the other has none")


def _readable(socket: zmq.Socket[bytes]) -> bool:
    return bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)


def _descriptor(socket: zmq.Socket[bytes]) -> int:
    return int(socket.getsockopt(zmq.FD))


class Links:
    """All links of one router."""

    def __init__(
        self,
        addresses: Iterable[str],
        facts: RouterFacts,
        dispatch: Dispatch,
        curve: Curve | None = None,
    ) -> None:
        self.context = zmq.Context()
        # libzmq's own limit is reached by 341 links.
        self.context.set(zmq.MAX_SOCKETS, LINKS_MAX * SOCKETS_A_LINK + 1)
        self.curve = curve
        self.facts = facts
        self.dispatch = dispatch
        self.malformed_total = 0
        self._log = LimitedLog(log)
        self.turns = Turns()
        self._by_worker: dict[str, Link] = {}
        self._links: dict[str, Link] = {}
        for address in addresses:
            self.connect(address)

    def __iter__(self) -> Iterator[Link]:
        return iter(self._links.values())

    def connect(self, address: str) -> None:
        """Keep a link to this address, and give its worker requests."""
        link = self._links.get(address)
        if link is None and len(self._links) >= LINKS_MAX:
            log.error("too many workers", extra={"address": address, "most": LINKS_MAX})
        elif link is None:
            self._links[address] = self._make(address)
        else:
            link.leaving = False
            link.rest(False)

    def rest(self, address: str) -> None:
        """Give the worker there no new requests while others can. An unknown address is ignored."""
        if link := self._links.get(address):
            link.rest(True)

    def disconnect(self, address: str) -> None:
        """Let the worker there go once no request is on it. An unknown address is ignored.

        Who says that it is gone may err, and what runs there is the proof.
        """
        if link := self._links.get(address):
            link.leaving = True
            link.rest(True)
            self._part()

    def _make(self, address: str) -> Link:
        return Link(address, self)

    def _part(self) -> None:
        for link in [link for link in self if link.leaving]:
            worker_id = link.worker_id
            if worker_id is None or not self.dispatch.is_on(worker_id):
                del self._links[link.address]
                link.close()
                if worker_id is not None:
                    self.gone(worker_id, "left")

    def send(self, worker_id: str, message: ToWorker) -> None:
        """To a worker that is gone, silently nothing: its loss is told separately."""
        if link := self._by_worker.get(worker_id):
            link.send(message)

    def claim(self, worker_id: str, link: Link) -> bool:
        """Bind the worker to its link; False when another address already serves as it."""
        return self._by_worker.setdefault(worker_id, link) is link

    def gone(self, worker_id: str, reason: str) -> None:
        self._by_worker.pop(worker_id, None)
        self.dispatch.on_lost(worker_id, reason)

    def malformed(self, address: str, error: str) -> None:
        self.malformed_total += 1
        self._log.warning("malformed message", {"address": address, "error": error})

    def failed(self, address: str) -> None:
        """A message could not be acted upon: a bug of ours, told with its traceback."""
        self._log.exception("a message was not taken", {"address": address})

    async def run(self) -> None:
        """Beat until cancelled."""
        clock = asyncio.get_running_loop().time
        due = clock()
        try:
            while True:
                for link in self:
                    link.beat()
                self.dispatch.held_up(clock() - due)
                self.dispatch.tick()
                for link in self:
                    if link.worker_id and self.dispatch.fleet.get(link.worker_id) is None:
                        link.lost("given up")
                self._part()
                due = clock() + BEAT_S
                await asyncio.sleep(BEAT_S)
        finally:
            self.close()

    def close(self) -> None:
        for link in self:
            link.close()
        self.context.term()
