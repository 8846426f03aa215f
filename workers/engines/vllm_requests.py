"""One phase of a request in vLLM's words, and vLLM's answers in ours."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from kvtransfer.protocol import TicketUnreadable, decode_ticket
from workers.api import MALFORMED, Delta, Finish, Generate, Phase
from workers.vllm_codec import Unreadable, decode_request, encode_extras, items_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_FINISH = {
    FinishReason.STOP: Finish.STOP,
    FinishReason.LENGTH: Finish.LENGTH,
    FinishReason.ABORT: Finish.ABORT,
    FinishReason.ERROR: Finish.ERROR,
    FinishReason.REPETITION: Finish.REPETITION,
}
WARM_UP_TOKENS = 4


class BadRequest(Exception):
    """The request can't be served by this engine, whoever sends it."""


def embeddings_max(config: VllmConfig) -> int:
    """Embeddings of one item that the engine can hold; 0 for a model of text.

    vLLM's front compares with its own configuration's. An engine that has less room waits for ever
    to schedule a larger item, and all that has come since waits behind it.
    """
    if not config.model_config.supports_multimodal_inputs:
        return 0
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.encoder_budget import MultiModalBudget

    budget = MultiModalBudget(config, MULTIMODAL_REGISTRY)
    return int(min(budget.encoder_cache_size, budget.encoder_compute_budget))


def core_request(
    generate: Generate, config: VllmConfig, embeddings_max: int = 0
) -> EngineCoreRequest:
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
        request = decode_request(generate.params, tokens, generate.contents)
    except Unreadable as error:
        raise BadRequest(f"parameters are not readable: {error}") from None
    if request.sampling_params is None:
        raise BadRequest("only generation is served")
    if request.lora_request is not None:
        raise BadRequest("LoRA adapters are not served yet")
    _check_items(request, generate, embeddings_max)
    request.request_id = generate.request_id
    request.external_req_id = None
    request.arrival_time = time.time()
    handed = len(tokens) if _nixl(config) else _tokens_handed_over(request, generate)
    if generate.phase is Phase.PREFILL and request.sampling_params.prompt_logprobs is None:
        # The decode worker computes what is not handed over, and nobody needs it twice.
        request.prompt_token_ids = tokens[: handed or None]
    request.sampling_params = _shape(request.sampling_params, generate, config, handed)
    return request


def _tokens_handed_over(request: EngineCoreRequest, generate: Generate) -> int:
    """Prompt tokens whose KV goes from the prefill worker to the decode worker.

    With a relayed first token all: it is the next that is computed. Else all but the last, which
    the decode worker computes for its first output. A window or a state is then right for exactly
    the next token. An image that ends the prompt is not cut: its tokens are computed together.
    """
    count = len(generate.prompt_token_ids)
    if generate.relay:
        return count
    ends = [item.offset + item.length for item in items_of(request.mm_features)]
    return count if count in ends else count - 1


def _check_items(request: EngineCoreRequest, generate: Generate, embeddings_max: int) -> None:
    features = request.mm_features or ()
    if items_of(features) != generate.items:
        raise BadRequest("the items told of are not the request's")
    for feature in features:
        if feature.data is None:  # The engine keeps none either: see `vllm_config`.
            raise BadRequest(f"the {feature.modality} at {feature.mm_position.offset} is missing")
        if (size := feature.mm_position.get_num_embeds()) > embeddings_max:
            raise BadRequest(
                f"the {feature.modality} at token {feature.mm_position.offset} has {size} "
                f"embeddings, the worker has room for {embeddings_max}"
            )


def warm_up_request(request_id: str) -> EngineCoreRequest:
    """A few sampled tokens with logprobs, so that what vLLM compiles on first use is compiled.

    With an empty cache of `torch.compile`'s that takes some ten seconds, in which nobody else's
    tokens come either.
    """
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=[1, 2, 3],
        mm_features=None,
        sampling_params=SamplingParams(
            max_tokens=WARM_UP_TOKENS, ignore_eos=True, temperature=1.0, logprobs=1
        ),
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=request_id,
        data_parallel_rank=None,
    )


def delta_of(
    output: EngineCoreOutput, generate: Generate, *, first: bool, pulled: dict[str, Any] | None
) -> Delta:
    """One output of one step. `pulled`: the connector's account of this request's pull."""
    reason = output.finish_reason
    finish = None if reason is None else _FINISH[reason]
    stats = output.prefill_stats
    cached = (stats.num_local_cached_tokens if stats else 0) if first else None
    if generate.phase is Phase.PREFILL:
        return _prefilled(output, generate, finish, cached)
    tokens = output.new_token_ids
    account: dict[str, Any] = {}
    if pulled is not None:
        if pulled["first_token"] is not None:
            tokens = [pulled["first_token"], *tokens]
        account = {
            "kv_tokens": pulled["tokens"],
            "kv_bytes": pulled["bytes"],
            "kv_s": pulled["seconds"],
            "kv_hidden_s": pulled["hidden_s"],
            "kv_transport": pulled["transport"],
            "kv_failed": pulled["error"],
            "kv_mismatched": pulled["mismatched"],
        }
    return Delta(
        request_id=output.request_id,
        token_ids=tokens,
        finish=finish,
        stop_reason=output.stop_reason,
        extras=encode_extras(output),
        cached_tokens=cached,
        error="the engine failed it" if finish is Finish.ERROR else None,
        **account,
    )


def _prefilled(
    output: EngineCoreOutput, generate: Generate, finish: Finish | None, cached: int | None
) -> Delta:
    request_id, relay = output.request_id, generate.relay
    ended = relay and (
        finish in (Finish.STOP, Finish.REPETITION)
        or (finish is Finish.LENGTH and generate.max_tokens == 1)
    )
    if finish is not Finish.LENGTH and not ended:
        why = f"prefill ended with {finish}"
        return Delta(request_id, [], Finish.ERROR, error=why)
    ticket = None
    if output.kv_transfer_params is not None:  # Another connector's own.
        ticket = msgspec.msgpack.encode(output.kv_transfer_params)
    return Delta(
        request_id,
        output.new_token_ids if relay else [],
        finish if ended else Finish.PREFILLED,
        stop_reason=output.stop_reason if ended else None,
        extras=encode_extras(output),
        ticket=ticket,
        cached_tokens=cached,
    )


def _shape(
    params: SamplingParams, generate: Generate, config: VllmConfig, handed: int
) -> SamplingParams:
    params = params.clone()
    nixl = _nixl(config)
    if generate.generated:
        assert params.max_tokens is not None
        params.max_tokens -= generate.generated
        params.min_tokens = max(0, params.min_tokens - generate.generated)
    hand_off: dict[str, Any] | None = None
    if generate.phase is Phase.PREFILL:
        params = _first_only(params) if generate.relay else _prefill_only(params)
        produce = _produce(generate, handed)
        hand_off = {"do_remote_decode": True} if nixl else {"tandem_produce": produce}
    elif generate.phase is Phase.DECODE and generate.ticket is not None:
        # The prefill worker has computed them.
        params.prompt_logprobs = None
        params.skip_reading_prefix_cache = False
        fetch = {**_fetch(generate.ticket, handed), "relay": generate.relay}
        hand_off = _nixl_params(generate.ticket) if nixl else {"tandem_fetch": fetch}
    extra = {k: v for k, v in (params.extra_args or {}).items() if k != "kv_transfer_params"}
    if hand_off is not None:
        extra["kv_transfer_params"] = hand_off
    params.extra_args = extra or None
    return params


def _nixl(config: VllmConfig) -> bool:
    """The handoff is vLLM's own connector's, which moves whole prompts."""
    transfer = config.kv_transfer_config
    return transfer is not None and transfer.kv_connector == "NixlConnector"


def _produce(generate: Generate, handed: int) -> dict[str, Any]:
    if generate.ticket is None:
        raise BadRequest("the prefill phase needs a ticket")
    try:
        ticket = decode_ticket(generate.ticket)
    except TicketUnreadable as error:
        raise BadRequest(str(error)) from None
    # With no token after the first there is nothing to hand off.
    keep = handed > 0 and not (generate.relay and generate.max_tokens == 1)
    return {"handle": ticket.handle, "tokens": handed, "relay": generate.relay, "keep": keep}


def _fetch(ticket: bytes, handed: int) -> dict[str, Any]:
    """For the connector; one that can't be read costs time and no more, as any failed pull."""
    try:
        read = decode_ticket(ticket)
    except TicketUnreadable as error:
        return {"unreadable": str(error)}
    return {
        "handle": read.handle,
        "epoch": read.epoch,
        "endpoint": read.endpoint,
        "tokens": handed,
    }


def _nixl_params(ticket: bytes) -> dict[str, Any]:
    try:
        return msgspec.msgpack.decode(ticket, type=dict[str, Any])
    except MALFORMED as error:
        raise BadRequest(f"the ticket is not readable: {error}") from None


def _first_only(params: SamplingParams) -> SamplingParams:
    """The request's own first token, and no more."""
    params.max_tokens = 1
    params.min_tokens = min(1, params.min_tokens)
    return params


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
