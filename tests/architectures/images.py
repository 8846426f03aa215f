"""Questions with images, made here, for a group and for the engine it is compared with."""

from __future__ import annotations

import base64
import io
import random
from typing import Any

import httpx

from tests.architectures.compare import Answer, Truth

TOKENS = 12
ANSWER_S = 120.0
SQUARE, WIDE = (84, 84), (140, 84)
"""Pixels; patches are of 28, so that the second has more placeholders."""


def picture(seed: int, size: tuple[int, int] = SQUARE) -> str:
    """A PNG of coloured squares as a data URL."""
    from PIL import Image

    rng = random.Random(seed)
    width, height = size
    small = Image.new("RGB", (width // 14, height // 14))
    small.putdata([
        (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        for _ in range(small.width * small.height)
    ])  # fmt: skip
    file = io.BytesIO()
    small.resize(size, Image.Resampling.NEAREST).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


ONE, OTHER, LARGER = picture(1), picture(2), picture(3, WIDE)
QUESTIONS: dict[str, tuple[str, list[str]]] = {
    "one": ("What is it?", [ONE]),
    "other": ("What is it?", [OTHER]),
    "larger": ("What is it?", [LARGER]),
    "one again": ("What is it?", [ONE]),
    "one, more words": ("Describe it in many words, please.", [ONE]),
    "two": ("Compare them.", [ONE, OTHER]),
    "two, turned": ("Compare them.", [OTHER, ONE]),
    "none": ("Hello there, who are you?", []),
}
"""By name: a text, and the images before it. `one` and `other` differ in their image alone."""


def chat(url: str, model: str, question: str, **options: Any) -> dict[str, Any]:
    """The completion, or `{"error": …}` with what came instead."""
    text, pictures = QUESTIONS[question]
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": each}} for each in pictures
    ]
    content.append({"type": "text", "text": text})
    body = {
        "model": model, "messages": [{"role": "user", "content": content}], "temperature": 0,
        "max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True, **options,
    }  # fmt: skip
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=ANSWER_S)
    if response.status_code != 200:
        return {"error": f"{response.status_code} {response.text[:500]}"}
    said: dict[str, Any] = response.json()
    return said


def truth(said: dict[str, Any]) -> Truth:
    """The answer of a completion with `logprobs` and two `top_logprobs`."""
    [choice] = said["choices"]
    told = choice["logprobs"]["content"]
    best = [sorted((x["logprob"] for x in t["top_logprobs"]), reverse=True) for t in told]
    return Truth(
        choice["token_ids"], [t["logprob"] for t in told], [first - next_ for first, next_ in best]
    )


def answer(url: str, said: dict[str, Any]) -> Answer:
    if error := said.get("error"):
        return Answer(error=error)
    [choice] = said["choices"]
    told = choice["logprobs"]
    [record] = httpx.get(f"{url}/tandem/requests/{said['id']}", timeout=ANSWER_S).json()
    logprobs = told and [t["logprob"] for t in told["content"]]
    details = said["usage"]["prompt_tokens_details"] or {}
    return Answer(choice["token_ids"], logprobs, details.get("cached_tokens", 0), record)
