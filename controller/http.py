"""A controller's HTTP side: is it alive, is it ready, what it counts, what it decided."""

from __future__ import annotations

import asyncio
from math import inf
from typing import TYPE_CHECKING

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from controller.leader import clock
from controller.observe import Bounds
from controller.records import RECORDS_MAX
from workers.serving import SmallServer, probe

if TYPE_CHECKING:
    from starlette.requests import Request

    from controller.leader import Leadership
    from controller.loop import Loop


class HttpSide(SmallServer):
    """Bound at once; it answers while it runs."""

    def __init__(self, host: str, port: int, loop: Loop, leadership: Leadership) -> None:
        """Bind. Raises OSError when the address is taken."""
        routes = [
            Route("/livez", self._livez),
            Route("/readyz", self._readyz),
            Route("/metrics", self._scrape),
            Route("/decisions", self._decisions),
        ]
        super().__init__(host, port, routes)
        self._loop = loop
        self._leadership = leadership
        self._began_at = clock()

    async def _livez(self, _: Request) -> Response:
        """Both loops move, whatever comes of it: an API server that is away is no reason to die."""
        now, terms = asyncio.get_running_loop().time(), self._leadership.terms
        limit_s = 3 * self._loop.look_s + 2 * Bounds().look_s
        looked_s = min(now - self._loop.ended_at, clock() - self._began_at)
        if looked_s > limit_s:
            return probe(f"no look ended for {looked_s:.0f} s")
        stepped_s = clock() - self._leadership.stepped_at
        # The longest Retry-After that is kept, and more. A dry run has no election.
        if stepped_s > 60 + 2 * terms.duration_s and not self._loop.dry_run:
            return probe(f"the election stands still for {stepped_s:.0f} s")
        return probe(None)

    async def _readyz(self, _: Request) -> Response:
        """It has seen the whole group once."""
        if self._loop.looked_at is not None:
            return probe(None)
        last = self._loop.records.last
        return probe(last.reason if last else "it has not looked yet")

    async def _scrape(self, _: Request) -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    async def _decisions(self, request: Request) -> Response:
        """`n` of them at most, of the last `since_s` seconds."""
        try:
            most = int(request.query_params.get("n", RECORDS_MAX))
            since_s = float(request.query_params.get("since_s", inf))
        except ValueError:
            return PlainTextResponse("n and since_s are numbers", 400)
        now = asyncio.get_running_loop().time()
        content = {
            "dry_run": self._loop.dry_run,
            "leads": self._leadership.leads,
            "holder": self._leadership.holder,
            "decisions": self._loop.records.since(now - since_s, max(0, most)),
        }
        return Response(msgspec.json.encode(content), media_type="application/json")
