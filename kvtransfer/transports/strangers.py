"""Connections that have not yet shown that they were told of an offer: few, and not for long."""

from __future__ import annotations

import logging
import socket
import threading
import time
from typing import TYPE_CHECKING, Final

from kvtransfer.limited_log import LimitedLog

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

STRANGERS_MAX: Final = 64
"""With one more, the oldest is cut off: a reader needs milliseconds, and whoever holds connections
open must not keep readers out."""
HELLO_S: Final = 5.0
"""For the whole hello, however it comes."""
ACCEPT_PAUSE_S: Final = 0.1


class Strangers:
    """One listener's connections without a hello. Their threads call `admitted` and `gone`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[socket.socket, None] = {}
        """Oldest first."""

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: socket.socket) -> None:
        with self._lock:
            self._open[connection] = None
            if len(self._open) > STRANGERS_MAX:
                oldest = next(iter(self._open))
                del self._open[oldest]
                cut(oldest)

    def admitted(self, connection: socket.socket) -> bool:
        """It has shown what it was told. False when it was cut off meanwhile."""
        with self._lock:
            return self._open.pop(connection, connection) is None

    def gone(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.pop(connection, None)


class Deadline:
    """A point in time by which a frame must have come, in whatever pieces."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def left_s(self) -> float:
        """Above zero. Raises TimeoutError when it is over."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("no hello came in time")
        return left


def accept_each(
    listener: socket.socket, serve: Callable[[socket.socket], None], closing: Callable[[], bool]
) -> None:
    """Accept until closing: neither a lack of descriptors or threads nor one peer ends it."""
    limited = LimitedLog(log)
    while not closing():
        try:
            connection, _ = listener.accept()
        except OSError as error:
            # `close`; or a client that was gone already; or no descriptors are left.
            if not closing():
                limited.warning("no connection accepted", {"error": str(error)})
                time.sleep(ACCEPT_PAUSE_S)
            continue
        try:
            serve(connection)
        except Exception:  # noqa: BLE001  # The thread's edge: no thread can be started, say.
            limited.exception("connection not served", {})
            connection.close()
            time.sleep(ACCEPT_PAUSE_S)


def cut(connection: socket.socket) -> None:
    """End the wait of the thread that this socket belongs to; closing it is that thread's."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # It was gone already.
