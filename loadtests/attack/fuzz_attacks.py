"""Requests that nobody would write: made from the API's description, and from bare bytes."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import hypothesis.strategies as st
import requests
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable

from loadtests.attack import bounds
from loadtests.attack.registry import attack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hypothesis.strategies import SearchStrategy

    from loadtests.attack.registry import Tally
    from loadtests.attack.scene import Scene

_ANSWER_S = 10.0
_TOLD = 90


class _Over(Exception):
    """The time for this is used up."""


def _draw(
    strategy: SearchStrategy[Any], until: float, start: int, send: Callable[[Any], None]
) -> None:
    """Send one example after another until then; the same ones for the same `start`."""

    @seed(start)
    @settings(
        max_examples=100_000, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    @given(strategy)
    def each(example: Any) -> None:
        if time.monotonic() > until:
            raise _Over
        send(example)

    with suppress(_Over, Unsatisfiable):  # Where nothing can be wrong, no case is.
        each()


# ---------------------------------------------------------------- by the description


def _tamed(case: Any, model: str, turn: int) -> Any:
    """Most cases name the right model and want few tokens, or none would get far."""
    body = case.body
    if isinstance(body, dict) and turn % 8:
        body["model"] = model
        for field in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if isinstance(body.get(field), int) or field == "max_tokens":
                body[field] = 2
    return case


def _send_cases(scene: Scene, tally: Tally, document: dict[str, Any], seconds: float) -> None:
    import schemathesis
    from schemathesis.core.result import Ok
    from schemathesis.generation import GenerationMode

    schema = schemathesis.openapi.from_dict(document)
    found = [each for each in schema.get_all_operations() if isinstance(each, Ok)]
    operations: Iterable[Any] = [each.ok() for each in found]
    operations = sorted(operations, key=lambda o: (o.path, o.method))
    modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
    pairs = [(operation, mode) for operation in operations for mode in modes]
    session, ends = requests.Session(), time.monotonic() + seconds
    for number, (operation, mode) in enumerate(pairs):
        # What one leaves of its share goes to those after it.
        share = (ends - time.monotonic()) / (len(pairs) - number)

        def send(case: Any, name: str = f"{operation.method.upper()} {operation.path}") -> None:
            case = _tamed(case, scene.plan.model, tally.statuses.total())
            kwargs = case.as_transport_kwargs(base_url=scene.url)
            kwargs["headers"] = {**(kwargs.get("headers") or {}), **scene.headers()}
            _send_one(session, tally, name, kwargs)

        with suppress(schemathesis.errors.SchemathesisError, UnicodeError):
            _draw(operation.as_strategy(mode), time.monotonic() + share, scene.plan.seed, send)
    tally.notes.append(f"{tally.statuses.total()} cases of {len(operations)} operations")


def _send_one(session: requests.Session, tally: Tally, name: str, kwargs: dict[str, Any]) -> None:
    try:
        try:
            answer = session.request(**kwargs, timeout=_ANSWER_S, allow_redirects=False)
        except requests.ConnectionError:
            # A kept connection may have been closed just then; a new one may not.
            answer = requests.request(**kwargs, timeout=_ANSWER_S, allow_redirects=False)
    except requests.Timeout:
        tally.saw("timeout")
    except requests.ConnectionError as error:
        tally.saw("closed")
        tally.expect(False, f"{name}: {str(error)[:_TOLD]} to {_shown(kwargs)}")
    except (requests.RequestException, ValueError):
        return  # The client library itself sends no such thing.
    else:
        tally.saw(answer.status_code)
        said = f"{name}: {answer.status_code} {answer.text[:_TOLD]}"
        tally.expect(
            answer.status_code < 500 or str(answer.status_code) in bounds.MAY_ANSWER_5XX,
            f"{said} to {_shown(kwargs)}",
        )


def _shown(kwargs: dict[str, Any]) -> str:
    sent = {k: kwargs[k] for k in ("json", "data", "params") if kwargs.get(k)}
    return repr(sent)[: 3 * _TOLD]


async def _described(scene: Scene, tally: Tally, seconds: float) -> None:
    async with scene.session() as session, session.get("/openapi.json") as response:
        text = await response.text()
        if response.status != 200:
            tally.broken.append(f"/openapi.json: {response.status} with a key")
            return
    await asyncio.to_thread(_send_cases, scene, tally, json.loads(text), seconds)


@attack(
    "schema-cases",
    "schemathesis: requests by the API's description, right and wrong",
    limit_s=150,
    busy=True,
)
async def schema_cases(scene: Scene, tally: Tally) -> None:
    await _described(scene, tally, 75.0)


@attack("schema-few", "the same for ten seconds", limit_s=60, short=True, busy=True)
async def schema_few(scene: Scene, tally: Tally) -> None:
    await _described(scene, tally, 10.0)


# ---------------------------------------------------------------- by bytes

_METHODS = st.sampled_from(
    [b"GET", b"POST", b"PUT", b"OPTIONS", b"HEAD", b"get", b"", b"P\0ST", b"A" * 300]
)
_TARGETS = st.one_of(
    st.sampled_from([
        b"/", b"*", b"/v1/completions", b"/v1/chat/completions", b"/health", b"//", b"/../..",
        b"/v1/models?%ff=%", b"/%00", b"http://x/v1/models", b"/v1/responses/%2e%2e%2f",
        b"/tandem/requests/%ff", b"/" + b"a" * 9000,
    ]),
    st.binary(max_size=40),
)  # fmt: skip
_VERSIONS = st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/1.", b"", b"http/1.1"])
_HEADERS = st.one_of(
    st.tuples(st.binary(max_size=20), st.binary(max_size=40)),
    st.sampled_from([
        (b"Content-Length", b"0"), (b"Content-Length", b"5"), (b"Content-Length", b"99999999999"),
        (b"Content-Length", b"-1"), (b"Content-Length", b"+5"), (b"Content-Length", b"5, 5"),
        (b"Transfer-Encoding", b"chunked"), (b"Transfer-Encoding", b"gzip, chunked"),
        (b"Transfer-Encoding", b"xchunked"), (b"Expect", b"100-continue"),
        (b"Connection", b"close"), (b"Connection", b"Upgrade"), (b"Upgrade", b"websocket"),
        (b"Upgrade", b"h2c"), (b"Content-Type", b"application/json"),
        (b"Content-Type", b"multipart/form-data; boundary=x"), (b"Content-Type", b"\xff"),
        (b"X-Request-Id", b"\xe9\xff"), (b"X-Tandem-Tenant", b"\0"), (b"X-Tandem-TTFT-S", b"nan"),
        (b"Host", b""), (b"Host", b"a\0b"), (b" Folded", b"a\r\n b"),
    ]),
)  # fmt: skip
_CHUNKS = st.lists(
    st.tuples(
        st.sampled_from([None, b"0", b"-1", b"ffffffffffffffff", b"5;x=y", b"g", b"", b"00000005"]),
        st.binary(max_size=30),
    ),
    max_size=4,
)
_BODIES = st.one_of(
    st.binary(max_size=60),
    st.sampled_from([
        b"{}", b"[]", b"null", b'{"model":"m"', b'{"prompt":"\\ud800"}', b"\xff\xfe{\0}\0",
        b'{"messages":[{"role":"user","content":null}]}', b'{"prompt":"a","n":1e400}',
    ]),
    _CHUNKS.map(lambda chunks: b"".join(
        (size if size is not None else b"%x" % len(data)) + b"\r\n" + data + b"\r\n"
        for size, data in chunks
    ) + b"0\r\n\r\n"),
)  # fmt: skip


@st.composite
def _requests(draw: st.DrawFn) -> bytes:
    line = b" ".join((draw(_METHODS), draw(_TARGETS), draw(_VERSIONS)))
    headers = [name + b": " + value for name, value in draw(st.lists(_HEADERS, max_size=6))]
    whole = b"\r\n".join([line, *headers, b"", b""]) + draw(_BODIES)
    if draw(st.integers(0, 3)) == 0:  # Bytes changed anywhere.
        at = draw(st.integers(0, len(whole)))
        whole = whole[:at] + draw(st.binary(max_size=8)) + whole[at + draw(st.integers(0, 8)) :]
    return whole * draw(st.sampled_from([1, 1, 1, 2]))


def _send_bytes(scene: Scene, tally: Tally, content: bytes) -> None:
    """Send it and close our half: it must be answered or closed, and not with a 5xx."""
    where = urlsplit(scene.url)
    with socket.create_connection((where.hostname or "", where.port or 0), _ANSWER_S) as connection:
        try:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(4096)
        except TimeoutError:
            tally.saw("silence")
            tally.expect(False, f"neither answered nor closed: {content[:_TOLD]!r}")
            return
        except OSError:
            tally.saw("closed")
            return
    status = answer[9:12].decode(errors="replace") if answer.startswith(b"HTTP/") else "closed"
    tally.saw(status)
    fine = status == "closed" or status < "500" or status in ("501", "503", "505")
    tally.expect(fine, f"{status} to {content[:_TOLD]!r}")


async def _bytes(scene: Scene, tally: Tally, seconds: float) -> None:
    def send(content: bytes) -> None:
        _send_bytes(scene, tally, content)

    until = time.monotonic() + seconds
    await asyncio.to_thread(_draw, _requests(), until, scene.plan.seed, send)


@attack(
    "http-bytes",
    "hypothesis: request lines, headers and chunks that are wrong",
    limit_s=90,
    busy=True,
)
async def http_bytes(scene: Scene, tally: Tally) -> None:
    await _bytes(scene, tally, 20.0)


@attack("http-bytes-few", "the same for four seconds", limit_s=60, short=True, busy=True)
async def http_bytes_few(scene: Scene, tally: Tally) -> None:
    await _bytes(scene, tally, 4.0)
