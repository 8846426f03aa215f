"""Blocks with items: vLLM's cache tells of them as routers make them of a request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.core.items import Item, items_of
from router.core.blocks import links
from router.core.cache_view import CacheView
from router.core.prefix_index import PrefixIndex
from workers.cache_mirror import CacheMirror

if TYPE_CHECKING:
    from vllm.v1.request import Request

# Torch warns of its own deprecations while vLLM imports it.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SIZE = 4
BLOCKS = 64


def request(number: int, parts: list[Any], salt: str | None) -> Request:
    """Text and images in turn: a number is a token, a pair an image's name and its length."""
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    tokens: list[int] = []
    features = []
    for part in parts:
        if isinstance(part, tuple):
            place = PlaceholderRange(offset=len(tokens), length=part[1])
            features.append(MultiModalFeatureSpec(None, "image", part[0], place, part[0]))
        tokens += [9] * part[1] if isinstance(part, tuple) else [part]
    return Request(
        f"r{number}", tokens, SamplingParams(), None, mm_features=features or None,
        cache_salt=salt, block_hasher=get_request_block_hasher(SIZE, sha256),
    )  # fmt: skip


def stored(requests: list[Request]) -> tuple[PrefixIndex, Any]:
    """All of them computed one after the other, told, and taken in by a router."""
    from vllm.v1.core.block_pool import BlockPool

    from kvtransfer.vllm_cache_events import told
    from workers.engines.vllm import _change

    pool = BlockPool(BLOCKS, True, SIZE, enable_kv_cache_events=True)
    mirror, index = CacheMirror(), PrefixIndex()
    view = CacheView("w", SIZE, index)
    assert all(view.snapshot(part) for part in mirror.snapshot())
    for each in requests:
        full = each.num_tokens // SIZE
        cached = cached_blocks(pool, each, full)
        blocks = pool.get_new_blocks(full)
        for at, block in enumerate(cached):
            blocks[at] = block
        pool.cache_full_blocks(each, blocks, len(cached), full, SIZE, 0)
        changes = [
            told(event, SIZE, pool.cached_block_hash_to_block, 0) for event in pool.take_events()
        ]
        # As they travel from the engine's process to the worker's.
        sent = msgspec.msgpack.decode(msgspec.msgpack.encode(changes))
        mirror.apply(_change(change) for change in sent if change is not None)
    assert view.events(0, mirror.since(0) or [])
    return index, pool


def cached_blocks(pool: Any, request: Request, most: int) -> list[Any]:
    found = []
    for hashed in request.block_hashes[:most]:
        if not (block := pool.get_cached_block(hashed, [0])):
            break
        found.append(block[0])
    return found


part = st.one_of(
    st.integers(0, 1), st.sampled_from([("cat", 1), ("dog", 1), ("sun", 6), ("sea", 6)])
)


@given(
    st.lists(st.tuples(st.lists(part, min_size=1, max_size=8), st.sampled_from([None, "s"])),
             min_size=1, max_size=5)
)  # fmt: skip
@settings(max_examples=60)
def test_hits_are_foretold_as_vllm_finds_them(asked: list[tuple[list[Any], str | None]]) -> None:
    """Among prompts of which vLLM has computed all but the last."""
    requests = [request(number, *each) for number, each in enumerate(asked)]
    index, pool = stored(requests[:-1])
    for each in requests:
        items = items_of(each.mm_features)
        tokens = each.prompt_token_ids or []
        found = index.cached(links(tokens, SIZE, each.cache_salt, None, items)).get("w", 0)
        assert found == len(cached_blocks(pool, each, (len(tokens) - 1) // SIZE))


def test_blocks_with_a_prompt_embedding_are_not_told_of() -> None:
    from vllm.distributed.kv_events import BlockStored

    from kvtransfer.vllm_cache_events import told

    extras = [("adapter", ("cat", 2), "salt"), (("cat", -2),), (b"digest",), None]
    event = BlockStored(
        block_hashes=[b"0", b"1", b"2", b"3"], parent_block_hash=None,
        token_ids=list(range(4 * SIZE)), block_size=SIZE, lora_id=1, medium=None,
        lora_name="adapter", extra_keys=cast(Any, extras), group_idx=0,
    )  # fmt: skip
    assert told(event, SIZE, cast(Any, SimpleNamespace()), 0) == [
        [b"0", b"1"], None, list(range(2 * SIZE)), "salt", "adapter", [["cat", 2, 6]],
    ]  # fmt: skip


CONFIG = SimpleNamespace(
    model_config=SimpleNamespace(max_model_len=100, get_vocab_size=lambda: 10),
    kv_transfer_config=None,
)


def asked(told: tuple[Any, ...] | None = None, *, sent: bool = True, room: int = 4) -> Any:
    """The worker's view of a request with an image of three tokens."""
    from vllm.multimodal.inputs import (
        MultiModalFeatureSpec,
        MultiModalKwargsItem,
        PlaceholderRange,
    )
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    from workers.api import Generate, Phase
    from workers.engines.vllm_requests import core_request
    from workers.vllm_codec import encode_contents, encode_request

    content = MultiModalKwargsItem() if sent else None
    image = MultiModalFeatureSpec(content, "image", "cat", PlaceholderRange(1, 3), "cat")
    request = EngineCoreRequest(
        request_id="r", prompt_token_ids=[9] * 5, mm_features=[image],
        sampling_params=SamplingParams(max_tokens=1), pooling_params=None, arrival_time=1.5,
        lora_request=None, cache_salt=None, data_parallel_rank=None,
    )  # fmt: skip
    items = items_of(request.mm_features) if told is None else told
    contents = encode_contents(request)
    generate = Generate(
        "r", Phase.BOTH, [9] * 5, 1, encode_request(request), items=items, contents=contents
    )
    return core_request(generate, cast(Any, CONFIG), embeddings_max=room)


def test_a_request_reaches_the_engine_with_its_items() -> None:
    (image,) = asked().mm_features
    assert (image.identifier, image.mm_position.offset, image.data) == ("cat", 1, {})


def test_items_that_are_other_ones_missing_or_too_large_are_refused() -> None:
    from workers.engines.vllm_requests import BadRequest

    for told in ((), (Item("dog", 1, 3),), (Item("cat", 0, 3),)):
        with pytest.raises(BadRequest, match="not the request's"):
            asked(told)
    with pytest.raises(BadRequest, match="the image at 1 is missing"):
        asked(sent=False)
    with pytest.raises(BadRequest, match="has 3 embeddings, the worker has room for 2"):
        asked(room=2)
