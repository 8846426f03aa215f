"""Memory of large requests goes back to the system."""

from __future__ import annotations

import subprocess
import sys

SWEPT = """
import asyncio, threading
from router import heap
heap.QUIET_S, heap.PAUSE_S = 0.01, 0.05
heap.set_up_heap()

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

def hold():
    pieces = [libc.malloc(2000) for _ in range(40_000)]
    for piece in pieces:
        ctypes.memset(piece, 1, 2000)
    for piece in pieces[:-1]:
        libc.free(piece)

async def main():
    before = resident()
    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()
    held = resident() - before
    sweep = heap.HeapSweep()
    sweep.freed(heap.LARGE_BYTES - 1)
    await asyncio.sleep(0.1)
    small = resident() - before
    sweep.freed(heap.LARGE_BYTES)
    sweep.freed(heap.LARGE_BYTES)
    for _ in range(500):
        await asyncio.sleep(0.01)
        if resident() - before < held / 4:
            break
    print(held >> 20, small >> 20, (resident() - before) >> 20)

asyncio.run(main())
"""


def test_a_large_request_s_memory_goes_back_when_it_is_over() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SWEPT], capture_output=True, text=True, timeout=60, check=True
    )
    held, small, after = map(int, done.stdout.split())
    assert held > 60
    assert small > 60  # A small request sweeps nothing.
    assert after < held / 4
