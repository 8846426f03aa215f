"""Which requests have waited for too long for a worker's answer, and what may be done about it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from router.core import lifecycle as life
from router.core.errors import NoCapacity, NoWorkers
from router.core.fleet import DOUBT_S
from router.core.hedging import Hedges, stuck_s
from router.live import Live

if TYPE_CHECKING:
    from collections.abc import Callable

    from router.core.fleet import Fleet
    from router.core.limits import Limits
    from router.core.placement import Placement

log = logging.getLogger(__name__)


class Patience:
    """Between the requests that run and the workers that they wait for."""

    def __init__(self, fleet: Fleet, limits: Limits) -> None:
        self._fleet = fleet
        self.hedges = Hedges(limits)

    def stuck(self, live: Live, now: float) -> life.Stuck | None:
        """Whether its workers are to be asked no longer."""
        if not isinstance(live.state, life.Prefilling | life.Decoding):
            return None  # How long it may wait, the queue knows.
        waited_s = now - live.progress_at
        streams = not life.can_begin_anew(live.state)
        late = waited_s > stuck_s(live.estimated_s, streams=streams)
        return life.Stuck(waited_s) if late else None

    def slow(self, live: Live, now: float) -> str | None:
        """The worker whose answer is overdue. One that answers nobody is doubted from now on."""
        owes = life.awaited(live.state)
        view = self._fleet.get(owes) if owes else None
        if view is None:
            return None
        waited_s = now - live.progress_at
        overdue = waited_s > self.hedges.overdue_s(live.estimated_s)
        if overdue and not view.doubted and view.brought_at < live.progress_at:
            self._fleet.doubt(view.id, now)
        return view.id if overdue or (view.silent and waited_s > DOUBT_S) else None

    def second(self, live: Live, slow: str, place: Callable[[Live], Placement]) -> Live | None:
        """Another try at the same beside it, with its placement; None where it may have none.

        Where the client has the first token from the prefill worker, it begins after that.
        """
        state = live.state
        assert isinstance(state, life.Prefilling | life.Decoding)
        tries = state.tries.next(refused=False)
        if live.rival is not None or tries is None:
            return None
        if not self.hedges.may_begin:
            live.over_budget = live.over_budget or self.hedges.refused()
            return None
        relayed = state.relayed if isinstance(state, life.Decoding) else None
        ask = live.ask if relayed is None else live.ask.after(relayed)
        rival = Live(ask, life.Placing(tries), live.progress_at, entry=live.entry)
        rival.output_tokens = live.output_tokens
        try:
            rival.placement = place(rival)
        except (NoCapacity, NoWorkers):
            return None
        if slow in (rival.placement.prefill, rival.placement.decode):
            return None
        self.hedges.begun()
        live.rival, rival.rival = rival, live
        log.info("asked twice", extra={"request": ask.request_id, "slow": slow})
        return rival
