"""How many of a prompt's tokens a prefix cache holds, by what was computed there before."""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def held(prompt: Sequence[int], computed: Iterable[Sequence[int]], block: int) -> int:
    """Tokens of `prompt` in whole blocks that a cache with the prompts `computed` holds.

    vLLM computes at least the last token of every prompt anew, and so the block that it is in.
    """
    most = (len(prompt) - 1) // block * block
    return min(most, max((_alike(prompt, other) // block * block for other in computed), default=0))


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
