"""vLLM's OpenAI application over this router's engine, and the router's own few routes."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn

import aiohttp
import msgspec
import vllm
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request  # noqa: TC002  # FastAPI reads the annotation.
from starlette.responses import JSONResponse, PlainTextResponse, Response
from vllm import AsyncEngineArgs, envs
from vllm.config import ParallelConfig, VllmConfig
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.utils.api_utils import validate_json_request
from vllm.exceptions import VLLMUnprocessableEntityError, VLLMValidationError
from vllm.reasoning import ReasoningParserManager
from vllm.renderers.chat_utils import load_chat_template
from vllm.utils.argparse_utils import FlexibleArgumentParser

from router.asker import AccessRules, asker
from router.core.access import ROUTES
from router.core.conversation import name_for, roles_in, trouble
from router.core.errors import TenantOverRate
from router.core.request_limits import OverLimit, check_request
from router.engine import Broken
from router.guard import GuardMiddleware, error_response
from router.http_limits import BodyLimits
from router.outcome import OutcomeMiddleware, refusal_response
from router.plain import splice
from workers.flags import config_apart, one_line

if TYPE_CHECKING:
    import argparse
    from collections.abc import Awaitable

    from fastapi import FastAPI
    from starlette.routing import BaseRoute

    from router.dispatch import Dispatch
    from router.engine import DisaggregatedEngine
    from router.journal import Record
    from router.leaving import Departure
    from router.link import Links

_TASKS = ("generate",)
_DOCS: Final = frozenset({"/openapi.json", "/docs", "/redoc"})
_SECRET: Final = frozenset({"epoch", "handoff_endpoint"})
"""Fields of a worker's hello with which its handles could be followed."""
VLLM_VERSION: str = vllm.__version__


class Unserved(Exception):
    """This router can't serve that model, or not by those flags; the message says what to do."""


class _Parser(FlexibleArgumentParser):  # type: ignore[misc]
    def error(self, message: str) -> NoReturn:
        """One line: vLLM's usage would be some hundred."""
        sys.stderr.write(f"{self.prog}: {message}\n")
        raise SystemExit(2)


def front_args(model: str, flags: list[str]) -> argparse.Namespace:
    """vLLM's own front flags; a bad one ends the process as argparse does."""
    parser = make_arg_parser(_Parser(prog="tandem router"))
    args: argparse.Namespace = parser.parse_args(["--model", model, *config_apart(flags)])
    if args.lora_modules:
        parser.error("--lora-modules: adapters are not served yet")
    if args.enable_mm_embeds:
        parser.error("--enable-mm-embeds: only images and the like themselves are served yet")
    if args.enable_prompt_embeds:
        parser.error("--enable-prompt-embeds: prompts are handed on as tokens; leave it out")
    args.disable_log_stats = True  # They are the engine's; the router has its own.
    validate_parsed_serve_args(args)
    return args


def front_config(args: argparse.Namespace) -> VllmConfig:
    """A configuration without a device: enough to render, tokenize and validate.

    Raises `Unserved`, also for what vLLM itself can't do.
    """
    try:
        config = _config(args)
    except (ValueError, OSError, ImportError) as error:  # pydantic's are ValueErrors.
        raise Unserved(one_line(error)) from error
    model = config.model_config
    if model.runner_type != "generate" or model.is_encoder_decoder:
        kind = "an encoder-decoder" if model.is_encoder_decoder else "no model that generates"
        raise Unserved(f"{model.model} is {kind}: run vLLM's own server for it")
    return config


def _config(args: argparse.Namespace) -> VllmConfig:
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    engine_args = AsyncEngineArgs.from_cli_args(args)
    model_config = engine_args.create_model_config()
    # No weights are loaded here, so their kernels need not exist on this machine.
    model_config.quantization = None
    envs.VLLM_CPU_KVCACHE_SPACE = 0
    # What a thinking budget needs, as an engine's own configuration would have it.
    engine_args._set_default_reasoning_config_args()
    return VllmConfig(
        model_config=model_config,
        # vLLM's word for a front that is not alone with its engine. By itself such a front sends an
        # image's hash alone once it has sent the image, to whichever engine; now it keeps what it
        # has processed, and each engine gets it whole (`vllm.multimodal.cache.factories`).
        parallel_config=ParallelConfig(_api_process_count=2),
        logging_config=engine_args.create_logging_config(),
        structured_outputs_config=engine_args.create_structured_outputs_config(),
        reasoning_config=engine_args.reasoning_config,
    )


def take_keys(args: argparse.Namespace, *, tenants_named: bool) -> list[str]:
    """The clients' keys, by vLLM's flag or variable, which vLLM itself is then not told of.

    Its own check knows one header, and guards some paths only. `tenants_named`: clients may say by
    a header whose their requests are. Raises `Unserved`.
    """
    keys = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
    args.api_key = envs.VLLM_API_KEY = None
    if envs.VLLM_ENABLE_RESPONSES_API_STORE and (len(keys) > 1 or tenants_named):
        raise Unserved(
            "VLLM_ENABLE_RESPONSES_API_STORE: the store knows no tenants, so each could read the "
            "others' responses; leave it out, or have one key and no --trust-tenant-header"
        )
    return keys


@dataclass(frozen=True, slots=True)
class Surface:
    """The part of the application that can be reached, and the keys that open it."""

    rules: AccessRules
    docs: bool
    """`/docs`, `/redoc` and `/openapi.json` are served."""


async def build_front(
    engine: DisaggregatedEngine,
    view: View,
    args: argparse.Namespace,
    surface: Surface,
) -> FastAPI:
    """The whole HTTP application."""
    _check_conversations(engine.renderer, args.chat_template)
    app: FastAPI = build_app(args, _TASKS, engine.model_config)
    await init_app_state(engine, app.state, args, _TASKS)
    splice(engine.plain_streams, app.state)
    app.add_exception_handler(Broken, _refused)
    # vLLM's handler is FastAPI's class's only, and misses what Starlette itself raises.
    app.add_exception_handler(HTTPException, _http_error)
    # `build_app` has built the stack already, with the handlers of then; the next request builds
    # it again.
    app.middleware_stack = None
    app.add_middleware(BodyLimits, limits=engine.limits)
    app.state.limits = engine.limits
    # The innermost: what it says has the headers that all others add.
    app.user_middleware.append(Middleware(OutcomeMiddleware, explain=_explain))
    app.dependency_overrides[validate_json_request] = _check_json
    mount(app, view, args, surface)
    if surface.docs:
        app.openapi()  # It takes seconds, and is kept: no request shall wait for it.
    return app


def mount(app: FastAPI, view: View, args: argparse.Namespace, surface: Surface) -> None:
    """Add our routes, and leave no other than those that a router serves."""
    _add_routes(app, view)
    app.router.routes[:] = [r for r in app.routes if _is_served(r, args, surface)]
    mounted = frozenset(getattr(route, "path", "") for route in app.routes)
    app.add_middleware(GuardMiddleware, rules=surface.rules, mounted=mounted)


def _is_served(route: BaseRoute, args: argparse.Namespace, surface: Surface) -> bool:
    path = getattr(route, "path", "")
    listed = next((each for each in ROUTES if each.path == path), None)
    methods = getattr(route, "methods", None)  # A mount has none, and serves whatever is below.
    if listed is None or not methods or not methods - {"HEAD", "OPTIONS"} <= listed.methods:
        return False
    if path in _DOCS:
        return surface.docs
    # Without the flag vLLM mounts these too, to say so.
    return not listed.optional or bool(args.enable_scale_out)


def _refused(request: Request, error: Any) -> Response:
    return refusal_response(error.error, request.url.path)


def _explain(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and error object of what is vLLM's to explain."""
    found = create_error_response(error).error
    return found.code, found.model_dump()


def _http_error(_: Request, error: Any) -> Response:
    """No such path, another method, a body nested too deeply: in OpenAI's shape too."""
    return error_response(error.status_code, error.detail, headers=error.headers)


async def _check_json(request: Request) -> None:
    """vLLM's own check of the content type, and then of what its validators trip over.

    They take these two for what they should be before pydantic has looked: a TypeError that names
    nothing, or a 500. FastAPI has parsed the body already, so looking at it costs nothing.
    """
    await validate_json_request(request)
    body = await request.json() if await request.body() else None
    if not isinstance(body, dict):
        return  # What pydantic says to that is clear.
    try:
        check_request(body, request.app.state.limits)
    except OverLimit as over:
        raise VLLMValidationError(str(over), parameter=over.field) from over
    if "/responses" in request.url.path and isinstance(body.get("input"), list):
        await _check_items(body["input"])
    if not isinstance(body.get("messages", []), list):
        raise VLLMValidationError("messages must be a list", parameter="messages")
    if not isinstance(body.get("structured_outputs"), dict | None):
        raise VLLMValidationError(
            "structured_outputs must be an object", parameter="structured_outputs"
        )
    # Of vLLM's scale-out endpoints: a client's word for what an item is, which all others would
    # have to believe, since caches go by it.
    parts = body.get("content_parts")
    named = [p for p in parts if isinstance(p, dict) and p.get("uuid")] if parts else []
    for field, given in (("features", body.get("features")), ("content_parts", named)):
        if given and "token_ids" in body:
            raise VLLMValidationError(
                f"{field}: items that a client names can't be served; send their content alone",
                parameter=field,
            )


async def _check_items(items: list[Any]) -> None:
    """Refuse the first item that is none, by itself.

    pydantic says of each in which way it is not each of thirty kinds: 2,000 of them took it 7 s and
    2 GB.
    """
    for at, item in enumerate(items):
        try:
            ResponsesRequest.model_validate({"input": [item]})
        except ValidationError as error:
            what = "this is no item that a response can follow"
            if isinstance(item, dict) and "type" not in item and "role" not in item:
                what = "an item needs a type, a message a role"
            raise VLLMValidationError(f"input[{at}]: {what}", parameter=f"input.{at}") from error
        if at % 8 == 7:
            await asyncio.sleep(0)


def _check_conversations(renderer: Any, chat_template: str | None) -> None:
    """Refuse what `trouble` finds before a conversation is rendered, whatever endpoint it is of.

    vLLM takes any role, and most templates print it: the model answers what it was never taught.
    """
    template = load_chat_template(chat_template)
    if template is None:
        template = getattr(renderer.tokenizer, "chat_template", None)
    if not isinstance(template, str):
        return  # The model has a renderer in code, or several templates: they know their roles.
    roles = roles_in(template)
    render = renderer.render_chat_async

    async def checked(conversations: Any, *rest: Any, **options: Any) -> Any:
        for messages in conversations:
            if found := trouble(messages, roles):
                raise VLLMValidationError(found[1], parameter=found[0])
            name_for(asker.get().tenant, messages)
        return await _fetched(render(conversations, *rest, **options))

    renderer.render_chat_async = checked


async def _fetched(rendering: Awaitable[Any]) -> Any:
    """Say 422 where vLLM says 500 to an item that can't be had, with our network's addresses."""
    try:
        return await rendering
    except (aiohttp.ClientError, TimeoutError) as error:
        what = "an item can't be fetched from its URL"
        raise VLLMUnprocessableEntityError(what, parameter="url") from error
    except RuntimeError as error:
        if "--allowed-local-media-path" not in str(error):
            raise
        what = "file URLs are not allowed here"
        raise VLLMUnprocessableEntityError(what, parameter="url") from error


@dataclass(frozen=True, slots=True)
class View:
    """The state that the router's own routes show."""

    links: Links
    dispatch: Dispatch
    departure: Departure


def _add_routes(app: FastAPI, view: View) -> None:
    dispatch = view.dispatch

    async def requests(request: Request) -> Response:
        who = asker.get()
        tenant = None if who.admin else who.tenant
        found = dispatch.journal.find(request.path_params["name"], tenant)
        if not found:
            raise HTTPException(404, "no such request, or too long ago")
        return JSONResponse([_record(r, dispatch) for r in found])

    async def workers(_: Request) -> Response:
        return JSONResponse(
            {
                "workers": [
                    {"hello": _named(w.hello), "load": _named(w.load)} for w in dispatch.fleet
                ],
                "refused": {link.address: link.refused for link in view.links if link.refused},
            }
        )

    async def readyz(_: Request) -> Response:
        trouble = "leaving" if view.departure.begun else _not_ready(dispatch)
        return PlainTextResponse(trouble or _degraded(dispatch) or "ok", 503 if trouble else 200)

    async def livez(_: Request) -> Response:
        return PlainTextResponse("ok")

    app.add_route("/tandem/requests/{name}", requests)
    app.add_route("/tandem/workers", workers)
    app.add_route("/livez", livez)
    app.add_route("/readyz", readyz)


def _named(message: msgspec.Struct) -> Any:
    """On the wire its fields have no names."""
    fields = msgspec.structs.asdict(message)
    return msgspec.to_builtins({k: v for k, v in fields.items() if k not in _SECRET})


def _not_ready(dispatch: Dispatch) -> str | None:
    error = dispatch.trouble()
    # Whoever names no tenant shares one: that it is over its rate says nothing of the router.
    return None if error is None or isinstance(error, TenantOverRate) else str(error)


def _degraded(dispatch: Dispatch) -> str | None:
    """Ready all the same: every request is served, some with a prompt computed where it decodes."""
    found = dispatch.handoffs.known.degraded
    return None if found is None else f"degraded: {found}"


def _record(record: Record, dispatch: Dispatch) -> dict[str, Any]:
    content: dict[str, Any] = msgspec.to_builtins(record)
    content["ttft_s"] = record.ttft_s
    if worker := dispatch.fleet.get(record.decode_worker or ""):
        content["block_bytes"] = worker.hello.block_bytes
        content["block_tokens"] = worker.hello.block_tokens
    return content
