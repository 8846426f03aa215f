"""Gives up KV that nobody will read, from outside the engine."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from typing import TYPE_CHECKING

import zmq

from kvtransfer.curve import present
from kvtransfer.protocol import TicketUnreadable, decode_ticket
from kvtransfer.sender import release_frame
from kvtransfer.sockets import bounded, is_address

if TYPE_CHECKING:
    from kvtransfer.curve import Pair

PEERS_MAX = 256
QUEUE_MAX = 1000
FRAME_BYTES_MAX = 1 << 16
"""The largest answer is small: a sender answers nothing to a `Release`."""


class ReleaseClient:
    """Sends `Release` to a ticket's own sender. What does not arrive, the lease ends."""

    def __init__(self, keys: Pair | None = None) -> None:
        """`keys`: as the senders have them."""
        self._keys = keys
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
        if not is_address(endpoint):
            return
        with contextlib.suppress(zmq.ZMQError):
            self._to(endpoint).send(release_frame(epoch, handle), zmq.NOBLOCK)

    def close(self) -> None:
        for socket in self._sockets.values():
            socket.close(linger=100)
        self._context.term()

    def _to(self, endpoint: str) -> zmq.Socket[bytes]:
        if endpoint not in self._sockets:
            socket = self._context.socket(zmq.DEALER)
            bounded(socket, FRAME_BYTES_MAX)
            present(socket, self._keys)
            socket.setsockopt(zmq.SNDHWM, QUEUE_MAX)
            try:
                socket.connect(endpoint)
            except zmq.ZMQError:
                socket.close()
                raise
            self._sockets[endpoint] = socket
            if len(self._sockets) > PEERS_MAX:
                self._sockets.popitem(last=False)[1].close(linger=100)
        return self._sockets[endpoint]
