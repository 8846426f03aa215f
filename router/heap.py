"""Memory that a large request took goes back to the system when the request is over."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from typing import Final

LARGE_BYTES: Final = 256 * 1024
"""Bodies of that size and allocations of that size count as large."""
QUIET_S: Final = 1.0
"""After a large request: then all that it had is freed."""
PAUSE_S: Final = 10.0
"""Between two sweeps, each of which locks the heap for some milliseconds."""
_ARENA_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -8, -3, -1  # glibc's <malloc.h>


def set_up_heap() -> None:
    """Have glibc map large allocations by themselves, and keep few heaps for threads.

    By itself it raises its threshold with each large allocation that is freed, so that the next
    ones stay in a heap, of which each thread has its own: 5 MB of text to tokenize left 450 MB.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_ARENA_MAX, 2)
        mallopt(_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(_TRIM_THRESHOLD, LARGE_BYTES)


class HeapSweep:
    """Gives free pages back after large requests, a while later and not too often."""

    def __init__(self) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._due: asyncio.TimerHandle | None = None
        self._earliest = 0.0

    def freed(self, size: int) -> None:
        """A request with so large a body is over."""
        if size < LARGE_BYTES or self._trim is None or self._due is not None:
            return
        loop = asyncio.get_running_loop()
        self._due = loop.call_at(max(self._earliest, loop.time() + QUIET_S), self._sweep)

    def _sweep(self) -> None:
        assert self._trim is not None
        self._due = None
        self._earliest = asyncio.get_running_loop().time() + PAUSE_S
        # It takes milliseconds, and does not hold Python's lock.
        threading.Thread(target=self._trim, args=(0,), daemon=True).start()
