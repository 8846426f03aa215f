"""What a router tells sizing: who came, what it took, and whether it was in time."""

from __future__ import annotations

import pytest
from prometheus_client import REGISTRY

from router.ask import Ask
from router.core.errors import NoWorkers, QueueFull, RouterError, TenantOverRate
from router.core.limits import Limits
from router.dispatch import Dispatch
from router.metrics import DemandMetrics
from tests.unit.test_dispatch import APART, hello, load
from workers.api import Batch, Delta, Finish, KvSnapshot, KvStored, Load, Role, Step


class Router:
    """One worker of each role, on a clock of ours."""

    def __init__(self, limits: Limits | None = None, *, workers: bool = True) -> None:
        self.now = 0.0
        self.dispatch = Dispatch(
            lambda w, m: None, self, lambda: self.now, policy=APART, limits=limits
        )
        self.demand = self.dispatch.door.demand
        if workers:
            self.dispatch.on_hello(hello("p", Role.PREFILL))
            self.dispatch.on_hello(hello("d", Role.DECODE))

    def deliver(self, deltas: list[Delta], prompt_extras: dict[str, bytes]) -> None: ...

    def fail(self, request_id: str, error: RouterError) -> None: ...

    def ask(self, name: str, tokens: int = 8, **more: object) -> None:
        self.dispatch.submit(Ask(name, list(range(tokens)), 4, **more))  # type: ignore[arg-type]

    def serve(self, name: str, at: list[float], **first: object) -> None:
        """The prompt is computed by `p`, and a token comes at each time."""
        done = Delta(f"{name}/p", [], Finish.PREFILLED, ticket=b"t", cached_tokens=0)
        self.dispatch.on_batch("p", Batch(load(), [done]))
        for n, self.now in enumerate(at):
            told = Delta(name, [7], Finish.LENGTH if n == len(at) - 1 else None)
            if n == 0:
                told = Delta(name, [7], told.finish, cached_tokens=0, **first)  # type: ignore[arg-type]
            self.dispatch.on_batch("d", Batch(load(), [told]))

    @property
    def verdicts(self) -> tuple[int, int, int]:
        return self.demand.judged, self.demand.first_in_time, self.demand.met


SOON = Limits(ttft_s=100.0, itl_s=0.5)


def test_who_is_served_in_time_meets_both_objectives() -> None:
    r = Router(SOON)
    r.ask("r")
    assert r.verdicts == (0, 0, 0)
    r.serve("r", [50.0, 50.5, 51.0])
    assert (r.demand.requests, r.demand.uncached_tokens, r.demand.computed_tokens) == (1, 8, 8)
    assert r.verdicts == (1, 1, 1)


def test_which_half_was_late_is_told_apart() -> None:
    r = Router(SOON)
    r.ask("slow")
    r.serve("slow", [1.0, 1.9])
    assert r.verdicts == (1, 1, 0)
    r.ask("late")
    r.serve("late", [102.5, 102.6])
    assert r.verdicts == (2, 1, 0)


def test_a_requests_own_objective_is_what_it_is_judged_by() -> None:
    r = Router(SOON)
    r.ask("r", ttft_s=1000.0)
    r.serve("r", [500.0])
    assert r.verdicts == (1, 1, 1)


def test_what_a_cache_has_is_neither_asked_for_nor_computed() -> None:
    r = Router()
    prompt = list(range(64))
    stored = KvStored([0, 1], -1, prompt[:32])
    r.dispatch.on_snapshot("p", KvSnapshot(0, 0, True, [stored]))
    r.dispatch.submit(Ask("r", prompt, 4))
    assert r.demand.uncached_tokens == 32
    done = Delta("r/p", [], Finish.PREFILLED, ticket=b"t", cached_tokens=32)
    r.dispatch.on_batch("p", Batch(load(), [done]))
    r.dispatch.on_batch("d", Batch(load(), [Delta("r", [7], cached_tokens=0)]))
    assert r.demand.computed_tokens == 32


def test_who_is_refused_came_too_and_was_not_served_in_time() -> None:
    r = Router(Limits(queue_max=1))
    r.ask("begins", 40)
    full = Batch(Load(1, True, 1, 0, 0, 0, 10_000, 0))
    r.dispatch.on_batch("d", full)
    r.ask("waits", 40)
    assert r.dispatch.door.queue.uncached_tokens == 40
    for _ in range(2):
        with pytest.raises(QueueFull):
            r.ask("refused", 40)
    assert (r.demand.requests, r.demand.uncached_tokens) == (4, pytest.approx(160))
    assert r.verdicts == (2, 0, 0)
    r.dispatch.cancel(["waits"])
    assert r.dispatch.door.queue.uncached_tokens == 0


def test_without_workers_who_comes_is_counted_and_probes_are_not() -> None:
    r = Router(workers=False)
    assert isinstance(r.dispatch.trouble(), NoWorkers)
    assert r.demand.requests == 0
    with pytest.raises(NoWorkers):
        r.ask("r")
    assert r.demand.requests == 1
    assert r.verdicts == (1, 0, 0)


def test_who_asks_for_more_than_its_share_is_no_demand() -> None:
    r = Router(Limits(tenant_tokens_per_s=1.0, tenant_burst_s=1.0))
    r.ask("one", tenant="t")
    with pytest.raises(TenantOverRate):
        r.ask("two", tenant="t")
    assert r.demand.requests == 1
    assert r.verdicts == (0, 0, 0)


def test_a_bad_request_and_a_client_that_left_soon_say_nothing() -> None:
    r = Router(SOON)
    r.ask("bad")
    r.dispatch.on_batch("p", Batch(load(), [Delta("bad/p", [], Finish.INVALID, error="no")]))
    r.ask("left")
    r.now = 50.0
    r.dispatch.cancel(["left"])
    assert r.verdicts == (0, 0, 0)


def test_a_client_that_waited_too_long_was_not_served_in_time() -> None:
    r = Router(SOON)
    r.ask("r")
    r.now = 101.0
    r.dispatch.cancel(["r"])
    assert r.verdicts == (1, 0, 0)


def test_a_relayed_token_does_not_count_its_prompt_twice() -> None:
    r = Router()
    r.ask("r", relay=True)
    done = Delta("r/p", [7], Finish.PREFILLED, ticket=b"t", cached_tokens=0)
    r.dispatch.on_batch("p", Batch(load(), [done]))
    r.dispatch.on_batch("d", Batch(load(), [Delta("r", [7, 8], Finish.LENGTH, cached_tokens=0)]))
    assert r.demand.computed_tokens == 8


def test_metrics_say_what_is_counted() -> None:
    r = Router()
    metrics = DemandMetrics(r.dispatch)
    try:
        r.ask("r", 100)
        step = Step(0.1, 1000, 500_000, 0, 0)
        busy = Load(2, True, 0, 0, 5000, 10_000, 10_000, 0, step=step)
        r.dispatch.on_batch("p", Batch(busy))
        assert REGISTRY.get_sample_value("tandem_router_arrived_total") == 1
        assert REGISTRY.get_sample_value("tandem_router_arrived_tokens_total") == 100
        assert REGISTRY.get_sample_value("tandem_router_running_requests") == 1
        assert REGISTRY.get_sample_value("tandem_router_queue_prompt_tokens") == 0
        pace = REGISTRY.get_sample_value("tandem_router_prefill_tokens_per_second")
        assert pace == pytest.approx(10_000, rel=0.3)
    finally:
        REGISTRY.unregister(metrics)
