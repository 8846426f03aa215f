"""What only vLLM understands, as the opaque bytes of `workers.api`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import msgspec
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from kvtransfer.core import items

if TYPE_CHECKING:
    from collections.abc import Sequence

_EXTRAS = ("new_logprobs", "new_prompt_logprobs_tensors", "routed_experts")
"""What of an `EngineCoreOutput` goes with its tokens to the client."""

# vLLM's encoder gives several frames (large arrays by themselves); a message here is one.
_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(list[bytes]).decode

items_of = items.items_of


class Unreadable(Exception):
    """The bytes are no request of this vLLM's; the message says why."""


def encode_request(request: EngineCoreRequest) -> bytes:
    """The request without its prompt's token ids and items, which travel beside it."""
    tokens, request.prompt_token_ids = request.prompt_token_ids, None
    features, request.mm_features = request.mm_features, None
    try:
        return _join(MsgpackEncoder().encode(request))
    finally:
        request.prompt_token_ids, request.mm_features = tokens, features


def encode_contents(request: EngineCoreRequest) -> bytes:
    """Its items as the model takes them, megabytes each, where they stand; empty for text."""
    return _join(MsgpackEncoder().encode(request.mm_features)) if request.mm_features else b""


def decode_request(
    content: bytes, prompt_token_ids: list[int], contents: bytes = b""
) -> EngineCoreRequest:
    """The request with its token ids and items again. Raises `Unreadable` for other bytes."""
    try:
        request = MsgpackDecoder(EngineCoreRequest).decode(_unpack(content))
        if contents:
            request.mm_features = MsgpackDecoder(list[MultiModalFeatureSpec]).decode(
                _unpack(contents)
            )
    # vLLM's decoder has no error of its own: the bytes may be wrong in any layer below it, or
    # right and refused by `SamplingParams`. A peer's bytes must not end this process.
    except Exception as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from error
    request.prompt_token_ids = prompt_token_ids
    return cast(EngineCoreRequest, request)


def encode_extras(output: EngineCoreOutput) -> bytes | None:
    """Logprobs and their like; None when there are none."""
    extras = {name: getattr(output, name) for name in _EXTRAS}
    if all(value is None for value in extras.values()):
        return None
    return _join(MsgpackEncoder().encode(EngineCoreOutput("", [], **extras)))


def decode_extras(content: bytes, into: EngineCoreOutput) -> None:
    """Set on `into` what `encode_extras` found; what it did not find stays as it is."""
    extras = MsgpackDecoder(EngineCoreOutput).decode(_unpack(content))
    for name in _EXTRAS:
        if (value := getattr(extras, name)) is not None:
            setattr(into, name, value)


def _join(frames: Sequence[Any]) -> bytes:
    # Images are megabytes: they are copied once here, and not twice.
    kinds = (bytes, bytearray, memoryview)
    return _pack([f if isinstance(f, kinds) else bytes(f) for f in frames])


def greedy(max_tokens: int) -> bytes:
    """A request for exactly so many tokens and nothing else, for who measures an engine."""
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return encode_request(
        EngineCoreRequest(
            request_id="",
            prompt_token_ids=[],
            mm_features=None,
            sampling_params=sampling,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
    )
