"""Which transport two processes use: the best that one offers and that reaches the other."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

from kvtransfer.transports.api import Memory, TransferError, Transport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtransfer.transports.memory import MemoryTransport
    from kvtransfer.transports.tcp import TcpTransport
    from kvtransfer.transports.ucx import UcxTransport

    # Here mypy sees that they are what they are taken for.
    _KINDS: tuple[type[Transport], ...] = (UcxTransport, TcpTransport, MemoryTransport)

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


def choose(
    memory: Memory, offered: Sequence[tuple[str, bytes]], ours: Sequence[Transport]
) -> tuple[Transport, bytes]:
    """The first of ours that the sender offers and that reaches it, with its description there.

    Raises `TransferError`, which names both sides' transports.
    """
    descriptions = dict(offered)
    for transport in ours:
        description = descriptions.get(transport.name)
        if description is None or transport.missing(memory) is not None:
            continue
        if transport.reaches(description):
            return transport, description
    theirs = ", ".join(name for name, _ in offered) or "none"
    own = ", ".join(t.name for t in ours) or "none"
    raise TransferError(
        f"no transport reaches the sender: it offers {theirs}, the receiver has {own}"
    )
