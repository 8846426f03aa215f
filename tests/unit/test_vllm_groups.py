"""Both sides of a handoff keep the same blocks of vLLM's groups: what the next token attends to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.request import Request

# Torch warns of its own deprecations while vLLM imports it.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

LENGTH_MAX = 400
KINDS = ["full", "sliding 7", "sliding 8", "sliding 16", "sliding 33", "chunked 8", "chunked 24"]


def cache_of(kinds: list[str], block: int) -> Any:
    """vLLM's configuration of groups of these kinds."""
    import torch
    from vllm.v1.kv_cache_interface import (
        ChunkedLocalAttentionSpec,
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        MambaSpec,
        SlidingWindowSpec,
    )

    plain: dict[str, Any] = {
        "block_size": block, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32,
    }  # fmt: skip
    specs = []
    for kind in kinds:
        name, _, window = kind.partition(" ")
        match name:
            case "full":
                specs.append(FullAttentionSpec(**plain))
            case "sliding":
                specs.append(SlidingWindowSpec(**plain, sliding_window=int(window)))
            case "chunked":
                specs.append(ChunkedLocalAttentionSpec(**plain, attention_chunk_size=int(window)))
            case "state":
                specs.append(
                    MambaSpec(block_size=LENGTH_MAX, shapes=((4,),), dtypes=(torch.float32,))
                )
    groups = [KVCacheGroupSpec([f"layer {n}"], spec) for n, spec in enumerate(specs)]
    return KVCacheConfig(1000, [], groups)


def manager_of(cache: Any, block: int) -> KVCacheManager:
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    return KVCacheManager(cache, LENGTH_MAX, block, block, enable_caching=False)


def request_of(tokens: int) -> Request:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    return Request("r", list(range(tokens)), SamplingParams(max_tokens=9), None)


def attended(kind: str, position: int) -> range:
    """The tokens that the one at this position attends to, itself left out."""
    name, _, window = kind.partition(" ")
    match name:
        case "sliding":
            return range(max(0, position - int(window) + 1), position)
        case "chunked":
            return range(position // int(window) * int(window), position)
    return range(position)


@settings(deadline=None, max_examples=300)
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3, unique=True),
    block=st.sampled_from([4, 8]),
    tokens=st.integers(1, 120),
    chunk=st.integers(1, 50),
)
def test_both_sides_keep_the_same_blocks_and_all_that_the_next_token_needs(
    kinds: list[str], block: int, tokens: int, chunk: int
) -> None:
    from kvtransfer.vllm_groups import Columns, groups_of, kept_from

    cache = cache_of(kinds, block)
    columns = Columns(groups_of(cache))
    span = range(columns.count(tokens))

    sender, prompt = manager_of(cache, block), request_of(tokens)
    announced: list[list[int]] = []
    for done in range(0, tokens, chunk):
        step = min(chunk, tokens - done)
        sender.allocate_slots(prompt, step)
        prompt.num_computed_tokens = done + step
        whole = done + step == tokens
        end = len(span) if whole else (done + step) // columns.tokens
        tables, kept = sender.get_block_ids("r"), kept_from(sender, tokens)
        announced += columns.ids(tables, tokens, range(len(announced), end), kept)
    sender.remove_skipped_blocks("r", tokens)  # As vLLM does when the request has finished.
    tables = sender.get_block_ids_for_computed_tokens("r", tokens)
    kept = kept_from(sender, tokens)
    assert columns.ids(tables, tokens, span, kept) == announced, "what was announced is still its"

    receiver, pulling = manager_of(cache, block), request_of(tokens + 1)
    blocks = receiver.allocate_slots(
        pulling, 0, num_external_computed_tokens=tokens, delay_cache_blocks=True
    )
    assert blocks is not None
    ours = columns.ids(receiver.get_block_ids("r"), tokens, span, [0] * len(kinds))
    assert [[b != 0 for b in column] for column in ours] == [
        [b != 0 for b in column] for column in announced
    ]
    for slot, kind in enumerate(kinds):
        for position in attended(kind, tokens):
            assert ours[position // block][slot] != 0, f"{kind}: {position} is attended to"


def test_a_state_is_handed_over_with_the_last_column_alone() -> None:
    from kvtransfer.vllm_groups import Columns, groups_of

    columns = Columns(groups_of(cache_of(["full", "state"], 8)))
    assert columns.tokens == 8
    assert columns.ids(([1, 2, 3], [9]), 20, range(3), [0, 0]) == [[1, 0], [2, 0], [3, 9]]


def test_groups_with_blocks_of_unlike_sizes_share_columns() -> None:
    from kvtransfer.vllm_groups import Columns, KvGroup

    columns = Columns([KvGroup("full_attention", 0, 4), KvGroup("sliding_window", 8, 8)])
    assert columns.tokens == 8
    assert columns.ids(([1, 2, 3], [0, 5]), 11, range(2), [0, 1]) == [[1, 2, 0], [3, 0, 5]]


# ------------------------------------------------------------ refusals


def config_of(**others: Any) -> Any:
    return SimpleNamespace(**{"speculative_config": None, **others})


def test_served_kinds_are_let_in() -> None:
    from kvtransfer.vllm_groups import refuse_unserved

    refuse_unserved(config_of(), cache_of([*KINDS, "state"], 8))


def test_a_kind_derived_from_a_served_one_is_refused_by_name() -> None:
    import torch
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, RSWASpec

    from kvtransfer.refusal import Unserved
    from kvtransfer.vllm_groups import refuse_unserved

    spec = RSWASpec(block_size=8, num_kv_heads=1, head_size=8, dtype=torch.float32, rswa_window=9)
    cache = KVCacheConfig(9, [], [KVCacheGroupSpec(["layer"], spec)])
    with pytest.raises(Unserved, match=r"RSWASpec; try --disable-hybrid-kv-cache-manager"):
        refuse_unserved(cast("Any", config_of()), cache)


def test_quantized_kv_with_scales_of_its_own_is_refused() -> None:
    import torch
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        KVQuantMode,
    )

    from kvtransfer.refusal import Unserved
    from kvtransfer.vllm_groups import refuse_unserved

    spec = FullAttentionSpec(
        block_size=8, num_kv_heads=1, head_size=8, dtype=torch.int8,
        kv_quant_mode=KVQuantMode.INT8_PER_TOKEN_HEAD,
    )  # fmt: skip
    cache = KVCacheConfig(9, [], [KVCacheGroupSpec(["layer"], spec)])
    with pytest.raises(Unserved, match="int8_per_token_head"):
        refuse_unserved(config_of(), cache)


def test_states_beside_speculation_are_refused() -> None:
    from kvtransfer.refusal import Unserved
    from kvtransfer.vllm_groups import refuse_unserved

    ngram = SimpleNamespace(method="ngram")
    refuse_unserved(config_of(speculative_config=ngram), cache_of(["full"], 8))
    with pytest.raises(Unserved, match="--speculative-config: the states"):
        refuse_unserved(config_of(speculative_config=ngram), cache_of(["full", "state"], 8))


def test_latent_attention_is_refused_on_a_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, MLAAttentionSpec

    from kvtransfer import vllm_groups
    from kvtransfer.refusal import Unserved

    spec = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.float32)
    cache = KVCacheConfig(9, [], [KVCacheGroupSpec(["layer"], spec)])
    with pytest.raises(Unserved, match="latent attention"):
        vllm_groups.refuse_unserved(config_of(), cache)
    monkeypatch.setattr(vllm_groups, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    vllm_groups.refuse_unserved(config_of(), cache)


def test_a_drafter_with_kv_of_its_own_is_refused_by_name() -> None:
    from kvtransfer.refusal import Unserved
    from kvtransfer.vllm_groups import refuse_unserved

    eagle = SimpleNamespace(method="eagle")
    with pytest.raises(Unserved, match="method eagle is not proven beside a handoff; use ngram"):
        refuse_unserved(config_of(speculative_config=eagle), cache_of(["full"], 8))
