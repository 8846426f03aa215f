"""`tandem keys`: makes the key files of the token channel."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from pathlib import Path

import zmq

_WHOSE = ("worker", "router")


def main(argv: list[str]) -> int:
    """`tandem keys make FOLDER`. 1 when the files can't be written or would replace others."""
    parser = argparse.ArgumentParser(prog="tandem keys", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("make", help="a pair for the workers and a pair for a router")
    made.add_argument("folder", type=Path, help="made if it is not there; no file is replaced")
    args = parser.parse_args(argv)
    try:
        make(args.folder)
    except OSError as error:
        where = error.filename or args.folder
        print(f"tandem keys: {where}: {error.strerror}; nothing is replaced", file=sys.stderr)
        return 1
    f = args.folder.absolute()
    print(f"WORKER_CURVE_SECRET_FILE={f / 'worker.secret'}")
    print(f"WORKER_CURVE_ROUTERS_FILE={f / 'router.public'}")
    print(f"ROUTER_CURVE_SECRET_FILE={f / 'router.secret'}")
    print(f"ROUTER_CURVE_WORKERS_FILE={f / 'worker.public'}")
    return 0


def make(folder: Path) -> None:
    """`worker.secret`, `worker.public`, `router.secret` and `router.public`, each one Z85 line.

    Raises OSError; a file that is there already is a FileExistsError, and then none is written.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    files: dict[Path, tuple[bytes, int]] = {}
    for whose in _WHOSE:
        public, secret = zmq.curve_keypair()
        files[folder / f"{whose}.secret"] = secret, 0o600
        files[folder / f"{whose}.public"] = public, 0o644
    for file in files:
        if os.path.lexists(file):
            raise FileExistsError(errno.EEXIST, "exists already", str(file))
    for file, (key, mode) in files.items():
        # Exclusive: two who make keys at once must not end with halves of two pairs.
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(descriptor, "wb") as opened:
            opened.write(key + b"\n")
