"""Fixtures and settings of all tests."""

import os
import signal
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.browser import chromium as chromium  # noqa: PLC0414 - fixtures for every test
from tests.browser import mails as mails  # noqa: PLC0414
from tests.browser import pytest_generate_tests as pytest_generate_tests  # noqa: PLC0414
from tests.browser import walk as walk  # noqa: PLC0414
from tests.browser import windows as windows  # noqa: PLC0414
from tests.browser import world as world  # noqa: PLC0414
from tests.flows import desk as desk  # noqa: PLC0414
from tests.postgres import Given, Server, own_server, programs, running_server
from tests.requirements import missing
from tests.secrets_watch import Watch, watching

#: Set by `dev.py test --long`: run every test with its full number of rounds.
LONG = bool(os.environ.get("IPGUARD_LONG"))

# No deadline, because the machine may be busy.
settings.register_profile("short", max_examples=100, deadline=None, print_blob=True)
settings.register_profile("long", max_examples=10_000, deadline=None, print_blob=True)
# Mutation testing needs the same result each time.
settings.register_profile(
    "mutation",
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.differing_executors],
)
settings.load_profile("long" if LONG else "short")

# Shells make background jobs ignore SIGINT, which programs started by the tests would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

#: The slowest files start first, so that neither process is left alone with one of them at the end.
SLOWEST = (
    "test_outage.py",
    "test_record.py",
    "test_cli_bulk.py",
    "test_races.py",
    "test_rules_impact.py",
    "test_state_machine.py",
    "test_contrib_fastapi.py",
    "test_contrib_flask.py",
    "test_stores.py",
    "test_guard_explorer.py",
    "test_row_stores.py",
    "test_guard_signals.py",
    "test_cli.py",
    "test_browser_axe.py",
    "test_browser_asking.py",
    "test_serve.py",
    "test_postgres_failures.py",
    "test_cli_watch.py",
    "test_outage_confirm.py",
    "test_postgres.py",
    "test_deployment.py",
    "test_benchmarks.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slowest files first; keep the order otherwise.

    mutmut puts the quickest tests first, so that a mutant is soon found: keep its order too.
    """
    if settings.get_current_profile_name() == "mutation":
        return
    places = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def rounds(short: int, long: int) -> int:
    """Return the number of rounds for the current profile."""
    return long if LONG else short


@pytest.fixture(name="rounds")
def _rounds() -> Callable[[int, int], int]:
    return rounds


@pytest.fixture
def long() -> bool:
    """Whether `dev.py test --long` is running."""
    return LONG


@pytest.fixture(scope="session", autouse=True)
def watch() -> Iterator[Watch]:
    """Fail at the end of the run if a confirmation number was logged."""
    with watching() as watch:
        yield watch


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server | Given]:
    """A PostgreSQL server shared by the tests of this process; do not stop it."""
    if not os.environ.get("IPGUARD_TEST_POSTGRES"):
        _require_programs()
    with running_server(fsync=False) as server:
        yield server


def _require_programs() -> None:
    try:
        programs()
    except RuntimeError:
        missing("PostgreSQL", "postgresql")


@pytest.fixture(scope="session")
def own_postgres(postgres: Server | Given) -> Iterator[Server]:
    """A shared server of our own, whose processes and port can be inspected; do not stop it."""
    if isinstance(postgres, Server):
        yield postgres
        return
    _require_programs()
    with own_server(fsync=False) as server:
        yield server
