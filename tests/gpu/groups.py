"""The groups of rows in `make gpu-check`: the cheapest and most telling first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Rows that share what is dear to make (a pair of processes, two engines), in one process."""

    name: str
    module: str
    """Has `run(rows, machine)`."""
    rows: tuple[str, ...]
    limit_s: float
    """On a GPU."""
    least_s: float
    """With less of the whole time left it is not begun."""


_TRANSPORT = (
    "offer", "connect", "bytes", "sums", "rates", "stopped sender", "fence", "late connect",
    "killed sender",
)  # fmt: skip
_SERVING = ("start", "equal", "first tokens", "transfer", "intervals")

GROUPS = (
    Group("machine", "machine", ("versions", "nixl", "copy"), 45, 10),
    Group("ucx", "transport", _TRANSPORT, 75, 20),
    Group("steps", "stepping", ("events", "pieces"), 30, 10),
    Group("collective", "transport", _TRANSPORT, 60, 15),
    Group("tcp", "transport", _TRANSPORT, 45, 10),
    Group("llama-1b", "serving", _SERVING, 200, 90),
    Group("window", "serving", ("start", "equal"), 110, 60),
    Group("mla", "serving", ("start", "equal"), 110, 60),
    Group("llama-8b", "serving", _SERVING, 200, 90),
)
