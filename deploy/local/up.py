"""`tandem up`: router, prefill and decode on this machine, until Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import socket
import sys
import time

from deploy.local.group import LocalGroup
from deploy.local.models import prepare
from deploy.local.parts import PartDied
from workers.models import PREPARED, ModelMissing


def main(argv: list[str]) -> int:
    """0 after Ctrl-C, 1 when something can't start or a part dies."""
    parser = argparse.ArgumentParser(
        prog="tandem up",
        description="Router, prefill and decode workers here. Other flags go to the workers.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--prefill", type=int, default=1, help="prefill workers")
    parser.add_argument("--decode", type=int, default=1, help="decode workers")
    args, flags = parser.parse_known_args(argv)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    try:
        _check_port(args.port)
        if args.model in PREPARED:
            prepare(args.model)
        group = LocalGroup(
            args.model, prefill=args.prefill, decode=args.decode,
            port=args.port, flags=flags, progress=_say,
        )  # fmt: skip
        with group:
            _say(f"serving {args.model} at {group.url}/v1; try:")
            _say(
                f"curl -N {group.url}/v1/chat/completions -H 'content-type: application/json' "
                f'-d \'{{"model": "{args.model}", "stream": true, "temperature": 0, "messages": '
                '[{"role": "user", "content": "What is the capital of France?"}]}\''
            )
            while True:
                time.sleep(0.5)
                group.check()
    except KeyboardInterrupt:
        _say("stopped")
        return 0
    except (PartDied, ModelMissing, OSError) as error:
        print(f"tandem up: {error}", file=sys.stderr)
        return 1


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _check_port(port: int) -> None:
    """Before any engine loads. Raises OSError."""
    if port:
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError as error:
            raise OSError(f"port {port} is taken; choose another with --port ({error})") from None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
