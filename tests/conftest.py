"""What all tests share: the two profiles, and how many rounds each has."""

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
from tests.postgres import Given, Server, own_server, running_server
from tests.secrets_watch import Watch, watching

#: `dev.py test --long` sets it: the same tests, with the full number of rounds.
LONG = bool(os.environ.get("IPGUARD_LONG"))

# No deadline: these machines are shared and slow at times. Failures print what repeats them.
settings.register_profile("short", max_examples=100, deadline=None, print_blob=True)
settings.register_profile("long", max_examples=10_000, deadline=None, print_blob=True)
# Mutation testing asks one thing, whether a test fails, and wants the same answer each time.
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

# A shell that starts the tests in the background has them ignore Ctrl-C; what they start would too.
signal.signal(signal.SIGINT, signal.default_int_handler)

#: The files that take longest. They are begun first, or at the end one process would be left alone
#: with the last of them.
LONGEST = (
    "test_cli.py",
    "test_cli_changes.py",
    "test_browser_axe.py",
    "test_browser_confirming.py",
    "test_stores.py",
    "test_races.py",
    "test_outage_confirm.py",
    "test_serve.py",
    "test_postgres_failures.py",
    "test_cli_watch.py",
    "test_scale_listing.py",
    "test_cli_bulk.py",
    "test_outage.py",
    "test_state_machine.py",
    "test_postgres.py",
    "test_deployment.py",
    "test_benchmarks.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; within a file, and among the others, the order stays."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def rounds(short: int, long: int) -> int:
    """Return how often a test repeats itself in the profile that is running."""
    return long if LONG else short


@pytest.fixture(name="rounds")
def _rounds() -> Callable[[int, int], int]:
    return rounds


@pytest.fixture
def long() -> bool:
    """Whether the full rounds are asked for."""
    return LONG


@pytest.fixture(scope="session", autouse=True)
def watch() -> Iterator[Watch]:
    """What watches the whole run for confirmation numbers in logs; the end of the run fails."""
    with watching() as it:
        yield it


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server | Given]:
    """A PostgreSQL server for all tests of this process; it is not to be stopped."""
    with running_server() as server:
        yield server


@pytest.fixture(scope="session")
def own_postgres(postgres: Server | Given) -> Iterator[Server]:
    """One whose processes and port are ours to meddle with; it is not to be stopped either."""
    if isinstance(postgres, Server):
        yield postgres
        return
    with own_server() as server:
        yield server
