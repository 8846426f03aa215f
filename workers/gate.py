"""Who may open the token channel: routers whose public keys are known, and nobody else."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

import zmq

from kvtransfer.curve import ZAP_ENDPOINT, demand, verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.keys import WorkerKeys

log = logging.getLogger(__name__)

_STRANGERS_TOLD_MAX: Final = 100
"""Addresses whose refusal is logged; more of them would be somebody filling the log."""


class Gate:
    """Answers libzmq's question (ZAP, rfc.zeromq.org/spec/27) before a router is let in."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: WorkerKeys) -> None:
        self._keys = keys
        self._loop = asyncio.get_running_loop()
        self._socket = context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(ZAP_ENDPOINT)
        self._told: set[bytes] = set()
        self.refused_total = 0
        self._descriptor = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._answer)

    def guard(self, socket: zmq.Socket[bytes]) -> None:
        """Before `socket` is bound: it speaks CURVE only, and asks here about every peer."""
        demand(socket, self._keys.secret)

    def close(self) -> None:
        if self._socket.closed:
            return
        self._loop.remove_reader(self._descriptor)
        # At once; closing is libzmq's own thread's, and until then questions would go unanswered.
        self._socket.unbind(ZAP_ENDPOINT)
        self._socket.close()

    def _answer(self) -> None:
        if self._socket.closed:
            return
        try:
            question = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        # The descriptor tells of edges only: there may be another question.
        self._loop.call_soon(self._answer)
        answer = verdict(question, self._keys.routers)
        if answer[2] != b"200":
            self._refused(question)
        self._socket.send_multipart(answer)

    def _refused(self, question: Sequence[bytes]) -> None:
        self.refused_total += 1
        address = question[3] if len(question) > 3 else b""
        if address not in self._told and len(self._told) < _STRANGERS_TOLD_MAX:
            self._told.add(address)
            log.warning(
                "router with an unknown key refused",
                extra={"address": address.decode(errors="replace")},
            )
