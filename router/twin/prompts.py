"""A request's token ids, made of the ids of its blocks: equal ids are equal tokens."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from router.twin.traces import Request


def prompt_of(request: Request, block_tokens: int) -> list[int]:
    """All tokens of a block are its id, so nothing has to be kept for it.

    It is an array, which router and simulated engine read as they do a list, four bytes a token and
    without a Python object for each: prompts of 100,000 tokens are common in Mooncake's traces.
    """
    tokens = array("I")
    for block in request.blocks:
        tokens.extend(array("I", (block,)) * block_tokens)
    del tokens[request.input_tokens :]
    return cast("list[int]", tokens)
