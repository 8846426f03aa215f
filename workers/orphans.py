"""Ends the engine's processes when this one dies, however it dies."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

log = logging.getLogger(__name__)

_WATCH = """
import os, select, signal, sys
worker, group = int(sys.argv[1]), int(sys.argv[2])
try:
    descriptor = os.pidfd_open(worker)
except ProcessLookupError:
    pass
else:
    select.select([descriptor], [], [])
try:
    os.killpg(group, signal.SIGKILL)
except ProcessLookupError:
    pass
"""


def guard() -> None:
    """Watch this process from one in a session of its own; call it before the engine starts.

    vLLM's engine core outlives a worker that is killed, and keeps its memory. A death signal set
    from here would not reach it: vLLM starts it. So this process leads a group, which everything
    that it starts is in, and the watcher ends the group. Linux only; elsewhere nothing is done.
    """
    if not hasattr(os, "pidfd_open"):
        log.warning("no pidfd here: a killed worker may leave its engine behind")
        return
    if os.getpgid(0) != os.getpid():
        os.setpgid(0, 0)
    subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _WATCH, str(os.getpid()), str(os.getpgid(0))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
