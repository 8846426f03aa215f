"""One request, however made, neither holds a real router up nor grows it."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from deploy.local.group import LocalGroup
from router.core.access import ROUTES
from tests.asking import MODEL

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.timeout(500)

SIMULATED = ["--engine", "sim", "--max-model-len", "2048"]
CPU_S_MAX = 2.0
"""The router's CPU time for one request; wall time would say what else runs here.
Without limits each of those below took more."""
USER = {"role": "user", "content": "hi"}
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
JSON_ROUTES = [
    route.path
    for route in ROUTES
    if "POST" in route.methods
    and not route.optional
    and not route.path.endswith(("/ping", "/cancel"))
]


class Router:
    """A real router over simulated workers, watched from outside."""

    def __init__(self, group: LocalGroup) -> None:
        assert group.router is not None
        assert group.router.process is not None
        self.pid = group.router.process.pid
        self.client = httpx.Client(base_url=group.url, timeout=120)
        self.address = self.client.base_url.host, self.client.base_url.port

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1]
        return sum(map(int, fields.split()[11:13])) / os.sysconf("SC_CLK_TCK")

    def resident(self) -> int:
        """MB."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") // 1_000_000

    def post(self, path: str, body: dict[str, Any] | bytes) -> httpx.Response:
        if isinstance(body, bytes):
            return self.client.post(
                path, content=body, headers={"content-type": "application/json"}
            )
        return self.client.post(path, json={"model": MODEL, "max_tokens": 1, **body})


@pytest.fixture(scope="module")
def router() -> Iterator[Router]:
    flags = ["--header-s", "2", "--idle-s", "60"]
    with LocalGroup(MODEL, flags=SIMULATED, router_flags=flags) as group:
        found = Router(group)
        for _ in range(3):  # What comes first imports and compiles.
            assert found.post(TEXT, {"prompt": "x"}).status_code == 200
            assert found.post(CHAT, {"messages": [USER]}).status_code == 200
            found.post(TEXT, {"prompt": "x", "structured_outputs": {"regex": "a|b"}})
        yield found
        found.client.close()


def structured(**given: Any) -> dict[str, Any]:
    return {"prompt": "x", "structured_outputs": given}


REFUSED: dict[str, tuple[str, Any, int, str]] = {
    "sequences": (TEXT, {"prompt": "x", "n": 16_384}, 400, "--sequences-max"),
    "prompts": (TEXT, {"prompt": ["x"] * 1_024, "n": 10}, 400, "--prompts-max"),
    "both": (TEXT, {"prompt": ["x"] * 100, "n": 10}, 400, "--sequences-max"),
    "chats": (CHAT, {"messages": [[USER]] * 2_000}, 400, "--prompts-max"),
    "messages": (CHAT, {"messages": [USER] * 3_001}, 400, "--messages-max"),
    "body": (TEXT, b'{"prompt":"' + b"x" * 60_000_000 + b'"}', 413, "--body-bytes-max"),
    "numbers": (TEXT, b"[1" + b",1" * 1_900_000 + b"]", 400, "--json-values-max"),
    "objects": (TEXT, b'{"prompt":[{}' + b",{}" * 29_000 + b"]}", 400, "--prompts-max"),
    "nesting": (TEXT, b'{"a":' + b"[" * 900 + b"]" * 900 + b"}", 400, "--json-depth-max"),
    "regex": (TEXT, structured(regex="a|" * 200_000), 400, "--grammar-bytes-max"),
    "tokens": ("/tokenize", {"prompt": "\u5b57" * 200_000}, 400, "--token-ids-max"),
    "parts": (CHAT, {"messages": [{**USER, "content": [{}] * 10}] * 900}, 400, "--messages-max"),
    "items": ("/v1/responses", {"input": [{"type": "x"}] * 200}, 400, "input[0]"),
    "tools": (CHAT, {"messages": [USER], "tools": [{"a": 1}] * 9_000}, 400, "--tools-max"),
    "tokenize": ("/tokenize", {"prompt": "word " * 500_000}, 400, "--text-chars-max"),
    "detokenize": ("/detokenize", {"tokens": [7] * 200_000}, 400, "--token-ids-max"),
    "stop": (TEXT, {"prompt": "x", "stop": ["a"] * 10_000}, 400, "--stops-max"),
    "bad words": (TEXT, {"prompt": "x", "bad_words": ["a"] * 10_000}, 400, "--bad-words-max"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_beyond_a_limit_costs_next_to_nothing_and_is_told_which(
    router: Router, name: str
) -> None:
    path, body, status, setting = REFUSED[name]
    before = router.cpu_s()
    answer = router.post(path, body)
    assert answer.status_code == status, answer.text[:500]
    assert setting in answer.json()["error"]["message"]
    assert router.cpu_s() - before < CPU_S_MAX


def test_memory_is_back_after_the_largest_requests_that_are_served(router: Router) -> None:
    largest = {"prompt": "word and " * 66_000}
    assert router.post("/tokenize", largest).status_code in (200, 400)
    before = router.resident()
    for _ in range(3):
        router.post("/tokenize", largest)
        router.post(TEXT, b'{"prompt":"' + b"x" * 4_000_000 + b'"}')
    deadline = time.monotonic() + 60
    while router.resident() > before * 1.1 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert router.resident() <= before * 1.1


def test_requests_at_the_bounds_are_served(router: Router) -> None:
    for body in ({"prompt": "x", "n": 128}, {"prompt": ["x"] * 128}):
        answer = router.post(TEXT, body)
        assert answer.status_code == 200, answer.text[:500]
        assert len(answer.json()["choices"]) == 128


def test_a_connection_that_dawdles_or_sends_endless_headers_ends(router: Router) -> None:
    def said(data: bytes) -> bytes:
        with socket.create_connection(router.address, timeout=60) as client:
            client.sendall(data)
            answer = b""
            try:
                while part := client.recv(65_536):
                    answer += part
            except ConnectionError:
                pass
            return answer

    assert said(b"") == b""
    assert said(b"GET /health HTTP/1.1\r\nhost: a\r\n").startswith(b"HTTP/1.1 408 ")
    long = b"GET /health HTTP/1.1\r\nx-a: " + b"a" * 500_000
    assert said(long).startswith(b"HTTP/1.1 431 ")
    assert router.client.get("/health").status_code == 200


def test_a_half_closed_client_s_request_is_cancelled(router: Router) -> None:
    body = b'{"model":"%s","prompt":"x","max_tokens":2000,"stream":true}' % MODEL.encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    with socket.create_connection(router.address, timeout=60) as client:
        client.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert client.recv(65_536).startswith(b"HTTP/1.1 200 ")
        client.shutdown(socket.SHUT_WR)
        try:
            while client.recv(65_536):
                pass
        except ConnectionError:
            pass
    text = router.client.get("/metrics").text
    assert 'tandem_router_requests_ended_total{error="",outcome="cancelled"} ' in text


def test_each_route_that_takes_json_looks_at_its_size_first(router: Router) -> None:
    deep = b'{"a":' + b"[" * 100 + b"]" * 100 + b"}"
    for path in JSON_ROUTES:
        answer = router.post(path, deep)
        assert answer.status_code == 400, path
        assert "--json-depth-max" in answer.text, path
