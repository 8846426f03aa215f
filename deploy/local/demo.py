"""`make demo`: one question, prefilled on one process and decoded on another."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import httpx

from deploy.local.group import LocalGroup
from deploy.local.parts import PartDied

QUESTION = "What is the capital of France?"


def main() -> int:
    """1 when the answer was not handed off, or not every block of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        # It shows the handoff, however cheap it would be to do without.
        apart = ["--disaggregate", "always"]
        flags = ["--max-model-len", "2048"]
        with LocalGroup(args.model, flags=flags, router_flags=apart, progress=say) as group:
            print(f"\n> {QUESTION}")
            name = ask(group.url, args.model)
            record = httpx.get(f"{group.url}/tandem/requests/{name}").json()[0]
    except PartDied as error:
        say(f"demo: {error}")
        return 1
    return report(record)


def ask(url: str, model: str) -> str:
    """Stream the answer to standard output; the request's id."""
    body = {
        "model": model,
        "stream": True,
        "temperature": 0,
        "max_tokens": 64,
        "messages": [{"role": "user", "content": QUESTION}],
    }
    name = ""
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=120) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if not data or data == "[DONE]":
                continue
            chunk: dict[str, Any] = json.loads(data)
            name = chunk["id"]
            print(chunk["choices"][0]["delta"].get("content") or "", end="", flush=True)
    print()
    return name


def report(record: dict[str, Any]) -> int:
    """One line of what happened; 1 when it is not what a handoff must be."""
    blocks = -(-record["prompt_tokens"] // record["block_tokens"])
    expected = blocks * record["block_bytes"]
    print(
        f"\nprefilled on {record['prefill_worker']}, decoded on {record['decode_worker']}; "
        f"KV moved {record['kv_bytes']:,} bytes ({blocks} blocks x {record['block_bytes']:,}) "
        f"in {record['kv_s'] * 1000:.0f} ms; first token after {record['ttft_s'] * 1000:.0f} ms"
    )
    return 0 if record["prefill_worker"] and record["kv_bytes"] == expected else 1


if __name__ == "__main__":
    sys.exit(main())
