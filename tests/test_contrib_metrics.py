"""Metrics of a guard: scraped over HTTP for Prometheus, and collected by OpenTelemetry's SDK."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, NumberDataPoint, Sum
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as text_format

import ipguard
from ipguard.aio import AsyncGuard
from ipguard.contrib._metrics import METRICS
from ipguard.contrib.opentelemetry import instrument
from ipguard.contrib.prometheus import GuardCollector
from ipguard.errors import StoreUnavailable
from tests.guards import HOME, OFFICE, World, new_world
from tests.postgres import free_port, until
from tests.test_docs import ROOT, table
from tests.test_servers import ask

PAGE = ROOT / "docs" / "monitoring.md"

PARSERS: dict[str, Callable[[str], Any]] = {
    "text/plain": text_format,
    "application/openmetrics-text": openmetrics,
}
Figures = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def world() -> World:
    world = new_world()
    world.restrict("jsmith", HOME)
    return world


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def use(world: World, guard: ipguard.Guard) -> Figures:
    """Let a guard decide, fail and recover; return its figures under OpenTelemetry's names."""
    for _ in range(3):
        assert guard.is_allowed("jsmith", HOME)
    assert guard.is_allowed("mlee", OFFICE)
    assert not guard.is_allowed("jsmith", OFFICE)
    assert not guard.check("jsmith", "nonsense")
    guard.saw("jsmith", HOME, True)
    guard.saw("jsmith", OFFICE, False)
    guard.close()
    world.store.down = StoreUnavailable("down")
    guard.saw("jsmith", OFFICE, True)
    guard.close()
    world.pass_time(6)
    assert not guard.check("jsmith", HOME)
    world.store.down = None
    world.pass_time(1)
    guard.sync()
    world.pass_time(2)
    counts = {
        ("allow", "listed"): 3,
        ("allow", "unrestricted"): 1,
        ("refuse", "not_listed"): 1,
        ("refuse", "bad_address"): 1,
        ("refuse", "bad_username"): 0,
        ("refuse", "unknown_user"): 0,
        ("retry", "store_unavailable"): 1,
    }
    return {
        **{
            key("ipguard.decisions", outcome=outcome, reason=reason): count
            for (outcome, reason), count in counts.items()
        },
        key("ipguard.lease.remaining"): 3.0,
        key("ipguard.last_sync.age"): 2.0,
        key("ipguard.store.errors"): 1,
        key("ipguard.loads"): 2,
        key("ipguard.evictions"): 0,
        key("ipguard.users_held"): 2,
        key("ipguard.revision"): guard.revision,
        key("ipguard.sightings.written"): 2,
        key("ipguard.sightings.lost"): 1,
        key("ipguard.sightings.waiting"): 0,
        key("ipguard.refresher.running"): 0,
    }


def prometheus_name(name: str) -> str:
    """Return the name that OpenTelemetry's rules make of one of its names."""
    (metric,) = (each for each in METRICS if each.name == name)
    unit = {"s": "_seconds"}.get(metric.unit, "")
    return name.replace(".", "_") + unit + ("_total" if metric.kind == "counter" else "")


# ---------------------------------------------------------------------------------- Prometheus


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def port(registry: CollectorRegistry) -> Iterator[int]:
    """The port of prometheus_client's own server."""
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


def scrape(port: int, accept: str = "text/plain") -> tuple[Figures, list[Any]]:
    """Scrape as Prometheus does; return the figures and the families."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.headers["Content-Type"].startswith(accept)
        families = list(PARSERS[accept](response.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    return {key(each.name, **each.labels): each.value for each in samples}, families


@pytest.mark.parametrize("accept", PARSERS)
def test_a_scrape(world: World, registry: CollectorRegistry, port: int, accept: str) -> None:
    """Every figure of the guard, under the documented names and types."""
    guard = world.guard()
    registry.register(GuardCollector(guard))
    expected = {
        (prometheus_name(name), labels): value
        for (name, labels), value in use(world, guard).items()
    }
    figures, families = scrape(port, accept)
    assert figures == expected
    kinds = {each.name: each.type for each in families}
    for metric in METRICS:
        assert kinds[prometheus_name(metric.name).removesuffix("_total")] == metric.kind


def test_before_the_first_sync_there_is_no_age(
    world: World, registry: CollectorRegistry, port: int
) -> None:
    GuardCollector(world.guard(), registry=registry)
    figures, _ = scrape(port)
    assert key("ipguard_last_sync_age_seconds") not in figures
    assert figures[key("ipguard_lease_remaining_seconds")] == 0


def test_a_scrape_reads_no_store(world: World, registry: CollectorRegistry, port: int) -> None:
    GuardCollector(world.guard(), registry=registry)
    scrape(port)
    assert (world.store.loads, world.store.syncs) == ([], [])


def test_allows_can_be_left_uncounted(world: World, registry: CollectorRegistry, port: int) -> None:
    """The guard then keeps its fast path, and the outcome is missing."""
    guard = world.guard()
    GuardCollector(guard, registry=registry, count_allows=False)
    assert guard.is_allowed("jsmith", HOME)
    assert "is_allowed" in vars(guard)
    outcomes = {dict(labels).get("outcome") for _, labels in scrape(port)[0]}
    assert outcomes == {"refuse", "retry", None}


def test_a_second_guard_has_no_place_in_a_registry(
    world: World, registry: CollectorRegistry
) -> None:
    GuardCollector(world.guard(), registry=registry)
    with pytest.raises(ValueError, match="Duplicated"):
        GuardCollector(world.guard(), registry=registry)


def test_the_collector_of_an_async_guard(
    world: World, registry: CollectorRegistry, port: int
) -> None:
    guard = world.guard()
    GuardCollector(AsyncGuard(guard), registry=registry)
    assert guard.is_allowed("jsmith", HOME)
    decided = key("ipguard_decisions_total", outcome="allow", reason="listed")
    assert scrape(port)[0][decided] == 1


APPLICATION = """
from prometheus_client import REGISTRY
from ipguard.contrib.prometheus import GuardCollector
from tests.forked_app import app, guard
REGISTRY.register(GuardCollector(guard))
"""


@pytest.mark.slow
def test_each_gunicorn_worker_has_its_port(tmp_path: Path) -> None:
    """With the settings of the page: a scrape of all has every login, a new worker an old port."""
    url = f"sqlite:///{tmp_path}/ipguard.db"
    ipguard.open_store(url).close()
    first, port = free_ports(4), free_port()
    (settings,) = re.findall(
        r"```python\n(# gunicorn.conf.py\n.*?)```", PAGE.read_text(), re.DOTALL
    )
    assert "9101" in settings
    (tmp_path / "gunicorn.conf.py").write_text(settings.replace("9101", str(first)))
    (tmp_path / "measured.py").write_text(APPLICATION)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "gunicorn", "--no-control-socket", "--preload"),
            *("-b", f"127.0.0.1:{port}", "-c", str(tmp_path / "gunicorn.conf.py"), "measured:app"),
        ],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        env=os.environ
        | {"IPGUARD_TEST_STORE": url, "IPGUARD_TEST_START": "1", "PYTHONPATH": str(tmp_path)},
    )
    ports = range(first, first + 3)
    decided = key("ipguard_decisions_total", outcome="allow", reason="unrestricted")

    def logins() -> list[float]:
        return [scrape(each)[0][decided] for each in ports]

    def answers(port: int) -> bool:
        assert process.poll() is None, "gunicorn ended"
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 60).close()
            return True
        return False

    def all_answer() -> bool:
        return all(map(answers, ports))

    def replaced() -> bool:
        with contextlib.suppress(OSError, HTTPException):  # it ends in the middle of an answer
            return all_answer() and sum(logins()) < before + 30
        return False

    try:
        until(all_answer, "each worker serves its metrics")
        before = sum(logins())  # the master's own login was inherited
        workers = Counter(ask(port, "jsmith", HOME)["worker"] for _ in range(30))
        assert sum(logins()) == before + 30
        assert len([each for each in logins() if each > before / 3]) == len(workers)
        os.kill(next(iter(workers)), signal.SIGKILL)
        until(replaced, "a new worker has the port")
        assert not answers(first + 3)
    finally:
        process.terminate()
        process.wait(60)


def free_ports(count: int) -> int:
    """Return the first of so many free ports in a row."""
    while True:
        first = free_port()
        with contextlib.suppress(OSError, OverflowError), contextlib.ExitStack() as probes:
            for port in range(first, first + count):
                probe = probes.enter_context(socket.socket())
                probe.bind(("127.0.0.1", port))
            return first


# ------------------------------------------------------------------------------- OpenTelemetry


@pytest.fixture
def reader() -> InMemoryMetricReader:
    return InMemoryMetricReader()


@pytest.fixture
def provider(reader: InMemoryMetricReader) -> Iterator[MeterProvider]:
    provider = MeterProvider([reader])
    yield provider
    provider.shutdown()


def collect(reader: InMemoryMetricReader) -> tuple[Figures, dict[str, Any]]:
    """Collect; return the figures, and the metrics by name."""
    data = reader.get_metrics_data()
    resources = [] if data is None else data.resource_metrics
    scopes = [scope for resource in resources for scope in resource.scope_metrics]
    assert {scope.scope.name for scope in scopes} <= {"ipguard"}
    found = {metric.name: metric for scope in scopes for metric in scope.metrics}
    figures = {
        key(name, **point.attributes): point.value
        for name, metric in found.items()
        for point in metric.data.data_points
        if isinstance(point, NumberDataPoint)
    }
    return figures, found


@pytest.mark.parametrize("kind", [None, AsyncGuard])
def test_a_collection(
    world: World, reader: InMemoryMetricReader, provider: MeterProvider, kind: Any
) -> None:
    """The same figures, with units and types."""
    guard = world.guard()
    observed = guard if kind is None else kind(guard)
    instrument(observed, meter_provider=provider)
    expected = use(world, guard)
    figures, found = collect(reader)
    assert figures == expected
    for metric in METRICS:
        made = found[metric.name]
        assert (made.unit, made.description) == (metric.unit, metric.help)
        counter = isinstance(made.data, Sum) and made.data.is_monotonic
        assert counter == (metric.kind == "counter")


def test_a_guard_is_not_kept_alive(
    world: World, reader: InMemoryMetricReader, provider: MeterProvider
) -> None:
    """A provider lives as long as the process."""
    guard = world.guard()
    instrument(guard, meter_provider=provider, count_allows=False)
    assert "is_allowed" in vars(guard)
    assert key("ipguard.revision") in collect(reader)[0]
    del guard
    gc.collect()
    assert collect(reader)[0] == {}


# -------------------------------------------------------------------------------- what is public


def test_the_page_lists_the_metrics() -> None:
    """Name for name, with types, units and labels."""
    listed = {row[0]: row[1:5] for row in table("docs/monitoring.md", "OpenTelemetry")}
    assert listed == {
        metric.name: (
            prometheus_name(metric.name),
            metric.kind,
            metric.unit,
            ", ".join(metric.labels),
        )
        for metric in METRICS
    }


def test_the_alerts_use_metrics_that_exist() -> None:
    used = set(re.findall(r"\bipguard_\w+", PAGE.read_text()))
    assert used == {prometheus_name(metric.name) for metric in METRICS}


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("prometheus", "GuardCollector(guard)"),
        ("opentelemetry", "instrument(guard)"),
    ],
)
def test_a_missing_framework_is_reported_when_the_kit_is_used(module: str, call: str) -> None:
    """The import works without it, and `ipguard` never imports it."""
    code = f"""
import sys
import ipguard
from ipguard.contrib.{module} import *
loaded = {{name.partition(".")[0] for name in sys.modules}}
assert not loaded & {{"prometheus_client", "opentelemetry"}}, loaded
sys.modules.update(dict.fromkeys(("prometheus_client", "opentelemetry")))
guard = ipguard.Guard(ipguard.open_store("memory://"))
try:
    {call}
except ModuleNotFoundError as exc:
    print(exc)
assert "is_allowed" in vars(guard)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith(f'pip install "ipguard[{module}]"')
