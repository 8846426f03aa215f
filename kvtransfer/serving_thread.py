"""A thread that serves peers: no exception of one turn ends it, and if it ends it says why."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Final

from kvtransfer.limited_log import LimitedLog

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

FAILURES_MAX: Final = 100
"""Turns in a row that fail before the thread is given up: it serves nobody then, and its process
is to be replaced."""
PAUSE_S: Final = 0.05
"""After a turn that failed."""


class ServingThread:
    """Repeats `turn` until `close`. `turn` waits by itself, and for a bounded time."""

    def __init__(
        self,
        name: str,
        turn: Callable[[], None],
        *,
        begin: Callable[[], None] = lambda: None,
        end: Callable[[], None],
    ) -> None:
        """`begin` and `end` are called once, by the thread; `end` also when it is given up."""
        self._begin, self._turn, self._end = begin, turn, end
        self._log = LimitedLog(log)
        self._closing = threading.Event()
        self._given_up: str | None = None
        self.failures_total = 0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def dead(self) -> str | None:
        """Why it serves nobody any more; None while it serves, and when it was closed."""
        if self._given_up is not None:
            return self._given_up
        if self._closing.is_set() or self._thread.ident is None or self._thread.is_alive():
            return None
        return f"thread {self._thread.name} has ended"

    def closing(self) -> None:
        """Let it end; whoever waits in `turn` is to be woken after this."""
        self._closing.set()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def _run(self) -> None:
        failures = 0
        try:
            self._begin()
            while not self._closing.is_set():
                try:
                    self._turn()
                    failures = 0
                except Exception as error:  # noqa: BLE001  # A thread's edge.
                    failures += 1
                    self.failures_total += 1
                    self._log.exception("a turn failed", {"serving": self._thread.name})
                    if failures >= FAILURES_MAX:
                        reason = f"{failures} turns in a row failed, the last with {error!r}"
                        self._given_up = f"thread {self._thread.name} was given up: {reason[:500]}"
                        log.critical("thread given up", extra={"reason": self._given_up})
                        return
                    self._closing.wait(PAUSE_S)
        finally:
            self._end()
