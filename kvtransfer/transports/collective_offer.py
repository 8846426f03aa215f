"""The sender's half of `collective`: threads that send what readers ask for."""

from __future__ import annotations

import contextlib
import hmac
import logging
import secrets
import socket
import threading
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

from kvtransfer.limited_log import LimitedLog
from kvtransfer.transports import collective_wire as wire
from kvtransfer.transports import device
from kvtransfer.transports.api import Segment, TransferError
from kvtransfer.transports.pieces import Pieces
from kvtransfer.transports.strangers import (
    HELLO_S,
    STRANGERS_MAX,
    Deadline,
    Strangers,
    accept_each,
    cut,
)

if TYPE_CHECKING:
    from kvtransfer.transports.api import Memory

log = logging.getLogger(__name__)

READERS_MAX: Final = 64
HELLO_BYTES_MAX: Final = 1024
CLOSE_S: Final = 1.0


class Description(msgspec.Struct, frozen=True, array_like=True):
    version: int
    backend: str
    host: str
    port: int
    token: bytes
    segments: list[Segment]


class CollectiveOffer:
    """KV memory that peers may read, until `close`: a thread that accepts, and one a reader.

    Each reader costs one listening store, one group and SLOTS staging buffers.
    """

    def __init__(self, memory: Memory, host: str, backend: str) -> None:
        self._memory = memory
        self._host = host
        self._backend = backend
        self._token = secrets.token_bytes(16)
        self._closing = False
        self._log = LimitedLog(log)
        self._strangers = Strangers()
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._listener = socket.create_server((host, 0), backlog=READERS_MAX)
        self.description = msgspec.msgpack.encode(
            Description(
                wire.VERSION, backend, host, self._listener.getsockname()[1], self._token,
                list(memory.segments),
            )
        )  # fmt: skip
        self._thread = threading.Thread(target=self._accept, name="kv-collective", daemon=True)
        self._thread.start()

    def close(self) -> None:
        with self._lock:
            if self._closing:
                return
            self._closing = True
            open_now = dict(self._connections)
        for connection in (self._listener, *open_now):
            cut(connection)
        # A thread that waits for a stopped reader outlives this: it holds staging, no KV memory.
        for thread in (self._thread, *open_now.values()):
            thread.join(CLOSE_S)
        self._listener.close()

    def _accept(self) -> None:
        accept_each(self._listener, self._begin, lambda: self._closing)

    def _begin(self, connection: socket.socket) -> None:
        thread = threading.Thread(
            target=self._serve, args=(connection,), name="kv-collective", daemon=True
        )
        with self._lock:
            if self._closing or len(self._connections) >= READERS_MAX + STRANGERS_MAX:
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
        device.use(self._memory.device)
        try:
            _Reader(self, connection).run()
        except TransferError as error:
            self._log.warning("a reader was refused", {"error": str(error)})
            with contextlib.suppress(OSError):  # It is gone already.
                connection.sendall(wire.frame(wire.Refused(str(error)[:1000])))
        except (OSError, RuntimeError) as error:  # RuntimeError is all of torch's.
            log.info("a reader is gone", extra={"error": str(error)})
        except Exception:  # noqa: BLE001  # A reader's edge.
            self._log.exception("answering a reader failed", {})
        finally:
            self._strangers.gone(connection)
            with self._lock:
                self._connections.pop(connection, None)
            connection.close()

    def admit(self, connection: socket.socket, buffer: bytearray) -> int | None:
        """The reader's unit size, once it has shown that it was given our description."""
        hello = wire.receive(connection, buffer, wire.ToOffer, Deadline(HELLO_S), HELLO_BYTES_MAX)
        connection.settimeout(wire.ANSWER_S)
        if hello is None:
            return None
        if not isinstance(hello, wire.Hello) or not hmac.compare_digest(hello.token, self._token):
            raise TransferError("the reader does not know this offer's token")
        if hello.version != wire.VERSION:
            raise TransferError(
                f"the sender speaks version {wire.VERSION}, the reader {hello.version}"
            )
        if not self._strangers.admitted(connection):
            raise TransferError("too many connections were open before the reader said who it is")
        if len(self._connections) - len(self._strangers) > READERS_MAX:
            raise TransferError(f"there are more than {READERS_MAX} readers")
        return hello.unit_bytes

    @property
    def closing(self) -> bool:
        return self._closing

    def meet(self, connection: socket.socket) -> wire.Lane:
        store, port = wire.serve_store(self._host)
        connection.sendall(wire.frame(wire.Ready(port)))
        return wire.Lane(store, wire.SENDER, self._backend, self._memory.device, self._host)

    def pieces(self, unit_bytes: int) -> Pieces:
        return Pieces(self._memory, unit_bytes)

    @property
    def device(self) -> str:
        return self._memory.device


class _Reader:
    """One reader's requests, in order: gather into a free slot, send, go on."""

    def __init__(self, offer: CollectiveOffer, connection: socket.socket) -> None:
        self._offer = offer
        self._connection = connection
        self._buffer = bytearray()

    def run(self) -> None:
        wire.keep_alive(self._connection)
        unit_bytes = self._offer.admit(self._connection, self._buffer)
        if unit_bytes is None:
            return
        most = wire.units_per_slot(unit_bytes)
        pieces = self._offer.pieces(unit_bytes)
        slots = wire.slots(unit_bytes, self._offer.device)
        lane = self._offer.meet(self._connection)
        self._connection.settimeout(None)
        try:
            self._send(lane, pieces, slots, most)
        finally:
            lane.abandon()

    def _send(self, lane: wire.Lane, pieces: Pieces, slots: list[Any], most: int) -> None:
        under_way: list[Any] = [None] * len(slots)
        turn = 0
        while True:
            want = wire.receive(self._connection, self._buffer, wire.ToOffer)
            if want is None or self._offer.closing:
                return
            units = _units(want, most, pieces.count)
            if under_way[turn] is not None:
                lane.wait(under_way[turn])
            staging = pieces.staging(slots[turn])
            with lane.copying():
                pieces.gather(units, staging)
                sent = slots[turn][: len(units) * pieces.unit_bytes]
                under_way[turn] = lane.send(sent, want.tag)
            turn = (turn + 1) % len(slots)


def _units(want: Any, most: int, count: int) -> Any:
    if not isinstance(want, wire.Want) or len(want.units) % 4:
        raise TransferError("the reader asked for something else than units")
    units = np.frombuffer(want.units, dtype="<i4")
    if not 0 < len(units) <= most:
        raise TransferError(f"the reader asked for {len(units)} units at once; 1 to {most} may be")
    if units.min() < 0 or units.max() >= count:
        raise TransferError(f"the reader asked for units outside the {count} there are")
    return units
