"""What the router counts, in the process's default registry beside the front's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from workers.loop_hold import HOLD_BUCKETS_S, LoopHold

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client import Metric

    from router.core.caches import Caches
    from router.core.handoffs import Handoffs
    from router.dispatch import Dispatch
    from router.journal import Record

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_GAPS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 5)


class Metrics:
    """The journal's observer. One a process."""

    def __init__(self) -> None:
        self._ended = Counter(
            "tandem_router_requests_ended_total", "Requests ended", ["outcome", "error"]
        )
        self._retries = Counter("tandem_router_retries_total", "Attempts beyond the first")
        self._prompt = Counter("tandem_router_prompt_tokens_total", "Prompt tokens served")
        self._output = Counter("tandem_router_output_tokens_total", "Tokens streamed")
        self._kv_bytes = Counter("tandem_router_kv_bytes_total", "KV bytes handed off")
        self._kv_failed = Counter("tandem_router_kv_failed_total", "Handoffs that failed")
        self._ttft = Histogram(
            "tandem_router_ttft_seconds", "Time to first token", buckets=_SECONDS
        )
        self._waited = Histogram(
            "tandem_router_queue_wait_seconds", "Waited for room", buckets=_SECONDS
        )
        self._gap = Histogram("tandem_router_itl_seconds", "Time between tokens", buckets=_GAPS)

    def token_gap(self, seconds: float) -> None:
        self._gap.observe(seconds)

    def ended(self, record: Record) -> None:
        self._ended.labels(record.outcome, record.error_code or "").inc()
        self._retries.inc(max(0, record.attempts - 1))
        self._prompt.inc(record.prompt_tokens)
        self._output.inc(record.output_tokens)
        self._kv_bytes.inc(record.kv_bytes)
        if record.kv_failed is not None:
            self._kv_failed.inc()
        if record.attempts:
            self._waited.observe(record.waited_s)
        if record.ttft_s is not None:
            self._ttft.observe(record.ttft_s)


def loop_hold() -> LoopHold:
    """A registered measurement of this process's event loop. One a process."""
    held = Histogram(
        "tandem_router_loop_hold_seconds", "How late the event loop is", buckets=HOLD_BUCKETS_S
    )
    hold = LoopHold(held.observe)
    longest = Gauge("tandem_router_loop_hold_longest_seconds", "Longest of the last minutes")
    longest.set_function(lambda: hold.longest_s)
    return hold


class CacheMetrics:
    """What is known of the workers' prefix caches, read when it is asked for."""

    def __init__(self, caches: Caches) -> None:
        self._caches = caches
        REGISTRY.register(self)

    def collect(self) -> Iterator[Metric]:
        c = self._caches
        for name, text, value in (
            ("tandem_router_index_blocks", "Distinct blocks in the prefix index", c.blocks),
            ("tandem_router_index_workers", "Workers whose cache is known", c.in_step),
        ):
            yield GaugeMetricFamily(name, text, value)
        for name, text, value in (
            ("tandem_router_index_asked_again_total", "Snapshots asked for", c.asked_again_total),
            ("tandem_router_index_disbelieved_total", "Indexes given up", c.disbelieved_total),
            ("tandem_router_index_overflowed_total", "Blocks left out", c.overflowed_total),
            ("tandem_router_index_left_out_total", "Whole caches left out", c.left_out_total),
            ("tandem_router_predicted_tokens_total", "Foretold", c.predicted_tokens_total),
            ("tandem_router_cached_tokens_total", "Come true", c.actual_tokens_total),
            ("tandem_router_mispredicted_tokens_total", "Difference", c.error_tokens_total),
        ):
            yield CounterMetricFamily(name, text, value)


class QueueMetrics:
    """Who waits, who was refused, and what is promised, read when it is asked for."""

    def __init__(self, dispatch: Dispatch) -> None:
        self._dispatch = dispatch
        REGISTRY.register(self)

    def collect(self) -> Iterator[Metric]:
        door, fleet = self._dispatch.door, list(self._dispatch.fleet)
        for name, text, value in (
            ("tandem_router_queue_requests", "Requests that wait", len(door.queue)),
            ("tandem_router_queue_tokens", "Their tokens", door.queue.tokens),
            (
                "tandem_router_prefill_tokens_queued",
                "Prompt tokens queued on workers",
                sum(w.prefill_tokens_queued for w in fleet),
            ),
            (
                "tandem_router_promised_blocks",
                "KV blocks that requests are yet to take",
                sum(sum(w.promised.values()) for w in fleet),
            ),
        ):
            yield GaugeMetricFamily(name, text, value)
        yield CounterMetricFamily(
            "tandem_router_workers_doubted_total",
            "Workers put aside for what they said",
            self._dispatch.doubts.total,
        )
        refused = CounterMetricFamily(
            "tandem_router_refused_total", "Requests refused before any work", labels=["error"]
        )
        for code, count in door.refused.items():
            refused.add_metric([code], count)
        yield refused
        hedges = CounterMetricFamily(
            "tandem_router_hedges_total", "Requests tried twice at once", labels=["outcome"]
        )
        for outcome, count in self._dispatch.patience.hedges.ended.items():
            hedges.add_metric([outcome], count)
        yield hedges


class HandoffMetrics:
    """Which handoffs don't work, read when it is asked for."""

    def __init__(self, handoffs: Handoffs) -> None:
        self._handoffs = handoffs
        REGISTRY.register(self)

    def collect(self) -> Iterator[Metric]:
        unpaired = GaugeMetricFamily(
            "tandem_router_unpaired_workers", "Can hand off with nobody", labels=["differs"]
        )
        for what, count in self._handoffs.unpaired.items():
            unpaired.add_metric([what], count)
        yield unpaired
        yield GaugeMetricFamily(
            "tandem_router_failing_pairs", "Whose handoffs fail in a row", self._handoffs.failing
        )


class DemandMetrics:
    """What sizing is told, read when it is asked for."""

    def __init__(self, dispatch: Dispatch) -> None:
        self._dispatch = dispatch
        REGISTRY.register(self)

    def collect(self) -> Iterator[Metric]:
        door, d = self._dispatch.door, self._dispatch.door.demand
        for name, text, value in (
            ("tandem_router_arrived_total", "Requests that arrived", d.requests),
            ("tandem_router_arrived_tokens_total", "Their uncached tokens", d.uncached_tokens),
            ("tandem_router_computed_tokens_total", "Prompt tokens computed", d.computed_tokens),
            ("tandem_router_judged_total", "Requests with a verdict", d.judged),
            ("tandem_router_first_in_time_total", "First token in time", d.first_in_time),
            ("tandem_router_met_total", "Both objectives met", d.met),
        ):
            yield CounterMetricFamily(name, text, value)
        for name, text, value in (
            (
                "tandem_router_running_requests",
                "On workers",
                len(self._dispatch) - len(door.queue),
            ),
            ("tandem_router_queue_prompt_tokens", "Waiting", door.queue.uncached_tokens),
            (
                "tandem_router_prefill_tokens_per_second",
                "Of a busy prefill worker",
                self._dispatch.fleet.prefill_tokens_per_s,
            ),
        ):
            yield GaugeMetricFamily(name, text, value)
