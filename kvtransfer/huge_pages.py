"""KV memory on huge pages, where the kernel allows: a reader then pins far fewer pages."""

from __future__ import annotations

import ctypes
import logging
import os
from typing import TYPE_CHECKING, Final

from kvtransfer import views

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvtransfer.transports.api import Memory

log = logging.getLogger(__name__)

HUGE_BYTES: Final = 2 << 20
COLLAPSE_BYTES: Final = 64 << 20
"""At a time: a call can't be interrupted, and one that fails has done what came before."""
MADV_HUGEPAGE: Final = 14
MADV_COLLAPSE: Final = 25
"""Linux 6.1 and later: now, rather than whenever the kernel's own thread comes by."""
SMAPS: Final = "/proc/self/smaps"


def advise(memory: Memory) -> int:
    """Ask for huge pages under this memory; how many of its bytes have them now.

    0 on devices, on other platforms, and where the kernel allows none. The content stays. What
    was never touched has no pages yet, and gets huge ones when it is.
    """
    if memory.device != "cpu" or not os.path.exists(SMAPS):
        return 0
    ranges = list(_ranges(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    madvise = libc.madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for start, end in ranges:
        aligned, last = -(-start // HUGE_BYTES) * HUGE_BYTES, end // HUGE_BYTES * HUGE_BYTES
        if last <= aligned:
            continue
        if madvise(aligned, last - aligned, MADV_HUGEPAGE):
            log.info("no huge pages", extra={"error": os.strerror(ctypes.get_errno())})
            continue
        for at in range(aligned, last, COLLAPSE_BYTES):
            # What fails stays on small pages: the count below says so.
            madvise(at, min(COLLAPSE_BYTES, last - at), MADV_COLLAPSE)
    return huge_bytes(ranges)


def huge_bytes(ranges: list[tuple[int, int]]) -> int:
    """Of these address ranges, as the kernel counts them.

    It counts by mapping and does not say where in one, so a mapping's count is cut to what the
    ranges have of it.
    """
    found = 0
    with open(SMAPS, encoding="ascii", errors="replace") as lines:
        inside = 0
        for line in lines:
            name, _, rest = line.partition(" ")
            if name == "AnonHugePages:":
                found += min(int(rest.split()[0]) << 10, inside)
            elif not name.endswith(":"):
                low, _, high = name.partition("-")
                inside = _overlap(int(low, 16), int(high, 16), ranges)
    return found


def _overlap(low: int, high: int, ranges: list[tuple[int, int]]) -> int:
    return sum(max(0, min(high, end) - max(low, start)) for start, end in ranges)


def _ranges(memory: Memory) -> Iterator[tuple[int, int]]:
    """Address ranges, merged where they touch: layers mostly lie in one allocation."""
    spans = sorted((s.base, s.base + views.span_bytes(s)) for s in memory.segments if s.blocks)
    if not spans:
        return
    start, end = spans[0]
    for low, high in spans[1:]:
        if low > end + HUGE_BYTES:
            yield start, end
            start, end = low, high
        else:
            end = max(end, high)
    yield start, end
