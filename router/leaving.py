"""How a router ends: readiness first, then it takes no more requests, and then its streams end."""

from __future__ import annotations

import asyncio
import logging
from math import ceil
from typing import TYPE_CHECKING

import uvicorn

from router.connection import ConnectionLimits, bounded

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)


class Departure:
    """Whether it has begun. Until it has, nothing here does anything."""

    def __init__(self) -> None:
        self.begun = False

    def wrap(self, app: ASGIApp) -> ASGIApp:
        """The application that, from then on, ends each connection with its answer.

        A client that keeps its connections would else send its next request into a closing one.
        """

        async def leaving(scope: Scope, receive: Receive, send: Send) -> None:
            async def last(message: Message) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
                await send(message)

            await app(scope, receive, last if self.begun and scope["type"] == "http" else send)

        return leaving


class LeavingServer(uvicorn.Server):
    """Serves until it is told to leave."""

    def __init__(
        self,
        app: ASGIApp,
        departure: Departure,
        drain_s: float,
        limits: ConnectionLimits | None = None,
    ) -> None:
        """`drain_s`: what streams when it takes no more requests may take so long to end."""
        super().__init__(
            uvicorn.Config(
                departure.wrap(app),
                http=bounded(limits or ConnectionLimits()),
                ws="none",
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=ceil(drain_s),
            )
        )
        self._departure = departure

    def leave(self, notice_s: float) -> None:
        """Not ready from now on, but serving so long that balancers notice it; then streams end.

        The second time: at once.
        """
        if self._departure.begun:
            self.force_exit = self.should_exit = True
            return
        self._departure.begun = True
        log.info("leaving", extra={"notice_s": notice_s})
        asyncio.get_running_loop().call_later(notice_s, self._stop)

    def _stop(self) -> None:
        self.should_exit = True
