"""A sender's control channel as a process of its own, over no engine: what a handoff port is.

    python -m deploy.local.handoff_side --address-file FILE

Simulated engines have no such port, and vLLM's takes gigabytes. This one runs the production
`Sender` with an empty memory, so what strangers send to the port can be tried on it.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path

from kvtransfer.protocol import Group, Layout
from kvtransfer.sender import Offered, Sender
from workers.addresses import write_addresses
from workers.logs import log_to_stderr

LAYOUT = Layout(
    "attacked", "float32", 1, 0, 1, False, False, [Group("full_attention", 0, 16, [0])], [4096]
)


def main() -> int:
    """Serve until SIGTERM; 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address-file", type=Path, required=True)
    args = parser.parse_args()
    log_to_stderr()
    sender = Sender("127.0.0.1", "attacked", 5.0, Offered(LAYOUT, "off", [[]]))
    write_addresses(args.address_file, channel=sender.endpoint, http="")
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    while not stopped.wait(0.2):
        sender.ended()  # As an engine's step does.
    sender.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
