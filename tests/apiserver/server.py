"""The store over real HTTP on this machine, with faults on demand."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.apiserver.store import (
    ADAPTERS,
    LEASES,
    SLICES,
    Object,
    Refusal,
    Resource,
    Store,
    Watcher,
    forbidden,
    line,
    scale_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

MERGE_PATCH = "application/merge-patch+json"
_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
_PHRASES = {200: "OK", 201: "Created"}


class Written(NamedTuple):
    method: str
    path: str
    body: Object | None
    token: str
    """Of whoever sent it."""


class ApiServer:
    """As an asynchronous context manager it listens inside."""

    def __init__(
        self, store: Store | None = None, *, bookmark_s: float = 60.0, host: str = "127.0.0.1"
    ) -> None:
        self.store = store or Store()
        self.url = ""
        self.asked: list[tuple[float, str, dict[str, str]]] = []
        """Time on the loop's clock, path and query of every request."""
        self.written: list[Written] = []
        """Every request that is no GET, carried out or not."""
        self.forbidden: set[tuple[str, str]] = set()
        """Verb and resource, as in a Role's rules, that nobody has a right to."""
        self.refusal: tuple[Refusal, dict[str, str]] | None = None
        """What everybody gets instead of an answer, and headers to it."""
        self.tokens: set[str] | None = None
        """Those that are good; None: nobody needs one."""
        self.hangs = False
        """Requests get no answer at all."""
        self.snapshots = "sent"
        """`refused` or `ignored` by a server without WatchList."""
        self.expiry_is_an_event = True
        self.watches: set[Watch] = set()
        self._bookmark_s = bookmark_s
        self._host = host
        self._port = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.store.listeners.append(self._wake)

    async def __aenter__(self) -> ApiServer:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """At the port that it had before, if any."""
        self._server = await asyncio.start_server(self._connected, self._host, self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://{self._host}:{self._port}"

    async def stop(self) -> None:
        """All connections break."""
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ------------------------------------------------------------ what goes wrong in a watch

    def mute(self) -> None:
        """The connections stay, and nothing comes over them any more: half open."""
        for watch in self.watches:
            watch.mute = True

    def end(self) -> None:
        for watch in self.watches:
            watch.over = True
            watch.wake.set()

    def cut(self) -> None:
        """In the middle of a line."""
        for watch in self.watches:
            watch.writer.write(b"20\r\n" + b'{"type":"MODIFI')
            watch.writer.transport.abort()

    def say(self, data: bytes) -> None:
        for watch in self.watches:
            watch.last_words = data
            watch.wake.set()

    def expire(self) -> None:
        """Every watch ends with an ERROR event."""
        self.store.compact()
        gone = Refusal(410, "Expired", "too old resource version: 1 (2)")
        self.say(line("ERROR", gone.body))

    def _wake(self) -> None:
        for watch in self.watches:
            watch.wake.set()

    # ------------------------------------------------------------ requests

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._serve(reader, writer)
        finally:
            self._tasks.discard(task)
            writer.transport.abort() if task.cancelling() else writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ")
        headers = {k.lower(): v for k, _, v in (h.partition(": ") for h in head[1:])}
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        address = urlsplit(target)
        query = dict(parse_qsl(address.query))
        self.asked.append((asyncio.get_running_loop().time(), address.path, query))
        if self.hangs:
            await reader.read()
            return
        try:
            self._admit(headers)
            body = json.loads(content) if content else None
            if method != "GET":
                self.written.append(Written(method, address.path, body, _token(headers)))
            if method == "PATCH" and headers.get("content-type") != MERGE_PATCH:
                raise Refusal(415, "UnsupportedMediaType", "the body of the request was unknown")
            answer = self._answer(method, unquote(address.path), query, body)
        except Refusal as refusal:
            extra = self.refusal[1] if self.refusal and self.refusal[0] is refusal else {}
            _write(writer, refusal.code, refusal.body, extra)
        else:
            if isinstance(answer, Watcher):
                await self._stream(reader, writer, answer, query)
            else:
                _write(writer, *answer)
        with suppress(ConnectionError):
            await writer.drain()

    def _admit(self, headers: dict[str, str]) -> None:
        if self.refusal:
            raise self.refusal[0]
        if self.tokens is not None and _token(headers) not in self.tokens:
            raise Refusal(401, "Unauthorized", "Unauthorized")

    def _answer(
        self, method: str, path: str, query: dict[str, str], body: Object | None
    ) -> tuple[int, Object] | Watcher:
        match path.strip("/").split("/"):
            case ["apis", group, version, "namespaces", namespace, plural, *name]:
                asked = group, version, plural
                all_of_them = (SLICES, LEASES, ADAPTERS)
                found = [r for r in all_of_them if (r.group, r.version, r.plural) == asked]
            case _:
                found, namespace, name = [], "", []
        if not found or (len(name) > 1 and name[1] not in found[0].subresources):
            raise Refusal(404, "NotFound", "the server could not find the requested resource")
        resource = found[0]
        watches = method == "GET" and query.get("watch") in ("1", "true")
        self._allow(method, watches, resource, namespace, name)
        if watches:
            return self._watch(resource, namespace, query)
        match method, name, body:
            case "GET", [], _:
                return 200, self.store.page(resource, namespace, query)
            case "GET", [one], _:
                return 200, self.store.get(resource, namespace, one)
            case "GET", [one, "scale"], _:
                return 200, scale_of(self.store.get(resource, namespace, one))
            case "POST", [], dict():
                return 201, self.store.create(resource, namespace, body)
            case "PUT", [_], dict():
                return 200, self.store.replace(resource, namespace, body)
            case "PATCH", [one], dict():
                return 200, self.store.patch(resource, namespace, one, body)
            case "PATCH", [one, part], dict():
                # A subresource changes its own part of the object, whatever else it is sent.
                own = {"scale": ("metadata", "spec"), "status": ("metadata", "status")}[part]
                change = {key: body[key] for key in own if key in body}
                after = self.store.patch(resource, namespace, one, change)
                return 200, scale_of(after) if part == "scale" else after
            case "DELETE", [one], _:
                self.store.delete(resource, namespace, one)
                return 200, {"kind": "Status", "apiVersion": "v1", "status": "Success"}
        raise Refusal(405, "MethodNotAllowed", "the server does not allow this method")

    def _allow(
        self, method: str, watches: bool, resource: Resource, namespace: str, name: list[str]
    ) -> None:
        verb = _VERBS.get(method) or ("watch" if watches else "get" if name else "list")
        one, sub = name[0] if name else "", "".join(name[1:])
        if (verb, "/".join(filter(None, (resource.plural, sub)))) in self.forbidden:
            raise forbidden(verb, resource, namespace, one, sub)

    def _watch(self, resource: Resource, namespace: str, query: dict[str, str]) -> Watcher:
        if "sendInitialEvents" in query and self.snapshots == "refused":
            raise Refusal(422, "Invalid", "sendInitialEvents is forbidden")
        if self.snapshots == "ignored":
            query = {k: v for k, v in query.items() if k != "sendInitialEvents"}
        try:
            return Watcher(self.store, resource, namespace, query)
        except Refusal as refusal:
            if not self.expiry_is_an_event:
                raise
            return _Expired(line("ERROR", refusal.body))

    async def _stream(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        watcher: Watcher,
        query: dict[str, str],
    ) -> None:
        head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
        writer.write(f"{head}\r\n".encode())
        watch = Watch(writer)
        self.watches.add(watch)
        try:
            async with asyncio.timeout(float(query.get("timeoutSeconds", 300))):
                async with asyncio.TaskGroup() as tasks:
                    telling = tasks.create_task(self._tell(watch, watcher))
                    leaving = tasks.create_task(reader.read())
                    leaving.add_done_callback(lambda _: telling.cancel())
                    telling.add_done_callback(lambda _: leaving.cancel())
        except TimeoutError:
            pass
        finally:
            self.watches.discard(watch)
        _chunks(writer, [b""])

    async def _tell(self, watch: Watch, watcher: Watcher) -> None:
        loop = asyncio.get_running_loop()
        bookmark = loop.call_later(self._bookmark_s, partial(self._mark, watch))
        try:
            while True:
                if not watch.mute:
                    _chunks(watch.writer, watcher.lines())
                    if watch.marked:
                        watch.marked = False
                        _chunks(watch.writer, [watcher.bookmark()])
                        bookmark = loop.call_later(self._bookmark_s, partial(self._mark, watch))
                    if watch.last_words:
                        _chunks(watch.writer, [watch.last_words])
                    if watch.over or watch.last_words or isinstance(watcher, _Expired):
                        return
                await watch.wake.wait()
                watch.wake.clear()
        finally:
            bookmark.cancel()

    def _mark(self, watch: Watch) -> None:
        watch.marked = True
        watch.wake.set()


class Watch:
    """One watch's connection."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.wake = asyncio.Event()
        self.mute = self.over = self.marked = False
        self.last_words = b""


class _Expired(Watcher):
    """A watch that only says that it can't be."""

    def __init__(self, said: bytes) -> None:
        self._said = [said]

    def lines(self) -> list[bytes]:
        said, self._said = self._said, []
        return said


def _token(headers: dict[str, str]) -> str:
    return headers.get("authorization", "").removeprefix("Bearer ")


def _write(
    writer: asyncio.StreamWriter, code: int, body: Any, headers: dict[str, str] | None = None
) -> None:
    content = json.dumps(body).encode()
    lines = [
        f"HTTP/1.1 {code} {_PHRASES.get(code, 'Refused')}",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        "Connection: close",
        *(f"{k}: {v}" for k, v in (headers or {}).items()),
    ]
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + content)


def _chunks(writer: asyncio.StreamWriter, parts: Iterable[bytes]) -> None:
    for part in parts:
        writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
