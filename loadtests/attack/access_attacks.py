"""Attacks by people without a key, with a wrong one, or with another tenant's."""

from __future__ import annotations

import asyncio
import json
import math
from typing import TYPE_CHECKING, Any

from loadtests.attack.registry import attack
from loadtests.attack.scene import KEY, OTHER_KEY, WRONG_KEY, Scene, ask

if TYPE_CHECKING:
    import aiohttp

    from loadtests.attack.registry import Tally

OPEN = frozenset({"/health", "/livez", "/readyz", "/ping"})
"""Routes that answer without a key."""
ROUTES = (
    *(("GET", p) for p in (
        "/docs", "/docs/oauth2-redirect", "/is_scaling_elastic_ep", "/load", "/metrics",
        "/openapi.json", "/redoc", "/server_info", "/tandem/requests/0", "/tandem/workers",
        "/tokenizer_info", "/v1/models", "/v1/responses/resp_0", "/version",
    )),
    *(("POST", p) for p in (
        "/abort_requests", "/classify", "/collective_rpc", "/detokenize", "/generative_scoring",
        "/inference/v1/generate", "/invocations", "/pause", "/pooling", "/reset_prefix_cache",
        "/resume", "/scale_elastic_ep", "/score", "/sleep", "/tokenize", "/v1/audio/transcriptions",
        "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/chat/completions/render",
        "/v1/completions", "/v1/completions/render", "/v1/embeddings", "/v1/load_lora_adapter",
        "/v1/messages", "/v1/messages/count_tokens", "/v1/responses", "/v1/responses/resp_0/cancel",
        "/v1/unload_lora_adapter", "/v2/rerank", "/wake_up",
    )),
)  # fmt: skip
"""Routes that vLLM's front or ours serves or may come to serve."""
_CHAT = [{"role": "user", "content": "Hello"}]


def _body(scene: Scene, path: str) -> dict[str, Any]:
    """A body that most routes would take, had they no guard."""
    body: dict[str, Any] = {"model": scene.plan.model, "max_tokens": 2}
    if "chat" in path or "messages" in path or path == "/invocations":
        return {**body, "messages": _CHAT}
    if path == "/generative_scoring":
        return {"query": "a", "items": ["b"], "label_token_ids": [1]}
    return {**body, "prompt": "Hello", "input": "Hello", "tokens": [1, 2]}


async def _knock(scene: Scene, tally: Tally, headers: dict[str, str]) -> None:
    """Ask on every route; nothing but the open ones may answer with 2xx."""
    async with scene.session(WRONG_KEY) as session:
        session.headers.clear()
        for method, path in ROUTES:
            body = None if method == "GET" else _body(scene, path)
            status, _ = await ask(session, tally, path, method, json=body, headers=headers)
            tally.expect(
                status in (401, 403, 404, 405, 501) or not scene.plan.keys,
                f"{method} {path} answers {status} to a stranger",
            )
        for path in OPEN:
            status, _ = await ask(session, tally, path, "GET", headers=headers)


@attack("no-key", "every route without a key", short=True)
async def no_key(scene: Scene, tally: Tally) -> None:
    await _knock(scene, tally, {})


@attack("wrong-key", "every route with a wrong key, in each header that clients use", short=True)
async def wrong_key(scene: Scene, tally: Tally) -> None:
    for headers in (
        {"Authorization": f"Bearer {WRONG_KEY}"},
        {"x-api-key": WRONG_KEY},
        {"api-key": WRONG_KEY},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Basic {KEY}"},
    ):
        await _knock(scene, tally, headers)


@attack("key-headers", "the right key in each header that clients use", short=True)
async def key_headers(scene: Scene, tally: Tally) -> None:
    async with scene.session() as session:
        session.headers.clear()
        for path, headers in (
            ("/v1/chat/completions", {"Authorization": f"Bearer {OTHER_KEY}"}),
            ("/v1/messages", {"x-api-key": OTHER_KEY, "anthropic-version": "2023-06-01"}),
            ("/v1/chat/completions", {"api-key": OTHER_KEY}),
        ):
            body = _body(scene, path)
            status, _ = await ask(session, tally, path, json=body, headers=headers)
            tally.expect(status == 200, f"{path} answers {status} to {next(iter(headers))}")


@attack("tenants", "made-up tenants and keys, and priorities that would starve others", limit_s=40)
async def tenants(scene: Scene, tally: Tally) -> None:
    body = {
        "model": scene.plan.model, "prompt": "Me first.", "max_tokens": 20, "ignore_eos": True,
    }  # fmt: skip

    async def push(number: int, session: aiohttp.ClientSession) -> None:
        for turn in range(3):
            name = f"tenant-{number}-{turn}"
            headers = {"X-Tandem-Tenant": name, "x-api-key": name}
            await ask(
                session, tally, "/v1/completions", json={**body, "priority": -100}, headers=headers
            )

    async with scene.session() as session:
        await asyncio.gather(*(push(n, session) for n in range(100)))


@attack("flood", "one tenant's 600 requests at once beside the others", limit_s=60)
async def flood(scene: Scene, tally: Tally) -> None:
    body = {
        "model": scene.plan.model, "prompt": "A flood " * 100, "max_tokens": 30, "ignore_eos": True,
    }  # fmt: skip
    async with scene.session(timeout_s=40) as session:
        asked = (ask(session, tally, "/v1/completions", json=body) for _ in range(600))
        await asyncio.gather(*asked)


@attack("refused-streams", "streams that are refused: a status, not an event", short=True)
async def refused_streams(scene: Scene, tally: Tally) -> None:
    completion = {
        "model": scene.plan.model, "prompt": "Hi", "max_tokens": 4, "stream": True,
    }  # fmt: skip
    chat = {
        "model": scene.plan.model, "messages": _CHAT, "max_tokens": 4, "stream": True,
    }  # fmt: skip
    cases: list[tuple[dict[str, Any], dict[str, str], range]] = [
        ({}, {"X-Tandem-TTFT-S": "0.0001"}, range(400, 504)),
        ({"structured_outputs": {"regex": "("}}, {}, range(400, 500)),
        ({"structured_outputs": {"grammar": "root ::= ("}}, {}, range(400, 500)),
        ({"response_format": {"type": "json_schema", "json_schema": {
            "name": "bad", "schema": {"type": "nothing"}}}}, {}, range(400, 500)),
    ]  # fmt: skip
    async with scene.session() as session:
        for path, body in (("/v1/completions", completion), ("/v1/chat/completions", chat)):
            for more, headers, want in cases:
                status, answer = await ask(
                    session, tally, path, json={**body, **more}, headers=headers
                )
                said = next(iter(more), "X-Tandem-TTFT-S")
                tally.expect(
                    status in want,
                    f"{path} with {said}: {status} {answer[:60].decode(errors='replace')}",
                )


@attack("bad-input", "input that is wrong in small ways: 4xx that name the field", short=True)
async def bad_input(scene: Scene, tally: Tally) -> None:
    model = scene.plan.model
    hello = {"model": model, "messages": _CHAT, "max_tokens": 2}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {**hello, "messages": [{"content": "no role"}]}),
        ("/v1/chat/completions", {**hello, "messages": [{}]}),
        ("/v1/chat/completions", {**hello, "use_beam_search": True, "n": 2}),
        ("/v1/completions", {"model": model, "prompt": "a", "use_beam_search": True, "n": 2}),
        ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "b"}),
        ("/v1/unload_lora_adapter", {"lora_name": "a"}),
        ("/v1/completions", {"model": model, "prompt": [2**40], "max_tokens": 1}),
        ("/v1/completions", {"model": model, "prompt": [-1], "max_tokens": 1}),
        ("/v1/completions", {"model": model, "prompt": "a", "max_tokens": -1}),
        ("/v1/completions", {"model": model, "prompt": "a", "priority": 2**70}),
        ("/v1/completions", {"model": model, "prompt": "a", "seed": 2**70}),
        ("/v1/completions", {"model": model, "prompt": "\ud800", "max_tokens": 1}),
        ("/v1/completions", {"model": model, "prompt": "a", "temperature": math.nan}),
        ("/detokenize", {"model": model, "tokens": [2**40]}),
        ("/detokenize", {"model": model, "tokens": [-5]}),
    ]
    async with scene.session() as session:
        for path, body in asked:
            status, answer = await ask(
                session, tally, path, data=json.dumps(body),
                headers={"Content-Type": "application/json"},
            )  # fmt: skip
            tally.expect(
                0 < status < 500 or status == 501,
                f"{path} {json.dumps(body)[:60]}: {status} {answer[:60].decode(errors='replace')}",
            )


@attack("others-records", "another tenant's requests, by id and by parts of ids", short=True)
async def others_records(scene: Scene, tally: Tally) -> None:
    body = {"model": scene.plan.model, "prompt": "Mine.", "max_tokens": 2}
    async with scene.session(KEY) as session:
        _, answer = await ask(session, tally, "/v1/completions", json=body)
        mine = json.loads(answer)["id"]
        status, _ = await ask(session, tally, f"/tandem/requests/{mine}", "GET")
        tally.expect(status == 200, f"a client's own record: {status}")
    async with scene.session(OTHER_KEY) as session:
        for name in (mine, mine[:-2], mine[5:], "0", "cmpl-", "a"):
            status, answer = await ask(session, tally, f"/tandem/requests/{name}", "GET")
            found = len(json.loads(answer)) if status == 200 else 0
            whose = "another tenant's id" if name == mine else f"{name[:8]!r}"
            tally.expect(found == 0, f"/tandem/requests/ tells a client {found} records of {whose}")
        status, answer = await ask(session, tally, "/tandem/workers", "GET")
        tally.expect(
            b"epoch" not in answer or status != 200, "/tandem/workers tells a client the epochs"
        )
