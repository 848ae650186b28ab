"""OpenTelemetry metrics for the figures of a guard.

    instrument(guard)

docs/monitoring.md lists the metrics.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import ipguard
from ipguard.contrib._metrics import METRICS, Metric

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation

    from ipguard.aio import AsyncGuard
    from ipguard.guard import Guard

__all__ = ["instrument"]


def instrument(
    guard: Guard | AsyncGuard,
    *,
    meter_provider: MeterProvider | None = None,
    count_allows: bool = True,
) -> None:
    """Let the meters of OpenTelemetry observe a guard, until it is garbage-collected.

    Each collection calls `stats()`, and reads no store.

    Args:
        guard: The guard. One for each meter provider: a second one would have the same names.
        meter_provider: The provider; None for the global one, which may also be set later.
        count_allows: Whether the guard counts allowed logins too, which makes `is_allowed` slower:
            see `Guard.count_allows`. If not, the outcome `allow` is missing, unless the guard
            counts it in any case.

    Raises:
        ModuleNotFoundError: The extra is not installed.
    """
    try:
        from opentelemetry import metrics
    except ModuleNotFoundError as missing:
        text = 'ipguard.contrib.opentelemetry needs its extra: pip install "ipguard[opentelemetry]"'
        raise ModuleNotFoundError(text, name=missing.name) from missing
    meter = metrics.get_meter("ipguard", ipguard.__version__, meter_provider)
    create = {
        "counter": meter.create_observable_counter,
        "gauge": meter.create_observable_gauge,
    }
    if count_allows:
        guard.count_allows()
    # A provider lives as long as the process and keeps its callbacks.
    alive = weakref.ref(guard)

    def observe(metric: Metric) -> Callable[[CallbackOptions], Iterator[Observation]]:
        def callback(_: CallbackOptions) -> Iterator[Observation]:
            if (guard := alive()) is not None:
                for labels, value in metric.values(guard.stats()):
                    yield metrics.Observation(value, dict(zip(metric.labels, labels, strict=True)))

        return callback

    for metric in METRICS:
        create[metric.kind](
            metric.name, callbacks=[observe(metric)], unit=metric.unit, description=metric.help
        )
