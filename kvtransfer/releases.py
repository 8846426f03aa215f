"""Gives up KV that nobody will read, from outside the engine."""

from __future__ import annotations

import contextlib
from collections import OrderedDict

import zmq

from kvtransfer.protocol import TicketUnreadable, decode_ticket
from kvtransfer.sender import release_frame

PEERS_MAX = 256


class ReleaseClient:
    """Sends `Release` to a ticket's own sender. What does not arrive, the lease ends."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._sockets: OrderedDict[str, zmq.Socket[bytes]] = OrderedDict()

    def release(self, ticket: bytes) -> bool:
        """Returns whether it was a ticket. Never waits."""
        try:
            read = decode_ticket(ticket)
        except TicketUnreadable:
            return False
        self.release_handle(read.endpoint, read.epoch, read.handle)
        return True

    def release_handle(self, endpoint: str, epoch: str, handle: str) -> None:
        """The same, of a ticket that was read already."""
        with contextlib.suppress(zmq.ZMQError):
            self._to(endpoint).send(release_frame(epoch, handle), zmq.NOBLOCK)

    def close(self) -> None:
        for socket in self._sockets.values():
            socket.close(linger=100)
        self._context.term()

    def _to(self, endpoint: str) -> zmq.Socket[bytes]:
        if endpoint not in self._sockets:
            socket = self._context.socket(zmq.DEALER)
            socket.connect(endpoint)
            self._sockets[endpoint] = socket
            if len(self._sockets) > PEERS_MAX:
                self._sockets.popitem(last=False)[1].close(linger=100)
        return self._sockets[endpoint]
