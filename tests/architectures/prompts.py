"""The prompts that every family is asked: token ids, below, at and beyond the edges that matter."""

from __future__ import annotations

import random

from tests.architectures.models import VOCABULARY

BLOCK = 32
"""Tokens a KV block, in every engine here that lets us choose; two blocks are a window."""
TOKENS = 16
"""Output tokens of each answer: some cross a block's or the window's edge while decoding."""
LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 95, 96, 97, 130, 300, 700, 1500)
LENGTH_MAX = 2048


def prompts() -> dict[str, list[int]]:
    """By name: a prompt of each length, and two that begin as others do.

    `700 forked` leaves the prompt of 700 tokens after eight blocks, `300 continued` goes on where
    that of 300 ends.
    """
    rng = random.Random(7)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(20, VOCABULARY - 10) for _ in range(count)]

    made = {str(length): tokens(length) for length in LENGTHS}
    made["700 forked"] = made["700"][: 8 * BLOCK] + tokens(200)
    made["300 continued"] = made["300"] + tokens(150)
    return made


PROMPTS = prompts()
TOGETHER = tuple(name for name in PROMPTS if name not in ("31", "63", "95", "700 forked"))
"""Thirteen: those of a round."""
