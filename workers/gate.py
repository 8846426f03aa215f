"""Who may open the token channel: routers whose public keys are known, and nobody else."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

import zmq
from zmq.utils import z85

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.keys import WorkerKeys

log = logging.getLogger(__name__)

_ENDPOINT: Final = "inproc://zeromq.zap.01"
_DOMAIN: Final = b"tandem"
_VERSION: Final = b"1.0"
_STRANGERS_TOLD_MAX: Final = 100
"""Addresses whose refusal is logged; more of them would be somebody filling the log."""


class Gate:
    """Answers libzmq's question (ZAP, rfc.zeromq.org/spec/27) before a router is let in."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: WorkerKeys) -> None:
        self._keys = keys
        self._loop = asyncio.get_running_loop()
        self._socket = context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(_ENDPOINT)
        self._told: set[bytes] = set()
        self.refused_total = 0
        self._descriptor = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._answer)

    def guard(self, socket: zmq.Socket[bytes]) -> None:
        """Before `socket` is bound: it speaks CURVE only, and asks here about every peer."""
        socket.curve_server = True
        socket.curve_secretkey = self._keys.secret
        socket.zap_domain = _DOMAIN
        # Else libzmq lets every key in when nobody answers its question.
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def close(self) -> None:
        if self._socket.closed:
            return
        self._loop.remove_reader(self._descriptor)
        # At once; closing is libzmq's own thread's, and until then questions would go unanswered.
        self._socket.unbind(_ENDPOINT)
        self._socket.close()

    def _answer(self) -> None:
        if self._socket.closed:
            return
        try:
            question = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        answer = verdict(question, self._keys.routers)
        if answer[2] != b"200":
            self._refused(question)
        self._socket.send_multipart(answer)
        # The descriptor tells of edges only: there may be another question.
        self._loop.call_soon(self._answer)

    def _refused(self, question: Sequence[bytes]) -> None:
        self.refused_total += 1
        address = question[3] if len(question) > 3 else b""
        if address not in self._told and len(self._told) < _STRANGERS_TOLD_MAX:
            self._told.add(address)
            log.warning("router with an unknown key refused", extra={"address": address.decode()})


def verdict(question: Sequence[bytes], routers: frozenset[bytes]) -> list[bytes]:
    """ZAP's answer: version, request id, status, reason, user id, metadata. `routers` are Z85."""
    match question:
        case [version, request_id, domain, _, _, b"CURVE", key] if (
            version == _VERSION and domain == _DOMAIN and len(key) == 32
        ):
            if z85.encode(key) in routers:
                return [_VERSION, request_id, b"200", b"OK", b"", b""]
            return [_VERSION, request_id, b"400", b"unknown key", b"", b""]
        case [_, request_id, *_]:
            return [_VERSION, request_id, b"500", b"not understood", b"", b""]
        case _:
            return [_VERSION, b"", b"500", b"not understood", b"", b""]
