"""The sender's side of `tcp`: KV memory answered to whoever has the token, by a thread each."""

from __future__ import annotations

import hmac
import logging
import secrets
import socket
import struct
import threading
from typing import TYPE_CHECKING, Final

import msgspec

from kvtransfer.limited_log import LimitedLog
from kvtransfer.transports import place
from kvtransfer.transports.api import TransferError
from kvtransfer.transports.strangers import (
    HELLO_S,
    STRANGERS_MAX,
    Deadline,
    Strangers,
    accept_each,
    cut,
)
from kvtransfer.transports.tcp_wire import (
    HELLO,
    REPLY_BYTES_MAX,
    REQUEST,
    TOKEN_BYTES,
    VERSION,
    TcpDescription,
    WireError,
    pack_reply,
    pack_welcome,
    parse_hello,
    parse_request,
    parse_units,
)
from kvtransfer.transports.unit_views import Views, advance

if TYPE_CHECKING:
    from kvtransfer.transports.api import Memory
    from kvtransfer.transports.unit_views import Numbers

log = logging.getLogger(__name__)

CONNECTIONS_MAX: Final = 256
"""Readers that were let in, at once."""
FRAME_TIMEOUT_S: Final = 5
"""For the rest of a frame that has begun."""
STALL_TIMEOUT_S: Final = 60
"""For a reader to take anything: a stopped one must not hold a thread for ever."""
PIECES_MAX: Final = 1024
"""IOV_MAX: how many one `sendmsg` takes."""


class TcpOffer:
    """Listens from construction to `close`. All its threads end with it."""

    def __init__(self, memory: Memory, host: str) -> None:
        self._memory = memory
        self._token = secrets.token_bytes(TOKEN_BYTES)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, 0), family=family, backlog=64)
        except OSError as error:
            raise TransferError(f"tcp can't listen on {host}: {error}") from error
        here = place.here()
        port = self._listener.getsockname()[1]
        self.description = msgspec.msgpack.encode(
            TcpDescription(VERSION, host, port, self._token, here.boot, here.net_ns)
        )
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._log = LimitedLog(log)
        self._strangers = Strangers()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._thread = threading.Thread(target=self._accept, name="kv-tcp-accept", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Returns when no thread of ours reads the memory any more."""
        with self._lock:
            self._closing.set()
            connections = dict(self._connections)
        for each in (self._listener, *connections):
            cut(each)  # Wakes whoever waits in it.
        self._thread.join()
        self._listener.close()
        for thread in connections.values():
            thread.join()

    def _accept(self) -> None:
        accept_each(self._listener, self._begin, self._closing.is_set)

    def _begin(self, connection: socket.socket) -> None:
        thread = threading.Thread(
            target=self._serve, args=(connection,), name="kv-tcp-serve", daemon=True
        )
        with self._lock:
            full = len(self._connections) >= CONNECTIONS_MAX + STRANGERS_MAX
            if self._closing.is_set() or full:
                connection.close()
                return
            self._connections[connection] = thread
            self._strangers.add(connection)
            try:
                thread.start()
            except RuntimeError:
                del self._connections[connection]
                self._strangers.gone(connection)
                raise

    def _serve(self, connection: socket.socket) -> None:
        try:
            _tune(connection)
            self._answer(connection)
        except WireError as error:
            self._log.warning("kv connection closed", {"reason": str(error)})
        except OSError as error:
            log.debug("kv connection ended", extra={"reason": str(error)})
        except Exception:  # noqa: BLE001  # A reader's edge.
            self._log.exception("answering a reader failed", {})
        finally:
            self._strangers.gone(connection)
            with self._lock:
                del self._connections[connection]
            connection.close()

    def _answer(self, connection: socket.socket) -> None:
        token, unit_bytes = parse_hello(_hello(connection))
        if not hmac.compare_digest(token, self._token):
            raise WireError("a hello without this offer's token")
        if not self._strangers.admitted(connection):
            raise WireError("too many connections were open before it said who it is")
        if len(self._connections) - len(self._strangers) > CONNECTIONS_MAX:
            raise WireError(f"more than {CONNECTIONS_MAX} readers")
        try:
            views = Views(self._memory, unit_bytes)
        except TransferError as error:
            connection.sendall(pack_welcome(-1, str(error)))
            return
        connection.sendall(pack_welcome(views.units))
        while True:
            number, form, size = parse_request(_receive(connection, REQUEST.size, idle=True))
            units = parse_units(form, _receive(connection, size, idle=False))
            _reply(connection, views, number, units)


def _hello(connection: socket.socket) -> bytes:
    """A new connection's first frame, within `HELLO_S` however slowly its bytes come."""
    deadline, frame = Deadline(HELLO_S), b""
    while len(frame) < HELLO.size:
        _time_out_after(connection, deadline.left_s())
        try:
            part = connection.recv(HELLO.size - len(frame))
        except BlockingIOError:
            continue
        if not part:
            raise WireError("a hello was cut off")
        frame += part
    _time_out_after(connection, FRAME_TIMEOUT_S)
    return frame


def _reply(connection: socket.socket, views: Views, number: int, units: Numbers) -> None:
    try:
        views.check(units, "this sender")
    except TransferError as error:
        raise WireError(str(error)) from None
    size = len(units) * views.unit_bytes
    if size > REPLY_BYTES_MAX and len(units) > 1:
        raise WireError(f"a request for {size} bytes at once")
    pieces = [memoryview(pack_reply(number, size)), *views.of(units)]
    index = 0
    while index < len(pieces):
        # Waits in the kernel, without the GIL, until all of it is in the socket's buffer.
        sent = connection.sendmsg(pieces[index : index + PIECES_MAX])
        index = advance(pieces, index, sent)


def _receive(connection: socket.socket, size: int, *, idle: bool) -> bytes:
    """Exactly `size` bytes. With `idle`, the first may take as long as it likes."""
    frame = bytearray(size)
    view, got = memoryview(frame), 0
    while got < size:
        try:
            count = connection.recv_into(view[got:])
        except BlockingIOError:
            if idle and not got:
                continue
            raise WireError("a frame was begun and not ended") from None
        if not count:
            if got or not idle:
                raise WireError("a frame was cut off")
            raise ConnectionResetError("the reader has closed")
        got += count
    return bytes(frame)


def _tune(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A reader's machine that is gone without a word ends its connection within half a minute.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    connection.setsockopt(
        socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", STALL_TIMEOUT_S, 0)
    )


def _time_out_after(connection: socket.socket, seconds: float) -> None:
    # The kernel's own timeouts: with Python's, each call would be two.
    whole = int(seconds)
    value = struct.pack("ll", whole, max(1, int((seconds - whole) * 1e6)))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
