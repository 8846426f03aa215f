"""vLLM's `EngineClient` over a fleet of workers, as `AsyncLLM` is one over a single engine."""

from __future__ import annotations

import logging
import time
from contextlib import aclosing
from copy import copy
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

from vllm.exceptions import RetryableRequestError, VLLMValidationError
from vllm.renderers.inputs.preprocess import extract_prompt_components
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.metrics.stats import PrefillStats

from router.ask import Ask
from router.asker import asker
from router.core.access import salt_for
from router.core.errors import RequestInvalid, RouterError, WorkerFailed
from router.core.request_limits import RequestLimits
from router.no_engine import NoEngine
from router.outcome import Outcome, outcome
from router.plain import PlainStreams
from router.preparing import BoundedPool, GrammarCheck, SubmissionTurns, leave_place
from workers.api import Delta, Finish
from workers.vllm_codec import decode_extras, encode_contents, encode_request, items_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Mapping

    from vllm.config import VllmConfig
    from vllm.inputs import EngineInput, PromptType
    from vllm.outputs import RequestOutput

    from router.dispatch import Dispatch

log = logging.getLogger(__name__)

_TEMPERATURE_MIN = 1e-5
"""vLLM takes anything below for greedy."""

SIMULATED = "sim"

_FINISH = {
    Finish.STOP: FinishReason.STOP,
    Finish.LENGTH: FinishReason.LENGTH,
    Finish.REPETITION: FinishReason.REPETITION,
}


class Broken(RetryableRequestError):  # type: ignore[misc]
    """A `RouterError`, as vLLM's layers take it; `router.outcome` says it to the client."""

    def __init__(self, error: RouterError) -> None:
        super().__init__(str(error))
        self.status_code = HTTPStatus(error.status)
        self.error = error


class Refusal(Broken):
    """Nothing has been started."""


class DisaggregatedEngine(NoEngine):
    """Renders in, tokens out: vLLM's front calls `generate`, the fleet does the work.

    It is also the dispatch's `Sink`: deltas go through vLLM's `OutputProcessor` (detokenizing,
    stop strings, logprobs, n > 1) to the waiting `generate` of each request.
    """

    def __init__(self, vllm_config: VllmConfig, limits: RequestLimits | None = None) -> None:
        super().__init__(vllm_config)
        limits = limits or RequestLimits()
        longest = self.model_config.max_model_len
        self.limits = replace(limits, token_ids_max=max(longest, limits.token_ids_max))
        self._turns = SubmissionTurns()
        self._grammars = GrammarCheck(limits.grammar_s, limits.preparing_max)
        # Everything that renders or tokenizes is given to this executor.
        self._pool = BoundedPool(self.renderer._executor, limits.preparing_max, _refusal)
        _bound_tokenizing(self.renderer, self.limits.token_ids_max)
        self.output_processor = OutputProcessor(self.renderer.tokenizer, log_stats=False)
        self.plain_streams = PlainStreams(self.renderer.tokenizer)
        self._dispatch: Dispatch | None = None
        self.priorities: Mapping[str, int] = {}
        """The most urgent that each tenant may ask for; `*` for all others, else 0."""

    def attach(self, dispatch: Dispatch) -> None:
        """Give the engine its way out. The two need each other, so this comes second."""
        self._dispatch = dispatch

    @property
    def dispatch(self) -> Dispatch:
        assert self._dispatch is not None, "attach() comes before any request"
        return self._dispatch

    # ------------------------------------------------------------ requests

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Raise `Refusal` before anything is rendered."""
        try:
            self.dispatch.check(asker.get().tenant)
        except RouterError as error:
            raise _refusal(error) from error

    async def generate(
        self,
        prompt: PromptType | EngineInput,
        sampling_params: SamplingParams,
        request_id: str,
        **options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generate for one request; `options` are those of vLLM's `EngineClient.generate`.

        Raises VLLMValidationError (4xx), `Refusal` or `Broken`. Closing the generator aborts.
        Whoever wanted a plain stream of this name gets `Piece`s.
        """
        plain = self.plain_streams.wanted(request_id)
        make = self._generate_plain if plain else self._generate_outputs
        result = outcome.get() or Outcome()
        try:
            async with aclosing(make(prompt, sampling_params, request_id, options)) as found:
                async for each in found:
                    result.begun = True
                    yield each
        except Exception as error:
            result.error = error
            raise

    async def _generate_outputs(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, options: dict[str, Any]
    ) -> AsyncGenerator[Any, None]:
        requests, queue = await self._add(prompt, sampling_params, request_id, options)
        ended = False
        try:
            while not ended:
                out = queue.get_nowait() or await queue.get()
                ended = out.finished
                yield out
            # Nothing is left to abort: each sequence ended in the dispatch as it did here.
        finally:
            if not ended:
                ids = [request.request_id for request in requests]
                self.output_processor.abort_requests(ids, internal=True)
                self.dispatch.cancel(ids)
            queue.close()

    async def _generate_plain(
        self, prompt: Any, params: SamplingParams, request_id: str, options: dict[str, Any]
    ) -> AsyncGenerator[Any, None]:
        """`Piece`s."""
        request = await self._process(prompt, params, request_id, options)
        internal_id, ended = request.request_id, False
        stream = self.plain_streams.open(request)
        try:
            try:
                self.dispatch.submit(_ask(request, encode_contents(request)))
            except RouterError as error:
                ended = True
                raise Refusal(error) from error
            leave_place()
            while not ended:
                piece = await stream.next()
                ended = piece.finish is not None
                yield piece
        finally:
            self.plain_streams.close(internal_id)
            if not ended:
                self.dispatch.cancel([internal_id])

    async def _add(
        self,
        prompt: PromptType | EngineInput,
        params: SamplingParams,
        request_id: str,
        options: dict[str, Any],
    ) -> tuple[list[EngineCoreRequest], RequestOutputCollector]:
        """Process, fan out (n > 1) and submit; either every sequence is submitted or none."""
        request = await self._process(prompt, params, request_id, options)
        params = cast(SamplingParams, request.params)
        text, _, _ = extract_prompt_components(self.model_config, prompt)
        queue = RequestOutputCollector(params.output_kind, request.request_id)
        parent = ParentRequest(request) if params.n > 1 else None
        children = [request] if parent is None else _children(parent, request, params.n)
        contents = encode_contents(request)  # All of them share it.
        begun: list[str] = []
        try:
            for index, child in enumerate(children):
                if index:
                    await self._turns.take()
                begun.append(child.request_id)
                self.output_processor.add_request(child, text, parent, index, queue)
                self.dispatch.submit(_ask(child, contents))
                leave_place()
        except BaseException as error:
            self.output_processor.abort_requests(begun, internal=True)
            self.dispatch.cancel(begun)
            if isinstance(error, RouterError):
                raise Refusal(error) from error
            raise
        return children, queue

    async def _process(
        self,
        prompt: PromptType | EngineInput,
        params: SamplingParams,
        request_id: str,
        options: dict[str, Any],
    ) -> EngineCoreRequest:
        _refuse_what_is_ours(params)
        who = asker.get()
        self._check_priority(who.tenant, options.get("priority") or 0)
        self._check_logprobs(params)
        process = self.input_processor.process_inputs
        kept = ("lora_request", "tokenization_kwargs", "priority", "session_id", "kv_hints")
        given = {key: options[key] for key in kept if options.get(key) is not None}
        given["supported_tasks"] = await self.get_supported_tasks()
        await self._turns.take()
        if isinstance(prompt, dict) and "type" in prompt:
            if _takes_long(params):
                call = partial(process, request_id, prompt, params, **given)
                try:
                    request = await self._grammars.run(call)
                except RouterError as error:
                    raise Refusal(error) from error
            else:
                request = process(request_id, prompt, params, **given)
        else:  # A raw prompt is tokenized here, which must not hold the loop up.
            request = await self.input_processor.process_inputs_async(
                request_id, prompt, params, **given
            )
        for key in ("reasoning_ended", "reasoning_parser_kwargs"):
            if options.get(key) is not None:
                setattr(request, key, options[key])
        if request.prompt_token_ids is None:
            raise VLLMValidationError(
                "prompt embeddings can't be served disaggregated; send text or token ids",
                parameter="prompt_embeds",
            )
        if any(feature.data is None for feature in request.mm_features or ()):
            raise VLLMValidationError(
                "items can't be served by name alone; send their content", parameter="features"
            )
        if who.salted:  # Before anything is made of it: worker and prefix index have the same.
            request.cache_salt = salt_for(who.tenant, request.cache_salt)
        self.input_processor.assign_request_id(request)
        return cast(EngineCoreRequest, request)

    def _check_logprobs(self, params: SamplingParams) -> None:
        """Beam search asks for them too. Where nobody makes any, vLLM's layers fail of that."""
        wanted = "logprobs" if params.logprobs is not None else "prompt_logprobs"
        if params.logprobs is None and params.prompt_logprobs is None:
            return
        fleet = self.dispatch.fleet
        if len(fleet) and all(worker.hello.engine == SIMULATED for worker in fleet):
            raise VLLMValidationError(
                f"{wanted}: the simulated engine makes none, and so there is no beam search either",
                parameter=wanted,
            )

    def _check_priority(self, tenant: str, priority: int) -> None:
        urgent = self.priorities.get(tenant, self.priorities.get("*", 0))
        if priority < urgent:
            raise VLLMValidationError(
                f"priority {priority} is more urgent than this tenant may ask for, {urgent} "
                "(--tenant-priorities)",
                parameter="priority",
            )

    async def abort(self, request_id: str | Iterable[str]) -> None:
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        self.dispatch.cancel(self.output_processor.abort_requests(ids, internal=False))

    # ------------------------------------------------------------ the dispatch's sink

    def deliver(self, deltas: list[Delta], prompt_extras: dict[str, bytes]) -> None:
        outputs: list[list[EngineCoreOutput]] = []
        # In their order. What comes with more than tokens, and may make no sense, stands alone.
        plain = False
        enough: list[str] = []
        for delta in deltas:
            request_id = delta.request_id
            try:
                if stream := self.plain_streams.get(request_id):
                    if stream.take(delta):
                        enough.append(request_id)
                    continue
                output = _output(delta, prompt_extras.get(request_id))
            except Exception as error:  # noqa: BLE001  # Others' tokens come with it.
                self._misread([request_id], error)
                continue
            bare = delta.extras is None and request_id not in prompt_extras
            if bare and plain:
                outputs[-1].append(output)
            else:
                outputs.append([output])
            plain = bare
        for some in outputs:
            try:
                processed = self.output_processor.process_outputs(some, time.monotonic())
                enough += processed.reqs_to_abort
            except Exception as error:  # noqa: BLE001
                self._misread([output.request_id for output in some], error)
        if enough:
            self.dispatch.enough(enough)

    def _misread(self, request_ids: list[str], error: Exception) -> None:
        """Fail requests whose output makes no sense; leaving it out would be a wrong answer."""
        for request_id in request_ids:
            log.error("output not understood", extra={"request": request_id, "error": repr(error)})
            reason = f"its output was not understood: {type(error).__name__}"
            self.fail(request_id, WorkerFailed("unknown", reason=reason))
        self.dispatch.cancel(request_ids)

    def fail(self, request_id: str, error: RouterError) -> None:
        if stream := self.plain_streams.get(request_id):
            stream.fail(_client_error(error))
            return
        state = self.output_processor.request_states.get(request_id)
        if state is None or state.queue is None:
            return
        queue = state.queue
        self.output_processor.abort_requests([request_id], internal=True)
        queue.put(_client_error(error))


def _bound_tokenizing(renderer: Any, most: int) -> None:
    """Refuse a text of too many tokens: `/tokenize` alone would answer with any number of them."""
    tokenize = renderer._tokenize_prompt_async

    async def bounded(prompt: Any, params: Any) -> Any:
        found = await tokenize(prompt, params)
        if (tokens := len(found["prompt_token_ids"])) > most:
            raise VLLMValidationError(
                f"the text has {tokens} tokens; at most {most} are served here (--token-ids-max)",
                parameter="prompt",
            )
        return found

    renderer._tokenize_prompt_async = bounded


def _refusal(error: RouterError) -> Refusal:
    """Note the error as the request's outcome, and wrap it for vLLM's layers."""
    refusal = Refusal(error)
    (outcome.get() or Outcome()).error = refusal
    return refusal


def _refuse_what_is_ours(params: SamplingParams) -> None:
    """The second would have an engine tell of blocks again that it has told of."""
    for name in ("kv_transfer_params", "kv_cache_report_mode"):
        if params.extra_args and name in params.extra_args:
            raise VLLMValidationError(
                f"{name} is set by the router, not by clients", parameter=name
            )


def _takes_long(params: SamplingParams) -> bool:
    """Whether checking them is more than looking at numbers: bad words are tokenized."""
    return params.structured_outputs is not None or bool(params.bad_words)


def _children(parent: ParentRequest, request: EngineCoreRequest, n: int) -> list[EngineCoreRequest]:
    children = []
    for index in range(n):
        child = copy(request)
        child.request_id, child.sampling_params = parent.get_child_info(index)
        children.append(child)
    return children


def _ask(request: EngineCoreRequest, contents: bytes) -> Ask:
    params = cast(SamplingParams, request.sampling_params)
    lora: Any = request.lora_request
    who = asker.get()
    return Ask(
        request_id=request.request_id,
        prompt_token_ids=cast("list[int]", request.prompt_token_ids),
        max_tokens=params.max_tokens or 1,
        params=encode_request(request),
        cache_salt=request.cache_salt,
        lora_name=lora.lora_name if lora else None,
        items=items_of(request.mm_features),
        contents=contents,
        priority=request.priority,
        relay=may_relay(params),
        name=request.external_req_id or "",
        tenant=who.tenant,
        ttft_s=who.ttft_s,
    )


def may_relay(params: SamplingParams) -> bool:
    """Whether the first token may come from another engine than the rest, and change nothing.

    The engine that goes on sees it as the prompt's last token. That makes a difference to whatever
    looks at output tokens apart from the prompt's (docs/handoff.md has the list, with reasons), and
    to a seed, whose random numbers are drawn one after the other.
    """
    greedy = params.temperature < _TEMPERATURE_MIN
    looks_at_output = (
        params.presence_penalty
        or params.frequency_penalty
        or params.structured_outputs is not None
        or params.bad_words
        or params.thinking_token_budget is not None
        or params.repetition_detection is not None
        or params.logprobs is not None
        or params.logprob_token_ids
        or params.prompt_logprobs is not None
        or params.trace_decode_token_ids
        or params.watermarking
        or params.extra_args
    )
    return not looks_at_output and (greedy or params.seed is None)


def _client_error(error: RouterError) -> Exception:
    return VLLMValidationError(str(error)) if isinstance(error, RequestInvalid) else Broken(error)


def _output(delta: Delta, prompt_extras: bytes | None) -> EngineCoreOutput:
    output = EngineCoreOutput(
        request_id=delta.request_id,
        new_token_ids=delta.token_ids,
        finish_reason=None if delta.finish is None else _FINISH[delta.finish],
        stop_reason=delta.stop_reason,
    )
    if delta.cached_tokens is not None:
        # How many blocks the prompt added to a cache is not told: None, and not a wrong 0.
        output.prefill_stats = PrefillStats(
            num_cached_tokens=delta.cached_tokens, num_cache_creation_tokens=cast(int, None)
        )
    if prompt_extras is not None:
        decode_extras(prompt_extras, output)
    if delta.extras is not None:
        decode_extras(delta.extras, output)
    return output
