"""Bounds of every ZeroMQ socket of ours: no peer can have it hold a larger frame than is stated."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import zmq

if TYPE_CHECKING:
    Socket = zmq.Socket[Any]

HANDSHAKE_MS: Final = 10_000
"""A peer that has not said by then who it is, is cut off."""


_TCP: Final = re.compile(r"tcp://[A-Za-z0-9._:%\[\]-]{1,260}:[0-9]{1,5}")


def is_address(endpoint: str) -> bool:
    """Whether it names a TCP port: libzmq would also connect within the process, or to a file."""
    return _TCP.fullmatch(endpoint) is not None


def bounded(socket: Socket, frame_bytes_max: int) -> None:
    """Before `socket` is bound or connected.

    libzmq closes the connection of a peer that announces a larger frame, before it takes any of it
    and also before the handshake.
    """
    socket.setsockopt(zmq.MAXMSGSIZE, frame_bytes_max)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
