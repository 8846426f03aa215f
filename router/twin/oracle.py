"""Placement by the production estimate, told the truth where production has to learn or to expect.

It sees what no router can: how long each output will be, what each engine holds at this moment, and
the rates that its steps really have. What it does with that is what production does, so what it is
better by is what knowing is worth. It is no bound on what another rule could do.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from router.core.fleet import WorkerView
from router.core.placement import EstimatePolicy
from router.core.rates import Rates
from workers.api import Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from router.core.placement import Placement, Prompt
    from router.twin.policies import Asked
    from router.twin.run import Twin
    from router.twin.worker import SimWorker
    from workers.engines.sim_settings import SimSettings


class Oracle:
    """Of one run."""

    def __init__(self, twin: Twin, asked: Asked, prefill_s: float) -> None:
        self._twin = twin
        self._asked = asked
        self._estimate = EstimatePolicy(prefill_s=prefill_s)
        self._rates = {w.worker_id: true_rates(w.plan.settings) for w in twin.workers.values()}

    def place(
        self, prompt: Prompt, workers: Sequence[WorkerView], avoid: frozenset[str] = frozenset()
    ) -> Placement:
        known = replace(prompt, output_tokens_expected=self._asked(prompt).output_tokens)
        return self._estimate.place(known, [self._true(w) for w in workers], avoid)

    def _true(self, view: WorkerView) -> WorkerView:
        worker = self._twin.workers[view.id]
        load = worker.model.load(self._twin.now)
        rates = self._rates[view.id]
        if load.step is not None and load.step.decodes:
            rates.context_tokens = load.step.context_tokens / load.step.decodes
        unheard = {r: p for r, p in view.unheard.items() if p[0] > worker.heard}
        seen = WorkerView(view.hello, load, view.heard_at, view.stepped_at, rates, view.sent)
        for request_id, (_, tokens) in unheard.items():
            seen.place(request_id, tokens)
        for request_id in view.promised:
            seen.promise(request_id, self._blocks_to_come(worker, request_id))
        return seen

    def _blocks_to_come(self, worker: SimWorker, request_id: str) -> int:
        """That this request is yet to take there."""
        request = self._twin.request(request_id.partition("/")[0])  # Behind it is the try.
        settings = worker.plan.settings
        size, most = settings.block_tokens, settings.max_model_len
        tokens = min(request.input_tokens + request.output_tokens, most)
        run = worker.model.requests.get(request_id)
        held = len(run.shared) + run.fresh if run else 0
        return max(0, -(-tokens // size) - held)


def true_rates(s: SimSettings) -> Rates:
    """What `Rates` would learn of steps that are as full of prompt as they can be."""
    chunk = s.chunk_tokens
    rates = Rates()
    rates.stepped(Step(s.step_s, prefill_tokens=chunk), prefill_left=True)
    rates.step.rates = [
        s.step_s,
        1 / s.prefill_tokens_per_s,
        s.pair_s,
        s.stream_s,
        s.context_token_s,
    ]
    rates.pull.rates = [s.pull_latency_s, 1 / s.pull_bytes_per_s]
    return rates
