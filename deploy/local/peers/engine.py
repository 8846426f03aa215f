"""A simulated engine as vLLM's KV connectors show it to an HTTP router.

A prefill answers with `kv_transfer_params`, under which its blocks are kept; the decode that comes
with them waits for the simulated pull, and then tells the prefill engine to let go, by a datagram
where vLLM's connector sends a notification.
"""

from __future__ import annotations

import asyncio
import socket
from base64 import b64decode, b64encode
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, Final

from workers.api import Delta, Finish, Generate, Phase
from workers.engines.sim import SimEngine

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

    from workers.api import Load
    from workers.engines.base import CacheChange
    from workers.engines.sim_settings import SimSettings

_LAST: Final = frozenset({Finish.STOP, Finish.LENGTH, Finish.ABORT, Finish.PREFILLED})


class EngineFailed(Exception):
    """The engine's own words."""


@dataclass(slots=True)
class Asked:
    """What a router asks of one engine for one request."""

    phase: Phase
    ticket: bytes | None = None
    remote: tuple[str, int] | None = None
    """Where the prefill engine is told that it may let go."""
    remote_cached: int | None = None
    """Prompt tokens that the prefill engine found in its cache."""


@dataclass(slots=True)
class Piece:
    """Tokens of one step; the last piece of a prefill has `kv_transfer_params`."""

    tokens: int
    last: bool
    cached_tokens: int | None = None
    kv_transfer_params: dict[str, Any] | None = None


def read_params(params: Mapping[str, Any] | None) -> Asked:
    """Of a request: `do_remote_decode` for a prefill, a prefill's own answer for a decode."""
    if params and params.get("do_remote_decode"):
        return Asked(Phase.PREFILL)
    if params and params.get("do_remote_prefill") and params.get("ticket"):
        return Asked(
            Phase.DECODE,
            b64decode(params["ticket"]),
            (params["remote_host"], params["remote_port"]),
            params.get("remote_prefill_cached_tokens"),
        )
    return Asked(Phase.BOTH)


def written_params(
    ticket: bytes, where: tuple[str, int], blocks: int, cached: int | None
) -> dict[str, Any]:
    """As large as NixlConnector's: it names every block."""
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": list(range(blocks)),
        "remote_engine_id": "sim",
        "remote_host": where[0],
        "remote_port": where[1],
        "tp_size": 1,
        "remote_prefill_cached_tokens": cached,
        "ticket": b64encode(ticket).decode(),
    }


@dataclass(slots=True)
class _Listener(asyncio.DatagramProtocol):
    engine: SimEngine

    def datagram_received(self, data: bytes, addr: object) -> None:
        self.engine.release([data])


@dataclass(slots=True)
class PeerEngine:
    """Runs on the event loop on which it was started."""

    settings: SimSettings
    on_changes: Callable[[list[CacheChange]], None] | None = None
    """Is told what the prefix cache stored and removed, step by step."""
    _queues: dict[str, asyncio.Queue[Delta]] = field(default_factory=dict)
    _engine: SimEngine | None = None
    _socket: socket.socket | None = None
    _transport: asyncio.DatagramTransport | None = None
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _numbers: count[int] = field(default_factory=count)

    async def start(self, epoch: str) -> None:
        self._engine = SimEngine(self.settings, epoch)
        await self._engine.start()
        self._tasks.append(asyncio.create_task(self._engine.run(self._on_step)))
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.setblocking(False)
        engine = self._engine
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(
            lambda: _Listener(engine), sock=self._socket
        )

    async def generate(
        self, prompt: Sequence[int], max_tokens: int, params: Mapping[str, Any] | None
    ) -> AsyncGenerator[Piece, None]:
        """Raises `EngineFailed`."""
        assert self._engine is not None
        asked = read_params(params)
        request_id = f"r{next(self._numbers)}"
        queue = self._queues[request_id] = asyncio.Queue()
        ended = False
        self._engine.submit(
            Generate(request_id, asked.phase, list(prompt), max_tokens, b"", asked.ticket)
        )
        try:
            while not ended:
                delta = await queue.get()
                if delta.finish is not None and delta.finish not in _LAST:
                    ended = True
                    raise EngineFailed(delta.error or f"{delta.finish}")
                ended = delta.finish is not None
                yield self._piece(asked, delta, len(prompt))
        finally:
            del self._queues[request_id]
            if not ended:
                self._engine.abort([request_id])

    def leases_open(self) -> int:
        """Finished prefills whose blocks are still kept."""
        assert self._engine is not None
        return self._engine.load().leases_open

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._transport is not None:
            self._transport.close()

    def _piece(self, asked: Asked, delta: Delta, prompt_tokens: int) -> Piece:
        if delta.ticket is not None:
            assert self._socket is not None
            blocks = -(-prompt_tokens // self.settings.block_tokens)
            where = self._socket.getsockname()
            written = written_params(delta.ticket, where, blocks, delta.cached_tokens)
            # vLLM's router asks for one token, which nobody reads.
            return Piece(1, True, delta.cached_tokens, written)
        cached = delta.cached_tokens
        if cached is not None and asked.ticket is not None:
            assert asked.remote is not None
            assert self._socket is not None
            self._socket.sendto(asked.ticket, asked.remote)
            cached = max(cached, asked.remote_cached or 0)
        return Piece(len(delta.token_ids), delta.finish is not None, cached)

    def _on_step(self, load: Load, deltas: list[Delta]) -> None:
        assert self._engine is not None
        if self.on_changes is not None and (changes := self._engine.cache_changes()):
            self.on_changes(changes)
        for delta in deltas:
            if (queue := self._queues.get(delta.request_id)) is not None:
                queue.put_nowait(delta)
