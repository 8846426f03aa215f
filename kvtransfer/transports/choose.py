"""Which transport two processes use: the best that one offers and that reaches the other."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Final

from kvtransfer.transports.api import Memory, TransferError, Transport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtransfer.transports.api import Peer
    from kvtransfer.transports.memory import MemoryTransport
    from kvtransfer.transports.tcp import TcpTransport
    from kvtransfer.transports.ucx import UcxTransport

    # Here mypy sees that they are what they are taken for.
    _KINDS: tuple[type[Transport], ...] = (UcxTransport, TcpTransport, MemoryTransport)

log = logging.getLogger(__name__)

PREFERRED: Final = ("ucx", "tcp", "collective")
"""Best first."""

_CLASSES: Final = {
    "ucx": "UcxTransport",
    "tcp": "TcpTransport",
    "collective": "CollectiveTransport",
    "memory": "MemoryTransport",
}
_LISTENS: Final = {"tcp", "collective"}
"""Those that are told the host by which their peers can reach this process."""


def load(name: str, host: str = "127.0.0.1") -> Transport:
    """Raises `TransferError` for a name that is none, or whose module can't be imported here."""
    if name not in _CLASSES:
        raise TransferError(f"no transport is called {name}: there are {', '.join(_CLASSES)}")
    try:
        module = importlib.import_module(f"kvtransfer.transports.{name}")
    except ImportError as error:
        raise TransferError(f"{name} can't be loaded: {error}") from error
    made: Transport = getattr(module, _CLASSES[name])(
        **({"host": host} if name in _LISTENS else {})
    )
    return made


def available(
    memory: Memory, names: Sequence[str] = PREFERRED, host: str = "127.0.0.1"
) -> tuple[list[Transport], dict[str, str]]:
    """Those that can serve `memory` here, in the order of `names`; why the others can't."""
    able: list[Transport] = []
    reasons: dict[str, str] = {}
    for name in names:
        try:
            transport = load(name, host)
            reason = transport.missing(memory)
        except TransferError as error:
            reason = str(error)
        if reason is None:
            able.append(transport)
        else:
            reasons[name] = reason
    return able, reasons


def candidates(
    memory: Memory, offered: Sequence[tuple[str, bytes]], ours: Sequence[Transport]
) -> list[tuple[Transport, bytes]]:
    """Our transports that the sender offers and that may reach it, with its descriptions, in order.

    Raises `TransferError` where there is none, which names both sides' transports.
    """
    descriptions = dict(offered)
    found = []
    for transport in ours:
        description = descriptions.get(transport.name)
        if description is None or transport.missing(memory) is not None:
            continue
        if transport.reaches(description):
            found.append((transport, description))
    if found:
        return found
    theirs = ", ".join(name for name, _ in offered) or "none"
    own = ", ".join(t.name for t in ours) or "none"
    raise TransferError(
        f"no transport reaches the sender: it offers {theirs}, the receiver has {own}"
    )


def connect(
    memory: Memory,
    offered: Sequence[tuple[str, bytes]],
    ours: Sequence[Transport],
    unit_bytes: int,
) -> tuple[str, Peer]:
    """Connect by the first that can, in the order of `candidates`; its name, and the peer.

    One that may reach the sender and can't is told in the log, once for each attempt to connect.
    Raises `TransferError` when none can, with each one's reason.
    """
    reasons: list[str] = []
    for transport, description in candidates(memory, offered, ours):
        try:
            peer = transport.connect(memory, description, unit_bytes)
        except TransferError as error:
            reasons.append(f"{transport.name}: {error}")
            continue
        if reasons:
            log.warning(
                "KV transport passed over",
                extra={"taken": transport.name, "reasons": reasons},
            )
        return transport.name, peer
    raise TransferError("; ".join(reasons))
