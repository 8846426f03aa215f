"""A worker's HTTP side: is it alive, is it ready, what has it counted, and may it go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from workers.serving import SmallServer, probe

if TYPE_CHECKING:
    from starlette.requests import Request

    from workers.drain import Drain
    from workers.metrics import Metrics
    from workers.server import Worker


class HttpSide(SmallServer):
    """Bound at once, so that probes and address files work while the engine loads."""

    def __init__(
        self, host: str, port: int, worker: Worker, metrics: Metrics, drain: Drain
    ) -> None:
        """Bind. Raises OSError when the address is taken."""
        routes = [
            Route("/livez", self._livez),
            Route("/readyz", self._readyz),
            Route("/metrics", self._scrape),
            # GET too: a pod's hook can do nothing else.
            Route("/drain", self._begin_drain, methods=["GET", "POST"]),
            Route("/drain", self._take_back, methods=["DELETE"]),
        ]
        super().__init__(host, port, routes)
        self._worker = worker
        self._metrics = metrics
        self._drain = drain

    async def _livez(self, _: Request) -> Response:
        return probe(self._worker.live)

    async def _readyz(self, _: Request) -> Response:
        return probe(self._worker.ready)

    async def _begin_drain(self, _: Request) -> Response:
        left = await self._drain.ask()
        return PlainTextResponse(left or "drained", status_code=503 if left else 200)

    async def _take_back(self, _: Request) -> Response:
        if self._drain.take_back():
            return PlainTextResponse("ok")
        return PlainTextResponse("the process is about to end", status_code=409)

    async def _scrape(self, _: Request) -> Response:
        if not self._worker.loading:
            self._metrics.set_load(self._worker.load)
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)
