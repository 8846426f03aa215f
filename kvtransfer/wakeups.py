"""Wakes a thread that waits on sockets, from another thread."""

from __future__ import annotations

import contextlib
import socket


class Wakeup:
    """A pipe to one's own poller: `set` from anywhere, `clear` where it is waited for."""

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)

    def fileno(self) -> int:
        return self._read.fileno()

    def set(self) -> None:
        # Full means that it is awake already; closed, that nobody waits any more.
        with contextlib.suppress(OSError):
            self._write.send(b"!")

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._read.recv(1024):
                pass

    def close(self) -> None:
        self._read.close()
        self._write.close()
