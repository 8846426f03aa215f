"""Where vLLM has put each layer's KV, and the layout by which another engine knows it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

from kvtransfer.protocol import Group, Layout
from kvtransfer.refusal import Unserved
from kvtransfer.transports.api import Memory, Segment
from kvtransfer.vllm_groups import groups_of

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
    from vllm.v1.kv_cache_layout import KVCacheLayout


@dataclass(frozen=True, slots=True)
class Placed:
    """One rank's KV memory."""

    memory: Memory
    layout: Layout


@dataclass(frozen=True, slots=True)
class _Layer:
    name: str
    tensor: torch.Tensor
    segment: Segment
    kernel_tokens: int
    """Tokens of a block as attention kernels see it, where that is a part of the manager's; else
    0."""
    backend: str


def place(kv_caches: dict[str, torch.Tensor], cache: KVCacheConfig, config: VllmConfig) -> Placed:
    """Find every layer's blocks: one of `page_size_bytes` every `block_stride` bytes.

    `kv_caches`: a view a layer, of shape (kernel blocks, heads, tokens, content). Layers that only
    share another's cache are left out. Raises `Unserved` where a block is not in one piece.
    """
    kv_layout = config.cache_config.get_resolved_kv_cache_layout()
    if not kv_layout.is_block_compact:
        raise Unserved(
            f"VLLM_KV_CACHE_LAYOUT {kv_layout.name}: a block is not in one piece in memory; "
            "use LBHNC"
        )
    strides = {n: t.block_stride for t in cache.kv_cache_tensors for n in t.layers}
    modules = config.compilation_config.static_forward_context
    layers = []
    for group in cache.kv_cache_groups:
        here = []
        for name in group.layer_names:
            if name not in strides:
                continue
            tensor = _first(kv_caches[name])
            kernel_tokens, segment = _cut(
                name, tensor, strides[name], _spec(group.kv_cache_spec, name), cache.num_blocks
            )
            backend = modules[name].get_attn_backend().get_name() if name in modules else ""
            here.append(_Layer(name, tensor, segment, kernel_tokens, backend))
        layers.append(here)
    segments: dict[Segment, int] = {}
    numbers = [
        [segments.setdefault(layer.segment, len(segments)) for layer in group] for group in layers
    ]
    groups = [
        Group(g.kind, g.window, g.block_tokens, n)
        for g, n in zip(groups_of(cache), numbers, strict=True)
    ]
    everyone = [layer for group in layers for layer in group]
    memory = Memory(tuple(segments), _device(everyone[0].tensor))
    return Placed(memory, _layout(everyone, groups, memory, kv_layout, config))


def _first(tensor: Any) -> torch.Tensor:
    """A state may come as its parts, one after the other in the same block."""
    found: torch.Tensor = tensor[0] if isinstance(tensor, list | tuple) else tensor
    return found


def _spec(spec: KVCacheSpec, name: str) -> KVCacheSpec:
    return spec.kv_cache_specs[name] if isinstance(spec, UniformTypeKVCacheSpecs) else spec


def _cut(
    name: str, tensor: torch.Tensor, stride: int, spec: KVCacheSpec, blocks: int
) -> tuple[int, Segment]:
    """Tokens of a kernel's block, if it is a part of the manager's; and the manager's blocks."""
    parts, rest = divmod(tensor.shape[0], blocks)
    if rest or not parts or spec.block_size % parts:
        raise Unserved(
            f"layer {name} has {tensor.shape[0]} blocks of KV for {blocks} of the manager's: this "
            "attention backend's blocks can't be told apart"
        )
    segment = Segment(tensor.data_ptr(), stride, spec.page_size_bytes, blocks)
    return (spec.block_size // parts if parts > 1 else 0), segment


def _layout(
    layers: list[_Layer],
    groups: list[Group],
    memory: Memory,
    kv_layout: KVCacheLayout,
    config: VllmConfig,
) -> Layout:
    """How this memory is cut. What is not known to be apart is taken to be one piece."""
    ranks = config.parallel_config.tensor_parallel_size
    heads = max(1, config.model_config.get_total_num_kv_heads())  # A model of states has none.
    held, first = max(1, heads // ranks), layers[0].tensor
    sizes = {s.block_bytes for s in memory.segments}
    whole = not any(layer.kernel_tokens for layer in layers)
    alike = len(groups) == 1 and len(sizes) == 1 and whole and first.shape[1] == held
    head_token_bytes, rest = divmod(max(sizes), held * groups[0].block_tokens)
    by_head = alike and not rest and kv_layout.name in ("LBHNC", "BLHNC")
    return Layout(
        content=_digest(layers, kv_layout, config),
        dtype=str(first.dtype),
        kv_heads=heads,
        head_token_bytes=head_token_bytes if by_head else 0,
        ranks=ranks,
        by_head=by_head,
        # The CPU's attention kernels pack a block's tokens in an order of their own, and no
        # other's order has been proven.
        by_token=False,
        groups=groups,
        segments=[s.block_bytes for s in memory.segments],
    )


def _digest(layers: list[_Layer], kv_layout: KVCacheLayout, config: VllmConfig) -> str:
    """Digest of what must be equal for the same bytes to mean the same; not of blocks and heads."""
    told = [
        [x.name, x.backend, x.kernel_tokens, str(x.tensor.dtype), x.tensor.shape[-1]]
        for x in layers
    ]
    content = [
        "tandem kv 3", _device(layers[0].tensor).partition(":")[0], kv_layout.name,
        config.cache_config.cache_dtype, sorted(told),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _device(tensor: torch.Tensor) -> str:
    return "cpu" if tensor.device.type == "cpu" else str(tensor.device)
