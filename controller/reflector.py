"""A session's shell: it sends its requests over HTTP and tells it what came of them."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import TYPE_CHECKING, Final

import httpx

from controller.api import beginning, retry_after_s
from controller.core.peers import sightings
from controller.core.session import Failure, Session
from controller.core.slices import merge

if TYPE_CHECKING:
    from collections.abc import Mapping

    from controller.access import Access
    from controller.core.patience import Patience
    from controller.core.peers import RoleFacts
    from controller.sources import Observe

log = logging.getLogger(__name__)

SETTLE_S: Final = 0.02
"""What changes within that time is shown at once: a group that starts is a burst of events."""
_REFUSAL_MAX: Final = 1 << 16
"""Bytes of a refusal that are read."""


class Reflector:
    """Peers as the EndpointSlices that a label selector names have them."""

    def __init__(
        self,
        access: Access,
        selector: str,
        role_label: str,
        roles: Mapping[str, RoleFacts],
        patience: Patience | None = None,
    ) -> None:
        self.session = Session(selector, random.uniform, patience)
        self._access = access
        self._role_label = role_label
        self._roles = roles
        self._path = f"/apis/discovery.k8s.io/v1/namespaces/{access.namespace}/endpointslices"
        self._told: str | None = None
        self._showing: asyncio.TimerHandle | None = None

    @property
    def heard_at(self) -> float | None:
        """On the event loop's clock, when what it says was last known to be so."""
        return self.session.heard_at

    async def run(self, observe: Observe) -> None:
        """Until cancelled."""
        try:
            await self._go_on(observe)
        finally:
            if self._showing:
                self._showing.cancel()

    async def _go_on(self, observe: Observe) -> None:
        loop = asyncio.get_running_loop()
        while True:
            query = self.session.next(loop.time())
            if query is None:
                await asyncio.sleep(max(0.0, self.session.next_at - loop.time()))
                continue
            await self._ask(query, observe)
            self._tell()

    async def _ask(self, query: dict[str, str], observe: Observe) -> None:
        session, loop = self.session, asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(session.give_up_at) as patience:
                await self._exchange(query, patience, observe)
        except TimeoutError:
            failure, reason = Failure.SILENT, "nothing came in time"
        except (httpx.ConnectError, OSError) as error:
            failure, reason = Failure.UNREACHABLE, f"{type(error).__name__}: {error}"
        except httpx.HTTPError as error:
            failure, reason = Failure.BROKEN_OFF, f"{type(error).__name__}: {error}"
        else:
            return
        # What goes wrong while a connection is closed concerns nobody.
        if not session.done:
            session.failed(failure, reason, loop.time())

    async def _exchange(
        self, query: dict[str, str], patience: asyncio.Timeout, observe: Observe
    ) -> None:
        session, now = self.session, asyncio.get_running_loop().time
        async with (
            self._access.client() as client,
            client.stream("GET", self._path, params=query) as response,
        ):
            if response.status_code != 200:
                body = await beginning(response, _REFUSAL_MAX)
                session.refused(response.status_code, body, retry_after_s(response), now())
                return
            session.opened(now())
            patience.reschedule(session.give_up_at)
            async for chunk in response.aiter_bytes():
                if session.feed(chunk, now()):
                    self._show_soon(observe)
                if session.done:
                    return
                patience.reschedule(session.give_up_at)
            if session.ended(now()):
                self._show_soon(observe)

    def _show_soon(self, observe: Observe) -> None:
        if self._showing is None:
            loop = asyncio.get_running_loop()
            self._showing = loop.call_later(SETTLE_S, self._show, observe)

    def _show(self, observe: Observe) -> None:
        self._showing = None
        assert self.session.slices is not None
        observe(sightings(merge(self.session.slices.values(), self._role_label), self._roles))

    def _tell(self) -> None:
        """The log, of a trouble once and of its end."""
        trouble = self.session.trouble
        kind = trouble and trouble.partition(":")[0]
        if kind != self._told:
            if trouble:
                log.warning("the API server fails us", extra={"reason": trouble})
            else:
                log.info("the API server answers again")
        self._told = kind
