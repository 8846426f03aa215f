"""What discovery counts, in the process's default registry."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from controller.core.peers import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client import Metric

    from controller.core.session import Session
    from controller.discovery import Discovery


class DiscoveryMetrics:
    """Read when they are asked for."""

    def __init__(
        self, discovery: Discovery, session: Session | None, clock: Callable[[], float]
    ) -> None:
        """`session` is the one that asks Kubernetes, if any; `clock` the event loop's."""
        self._discovery = discovery
        self._session = session
        self._clock = clock
        REGISTRY.register(self)

    def collect(self) -> Iterator[Metric]:
        peers = GaugeMetricFamily("tandem_controller_peers", "Peers by state", labels=["state"])
        for state in (Kind.JOINED, Kind.READY, Kind.DRAINING):
            peers.add_metric([state], self._discovery.count(state))
        yield peers
        age_s = self._discovery.age_s(self._clock())
        yield GaugeMetricFamily(
            "tandem_controller_peers_age_seconds",
            "Since what is known of peers was known to be so",
            inf if age_s is None else age_s,
        )
        if self._session is None:
            return
        requests = CounterMetricFamily(
            "tandem_controller_api_requests_total", "Requests to the API server", labels=["phase"]
        )
        for phase, count in self._session.requests.items():
            requests.add_metric([phase], count)
        yield requests
        failures = CounterMetricFamily(
            "tandem_controller_api_failures_total", "Those that failed", labels=["reason"]
        )
        for failure, count in self._session.failures.items():
            failures.add_metric([failure], count)
        yield failures
