"""ZeroMQ's CURVE between the processes of a group: who is let in, and with which key one asks."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import zmq
from zmq.utils import z85

from kvtransfer.keys import read_secret
from kvtransfer.limited_log import LimitedLog

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

log = logging.getLogger(__name__)

ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"
DOMAIN: Final = b"tandem"
_VERSION: Final = b"1.0"
_QUESTIONS_AT_ONCE: Final = 64


@dataclass(frozen=True, slots=True)
class Pair:
    """One key pair, Z85. The workers of a group share one."""

    public: bytes
    secret: bytes = field(repr=False)

    @classmethod
    def read(cls, secret_file: Path) -> Pair:
        """Raises `KeyFileBad`."""
        secret = read_secret(secret_file)
        return cls(zmq.curve_public(secret), secret)


def present(socket: zmq.Socket[bytes], pair: Pair | None) -> None:
    """Before `socket` connects to another worker: prove that we are one, and ask that it does."""
    if pair is not None:
        socket.curve_publickey = pair.public
        socket.curve_secretkey = pair.secret
        socket.curve_serverkey = pair.public


def demand(socket: zmq.Socket[bytes], secret: bytes) -> None:
    """Before `socket` is bound: it speaks CURVE only, and asks its context's gate of every peer."""
    socket.curve_server = True
    socket.curve_secretkey = secret
    socket.zap_domain = DOMAIN
    # Else libzmq lets every key in when nobody answers its question.
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


class Gate:
    """Lets other workers in, and nobody else. Belongs to the thread that polls its socket."""

    def __init__(self, context: zmq.Context[Any], pair: Pair) -> None:
        self._pair = pair
        self._log = LimitedLog(log)
        self.refused_total = 0
        self.socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(ZAP_ENDPOINT)

    def guard(self, socket: zmq.Socket[bytes]) -> None:
        demand(socket, self._pair.secret)

    def answer(self) -> None:
        """Answer what was asked since the last call; a few dozen questions at most."""
        for _ in range(_QUESTIONS_AT_ONCE):
            try:
                question = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            answer = verdict(question, frozenset([self._pair.public]))
            if answer[2] != b"200":
                self.refused_total += 1
                address = question[3].decode(errors="replace") if len(question) > 3 else ""
                self._log.warning("worker with an unknown key refused", {"address": address})
            self.socket.send_multipart(answer)

    def close(self) -> None:
        self.socket.close()


def verdict(question: Sequence[bytes], known: frozenset[bytes]) -> list[bytes]:
    """ZAP's answer (rfc.zeromq.org/spec/27) to whether a peer may come in.

    It is version, request id, status, reason, user id, metadata. `known` are Z85.
    """
    match question:
        case [version, request_id, domain, _, _, b"CURVE", key] if (
            version == _VERSION and domain == DOMAIN and len(key) == 32
        ):
            if z85.encode(key) in known:
                return [_VERSION, request_id, b"200", b"OK", b"", b""]
            return [_VERSION, request_id, b"400", b"unknown key", b"", b""]
        case [_, request_id, *_]:
            return [_VERSION, request_id, b"500", b"not understood", b"", b""]
        case _:
            return [_VERSION, b"", b"500", b"not understood", b"", b""]
