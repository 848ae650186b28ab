"""The metrics of a guard, under their OpenTelemetry names.

The Prometheus name of a metric is what OpenTelemetry's exporter for Prometheus makes of it, so that
both kits fill the same dashboards: `ipguard.lease.remaining` in seconds is
`ipguard_lease_remaining_seconds`, the counter `ipguard.loads` is `ipguard_loads_total`. Names,
units and labels are public: docs/monitoring.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, Literal

import attrs

from ipguard.guard import GuardStats

Values = Iterable[tuple[tuple[str, ...], float]]
"""Values, each with the values of its labels."""


@attrs.frozen(kw_only=True)
class Metric:
    """A metric, read from `Guard.stats()`.

    Attributes:
        name: The name for OpenTelemetry.
        kind: `counter` only grows while the process runs.
        unit: A UCUM unit; braces annotate what is counted.
        help: What it measures.
        labels: The names of the labels.
        values: Returns the current values; without any, there is nothing to measure yet.
    """

    name: str
    kind: Literal["counter", "gauge"]
    unit: str
    help: str
    values: Callable[[GuardStats], Values]
    labels: tuple[str, ...] = ()


def _decisions(stats: GuardStats) -> Values:
    for (outcome, reason), count in stats.decisions.items():
        yield (outcome.value, reason.value), count


def _single(read: Callable[[GuardStats], float | None]) -> Callable[[GuardStats], Values]:
    """Return the values of a metric without labels, which may have none yet."""

    def values(stats: GuardStats) -> Values:
        value = read(stats)
        return [] if value is None else [((), value)]

    return values


METRICS: Final = (
    Metric(
        name="ipguard.decisions",
        kind="counter",
        unit="{decision}",
        help="Logins decided, by outcome and reason.",
        labels=("outcome", "reason"),
        values=_decisions,
    ),
    Metric(
        name="ipguard.lease.remaining",
        kind="gauge",
        unit="s",
        help="For how long the guard may answer without the store; 0 if the lease is over.",
        values=_single(lambda stats: stats.lease_remaining),
    ),
    Metric(
        name="ipguard.last_sync.age",
        kind="gauge",
        unit="s",
        help="Age of the last successful sync; missing before the first.",
        values=_single(lambda stats: stats.last_sync_age),
    ),
    Metric(
        name="ipguard.store.errors",
        kind="counter",
        unit="{error}",
        help="Calls to the store that failed.",
        values=_single(lambda stats: stats.store_errors),
    ),
    Metric(
        name="ipguard.loads",
        kind="counter",
        unit="{load}",
        help="Policies read from the store.",
        values=_single(lambda stats: stats.loads),
    ),
    Metric(
        name="ipguard.evictions",
        kind="counter",
        unit="{eviction}",
        help="Users evicted to make room.",
        values=_single(lambda stats: stats.evictions),
    ),
    Metric(
        name="ipguard.users_held",
        kind="gauge",
        unit="{user}",
        help="Users remembered.",
        values=_single(lambda stats: stats.users),
    ),
    Metric(
        name="ipguard.revision",
        kind="gauge",
        unit="{revision}",
        help="The store's revision that the guard is current to.",
        values=_single(lambda stats: stats.revision),
    ),
    Metric(
        name="ipguard.sightings.written",
        kind="counter",
        unit="{login}",
        help="Logins with the right password that were given to the store as sightings.",
        values=_single(lambda stats: stats.sightings_written),
    ),
    Metric(
        name="ipguard.sightings.lost",
        kind="counter",
        unit="{login}",
        help="Logins with the right password that were not recorded: too many, or a store error.",
        values=_single(lambda stats: stats.sightings_lost),
    ),
    Metric(
        name="ipguard.sightings.waiting",
        kind="gauge",
        unit="{login}",
        help="Logins with the right password that wait to be written, most for up to an hour.",
        values=_single(lambda stats: stats.sightings_waiting),
    ),
    Metric(
        name="ipguard.refresher.running",
        kind="gauge",
        unit="{refresher}",
        help="1 if the refresher runs, 0 if checks have to sync.",
        values=_single(lambda stats: stats.woken_by == "refresher"),
    ),
)
