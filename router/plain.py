"""Plain streams: text as it comes, without an output object and a model for each token.

A stream is plain when its events differ in their text only: one sequence, no logprobs, no parser,
no token ids. vLLM's own generator still writes its first and last events, and with them everything
that the schema has; what lies between is its own first event again with other text in it.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import msgspec
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from router.outcome import outcome
from workers.api import Finish

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from vllm.v1.engine import EngineCoreRequest

    from workers.api import Delta

_json = msgspec.json.Encoder().encode


@dataclass(slots=True)
class Piece:
    """What came since the last one."""

    stream: PlainStream
    text: str = ""
    tokens: int = 0
    finish: Finish | None = None
    stop_reason: int | str | None = None


class PlainStream:
    """One sequence: deltas in, text out. Whoever is slow gets several steps' text at once."""

    def __init__(self, request: EngineCoreRequest, tokenizer: Any) -> None:
        self.prompt_token_ids = cast("list[int]", request.prompt_token_ids)
        self.cached_tokens: int | None = None
        self._detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, request)
        self._piece: Piece | None = None
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def take(self, delta: Delta) -> bool:
        """One step's. True when a stop string ended it here, and the worker does not know."""
        detokenizer, finish, stop_reason = self._detokenizer, delta.finish, delta.stop_reason
        if delta.cached_tokens is not None:
            self.cached_tokens = delta.cached_tokens
        before = detokenizer.num_output_tokens()
        stop = detokenizer.update(delta.token_ids, finish is Finish.STOP)
        enough = stop is not None and finish is None
        if stop is not None:
            finish, stop_reason = Finish.STOP, stop
        piece = self._piece
        if piece is None:
            piece = self._piece = Piece(self)
        piece.text += detokenizer.get_next_output_text(finish is not None, delta=True)
        piece.tokens += detokenizer.num_output_tokens() - before
        piece.finish, piece.stop_reason = finish, stop_reason
        self._wake()
        return enough

    def fail(self, error: Exception) -> None:
        self._error = error
        self._wake()

    async def next(self) -> Piece:
        """Waits for one. Raises what `fail` was told; what came before is lost with it."""
        while self._piece is None and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._error is not None:
            raise self._error
        piece, self._piece = self._piece, None
        assert piece is not None
        return piece

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class PlainStreams:
    """Those of one engine: who wants one, and who gets the deltas."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._wanted: set[str] = set()
        self._open: dict[str, PlainStream] = {}

    def want(self, name: str) -> None:
        """The next `generate` of this name is to yield `Piece`s, its last output a finished one."""
        self._wanted.add(name)

    def wanted(self, name: str) -> bool:
        """Whether it is; asked once."""
        found = name in self._wanted
        self._wanted.discard(name)
        return found

    def open(self, request: EngineCoreRequest) -> PlainStream:
        stream = self._open[request.request_id] = PlainStream(request, self._tokenizer)
        return stream

    def get(self, request_id: str) -> PlainStream | None:
        return self._open.get(request_id)

    def close(self, request_id: str) -> None:
        self._open.pop(request_id, None)


# ------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class _Endpoint:
    """How vLLM's generator of events is called, and what it begins with."""

    outputs_at: int
    """Which argument has the engine's outputs, and which the request's name."""
    name_at: int
    name_suffix: str
    """Of the only sequence's name, as the engine gets it."""
    openings: int
    """Events before the first with text."""
    numbered: bool
    """Outputs come with their prompt's number."""


_CHAT = _Endpoint(outputs_at=1, name_at=2, name_suffix="", openings=1, numbered=False)
_COMPLETION = _Endpoint(outputs_at=2, name_at=3, name_suffix="-0", openings=0, numbered=True)
_CREATED = re.compile(rb'"created":\d+')


def splice(streams: PlainStreams, state: Any) -> None:
    """Have vLLM's two streaming endpoints write plain streams this way."""
    chat, completion = state.openai_serving_chat, state.openai_serving_completion
    if chat is not None and chat.parser_cls is None and not _watched(chat):
        write = chat.chat_completion_stream_generator
        chat.chat_completion_stream_generator = partial(_events, streams, _CHAT, write)
    if completion is not None and not _watched(completion):
        write = completion.completion_stream_generator
        completion.completion_stream_generator = partial(_events, streams, _COMPLETION, write)


def _watched(serving: Any) -> bool:
    """Its operator wants something in each event, or of it."""
    return bool(
        getattr(serving, "enable_log_outputs", False)
        or serving.enable_per_request_metrics
        or serving.enable_force_include_usage
    )


def is_plain(request: Any) -> bool:
    """Whether its events differ in their text only."""
    usage = request.stream_options
    return not (
        (request.n or 1) > 1
        or request.use_beam_search
        or request.echo
        or request.logprobs not in (None, False)
        or request.prompt_logprobs is not None
        or request.return_token_ids
        or getattr(request, "return_prompt_text", False)
        or getattr(request, "tools", None)
        or (usage is not None and usage.continuous_usage_stats)
    )


async def _events(
    streams: PlainStreams, endpoint: _Endpoint, write: Any, *arguments: Any, **options: Any
) -> AsyncIterator[str | bytes]:
    """Server-sent events, as vLLM's own `write` would write them."""
    if not is_plain(arguments[0]) or options.get("num_prompts", 1) > 1:
        async for event in write(*arguments, **options):
            yield event
        return
    name = arguments[endpoint.name_at] + endpoint.name_suffix
    outputs = arguments[endpoint.outputs_at]

    def written(output: RequestOutput | Exception) -> AsyncGenerator[str, None]:
        given = list(arguments)
        given[endpoint.outputs_at] = _only(output, numbered=endpoint.numbered)
        generator: AsyncGenerator[str, None] = write(*given, **options)
        return generator

    streams.want(name)
    writer = _Writer(endpoint.openings, written)
    try:
        async for output in outputs:
            piece = output[1] if endpoint.numbered else output
            if writer.head is None and piece.finish is None:
                for event in await writer.begin(piece):
                    yield event
            if piece.finish is None:
                yield writer.event(piece)
            else:
                async for event in writer.end(piece):
                    yield event
    except Exception as error:  # noqa: BLE001  # vLLM's own generator says it to the client.
        if (result := outcome.get()) and result.error is not None:
            return  # It is the engine's, and `router.outcome` says it.
        async for event in written(error):
            yield event
    finally:
        streams.wanted(name)
        await outputs.aclose()


class _Writer:
    """One stream's events: the first and the last are vLLM's, those between are cut from it."""

    def __init__(self, openings: int, written: Callable[[Any], AsyncGenerator[str, None]]) -> None:
        self.head: bytes | None = None
        self._tail = b""
        self._openings, self._written = openings, written
        self._tokens = 0
        self._created = b""

    async def begin(self, piece: Piece) -> list[bytes]:
        """What comes before the first text; from here on `event` knows how one looks."""
        mark = secrets.token_hex(16)
        found = []
        async with aclosing(self._written(_output(piece, mark, 1))) as events:
            async for event in events:
                found.append(event.encode())
                if len(found) > self._openings:
                    break
        self.head, self._tail = found.pop().split(f'"{mark}"'.encode())
        created = _CREATED.search(self.head)
        self._created = created[0] if created else b""
        return found

    def event(self, piece: Piece) -> bytes:
        assert self.head is not None
        self._tokens += piece.tokens
        return self.head + _json(piece.text) + self._tail

    async def end(self, piece: Piece) -> AsyncIterator[bytes]:
        """The last text, why it ended, the usage if it is wanted, and `[DONE]`."""
        skip = self._openings if self.head is not None else 0
        self._tokens += piece.tokens
        async with aclosing(self._written(_output(piece, piece.text, self._tokens))) as events:
            async for event in events:
                if skip:
                    skip -= 1
                elif self._created:  # One stream was created once.
                    yield _CREATED.sub(self._created, event.encode(), count=1)
                else:
                    yield event.encode()


def _output(piece: Piece, text: str, tokens: int) -> RequestOutput:
    """As vLLM's own processor makes it; token ids are only counted."""
    finish = None if piece.finish is None else piece.finish.value
    output = CompletionOutput(
        index=0, text=text, token_ids=[0] * tokens, cumulative_logprob=None, logprobs=None,
        finish_reason=finish, stop_reason=piece.stop_reason,
    )  # fmt: skip
    stream = piece.stream
    return RequestOutput(
        "", None, stream.prompt_token_ids, None, [output], finish is not None,
        num_cached_tokens=stream.cached_tokens,
    )  # fmt: skip


async def _only(output: RequestOutput | Exception, *, numbered: bool) -> AsyncIterator[Any]:
    if isinstance(output, Exception):
        raise output
    yield (0, output) if numbered else output
