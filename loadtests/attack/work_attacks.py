"""Requests that are well formed and cost far more than they look."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from loadtests.attack.registry import attack
from loadtests.attack.scene import ask

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from loadtests.attack.registry import Tally
    from loadtests.attack.scene import Scene

_MIB = 1 << 20


def _chat(scene: Scene, **more: Any) -> dict[str, Any]:
    message = {"role": "user", "content": "Hello"}
    return {"model": scene.plan.model, "messages": [message], "max_tokens": 2, **more}


def _completion(scene: Scene, **more: Any) -> dict[str, Any]:
    return {"model": scene.plan.model, "prompt": "Hello", "max_tokens": 2, **more}


async def _post(
    scene: Scene, tally: Tally, path: str, *bodies: dict[str, Any], refused: bool = True
) -> None:
    """All bodies at once. `refused`: a 2xx breaks the bound that this attack is about."""
    texts = [json.dumps(body).encode() for body in bodies]
    headers = {"Content-Type": "application/json"}
    async with scene.session() as session:
        asked = (ask(session, tally, path, data=t, headers=headers) for t in texts)
        for status, _ in await asyncio.gather(*asked):
            tally.expect(
                not refused or 400 <= status < 500 or status in (501, 503),
                f"{path}: {status or 'no answer'} where a limit should answer 4xx",
            )


@attack("openapi", "the API's description, asked for four times")
async def openapi(scene: Scene, tally: Tally) -> None:
    async with scene.session() as session:
        await asyncio.gather(*(ask(session, tally, "/openapi.json", "GET") for _ in range(4)))


@attack("scoring-items", "100,000 items to score")
async def scoring_items(scene: Scene, tally: Tally) -> None:
    body = {"query": "a", "items": ["b"] * 100_000, "label_token_ids": [1, 2]}
    await _post(scene, tally, "/generative_scoring", {"model": scene.plan.model, **body})


@attack("prompts-times-n", "1,024 prompts, ten answers to each")
async def prompts_times_n(scene: Scene, tally: Tally) -> None:
    body = _completion(scene, prompt=["Hello"] * 1024, n=10, max_tokens=1)
    await _post(scene, tally, "/v1/completions", body)


@attack("huge-n", "16,384 answers to one prompt", short=True)
async def huge_n(scene: Scene, tally: Tally) -> None:
    await _post(scene, tally, "/v1/completions", _completion(scene, n=16_384, max_tokens=1))
    await _post(scene, tally, "/v1/chat/completions", _chat(scene, n=16_384, max_tokens=1))


@attack("chat-batch", "2,000 chats in one request")
async def chat_batch(scene: Scene, tally: Tally) -> None:
    messages = [[{"role": "user", "content": "Hello"}]] * 2000
    body = {"model": scene.plan.model, "messages": messages, "max_tokens": 1}
    await _post(scene, tally, "/v1/chat/completions/batch", body)


@attack("body-200mb", "a body of 200 MB, with its length told and in chunks", limit_s=60)
async def body_200mb(scene: Scene, tally: Tally) -> None:
    async def content() -> AsyncIterator[bytes]:
        yield b'{"model": "m", "prompt": "'
        for _ in range(200):
            yield b"a" * _MIB
        yield b'"}'

    length = 200 * _MIB + 28
    async with scene.session(timeout_s=30) as session:
        for told in ({"Content-Length": str(length)}, {}):
            headers = {"Content-Type": "application/json", **told}
            status, _ = await ask(
                session, tally, "/v1/completions", data=content(), headers=headers
            )
            tally.expect(status < 500 and status != 200, f"a body of 200 MB: {status}")


@attack("regex-alternatives", "a regular expression of 200,000 alternatives", limit_s=60)
async def regex_alternatives(scene: Scene, tally: Tally) -> None:
    regex = "|".join(f"w{n}" for n in range(200_000))
    await _post(
        scene, tally, "/v1/chat/completions", _chat(scene, structured_outputs={"regex": regex})
    )


@attack(
    "schema-explosion", "JSON schemas and grammars that are small and compile for long", limit_s=60
)
async def schema_explosion(scene: Scene, tally: Tally) -> None:
    nested: dict[str, Any] = {"type": "string"}
    for level in range(400):
        nested = {
            "type": "object",
            "properties": {f"p{level}": nested, "q": {"type": "string"}},
        }
    asked: list[dict[str, Any]] = [
        {"structured_outputs": {"regex": "(((a{1,999}){1,999}){1,999})"}},
        {"structured_outputs": {"choice": [f"choice {n}" for n in range(50_000)]}},
        {"structured_outputs": {"json": nested}},
        {"structured_outputs": {"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000}},
    ]
    bodies = [_chat(scene, **more) for more in asked]
    await _post(scene, tally, "/v1/chat/completions", *bodies, refused=False)


@attack("tokenize-5mb", "5 MB of text to tokenize, six at once")
async def tokenize_5mb(scene: Scene, tally: Tally) -> None:
    body = {"model": scene.plan.model, "prompt": "the quick brown fox " * 250_000}
    await _post(scene, tally, "/tokenize", *[body] * 6, refused=False)


@attack("one-word", "a prompt of one word of a million letters, and one of a million brackets")
async def one_word(scene: Scene, tally: Tally) -> None:
    prompts = ("a" * 1_000_000, "[" * 1_000_000, "\u0301" * 300_000, " " * 1_000_000)
    bodies = [_completion(scene, prompt=prompt) for prompt in prompts]
    await _post(scene, tally, "/v1/completions", *bodies)


@attack("deep-json", "bodies nested 100,000 deep", short=True)
async def deep_json(scene: Scene, tally: Tally) -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    objects = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
    headers = {"Content-Type": "application/json"}
    async with scene.session() as session:
        for body in (deep, objects, b'{"model": "m", "messages": ' + deep + b"}", b"[" * 100_000):
            for path in ("/v1/chat/completions", "/v1/messages", "/tokenize"):
                status, _ = await ask(session, tally, path, data=body, headers=headers)
                tally.expect(400 <= status < 500, f"{path}, nested deeply: {status}")


@attack("many-of-each", "10,000 stop strings, biases, bad words, tools and logprobs", limit_s=60)
async def many_of_each(scene: Scene, tally: Tally) -> None:
    words = [f"word {n}" for n in range(10_000)]
    tools = [
        {"type": "function", "function": {"name": f"f{n}", "parameters": {"type": "object"}}}
        for n in range(2000)
    ]
    bodies = [
        _chat(scene, stop=words),
        _chat(scene, bad_words=words),
        _chat(scene, stop_token_ids=list(range(10_000))),
        _chat(scene, logit_bias={str(n): 1.0 for n in range(10_000)}),
        _chat(scene, tools=tools),
        _chat(scene, logprobs=True, top_logprobs=10_000),
    ]
    await _post(scene, tally, "/v1/chat/completions", *bodies, refused=False)
