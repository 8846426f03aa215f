"""Traces of requests: when each came, how long it was, and which blocks of it others have too."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

BLOCK_TOKENS: Final = 512
"""Of Mooncake's hash ids."""
IDS_END: Final = 1 << 31
"""Above every block's id: it is the token id of all its tokens."""


class TraceUnreadable(Exception):
    """The file, the line, and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Request:
    """`blocks`: an id for each block of the prompt, the last perhaps not full. Prompts whose first
    ids are equal begin with the same tokens."""

    at_s: float
    input_tokens: int
    output_tokens: int
    blocks: Sequence[int]

    @property
    def session(self) -> int:
        """No trace names its sessions: requests that share more than their first block (of most
        traces, all do) are of one."""
        return self.blocks[1] if len(self.blocks) > 1 else self.blocks[0]


@dataclass(frozen=True, slots=True)
class Trace:
    name: str
    requests: Sequence[Request]
    """In the order in which they come; the first at 0 or later."""
    block_tokens: int = BLOCK_TOKENS

    @property
    def seconds(self) -> float:
        """To the last arrival."""
        return self.requests[-1].at_s if self.requests else 0.0

    def first(self, count: int) -> Trace:
        return replace(self, requests=self.requests[:count])

    def scaled(self, lengths: int = 1, time: float = 1.0) -> Trace:
        """Lengths divided by `lengths` (which divides `block_tokens`), time stretched by `time`.

        Raises ValueError.
        """
        if lengths < 1 or self.block_tokens % lengths:
            raise ValueError(f"{self.block_tokens} tokens a block can't be divided by {lengths}")
        if time <= 0:
            raise ValueError(f"time can't be stretched by {time}")
        requests = [
            Request(
                r.at_s * time,
                -(-r.input_tokens // lengths),
                max(1, round(r.output_tokens / lengths)),
                r.blocks,
            )
            for r in self.requests
        ]
        return Trace(self.name, requests, self.block_tokens // lengths)


def read(path: Path) -> Trace:
    """Mooncake's JSON lines or Azure's CSV, by the file's suffix. Raises `TraceUnreadable`."""
    readers: dict[str, Callable[[str, Iterable[str]], list[Request]]]
    readers = {".jsonl": mooncake, ".csv": azure}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise TraceUnreadable(f"{path.name}: neither Mooncake's .jsonl nor Azure's .csv")
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            requests = reader(path.name, lines)
    except OSError as error:
        raise TraceUnreadable(f"{path.name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TraceUnreadable(f"{path.name}: not UTF-8") from error
    if not requests:
        raise TraceUnreadable(f"{path.name}: there is no request in it")
    requests.sort(key=lambda r: r.at_s)
    began_s = requests[0].at_s
    requests = [replace(r, at_s=r.at_s - began_s) for r in requests]
    return Trace(path.stem, spread(requests))


def mooncake(name: str, lines: Iterable[str]) -> list[Request]:
    """`timestamp` in ms, `input_length`, `output_length`, `hash_ids` of 512 tokens each."""
    requests = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise TraceUnreadable(f"{where}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise TraceUnreadable(f"{where}: not an object")
        at_ms, tokens = _number(where, record, "timestamp"), _count(where, record, "input_length")
        ids = record.get("hash_ids")
        if not isinstance(ids, list) or not all(_is_id(i) for i in ids):
            raise TraceUnreadable(f"{where}: hash_ids is not a list of numbers from 0 to 2^31 - 1")
        if len(ids) != -(-tokens // BLOCK_TOKENS):
            raise TraceUnreadable(
                f"{where}: {len(ids)} hash_ids for {tokens} tokens in blocks of {BLOCK_TOKENS}"
            )
        outputs = _count(where, record, "output_length", least=0)
        requests.append(Request(at_ms / 1000, tokens, max(1, outputs), tuple(ids)))
    return requests


def azure(name: str, lines: Iterable[str]) -> list[Request]:
    """`TIMESTAMP,ContextTokens,GeneratedTokens`; no prompt has anything of another's."""
    rows = csv.DictReader(lines)
    wanted = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
    if missing := [w for w in wanted if w not in (rows.fieldnames or ())]:
        raise TraceUnreadable(f"{name}, line 1: no column {', '.join(missing)}")
    requests: list[Request] = []
    for row in rows:
        where = f"{name}, line {rows.line_num}"
        try:
            at = datetime.fromisoformat((row["TIMESTAMP"] or "").strip())
        except ValueError as error:
            raise TraceUnreadable(f"{where}: TIMESTAMP: {error}") from error
        counts = {w: _integer(where, w, row[w]) for w in wanted[1:]}
        tokens = _count(where, counts, "ContextTokens")
        outputs = _count(where, counts, "GeneratedTokens", least=0)
        # Stamps without a zone are all of one; which, does not matter.
        at_s = (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
        requests.append(Request(at_s, tokens, max(1, outputs), own_blocks(len(requests), tokens)))
    return requests


def own_blocks(number: int, tokens: int) -> tuple[int, ...]:
    """Of a prompt that shares nothing: its first block differs from every other's."""
    return (number,) * -(-tokens // BLOCK_TOKENS)


def spread(requests: Sequence[Request]) -> list[Request]:
    """Those with one stamp, evenly over the time to the next: Mooncake's are rounded to 3 s."""
    groups = [list(group) for _, group in groupby(requests, key=lambda r: r.at_s)]
    found = []
    for at, group in enumerate(groups):
        begin_s = group[0].at_s
        if at + 1 < len(groups):
            lasts_s = groups[at + 1][0].at_s - begin_s
        else:  # As long as the one before.
            lasts_s = begin_s - groups[at - 1][0].at_s if at else 0.0
        found += [replace(r, at_s=begin_s + lasts_s * n / len(group)) for n, r in enumerate(group)]
    return found


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < IDS_END


def _integer(where: str, name: str, text: str | None) -> int:
    try:
        return int(text or "")
    except ValueError:
        raise TraceUnreadable(f"{where}: {name} is {text!r}, not a whole number") from None


def _number(where: str, record: dict[str, Any], name: str) -> float:
    value = record.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1e15:
        raise TraceUnreadable(f"{where}: {name} is {value!r}, not a number from 0 on")
    return float(value)


def _count(where: str, record: dict[str, Any], name: str, least: int = 1) -> int:
    value = record.get(name)
    if type(value) is not int or not least <= value < IDS_END:
        raise TraceUnreadable(f"{where}: {name} is {value!r}, not a whole number from {least} on")
    return value
