"""Connections over which nothing has been heard yet: few at once, and none for long.

libzmq bounds a message and not how many connections are in the middle of one. A stranger that opens
hundreds and leaves a large frame unfinished on each would fill the memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket as sockets
import time
from typing import TYPE_CHECKING, Any, Final

import zmq
from zmq.utils.monitor import parse_monitor_message

if TYPE_CHECKING:
    from collections.abc import Callable

HELD_BYTES_MAX: Final = 256 << 20
"""Bytes of incomplete messages that all unheard connections may have sent together."""
UNHEARD_S: Final = 10.0
"""So long a connection may take until its first message is complete."""
_CHECK_S: Final = 1.0
_EVENTS: Final = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED


class Newcomers:
    """Follows a bound socket's connections by their file descriptors, which libzmq tells."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        message_bytes_max: int,
        hear: Callable[[], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Before `socket` is bound. `hear` takes waiting messages and calls `heard` for each."""
        self.most = max(2, HELD_BYTES_MAX // message_bytes_max)
        """Connections that may be unheard at once."""
        self.ended_total = 0
        self._hear = hear
        self._clock = clock
        self._unheard: dict[int, float] = {}
        """When each was accepted, by its descriptor; the oldest first."""
        self._known: set[int] = set()
        self._loop = asyncio.get_running_loop()
        self._socket = socket
        self._monitor = socket.get_monitor_socket(_EVENTS)
        self._descriptor = int(self._monitor.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._notice)
        self._timer = self._loop.call_later(_CHECK_S, self._check)
        self._notice()  # Until a monitor is found empty once, its descriptor tells nothing.

    def heard(self, frame: zmq.Frame) -> None:
        """Count the connection that it came over as heard."""
        try:
            descriptor = int(frame.get(zmq.SRCFD))
        except zmq.ZMQError:
            return  # It came from within the process.
        if descriptor not in self._known:
            self._follow()  # Its being accepted was told before its message, and may be unread.
            if self._unheard.pop(descriptor, None) is not None:
                self._known.add(descriptor)

    def close(self) -> None:
        self._timer.cancel()
        self._loop.remove_reader(self._descriptor)
        self._socket.disable_monitor()
        self._monitor.close(linger=0)  # Else the context would wait for it.

    def _follow(self) -> None:
        while event := self._next():
            descriptor = int(event["value"])
            self._unheard.pop(descriptor, None)
            self._known.discard(descriptor)
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._unheard[descriptor] = self._clock()

    def _notice(self) -> None:
        self._follow()
        if len(self._unheard) > self.most:
            self._hear()  # What a router says first may be here already.
            while len(self._unheard) > self.most:
                self._end(next(iter(self._unheard)))

    def _next(self) -> dict[str, Any] | None:
        try:
            frames = self._monitor.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None
        return dict(parse_monitor_message(frames))

    def _check(self) -> None:
        self._timer = self._loop.call_later(_CHECK_S, self._check)
        self._notice()
        late = self._clock() - UNHEARD_S
        if any(at < late for at in self._unheard.values()):
            self._hear()
        for descriptor in [d for d, at in self._unheard.items() if at < late]:
            self._end(descriptor)

    def _end(self, descriptor: int) -> None:
        """Shut the connection down; libzmq finds its end, and frees what it has of a message."""
        del self._unheard[descriptor]
        self.ended_total += 1
        try:
            connection = sockets.socket(fileno=os.dup(descriptor))
        except OSError:  # It has gone by itself.
            return
        with connection, contextlib.suppress(OSError):
            connection.shutdown(sockets.SHUT_RDWR)
