"""A process's own small HTTP server: bound at once, and no concern of its signals."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.routing import BaseRoute

ANSWERS_S: Final = 1
"""What is being answered when everything ends may take so long."""


class SmallServer:
    """It answers while it runs."""

    def __init__(self, host: str, port: int, routes: Sequence[BaseRoute]) -> None:
        """Bind; port 0 takes a free one. Raises OSError when the address is taken."""
        self._socket = socket.create_server((host, port))
        self.address = f"http://{host}:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(
            Starlette(routes=routes),
            log_level="warning",
            lifespan="off",
            access_log=False,
            timeout_graceful_shutdown=ANSWERS_S,
        )
        self._server = uvicorn.Server(config)

    async def run(self) -> None:
        # Not `serve`, which takes the signals: the process's own decide when everything ends.
        await self._server._serve([self._socket])

    def leave(self) -> None:
        """Let `run` end once what was asked is answered."""
        self._server.should_exit = True


def probe(trouble: str | None) -> Response:
    """Kubernetes' way to be told: 200, or 503 and why."""
    return PlainTextResponse(trouble or "ok", status_code=503 if trouble else 200)
