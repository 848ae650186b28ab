"""A Prometheus collector for the figures of a guard.

    from prometheus_client import REGISTRY, start_http_server

    REGISTRY.register(GuardCollector(guard))
    start_http_server(9101, addr="127.0.0.1")

docs/monitoring.md lists the metrics, and says how to scrape servers with several processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ipguard.contrib._metrics import METRICS, Metric, Values

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    from ipguard.aio import AsyncGuard
    from ipguard.guard import Guard

__all__ = ["GuardCollector"]


class GuardCollector:
    """Collects the figures of a guard. A scrape calls `stats()` once, and reads no store.

    Args:
        guard: The guard. One for each registry: a second one would have the same names.
        registry: Where to register the collector; None if the caller does.
        count_allows: Whether the guard counts allowed logins too, which makes `is_allowed` slower:
            see `Guard.count_allows`. If not, the outcome `allow` is missing, unless the guard
            counts it in any case.

    Raises:
        ModuleNotFoundError: The extra is not installed.
    """

    def __init__(
        self,
        guard: Guard | AsyncGuard,
        *,
        registry: CollectorRegistry | None = None,
        count_allows: bool = True,
    ) -> None:
        try:
            from prometheus_client import core
        except ModuleNotFoundError as missing:
            text = 'ipguard.contrib.prometheus needs its extra: pip install "ipguard[prometheus]"'
            raise ModuleNotFoundError(text, name=missing.name) from missing
        self._guard = guard
        self._kinds = {"counter": core.CounterMetricFamily, "gauge": core.GaugeMetricFamily}
        if count_allows:
            guard.count_allows()
        if registry is not None:
            registry.register(self)

    def describe(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Return the metrics without values, for the registry's check of names."""
        return (self._family(metric, ()) for metric in METRICS)

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Return the metrics with their values."""
        stats = self._guard.stats()
        return (self._family(metric, metric.values(stats)) for metric in METRICS)

    def _family(self, metric: Metric, values: Values) -> CounterMetricFamily | GaugeMetricFamily:
        unit = "seconds" if metric.unit == "s" else ""
        name = metric.name.replace(".", "_")
        kind = self._kinds[metric.kind]
        family: CounterMetricFamily | GaugeMetricFamily
        family = kind(name, metric.help, labels=metric.labels, unit=unit)
        for labels, value in values:
            family.add_metric(labels, value)
        return family
