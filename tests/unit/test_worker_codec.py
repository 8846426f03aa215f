"""Requests and extras survive the wire."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from types import ModuleType

    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest

pytestmark = [
    # Torch warns of its own deprecations while vLLM imports it.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # vLLM's decoder makes tensors over the bytes received; nobody writes to them.
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),
]


@pytest.fixture(scope="module")
def codec() -> ModuleType:
    import workers.vllm_codec

    return workers.vllm_codec


def request_for(tokens: list[int], **sampling: Any) -> EngineCoreRequest:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    return EngineCoreRequest(
        request_id="r",
        prompt_token_ids=tokens,
        mm_features=None,
        sampling_params=SamplingParams(**sampling),
        pooling_params=None,
        arrival_time=1.5,
        lora_request=None,
        cache_salt="salt",
        data_parallel_rank=None,
        priority=3,
    )


def output(**fields: Any) -> EngineCoreOutput:
    from vllm.v1.engine import EngineCoreOutput

    return EngineCoreOutput("r", [7], **fields)


def test_a_request_survives_without_its_tokens(codec: ModuleType) -> None:
    tokens = list(range(40_000, 44_000))
    sampling = {
        "temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 42, "max_tokens": 9,
        "min_tokens": 2, "logprobs": 3, "prompt_logprobs": 2, "presence_penalty": 0.5,
        "stop_token_ids": [3], "logit_bias": {5: 1.0}, "extra_args": {"a": [1, "b"]},
    }  # fmt: skip
    request = request_for(tokens, **sampling)
    content = codec.encode_request(request)
    assert isinstance(content, bytes)
    assert len(content) < 2000, "the tokens travel beside it"
    assert request.prompt_token_ids is tokens, "encoding changes nothing"
    back = codec.decode_request(content, tokens)
    assert back.prompt_token_ids == tokens
    for name, value in sampling.items():
        assert getattr(back.sampling_params, name) == value, name
    assert (back.cache_salt, back.priority, back.arrival_time) == ("salt", 3, 1.5)


def picture_of(seed: int, offset: int) -> Any:
    import torch
    from vllm.multimodal.inputs import (
        MultiModalBatchedField,
        MultiModalFeatureSpec,
        MultiModalFieldElem,
        MultiModalKwargsItem,
        PlaceholderRange,
    )

    pixels = torch.rand(40_000, generator=torch.Generator().manual_seed(seed))
    content = MultiModalKwargsItem(
        {"pixels": MultiModalFieldElem(data=pixels, field=MultiModalBatchedField())}
    )
    place = PlaceholderRange(offset, 3, torch.tensor([True, False, True]))
    return MultiModalFeatureSpec(content, "image", f"hash-{seed}", place, f"hash-{seed}")


def test_items_travel_beside_the_request_and_survive(codec: ModuleType) -> None:
    import torch

    request = request_for([9] * 20, max_tokens=2)
    request.mm_features = features = [picture_of(1, 2), picture_of(2, 10)]
    content, contents = codec.encode_request(request), codec.encode_contents(request)
    assert len(content) < 2000 < 2 * 160_000 < len(contents) < 2 * 160_000 + 2000
    assert request.mm_features is features, "encoding changes nothing"
    back = codec.decode_request(content, [9] * 20, contents)
    for ours, theirs in zip(back.mm_features, features, strict=True):
        assert torch.equal(ours.data["pixels"].data, theirs.data["pixels"].data)
        assert torch.equal(ours.mm_position.is_embed, theirs.mm_position.is_embed)
    assert codec.items_of(back.mm_features) == codec.items_of(features)
    assert [i.offset for i in codec.items_of(features)] == [2, 10]


def test_text_has_no_contents(codec: ModuleType) -> None:
    request = request_for([1])
    assert codec.encode_contents(request) == b""
    assert codec.decode_request(codec.encode_request(request), [1]).mm_features is None


@pytest.mark.parametrize("contents", [b"junk", b"\x91\xc4\x02{}", b"\x90"])
def test_other_contents_are_refused_as_such(codec: ModuleType, contents: bytes) -> None:
    with pytest.raises(codec.Unreadable):
        codec.decode_request(codec.encode_request(request_for([1])), [1], contents)


def test_structured_output_survives(codec: ModuleType) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    wanted = StructuredOutputsParams(json={"type": "object"})
    back = codec.decode_request(
        codec.encode_request(request_for([1], structured_outputs=wanted)), [1]
    )  # fmt: skip
    assert back.sampling_params.structured_outputs.json == {"type": "object"}


@pytest.mark.parametrize("content", [b"", b"junk", b"\x91\xc4\x02{}", b"\x90"])
def test_other_bytes_are_refused_as_such(codec: ModuleType, content: bytes) -> None:
    with pytest.raises(codec.Unreadable):
        codec.decode_request(content, [1])


def test_a_plain_token_has_no_extras(codec: ModuleType) -> None:
    assert codec.encode_extras(output()) is None


def test_logprobs_survive_exactly(codec: ModuleType) -> None:
    import torch
    from vllm.v1.outputs import LogprobsLists, LogprobsTensors

    lists = LogprobsLists(
        np.array([[7, 8, 9]], dtype=np.int32),
        np.array([[-0.25, -1.5, -3.0]], dtype=np.float32),
        np.array([2], dtype=np.int32),
    )
    tensors = LogprobsTensors(
        torch.arange(6, dtype=torch.int32).reshape(3, 2),
        torch.linspace(-4, 0, 6).reshape(3, 2),
        torch.tensor([0, 1, 2], dtype=torch.int32),
    )
    content = codec.encode_extras(output(new_logprobs=lists, new_prompt_logprobs_tensors=tensors))
    into = output()
    codec.decode_extras(content, into)
    for theirs, ours in zip(into.new_logprobs[:3], lists[:3], strict=True):
        np.testing.assert_array_equal(theirs, ours)
    for theirs, ours in zip(into.new_prompt_logprobs_tensors[:3], tensors[:3], strict=True):
        assert torch.equal(theirs, ours)


def test_extras_of_the_prompt_and_of_the_token_join_in_one_output(codec: ModuleType) -> None:
    import torch
    from vllm.v1.outputs import LogprobsLists, LogprobsTensors

    ids = np.array([[7]], dtype=np.int32)
    lists = LogprobsLists(ids, ids.astype(np.float32), np.array([1], dtype=np.int32))
    one = torch.zeros(1, 1)
    prompt = codec.encode_extras(
        output(new_prompt_logprobs_tensors=LogprobsTensors(one.int(), one, one[0].int()))
    )
    into = output()
    codec.decode_extras(prompt, into)
    codec.decode_extras(codec.encode_extras(output(new_logprobs=lists)), into)
    assert into.new_logprobs is not None
    assert into.new_prompt_logprobs_tensors is not None


def test_no_bytes_of_a_peer_raise_anything_else(codec: ModuleType) -> None:
    content = codec.encode_request(request_for([1], logit_bias={5: 1.0}))
    chance = random.Random(0)
    refused = 0
    for _ in range(2000):
        noisy = bytearray(content)
        for _ in range(chance.randint(1, 3)):
            noisy[chance.randrange(len(noisy))] = chance.randrange(256)
        try:
            codec.decode_request(bytes(noisy), [1])
        except codec.Unreadable:
            refused += 1
    assert refused > 500
