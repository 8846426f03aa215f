"""A trace as prompts of text: equal blocks are equal words, and every word is one token."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from tokenizers import Tokenizer

from router.twin.generate import KINDS, generate_kind

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from router.twin.traces import Trace

_WORDS: Final = 4096


@dataclass(frozen=True, slots=True)
class Ask:
    """Due `at_s` after the replay's start."""

    at_s: float
    prompt: str
    input_tokens: int
    output_tokens: int


def load(model: Path, trace: Trace, tokens_max: int) -> list[Ask]:
    """`tokens_max`: of a prompt and its answer; what is longer is cut."""
    words = one_token_words(model)
    asks = []
    for request in trace.requests:
        outputs = min(request.output_tokens, tokens_max // 4)
        tokens = min(request.input_tokens, tokens_max - outputs - 1)
        text = [w for block in request.blocks for w in _block(words, block, trace.block_tokens)]
        asks.append(Ask(request.at_s, "".join(text[:tokens]), tokens, outputs))
    return asks


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a trace, and how it is made to fit a small machine and a short run."""

    name: str = "mooncake-conversation"
    seed: int = 0
    requests: int = 400
    divide_lengths: int = 16
    stretch_time: float = 0.25
    reuse_sooner: float = 10.0
    """Shared beginnings come back so many times sooner than the published ones, whose median is 200
    s: a run of half a minute would have next to none."""


def shaped(shape: Shape) -> Trace:
    """Raises KeyError, ValueError."""
    kind = KINDS[shape.name]
    if (sharing := kind.sharing) is not None:
        p50_s, p90_s = sharing.gap_p50_s, sharing.gap_p90_s
        by = shape.reuse_sooner
        kind = replace(kind, sharing=replace(sharing, gap_p50_s=p50_s / by, gap_p90_s=p90_s / by))
    made = generate_kind(shape.name, kind, shape.seed, shape.requests)
    return made.scaled(shape.divide_lengths, shape.stretch_time)


def one_token_words(model: Path) -> Sequence[str]:
    """Each with a space before it."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    found = []
    for word in sorted(tokenizer.get_vocab()):
        text = " " + word[1:]
        plain = word[0] == "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}" and word[1:].isascii()
        if plain and len(word) > 2 and word[1:].isalpha() and word[1:].islower():
            if len(tokenizer.encode(text, add_special_tokens=False).ids) == 1:
                found.append(text)
            if len(found) == _WORDS:
                break
    return found


def _block(words: Sequence[str], block: int, tokens: int) -> list[str]:
    return random.Random(block).choices(words, k=tokens)
