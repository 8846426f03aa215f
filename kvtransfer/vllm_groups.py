"""vLLM's KV cache groups as the handoff knows them, and which of their kinds it serves."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING, Final

from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpecKind,
    KVQuantMode,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    get_kv_cache_spec_kind,
    iter_layer_specs,
)

from kvtransfer.protocol import NULL_BLOCK, STATE
from kvtransfer.refusal import Unserved

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

    Tables = Sequence[Sequence[int]]

SERVED: Final = (
    FullAttentionSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    ChunkedLocalAttentionSpec,
    MambaSpec,
)
"""Exactly these: a kind derived from one keeps its blocks in a way of its own."""
QUANTIZED: Final = (KVQuantMode.NONE, KVQuantMode.FP8_PER_TENSOR)
"""Others keep scales beside the blocks."""
DRAFTERS: Final = ("ngram",)
"""Ways to speculate that keep no KV of their own."""
LATENT: Final = KVCacheSpecKind.MLA_ATTENTION.value
APART: Final = "a mixed worker with --kv-connector none"


@dataclass(frozen=True, slots=True)
class KvGroup:
    """Layers that share block ids."""

    kind: str
    window: int
    """Tokens that the next one attends to; 0 for all."""
    block_tokens: int

    @property
    def is_state(self) -> bool:
        return self.kind == STATE


def groups_of(config: KVCacheConfig) -> list[KvGroup]:
    """In vLLM's order. Raises `Unserved` for a kind that is not served."""
    return [_group(group.kv_cache_spec) for group in config.kv_cache_groups]


def refuse_unserved(config: VllmConfig, cache: KVCacheConfig) -> None:
    """Raise `Unserved` for what vLLM would run and the handoff can't move."""
    if not cache.kv_cache_groups:
        raise Unserved("the model keeps no KV cache: there is nothing to hand off")
    if any(g.host_resident or not g.enable_kv_transfer for g in cache.kv_cache_groups):
        raise Unserved("the model keeps a part of its KV in host memory: that is not handed off")
    groups, speculation = groups_of(cache), config.speculative_config
    if current_platform.is_cpu() and any(g.kind == LATENT for g in groups):
        raise Unserved(
            "the model's latent attention (MLA) is not handed off on a CPU: there vLLM's kernels "
            "give a prompt's last token another result alone than with the prompt; use a GPU, or "
            + APART
        )
    if speculation is None:
        return
    if speculation.method not in DRAFTERS:
        raise Unserved(
            f"--speculative-config: method {speculation.method} is not proven beside a handoff; "
            f"use {' or '.join(DRAFTERS)}, or {APART}"
        )
    if any(g.is_state for g in groups):
        raise Unserved(
            "--speculative-config: the states of a Mamba model are not handed off with "
            "speculation; leave it out"
        )


def _group(spec: KVCacheSpec) -> KvGroup:
    layers = list(iter_layer_specs(spec))
    kinds = {type(layer) for layer in layers}
    if len(kinds) != 1 or not kinds <= set(SERVED):
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise Unserved(
            f"the model keeps KV of a kind that is not handed off: {names}; "
            f"try --disable-hybrid-kv-cache-manager, or {APART}"
        )
    for layer in layers:
        if isinstance(layer, AttentionSpec) and layer.kv_quant_mode not in QUANTIZED:
            raise Unserved(
                f"--kv-cache-dtype: KV quantized as {layer.kv_quant_mode.name.lower()} is not "
                "handed off; use auto or fp8"
            )
        if isinstance(layer, SlidingWindowSpec) and layer.extra_retained_tokens:
            raise Unserved("--speculative-config: a drafter of several modules is not served")
    windows = {_window(layer) for layer in layers}
    if len(windows) != 1:
        raise Unserved(f"one KV group has layers of several windows: {sorted(windows)}")
    kind = get_kv_cache_spec_kind(layers[0]).value
    return KvGroup(kind, windows.pop(), layers[0].block_size)


def _window(spec: KVCacheSpec) -> int:
    window = 0
    match spec:
        case SlidingWindowSpec():
            window = spec.sliding_window
        case ChunkedLocalAttentionSpec():
            window = spec.attention_chunk_size
    return window


class Columns:
    """A prompt's block ids by column (`kvtransfer.protocol`), out of vLLM's block tables."""

    def __init__(self, groups: Sequence[KvGroup]) -> None:
        self._groups = groups
        counted = [g.block_tokens for g in groups if not g.is_state]
        self.tokens: int = lcm(*(counted or [g.block_tokens for g in groups]))

    @property
    def has_state(self) -> bool:
        return any(g.is_state for g in self._groups)

    @property
    def forget(self) -> bool:
        """Some group keeps what one next token needs, and not what the one before it did."""
        return any(g.window or g.is_state for g in self._groups)

    @property
    def indexed_group(self) -> int:
        """The group whose cached blocks say most of what a prompt can hit."""
        whole = [n for n, g in enumerate(self._groups) if not g.window and not g.is_state]
        return whole[0] if whole else 0

    def count(self, tokens: int) -> int:
        """Columns that so many tokens fill, the partial last one included."""
        return -(-tokens // self.tokens)

    def ids(
        self, tables: Tables, tokens: int, columns: range, kept_from: Sequence[int]
    ) -> list[list[int]]:
        """The blocks of these columns of a prompt of which `tokens` are handed over.

        `kept_from`: by group, the first block that the token after them attends to; what comes
        before is null, as is whatever the tables have as null.
        """
        found = []
        for column in columns:
            ids: list[int] = []
            for group, table, first in zip(self._groups, tables, kept_from, strict=True):
                if group.is_state:
                    last = column == self.count(tokens) - 1
                    ids.append(table[(tokens - 1) // group.block_tokens] if last else NULL_BLOCK)
                    continue
                blocks = self.tokens // group.block_tokens
                end = -(-tokens // group.block_tokens)
                ids += [
                    table[n] if first <= n < end else NULL_BLOCK
                    for n in range(column * blocks, (column + 1) * blocks)
                ]
            found.append(ids)
        return found


def kept_from(cache: KVCacheManager, tokens: int) -> list[int]:
    """By group, the first block that a token after `tokens` others attends to, as vLLM has it."""
    managers = cache.coordinator.single_type_managers
    return [
        max(0, manager.get_num_skipped_tokens(tokens)) // manager.block_size for manager in managers
    ]
