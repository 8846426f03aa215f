"""What a worker counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from workers.api import Finish
from workers.loop_hold import HOLD_BUCKETS_S, LoopHold

if TYPE_CHECKING:
    from workers.api import Delta, Load, Phase
    from workers.channel import Channel


class Metrics:
    """In a registry of their own: vLLM fills the default one in this process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        by = ["transport"]
        self._requests = Counter(
            "tandem_worker_requests_total", "Requests taken on", ["phase"], registry=registry
        )
        self._ended = Counter(
            "tandem_worker_requests_ended_total", "Requests ended", ["finish"], registry=registry
        )
        self._tokens = Counter(
            "tandem_worker_output_tokens_total", "Tokens generated", registry=registry
        )
        self._kv_bytes = Counter(
            "tandem_worker_kv_pulled_bytes_total", "KV bytes pulled", by, registry=registry
        )
        self._kv_seconds = Histogram(
            "tandem_worker_kv_pull_seconds", "Reading time of one pull", by, registry=registry,
            buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
        )  # fmt: skip
        self._kv_hidden = Counter(
            "tandem_worker_kv_hidden_seconds_total", "Reading time while the prompt was computed",
            by, registry=registry,
        )  # fmt: skip
        self._kv_failed = Counter(
            "tandem_worker_kv_pulls_failed_total", "Pulls that failed", by, registry=registry
        )
        self._kv_mismatched = Counter(
            "tandem_worker_kv_mismatches_total", "Pulls refused for their content",
            by, registry=registry,
        )  # fmt: skip
        self._load = {
            "steps": Gauge("tandem_worker_steps", "Engine steps", registry=registry),
            "blocks_free": Gauge("tandem_worker_blocks_free", "Free blocks", registry=registry),
            "blocks_total": Gauge("tandem_worker_blocks_total", "KV blocks", registry=registry),
            "leases_open": Gauge("tandem_worker_leases_open", "Open leases", registry=registry),
            "leases_expired": Gauge(
                "tandem_worker_leases_expired", "Leases that ended unread", registry=registry
            ),
            "prefill_tokens_queued": Gauge(
                "tandem_worker_prefill_tokens_queued", "Uncomputed tokens", registry=registry
            ),
            "draining": Gauge(
                "tandem_worker_draining", "It takes nothing new, 0 or 1", registry=registry
            ),
            # The names that the Gateway API inference extension scrapes.
            "running": Gauge("vllm:num_requests_running", "Running", registry=registry),
            "waiting": Gauge("vllm:num_requests_waiting", "Waiting", registry=registry),
        }
        held = Histogram(
            "tandem_worker_loop_hold_seconds", "How late the event loop is",
            buckets=HOLD_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self.loop_hold = LoopHold(held.observe)
        longest = Gauge(
            "tandem_worker_loop_hold_longest_seconds", "Longest of the last minutes",
            registry=registry,
        )  # fmt: skip
        longest.set_function(lambda: self.loop_hold.longest_s)
        self._usage = Gauge("vllm:kv_cache_usage_perc", "KV cache usage, 0-1", registry=registry)

    def watch(self, channel: Channel) -> None:
        """Count what reaches its port and is not heard."""
        for name, text, count in (
            ("tandem_worker_malformed_messages", "Malformed", lambda: channel.malformed_total),
            ("tandem_worker_failed_messages", "Not acted upon", lambda: channel.failed_total),
            (
                "tandem_worker_refused_handshakes",
                "Without a known key",
                lambda: channel.gate.refused_total if channel.gate else 0,
            ),
            (
                "tandem_worker_strangers_ended",
                "Connections that said nothing",
                lambda: channel.newcomers.ended_total,
            ),
        ):
            Gauge(name, text, registry=self.registry).set_function(count)

    def accepted(self, phase: Phase) -> None:
        self._requests.labels(phase.value).inc()

    def stepped(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            self._tokens.inc(len(delta.token_ids))
            if delta.finish is not None:
                self._ended.labels(Finish(delta.finish).value).inc()
            if delta.kv_bytes:
                self._kv_bytes.labels(delta.kv_transport).inc(delta.kv_bytes)
                self._kv_seconds.labels(delta.kv_transport).observe(delta.kv_s)
                self._kv_hidden.labels(delta.kv_transport).inc(delta.kv_hidden_s)
            if delta.kv_failed is not None:
                self._kv_failed.labels(delta.kv_transport).inc()
                self._kv_mismatched.labels(delta.kv_transport).inc(delta.kv_mismatched)

    def set_load(self, load: Load) -> None:
        for name, gauge in self._load.items():
            gauge.set(getattr(load, name))
        self._usage.set(1 - load.blocks_free / max(1, load.blocks_total))
