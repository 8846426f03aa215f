"""`tandem controller explain`: what a running controller decided lately, and why."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any, Final

import httpx

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ANSWER_S: Final = 10.0
_SECONDS: Final = {"": 1, "s": 1, "m": 60, "h": 3600}


def parse(argv: list[str]) -> argparse.Namespace:
    """A bad flag ends the process as argparse does."""
    parser = argparse.ArgumentParser(
        prog="tandem controller explain", description="What a controller decided lately, and why."
    )
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the controller's address")
    parser.add_argument(
        "--since", type=_duration, metavar="TIME", help="only of the last 90s, 10m, 2h …"
    )
    parser.add_argument("-n", type=int, default=20, metavar="N", help="at most so many (20)")
    parser.add_argument("--facts", action="store_true", help="with every figure")
    return parser.parse_args(argv)


def ask(args: argparse.Namespace) -> dict[str, Any]:
    """Raises httpx.HTTPError, or ValueError for an answer that is no controller's."""
    query: dict[str, float] = {"n": max(0, args.n)}
    if args.since is not None:
        query["since_s"] = args.since
    url = f"{args.url.rstrip('/')}/decisions"
    answer = httpx.get(url, params=query, timeout=ANSWER_S, trust_env=False)
    answer.raise_for_status()
    content: dict[str, Any] = answer.json()
    if not isinstance(content, dict) or "decisions" not in content:
        raise ValueError(f"{url} is no controller's")
    return content


def lines(content: dict[str, Any], *, facts: bool) -> Iterator[str]:
    """A table, the latest last."""
    holder = content["holder"] or "nobody"
    if content["dry_run"]:
        yield "a dry run: it scales nothing"
    else:
        yield "it leads" if content["leads"] else f"it does not lead; the Lease is {holder}'s"
    rows = [("at", "what", "prefill", "decode", "why")]
    details: list[list[str]] = [[]]
    for decision in content["decisions"]:
        why = decision["reason"]
        if decision["trouble"]:
            why += f" ({decision['trouble']})"
        sizes = (_change(decision[role]) for role in ("prefill", "decode"))
        rows.append((decision["at"], decision["kind"], *sizes, why))
        details.append(list(_facts(decision["facts"])) if facts else [])
    widths = [max(len(row[n]) for row in rows) for n in range(4)]
    for row, more in zip(rows, details, strict=True):
        yield "  ".join([*(text.ljust(w) for text, w in zip(row, widths, strict=False)), row[4]])
        yield from more


def _change(sizes: list[int] | None) -> str:
    if sizes is None:
        return "-"
    before, after = sizes
    return str(after) if before == after else f"{before} > {after}"


def _facts(facts: dict[str, float]) -> Iterable[str]:
    return (f"    {name} = {value:.4g}" for name, value in facts.items())


def _duration(text: str) -> float:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh]?)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: want 90s, 10m or 2h")
    return float(found[1]) * _SECONDS[found[2]]
