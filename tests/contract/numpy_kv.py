"""KV memory of numpy, cut in any way, whose content tells whose it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from xxhash import xxh3_64_intdigest

from kvtransfer.core.geometry import heads_of
from kvtransfer.protocol import Group, Layout
from kvtransfer.transports.api import Memory, Segment

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True)
class Cut:
    """How one side's memory is cut. A block keeps heads apart, and a head its tokens."""

    layers: int = 3
    kv_heads: int = 4
    block_tokens: int = 8
    head_token_bytes: int = 64
    ranks: int = 1
    blocks: int = 97
    """The null block, which is never used, included."""
    by_token: bool = True

    def layout(self, content: str = "numpy") -> Layout:
        heads = max(1, self.kv_heads // max(1, self.ranks))
        size = heads * self.block_tokens * self.head_token_bytes
        layers = list(range(self.layers))
        return Layout(
            content, "u64", self.kv_heads, self.head_token_bytes, self.ranks,
            by_head=True, by_token=self.by_token, segments=[size] * self.layers,
            groups=[Group("full_attention", 0, self.block_tokens, layers)],
        )  # fmt: skip

    def blocks_of(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)


PLAIN: Final = Cut()


@dataclass(frozen=True)
class Prompt:
    """Its KV is a function of handle, layer, head and token: whoever has it can check it."""

    handle: str
    tokens: int
    cached: int = 0
    """At the receiver, of its own."""
    same: int | None = None
    """Tokens as the prompt of this handle has them; from there on others. None: all."""

    @property
    def seed(self) -> int:
        return xxh3_64_intdigest(self.handle.encode())

    @property
    def token_ids(self) -> list[int]:
        same = self.tokens if self.same is None else self.same
        return [(self.seed + 7 * i + (i >= same)) % 50_000 for i in range(self.tokens)]

    def kv(self, cut: Cut, heads: Iterable[int], tokens: Iterable[int]) -> np.ndarray:
        """Shape (layers, heads, tokens, words)."""
        words = np.arange(cut.head_token_bytes // 8, dtype=np.uint64)
        axes = np.meshgrid(
            np.arange(cut.layers, dtype=np.uint64), np.array(list(heads), dtype=np.uint64),
            np.array(list(tokens), dtype=np.uint64), words, indexing="ij",
        )  # fmt: skip
        mixed = np.full(axes[0].shape, self.seed, dtype=np.uint64)
        for axis in axes:
            mixed = (mixed ^ axis) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
        return mixed


class Kv:
    """One rank's memory."""

    def __init__(self, cut: Cut, rank: int, seed: int) -> None:
        heads = heads_of(cut.layout(), rank)
        self.cut, self.heads = cut, range(heads.first, heads.first + heads.count)
        words = cut.head_token_bytes // 8
        shape = (cut.layers, cut.blocks, heads.count, cut.block_tokens, words)
        junk = np.random.default_rng(seed).integers(0, 2**63, size=shape, dtype=np.uint64)
        self.array = junk
        size = heads.count * cut.block_tokens * cut.head_token_bytes
        self.memory = Memory(
            tuple(Segment(layer.ctypes.data, size, size, cut.blocks) for layer in junk)
        )

    def write(self, prompt: Prompt, first: int, blocks: list[int]) -> None:
        """What a step computes: the prompt's blocks from its block `first`."""
        span = self.cut.block_tokens
        for number, block in enumerate(blocks, first):
            tokens = range(number * span, min((number + 1) * span, prompt.tokens))
            self.array[:, block, :, : len(tokens)] = prompt.kv(self.cut, self.heads, tokens)

    def holds(self, prompt: Prompt, blocks: list[int]) -> bool:
        """From its first token that is not cached, in the prompt's `blocks`."""
        span = self.cut.block_tokens
        for number in range(prompt.cached // span, self.cut.blocks_of(prompt.tokens)):
            tokens = range(number * span, min((number + 1) * span, prompt.tokens))
            here = self.array[:, blocks[number], :, : len(tokens)]
            if not np.array_equal(here, prompt.kv(self.cut, self.heads, tokens)):
                return False
        return True
