"""A worker's HTTP side: is it alive, is it ready, what has it counted."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

if TYPE_CHECKING:
    from starlette.requests import Request

    from workers.metrics import Metrics
    from workers.server import Worker


class HttpSide:
    """Bound at once, so that probes and address files work while the engine loads."""

    def __init__(self, host: str, port: int, worker: Worker, metrics: Metrics) -> None:
        """Bind. Raises OSError when the address is taken."""
        self._socket = socket.create_server((host, port))
        self.address = f"http://{host}:{self._socket.getsockname()[1]}"
        self._worker = worker
        self._metrics = metrics
        app = Starlette(
            routes=[
                Route("/livez", self._livez),
                Route("/readyz", self._readyz),
                Route("/metrics", self._scrape),
            ]
        )
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))

    async def run(self) -> None:
        # Not `serve`, which takes the signals: the process's own decide when everything ends.
        await self._server._serve([self._socket])

    async def _livez(self, _: Request) -> Response:
        return _probe(self._worker.live)

    async def _readyz(self, _: Request) -> Response:
        return _probe(self._worker.ready)

    async def _scrape(self, _: Request) -> Response:
        if self._worker.ready != "the engine is loading":
            self._metrics.set_load(self._worker.load)
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _probe(trouble: str | None) -> Response:
    return PlainTextResponse(trouble or "ok", status_code=503 if trouble else 200)
