"""An election's shell: it sends its requests over HTTP, and knows whether we lead just now."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from controller.api import NoAnswer, ask
from controller.core import lease

if TYPE_CHECKING:
    from controller.access import Access
    from controller.core.lease import Request, State, Terms

log = logging.getLogger(__name__)

_BY_STATUS: Final = {401: "unauthorized", 403: "forbidden", 409: "conflict", 429: "throttled"}


def clock() -> float:
    """Seconds that go on while the machine sleeps, where it can tell; no wall clock."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Leadership:
    """One contender. `run` it, and `leave` when that is over."""

    def __init__(self, terms: Terms, access: Access) -> None:
        self.failures: Counter[str] = Counter()
        """By reason: requests for the Lease that came to nothing."""
        self.stepped_at = clock()
        """When it last did anything: it does every few seconds."""
        self._election = lease.Election(terms, random.uniform)
        self._access = access
        self._state: State = lease.State()
        self._led = False
        self._told: str | None = None

    @property
    def terms(self) -> Terms:
        return self._election.terms

    @property
    def leads(self) -> bool:
        """Now, by our own clock."""
        return self._state.leads(clock())

    @property
    def left_s(self) -> float:
        """For how long we lead yet if nothing more is heard; 0 if we do not."""
        return max(0.0, self._state.lead_until - clock())

    @property
    def holder(self) -> str:
        """Who holds the Lease as far as is known."""
        return self._state.seen.holder if self._state.seen else ""

    async def run(self) -> None:
        """Until cancelled."""
        while not self._state.done:
            await asyncio.sleep(max(0.0, self._state.next_at - clock()))
            await self._go_on()

    async def leave(self) -> None:
        """Lead no more, and give the Lease away if that can be done soon; `run` is over by now."""
        if self._state.asked:
            self._step(lease.NoAnswer("we leave"))
        self._step(lease.Leave())
        try:
            async with asyncio.timeout(self.terms.answer_s + self.terms.retry_s):
                await self.run()
        except TimeoutError:
            log.warning("the Lease was not given away", extra={"reason": self._state.trouble})

    async def _go_on(self) -> None:
        request = self._step(lease.Due(_wall()))
        if request is None:
            return
        within_s = self._state.give_up_at - clock()
        content = ("application/json", request.body) if request.body else None
        try:
            answer = await ask(
                self._access, request.method, request.path, content, within_s=within_s
            )
        except NoAnswer as error:
            self.failures[error.kind] += 1
            self._step(lease.NoAnswer(f"{error.kind}: {error}"))
            return
        looked_in_vain = answer.status == 404 and request.method == "GET"
        if answer.status >= 300 and not looked_in_vain:
            self.failures[_BY_STATUS.get(answer.status, "refused")] += 1
        self._step(lease.Answered(answer.status, answer.body, answer.retry_after_s))

    def _step(self, event: lease.Event) -> Request | None:
        self.stepped_at = now = clock()
        self._state, request = self._election.step(self._state, event, now)
        leads, trouble = self._state.leads(now), self._state.trouble
        facts = {"lease": self.terms.name, "holder": self.holder}
        if leads != self._led:
            log.info("leads" if leads else "leads no more", extra=facts | {"reason": trouble})
        elif trouble and self._told is None:
            log.warning("no word of the Lease", extra=facts | {"reason": trouble})
        self._led, self._told = leads, trouble
        return request


def _wall() -> str:
    """For people: nobody compares it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
