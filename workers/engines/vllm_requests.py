"""One phase of a request in vLLM's words, and vLLM's answers in ours."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from workers.api import MALFORMED, Delta, Finish, Generate, Phase
from workers.vllm_codec import Unreadable, decode_request, encode_extras

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_FINISH = {
    FinishReason.STOP: Finish.STOP,
    FinishReason.LENGTH: Finish.LENGTH,
    FinishReason.ABORT: Finish.ABORT,
    FinishReason.ERROR: Finish.ERROR,
    FinishReason.REPETITION: Finish.REPETITION,
}


class BadRequest(Exception):
    """The request can't be served by this engine, whoever sends it."""


def core_request(generate: Generate, config: VllmConfig) -> EngineCoreRequest:
    """What to ask of the engine core for this phase. Raises `BadRequest`."""
    tokens = generate.prompt_token_ids
    limit = config.model_config.max_model_len
    if not tokens:
        raise BadRequest("the prompt is empty")
    if len(tokens) >= limit:
        raise BadRequest(f"the prompt has {len(tokens)} tokens, the model at most {limit}")
    vocabulary = config.model_config.get_vocab_size()
    if not 0 <= min(tokens) <= max(tokens) < vocabulary:
        raise BadRequest(f"a token id is outside the model's vocabulary of {vocabulary}")
    try:
        request = decode_request(generate.params, tokens)
    except Unreadable as error:
        raise BadRequest(f"sampling parameters are not readable: {error}") from None
    if request.sampling_params is None:
        raise BadRequest("only generation is served")
    if request.lora_request is not None:
        raise BadRequest("LoRA adapters are not served yet")
    request.request_id = generate.request_id
    request.external_req_id = None
    request.arrival_time = time.time()
    request.sampling_params = _shape(request.sampling_params, generate, config)
    return request


def warm_up_request(request_id: str) -> EngineCoreRequest:
    """One token, to see the engine step."""
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=[1, 2, 3],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=1, temperature=0.0),
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=request_id,
        data_parallel_rank=None,
    )


def delta_of(
    output: EngineCoreOutput, phase: Phase, *, first: bool, pulled: list[Any] | None
) -> Delta:
    """One output of one step. `pulled`: the connector's account of this request's pull."""
    reason = output.finish_reason
    finish = None if reason is None else _FINISH[reason]
    stats = output.prefill_stats
    cached = (stats.num_local_cached_tokens if stats else 0) if first else None
    extras = encode_extras(output)
    if phase is Phase.PREFILL:
        if finish is not Finish.LENGTH:
            why = f"prefill ended with {finish}"
            return Delta(output.request_id, [], Finish.ERROR, error=why)
        params = output.kv_transfer_params or {}
        ticket = params.get("tandem_ticket") or msgspec.msgpack.encode(params)
        return Delta(
            output.request_id, [], Finish.PREFILLED,
            extras=extras, ticket=ticket, cached_tokens=cached,
        )  # fmt: skip
    _, tokens, size, seconds, failed = pulled or ("", 0, 0, 0.0, None)
    return Delta(
        request_id=output.request_id,
        token_ids=output.new_token_ids,
        finish=finish,
        stop_reason=output.stop_reason,
        extras=extras,
        cached_tokens=cached,
        kv_tokens=tokens,
        kv_bytes=size,
        kv_s=seconds,
        kv_failed=failed,
        error="the engine failed it" if finish is Finish.ERROR else None,
    )


def _shape(params: SamplingParams, generate: Generate, config: VllmConfig) -> SamplingParams:
    params = params.clone()
    transfer = config.kv_transfer_config
    nixl = transfer is not None and transfer.kv_connector == "NixlConnector"
    hand_off: dict[str, Any] | None = None
    if generate.phase is Phase.PREFILL:
        params = _prefill_only(params)
        hand_off = {"do_remote_decode": True} if nixl else {"tandem_produce": True}
    elif generate.phase is Phase.DECODE and generate.ticket is not None:
        # The prefill worker has computed them.
        params.prompt_logprobs = None
        params.skip_reading_prefix_cache = False
        hand_off = _nixl_params(generate.ticket) if nixl else {"tandem_ticket": generate.ticket}
    extra = {k: v for k, v in (params.extra_args or {}).items() if k != "kv_transfer_params"}
    if hand_off is not None:
        extra["kv_transfer_params"] = hand_off
    params.extra_args = extra or None
    return params


def _nixl_params(ticket: bytes) -> dict[str, Any]:
    try:
        return msgspec.msgpack.decode(ticket, type=dict[str, Any])
    except MALFORMED as error:
        raise BadRequest(f"the ticket is not readable: {error}") from None


def _prefill_only(params: SamplingParams) -> SamplingParams:
    """The prompt's KV and its logprobs, and one token that nobody will see."""
    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=params.prompt_logprobs,
        skip_reading_prefix_cache=params.skip_reading_prefix_cache,
    )
