"""Chats about images: tokens are one engine's, whichever worker has seen an image before."""

from __future__ import annotations

import argparse
import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.asking import await_free
from tests.forks import ForkedAggregated, ForkedGroup
from tests.integration.picture_model import PLACEHOLDER, make, picture

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from deploy.local.group import LocalGroup
    from tests.forks import Zygote

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

NAME = "pictures"
BLOCK = 32
FLAGS = [
    "--max-model-len", "2048", "--dtype", "float32", "--enforce-eager", "--block-size", str(BLOCK),
    "--num-gpu-blocks-override", "128",
]  # fmt: skip
ROUTER_FLAGS = [
    "--disaggregate", "always", "--enable-scale-out",
    "--limit-mm-per-prompt", '{"image": 3, "video": 0}', "--hedge-ratio", "0",
]  # fmt: skip
PICTURES = {"a": (84, 84), "b": (84, 84), "c": (140, 84), "d": (252, 252), "e": (252, 252)}
"""Their sizes: nine tokens, nine, fifteen, and twice 81, over three blocks or four."""
LONG = "Look at this for as long as you like, and then say in a few words of your own, " * 3

CHATS: list[tuple[str, str]] = [
    ("a", "What is it?"), ("b", "What is it?"), ("a", LONG), ("b", LONG), ("a", LONG),
    ("ab", LONG), ("ba", LONG), ("ab", LONG), ("c", LONG), ("d", "What is it?"),
    ("e", "What is it?"), ("d", LONG), ("e", LONG), ("dd", LONG), ("de", LONG), ("", LONG),
]  # fmt: skip
"""Images by their names, and the text that follows them."""


@dataclass(frozen=True)
class Answer:
    """One engine's, or a group's, answer to one chat."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float] | None
    request_id: str

    def record(self, url: str) -> dict[str, Any]:
        records: list[dict[str, Any]] = httpx.get(
            f"{url}/tandem/requests/{self.request_id}", timeout=30
        ).json()
        return records[0]


def body_of(number: int, seeds: dict[str, int]) -> dict[str, Any]:
    """Every other one with logprobs: its first token is not the prefill worker's then."""
    names, text = CHATS[number]
    images = [
        {"type": "image_url", "image_url": {"url": picture(seeds[name], *PICTURES[name])}}
        for name in names
    ]
    return {
        "model": NAME, "messages": [{"role": "user", "content": [*images, said(text)]}],
        "temperature": 0, "max_tokens": 8, "ignore_eos": True, "return_token_ids": True,
        **({"logprobs": True, "top_logprobs": 1} if number % 2 else {}),
    }  # fmt: skip


def said(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


SEEDS = {name: number for number, name in enumerate(PICTURES)}


def ask(url: str, body: dict[str, Any]) -> Answer:
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    content = answer.json()
    (choice,) = content["choices"]
    logprobs = choice["logprobs"] and [token["logprob"] for token in choice["logprobs"]["content"]]
    return Answer(content["prompt_token_ids"], choice["token_ids"], logprobs, content["id"])


def check_same(ours: Answer, theirs: Answer) -> None:
    assert ours.prompt == theirs.prompt
    assert ours.tokens == theirs.tokens
    if theirs.logprobs is not None:
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(NAME)
    make(folder)
    return folder


@pytest.fixture(scope="module")
def expected(model: Path, zygote: Zygote) -> list[Answer]:
    """Answers of plain vLLM, which has ended before the group begins: memory is short."""
    with ForkedAggregated(zygote, str(model), served_as=NAME, flags=FLAGS) as one:
        one.await_ready()
        return [ask(one.url, body_of(number, SEEDS)) for number in range(len(CHATS))]


@pytest.fixture(scope="module")
def pictures(model: Path, expected: list[Answer], zygote: Zygote) -> Iterator[LocalGroup]:
    """A router with two prefill workers and one that decodes."""
    served = ["--served-model-name", NAME]
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(
            ForkedGroup(
                zygote, str(model), prefill=2, flags=FLAGS, router_flags=[*ROUTER_FLAGS, *served],
                # An image in several steps, and so announced and read in several parts.
                role_flags={"prefill": ["--max-num-batched-tokens", "128"]},
            )
        )  # fmt: skip


def seen(answer: Answer, names: str) -> list[object]:
    """Each place as the model sees it: a token, or a part of a certain image."""
    places: list[object] = list(answer.prompt)
    images, at, part = iter(names), 0, 0
    name = ""
    for at, token in enumerate(answer.prompt):
        if token != PLACEHOLDER:
            part = 0
            continue
        name, part = (name, part + 1) if part else (next(images), 1)
        places[at] = (name, part)
    assert next(images, None) is None
    return places


def shared(one: list[object], other: list[object]) -> int:
    """Tokens in blocks that both begin with, less the one that is always computed."""
    alike = 0
    for mine, theirs in zip(one[:-1], other, strict=False):
        if mine != theirs:
            break
        alike += 1
    return alike // BLOCK * BLOCK


def test_caches_are_hit_by_equal_images_and_never_by_others(
    pictures: LocalGroup, expected: list[Answer]
) -> None:
    """One chat after the other: what is foretold, what is cached, and what must be are the same."""
    known: dict[str, list[list[object]]] = {"prefill-0": [], "prefill-1": []}
    hits = []
    numbers = [*range(len(CHATS)), 4, 7, 12, 14]
    for number in numbers:
        ours = ask(pictures.url, body_of(number, SEEDS))
        check_same(ours, expected[number])
        record, sees = ours.record(pictures.url), seen(ours, CHATS[number][0])
        assert record["kv_failed"] is None
        assert record["kv_tokens"] > 0
        worker = known[record["prefill_worker"]]
        true = max((shared(sees, before) for before in worker), default=0)
        assert (record["predicted_tokens"], record["cached_tokens"]) == (true, true)
        worker.append(sees)
        hits.append(true)
    assert max(hits) >= 3 * BLOCK, "beyond the end of an image over three blocks"
    assert all(known.values()), "both have computed some"


def test_answers_are_one_engines_when_asked_together(
    pictures: LocalGroup, expected: list[Answer]
) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: ask(pictures.url, body_of(n, SEEDS)), range(len(CHATS))))
    for ours, theirs in zip(answers, expected, strict=True):
        check_same(ours, theirs)
        assert ours.record(pictures.url)["kv_failed"] is None
    await_free(pictures, 20)


def test_several_answers_to_one_chat_share_its_image(pictures: LocalGroup) -> None:
    body = {**body_of(11, SEEDS), "n": 3, "temperature": 1.0, "seed": 5, "logprobs": False}
    for field in ("top_logprobs", "logprobs"):
        body.pop(field, None)
    answer = httpx.post(f"{pictures.url}/v1/chat/completions", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    assert len({tuple(c["token_ids"]) for c in answer.json()["choices"]}) == 3


def test_a_worker_that_begins_anew_is_told_of_images_seen_before(
    pictures: LocalGroup, expected: list[Answer]
) -> None:
    """Killed in the middle of chats, none of which fails; then it computes some again."""
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, pictures.url, body_of(n, SEEDS)) for n in range(len(CHATS))]
        asked[2].result()
        pictures.kill("prefill-0")
        for future, theirs in zip(asked, expected, strict=True):
            check_same(future.result(), theirs)
        pictures.restart("prefill-0")
        used, until = set[str](), time.monotonic() + 120
        while "prefill-0" not in used:
            assert time.monotonic() < until, "it gets nothing to do"
            answers = list(pool.map(lambda n: ask(pictures.url, body_of(n, SEEDS)), range(16)))
            for number, ours in enumerate(answers):
                check_same(ours, expected[number])
            used |= {ours.record(pictures.url)["prefill_worker"] for ours in answers}


# ------------------------------------------------------------ refused


def image(url: str | None, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": url and {"url": url}, **more}


WRONG: list[tuple[list[dict[str, Any]], int, str | None]] = [
    ([image(picture(n)) for n in range(4)], 400, "image"),
    ([{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}], 400, "audio"),
    ([{"type": "image_embeds", "image_embeds": "AAAA"}], 400, "image_embeds"),
    ([image("data:image/png;base64,AAAA")], 400, None),
    ([image("file:///etc/hostname")], 422, "url"),
    ([image("http://127.0.0.1:1/picture.png")], 422, "url"),
    ([image(None, uuid="nobody-sent-it")], 400, None),
]


@pytest.mark.parametrize("which", range(len(WRONG)))
def test_a_bad_image_is_the_clients_fault(pictures: LocalGroup, which: int) -> None:
    content, status, field = WRONG[which]
    body = {"model": NAME, "messages": [{"role": "user", "content": [*content, said("What?")]}]}
    answer = httpx.post(f"{pictures.url}/v1/chat/completions", json=body, timeout=60)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, field), answer.text
    assert "127.0.0.1" not in answer.text, "what our network looks like from here"


def test_scale_out_takes_a_client_s_images_and_not_its_word_for_them(pictures: LocalGroup) -> None:
    def answer(**body: Any) -> tuple[int, str | None]:
        tokens = {"model": NAME, "token_ids": [5, 14, PLACEHOLDER, 15, 6]}
        response = httpx.post(
            f"{pictures.url}/inference/v1/generate", timeout=60,
            json={**tokens, "sampling_params": {"max_tokens": 2}, **body},
        )  # fmt: skip
        return response.status_code, response.json().get("error", {}).get("param")

    part = {"type": "image_url", "url": picture(1)}
    assert answer(content_parts=[part]) == (200, None)
    assert answer(content_parts=[{**part, "uuid": "x"}]) == (400, "content_parts")
    named = {
        "mm_hashes": {"image": ["x"]},
        "mm_placeholders": {"image": [{"offset": 2, "length": 1}]},
    }
    assert answer(features=named) == (400, "features")


def test_an_image_s_name_is_its_tenants_own(pictures: LocalGroup) -> None:
    """The name says nothing in another tenant's mouth."""

    def status(part: dict[str, Any], tenant: str) -> int:
        messages = [{"role": "user", "content": [part, said("What?")]}]
        return httpx.post(
            f"{pictures.url}/v1/chat/completions", timeout=60,
            json={"model": NAME, "messages": messages, "max_tokens": 2},
            headers={"X-Tandem-Tenant": tenant},
        ).status_code  # fmt: skip

    assert status(image(picture(77), uuid="mine"), "one") == 200
    assert status(image(None, uuid="mine"), "one") == 200
    assert status(image(None, uuid="mine"), "two") == 400


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Torch's own, while vLLM imports it.
def test_the_front_keeps_images_for_itself_and_engines_keep_none(model: Path) -> None:
    from vllm.multimodal.cache import MultiModalProcessorOnlyCache
    from vllm.multimodal.cache.factories import (
        engine_receiver_cache_from_config,
        processor_cache_from_config,
    )

    from router.front import front_args, front_config
    from workers.api import Role
    from workers.engines.vllm_config import vllm_config
    from workers.server import Identity

    front = front_config(front_args(str(model), ["--max-model-len", "2048"]))
    assert isinstance(processor_cache_from_config(front), MultiModalProcessorOnlyCache)
    identity = Identity("w", "e", Role.MIXED, "m", "model", "tokenizer", 5.0)
    args = argparse.Namespace(model=str(model), role="mixed", kv_connector="none")
    worker = vllm_config(args, identity, ["--mm-processor-cache-gb", "4", *FLAGS])
    assert engine_receiver_cache_from_config(worker) is None
