"""The signals by which a process is told to end, from the first to its last instruction."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import asyncio

ENDING: Final = (signal.SIGTERM, signal.SIGINT)


def end_unheard(loop: asyncio.AbstractEventLoop) -> None:
    """Call it last on the loop: what remains is the interpreter's, and ends by itself.

    A closed loop leaves signals to the system, which would kill a process that has ended well, and
    give it a status that says so.
    """
    for number in ENDING:
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)
