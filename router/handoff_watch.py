"""Tells the operator, in the log, of handoffs that don't work."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from router.core import lifecycle as life
from router.core.handoffs import Handoffs, Warned

if TYPE_CHECKING:
    from router.core.fleet import Fleet
    from router.live import Live
    from workers.api import Delta

log = logging.getLogger(__name__)


class HandoffWatch:
    """Between the dispatch, which sees workers and answers come, and `Handoffs`, which judges."""

    def __init__(self, fleet: Fleet) -> None:
        self.known = Handoffs(fleet)

    def changed(self) -> None:
        """Workers have joined or left."""
        for told in self.known.changed():
            _warn(told)

    def came(self, live: Live, worker_id: str, delta: Delta) -> None:
        """A worker's first delta says what became of the KV that another computed for it."""
        sender = life.sender(live.state)
        if sender is None or sender == worker_id:
            return
        if delta.kv_bytes or delta.kv_failed is not None:
            told = self.known.came(sender, worker_id, delta.kv_failed, live.progress_at)
            if told:
                _warn(told)


def _warn(told: Warned) -> None:
    log.warning(told.message, extra={"workers": told.workers, "reason": told.reason})
