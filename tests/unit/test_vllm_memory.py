"""Each KV block lies where we say, in every layout that vLLM has for its attention backends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvtransfer import views

# Torch warns of its own deprecations while vLLM imports it.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

BLOCKS, TOKENS, HEADS = 6, 32, 4
COMPACT = ["LBHNC", "LBNHC", "BLHNC", "BLNHC"]


def spec_of(kind: str, **others: Any) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, MLAAttentionSpec

    plain: dict[str, Any] = {"block_size": TOKENS, "dtype": torch.bfloat16}
    match kind:
        case "gqa":
            plain |= {"num_kv_heads": HEADS, "head_size": 16}
            return FullAttentionSpec(**{**plain, **others})
        case "mla":
            plain |= {"num_kv_heads": 1, "head_size": 40}
            return MLAAttentionSpec(**{**plain, **others})
    shapes, dtypes = ((3, 8), (5, 4)), (torch.bfloat16, torch.float32)
    return MambaSpec(block_size=4096, shapes=shapes, dtypes=dtypes, **others)


def config_of(layout: Any, heads: int = HEADS, ranks: int = 1) -> Any:
    return SimpleNamespace(
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: layout, cache_dtype="auto"
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: heads),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )


def allocated(
    groups: list[tuple[Any, list[str]]], layout: Any, kernel: list[int] | None = None
) -> tuple[Any, Any]:
    """vLLM's configuration of these groups, which share one allocation, and its own views."""
    import torch
    from vllm.v1.kv_cache_interface import (
        KVCacheConfig,
        KVCacheGroupSpec,
        KVCacheTensor,
        compute_layout_strides,
    )
    from vllm.v1.worker.utils import allocate_kv_cache

    tensors, sizes = [], []
    for spec, layers in groups:
        fixed = (None,) * 5
        strides = compute_layout_strides(spec, BLOCKS, len(layers), layout, fixed_strides=fixed)
        sizes.append(spec.page_size_bytes * BLOCKS * len(layers))
        tensors.append((list(layers), strides[0], strides[1]))
    kv_tensors = [KVCacheTensor(max(sizes), n, a, b) for n, a, b in tensors]
    cache = KVCacheConfig(BLOCKS, kv_tensors, [KVCacheGroupSpec(n, s) for s, n in groups])
    return cache, allocate_kv_cache(cache, torch.device("cpu"), layout, kernel)


def bytes_of(tensor: Any, block: int, parts: int) -> np.ndarray:
    """Bytes that the engine sees in one of the manager's blocks, sorted: their order differs."""
    import torch

    held = tensor[block * parts : (block + 1) * parts].contiguous().view(torch.uint8)
    return np.sort(held.numpy().reshape(-1))


def fill(tensor: Any, seed: int) -> None:
    import torch

    noise = np.random.default_rng(seed).integers(0, 256, tensor.numel() * tensor.element_size())
    flat = torch.from_numpy(noise.astype(np.uint8)).view(tensor.dtype)
    tensor.copy_(flat.view(tensor.shape))


def check(groups: list[tuple[Any, list[str]]], name: str, kernel: list[int] | None = None) -> Any:
    """One layer after another: fill it, and find each of its blocks where `place` says."""
    from vllm.v1.kv_cache_layout import KVCacheLayout

    from kvtransfer.vllm_memory import place

    layout = KVCacheLayout[name]
    cache, tensors = allocated(groups, layout, kernel)
    placed = place(tensors, cache, config_of(layout))
    for (spec, layers), group in zip(groups, placed.layout.groups, strict=True):
        assert len(group.segments) == len(layers)
        for layer, number in zip(layers, group.segments, strict=True):
            tensor, segment = tensors[layer], placed.memory.segments[number]
            fill(tensor, number)
            assert segment.block_bytes == spec.page_size_bytes
            parts = tensor.shape[0] // BLOCKS
            for block in range(BLOCKS):
                start = segment.base + block * segment.stride
                here = views.array(start, segment.block_bytes)
                assert np.array_equal(np.sort(here), bytes_of(tensor, block, parts))
    return placed.layout


@pytest.mark.parametrize("name", COMPACT)
@pytest.mark.parametrize("kind", ["gqa", "mla", "state"])
def test_blocks_lie_where_we_say_in_every_layout_with_whole_blocks(kind: str, name: str) -> None:
    check([(spec_of(kind), ["a", "b", "c"])], name)


@pytest.mark.parametrize("name", ["LBHNC", "LBNHC"])
def test_the_manager_s_blocks_are_several_of_the_kernel_s(name: str) -> None:
    layout = check([(spec_of("gqa"), ["a", "b"])], name, kernel=[TOKENS // 4])
    assert layout.groups[0].block_tokens == TOKENS
    assert not layout.by_head, "heads lie inside the kernel's blocks"


def test_two_sides_of_unlike_kernel_blocks_are_refused() -> None:
    from kvtransfer.core.geometry import refusal

    one = check([(spec_of("gqa"), ["a", "b"])], "LBHNC", kernel=[TOKENS // 4])
    two = check([(spec_of("gqa"), ["a", "b"])], "LBHNC")
    assert (refusal(one, two) or "").startswith("KV content differs")


@pytest.mark.parametrize("name", ["LBHNC", "LBNHC"])
def test_groups_that_share_an_allocation_share_segments(name: str) -> None:
    from kvtransfer.core.geometry import routes

    sliding = spec_of("gqa", head_size=32, num_kv_heads=2)
    layout = check([(spec_of("gqa"), ["a", "b"]), (sliding, ["c", "d"])], name)
    assert layout.groups[0].segments == layout.groups[1].segments
    assert len(layout.segments) == 2
    routes(layout, layout, 0)


def test_unlike_layers_of_one_group_keep_their_own_sizes() -> None:
    import torch
    from vllm.v1.kv_cache_interface import (
        KVCacheConfig,
        KVCacheGroupSpec,
        KVCacheTensor,
        UniformTypeKVCacheSpecs,
    )
    from vllm.v1.kv_cache_layout import KVCacheLayout
    from vllm.v1.worker.utils import allocate_kv_cache

    from kvtransfer.vllm_memory import place

    small, large = spec_of("gqa"), spec_of("gqa", head_size=48)
    sizes = [spec.page_size_bytes for spec in (small, large)]
    tensors = [
        KVCacheTensor(sum(sizes) * BLOCKS, ["a"], sizes[0] * BLOCKS, sizes[0]),
        KVCacheTensor(
            sum(sizes) * BLOCKS, ["b"], sizes[1] * BLOCKS, sizes[1], offset=sizes[0] * BLOCKS
        ),
    ]
    both = UniformTypeKVCacheSpecs(block_size=TOKENS, kv_cache_specs={"a": small, "b": large})
    cache = KVCacheConfig(BLOCKS, tensors, [KVCacheGroupSpec(["a", "b"], both)])
    layout = KVCacheLayout.LBHNC
    found = allocate_kv_cache(cache, torch.device("cpu"), layout)
    placed = place(found, cache, config_of(layout))
    assert placed.layout.segments == sizes
    assert placed.layout.head_token_bytes == 0, "layers are unlike: heads are not told apart"
    for name, segment in zip(("a", "b"), placed.memory.segments, strict=True):
        fill(found[name], 3)
        here = views.array(segment.base + 2 * segment.stride, segment.block_bytes)
        assert np.array_equal(np.sort(here), bytes_of(found[name], 2, 1))


@pytest.mark.parametrize("name", ["LHBNC", "BHLNC"])
def test_a_layout_that_tears_blocks_apart_is_refused(name: str) -> None:
    from kvtransfer.refusal import Unserved

    with pytest.raises(Unserved, match=f"{name}.*use LBHNC"):
        check([(spec_of("gqa"), ["a", "b"])], name)


def test_heads_first_is_what_we_ask_of_vllm_but_for_latent_attention() -> None:
    from kvtransfer.vllm_connector import TandemConnector

    def asked(*, use_mla: bool) -> str | None:
        config: Any = SimpleNamespace(model_config=SimpleNamespace(use_mla=use_mla))
        return TandemConnector.get_required_kvcache_layout(config)

    assert asked(use_mla=False) == "LBHNC"
    assert asked(use_mla=True) is None
    assert check([(spec_of("gqa"), ["a", "b"])], "LBHNC").by_head
    assert not check([(spec_of("gqa"), ["a", "b"])], "LBNHC").by_head
