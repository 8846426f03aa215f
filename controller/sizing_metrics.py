"""What sizing counts, in the process's default registry."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from prometheus_client import Metric

    from controller.leader import Leadership
    from controller.loop import Loop
    from controller.observe import Observer


class SizingMetrics:
    """Read when they are asked for."""

    def __init__(
        self, loop: Loop, observer: Observer, leadership: Leadership, clock: Callable[[], float]
    ) -> None:
        """`clock` is the event loop's."""
        self._loop, self._observer, self._leadership = loop, observer, leadership
        self._clock = clock
        REGISTRY.register(self)

    def collect(self) -> Iterator[Metric]:
        loop, seen = self._loop, self._loop.seen
        yield GaugeMetricFamily(
            "tandem_controller_leader", "1 for the replica that leads", self._leadership.leads
        )
        age_s = inf if loop.looked_at is None else self._clock() - loop.looked_at
        yield GaugeMetricFamily(
            "tandem_controller_look_age_seconds", "Since the whole group was last seen", age_s
        )
        for name, text, size in (
            ("tandem_controller_replicas_wanted", "That there should be", loop.decided),
            ("tandem_controller_replicas", "That are asked for", seen and seen.wanted),
            ("tandem_controller_replicas_ready", "That serve", seen and seen.ready),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["role"])
            if size:
                gauge.add_metric(["prefill"], size.prefill)
                gauge.add_metric(["decode"], size.decode)
            yield gauge
        yield _counted(
            "tandem_controller_decisions_total", "Decisions", "kind", loop.records.counts
        )
        yield _counted(
            "tandem_controller_scale_failures_total", "Scales not written", "reason", loop.failures
        )
        yield _counted(
            "tandem_controller_scale_read_failures_total",
            "Scales not read",
            "reason",
            self._observer.scales_failed,
        )
        yield _counted(
            "tandem_controller_scrapes_failed_total",
            "Metrics not read",
            "role",
            self._observer.scrapes_failed,
        )
        yield _counted(
            "tandem_controller_lease_failures_total",
            "Lease requests in vain",
            "reason",
            self._leadership.failures,
        )


def _counted(name: str, text: str, label: str, counts: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family
