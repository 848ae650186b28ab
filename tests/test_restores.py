"""A dump that is restored in place, one statement at a time: the answers of stores and guards.

The dumps are those of pg_dump and of Python's `iterdump`. After each statement, a restricted user
logs in from elsewhere and a registered one from its own address.
"""

from __future__ import annotations

import re
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

import ipguard
from ipguard import Actor, Reason, StoreError, StoreUnavailable
from ipguard.model import RESET
from ipguard.store import RestrictionStore
from ipguard.stores import open_store
from ipguard.stores.postgres import PostgresStore
from ipguard.testing import Outbox
from tests.postgres import Given, Server, fresh_schema, programs

pytestmark = pytest.mark.slow

BOSS = Actor(username="boss", email="boss@example.com", manages=Actor.EVERY_ACCOUNT)
HOME, ELSEWHERE = "203.0.113.7", "198.51.100.7"
TABLES = (
    "changes",
    "failures",
    "head",
    "imports",
    "past_restrictions",
    "requests",
    "restrictions",
    "schema_version",
    "search_blocks",
    "search_terms",
    "sightings",
    "users",
)
MARKER = "zz_restore_marker"


def fill(store: RestrictionStore) -> None:
    store.put_users(
        ipguard.User(username=name, full_name="", account_id="A1") for name in ("al", "jo", "kim")
    )
    flow = ipguard.Workflow(store, Outbox(), key=bytes(32))
    flow.impose(BOSS, "jo", HOME, reason="office")
    flow.impose(BOSS, "jo", "203.0.113.8", reason="home")
    flow.impose(BOSS, "kim", HOME, reason="office")


class Watch:
    """Guards with expired leases that answer after each step of a restore."""

    def __init__(self, store: RestrictionStore) -> None:
        self.store, self.now = store, 0.0
        self.policies = {name: store.load_policy(name).restrictions for name in ("jo", "kim")}
        self.guards = [
            ipguard.Guard(store, unknown_users="deny", preload=preload, monotonic=lambda: self.now)
            for preload in (False, True)
        ]
        self.refused = 0
        assert self.ask() == {Reason.NOT_LISTED, Reason.LISTED, Reason.UNRESTRICTED}

    def ask(self) -> set[Reason]:
        """Return the reasons of all answers; fail if one is wrong."""
        self.now += 60.0
        reasons = set()
        for guard in self.guards:
            try:
                guard.sync()
            except StoreUnavailable:
                self.refused += 1
                self.now += 60.0
            answers = {
                user: guard.check(user, address)
                for user, address in (("jo", ELSEWHERE), ("kim", HOME), ("al", HOME))
            }
            assert answers["jo"].reason in (Reason.NOT_LISTED, Reason.STORE_UNAVAILABLE)
            assert answers["kim"].reason in (Reason.LISTED, Reason.STORE_UNAVAILABLE)
            assert answers["al"].reason in (Reason.UNRESTRICTED, Reason.STORE_UNAVAILABLE)
            reasons |= {answer.reason for answer in answers.values()}
        for name, restrictions in self.policies.items():
            try:
                assert self.store.load_policy(name).restrictions == restrictions
            except StoreError:
                self.refused += 1
        return reasons


# ------------------------------------------------------------------------------- PostgreSQL


def dumped(url: str, schema: str, *options: str) -> list[str]:
    """Return the statements of a dump of pg_dump, each row a statement."""
    command = [programs() / "pg_dump", "--inserts", "-n", schema, *options, url]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = re.sub(r"(?m)^\\.*\n", "", text)
    head, *entries = re.split(r"\n(?=--\n-- (?:Data for )?Name: )", text)
    statements = head.splitlines()
    for entry in entries:
        statements += entry.splitlines() if "Data for Name: " in entry else [entry]
    return [text for text in statements if re.sub(r"(?m)^--.*|\s", "", text)]


def cleaned(url: str, schema: str) -> list[str]:
    return dumped(url, schema, "--clean", "--if-exists")


def dropped(url: str, schema: str) -> list[str]:
    return [f"DROP SCHEMA {schema} CASCADE", *dumped(url, schema)]


def truncated(url: str, schema: str) -> list[str]:
    tables = ", ".join(f"{schema}.{table}" for table in (*TABLES, MARKER))
    return [f"TRUNCATE {tables}", *dumped(url, schema, "--data-only")]


def truncated_without_marker(url: str, schema: str) -> list[str]:
    tables = ", ".join(f"{schema}.{table}" for table in TABLES)
    return [f"TRUNCATE {tables}", *dumped(url, schema, "--data-only")]


def deleted(url: str, schema: str) -> list[str]:
    statements = [f"DELETE FROM {schema}.{table}" for table in ("users", *TABLES)]
    return [*statements, *dumped(url, schema, "--data-only")]


def marker_first(url: str, schema: str) -> list[str]:
    """The order in which `pg_restore --jobs` may restore."""
    statements = dumped(url, schema, "--clean", "--if-exists")
    (marker,) = [text for text in statements if f"INSERT INTO {schema}.{MARKER}" in text]
    statements.remove(marker)
    first = next(n for n, text in enumerate(statements) if text.startswith("INSERT INTO"))
    return [*statements[:first], marker, *statements[first:]]


@pytest.fixture
def url(postgres: Server | Given) -> str:
    return postgres.url(schema=fresh_schema())


def place(store: PostgresStore) -> tuple[str, str]:
    """Return the connection string and the schema of a store."""
    options = store._options
    return options.servers[0], options.schema


@pytest.mark.parametrize(
    "steps", [cleaned, dropped, truncated, truncated_without_marker, deleted, marker_first]
)
def test_a_dump_restored_in_place_is_not_read_half(
    url: str, steps: Callable[[str, str], list[str]]
) -> None:
    """Nothing is answered until the last row is restored; then every guard starts over."""
    with PostgresStore(url) as store:
        fill(store)
        watch = Watch(store)
        before = store.changes_since(None)
        server, schema = place(store)
        statements = steps(server, schema)
        with psycopg.connect(server, autocommit=True) as restoring:
            for statement in statements:
                restoring.execute(statement.encode())
                watch.ask()
        assert watch.refused > len(TABLES)
        after = store.changes_since((before.head, before.token))
        assert after.usernames is RESET
        assert after.head == before.head
        assert watch.ask() == {Reason.NOT_LISTED, Reason.LISTED, Reason.UNRESTRICTED}


@pytest.mark.parametrize("steps", [cleaned, truncated])
def test_a_restore_in_one_transaction_is_a_reset(
    url: str, steps: Callable[[str, str], list[str]]
) -> None:
    """Reads wait for its locks and fail until the commit; then every guard starts over."""
    with PostgresStore(url, timeout=0.3) as store:
        fill(store)
        watch = Watch(store)
        before = store.changes_since(None)
        server, schema = place(store)
        statements = steps(server, schema)
        with psycopg.connect(server) as restoring:
            for statement in statements:
                restoring.execute(statement.encode())
            assert watch.ask() == {Reason.STORE_UNAVAILABLE}
        assert store.changes_since((before.head, before.token)).usernames is RESET
        assert watch.ask() == {Reason.NOT_LISTED, Reason.LISTED, Reason.UNRESTRICTED}


def test_a_snapshot_does_not_survive_a_truncation(url: str) -> None:
    """To an older snapshot, a truncated table is empty: the stream must fail."""
    with PostgresStore(url) as store:
        fill(store)
        server, schema = place(store)
        _, policies = store.load_all_policies()
        with psycopg.connect(server, autocommit=True) as restoring:
            restoring.execute(f"TRUNCATE {schema}.restrictions".encode())
        with pytest.raises(StoreUnavailable, match="restore marker"):
            dict(policies)
        with pytest.raises(StoreUnavailable, match="restore marker"):
            store.load_all_policies()


def test_nothing_is_written_to_a_half_restored_schema(url: str) -> None:
    """Transactions, imports and migrations are refused without the marker."""
    with PostgresStore(url) as store:
        fill(store)
        server, schema = place(store)
        with psycopg.connect(server, autocommit=True) as restoring:
            restoring.execute(f"DELETE FROM {schema}.schema_version".encode())
            with pytest.raises(StoreUnavailable, match="being restored"), store.transaction():
                pass
            with pytest.raises(StoreUnavailable), store.transaction(staged=[]):
                pass
            with pytest.raises(StoreUnavailable):
                store.overview(Actor.EVERY_ACCOUNT)
            with pytest.raises(StoreUnavailable, match="being restored"):
                PostgresStore(url, migrate=True)


def test_a_token_of_a_change_fits_after_a_restore(url: str) -> None:
    """The plain token of an entry still identifies its change after a restore."""
    with PostgresStore(url) as store:
        fill(store)
        server, schema = place(store)
        with psycopg.connect(server, autocommit=True) as connection:
            query = f"SELECT revision, token FROM {schema}.changes WHERE revision = 1".encode()
            revision, token = connection.execute(query).fetchall()[0]
        assert store.changes_since((revision, token)).usernames == frozenset({"jo", "kim"})
        assert store.changes_since((revision, token[::-1] + "x")).usernames is RESET


# ------------------------------------------------------------------------------- SQLite


def recreated(path: Path) -> Iterator[str]:
    """The statements of a dump, without its transaction, after dropping every table."""
    with closing(sqlite3.connect(path)) as connection:
        statements = list(connection.iterdump())
    yield from (f"DROP TABLE {table}" for table in (*TABLES, MARKER))
    yield from (text for text in statements if text not in ("BEGIN TRANSACTION;", "COMMIT;"))


def refilled(path: Path) -> Iterator[str]:
    """The rows of a dump, after deleting every row."""
    with closing(sqlite3.connect(path)) as connection:
        statements = list(connection.iterdump())
    yield from (f"DELETE FROM {table}" for table in TABLES)
    yield from (text for text in statements if text.startswith("INSERT INTO"))


@pytest.mark.parametrize("steps", [recreated, refilled])
def test_a_dump_restored_into_the_same_file_is_not_read_half(
    tmp_path: Path, steps: Callable[[Path], Iterator[str]]
) -> None:
    """Nothing is answered until the last row is restored, although the file is the same."""
    path = tmp_path / "a.db"
    with open_store(f"sqlite:///{path}") as store:
        fill(store)
        watch = Watch(store)
        statements = list(steps(path))
        with closing(sqlite3.connect(path, isolation_level=None)) as restoring:
            for statement in statements:
                restoring.execute(statement)
                watch.ask()
        assert watch.refused > len(TABLES)
        assert watch.ask() == {Reason.NOT_LISTED, Reason.LISTED, Reason.UNRESTRICTED}


def test_nothing_is_read_or_written_without_the_marker_on_sqlite(tmp_path: Path) -> None:
    """Every call that a guard depends on refuses a file with an unfinished restore."""
    path = tmp_path / "a.db"
    with open_store(f"sqlite:///{path}") as store:
        fill(store)
        with closing(sqlite3.connect(path, isolation_level=None)) as restoring:
            restoring.execute("DELETE FROM head")
        for call in (
            lambda: store.load_policy("jo"),
            store.load_all_policies,
            lambda: store.changes_since(None),
            lambda: store.wait(0, 0.0),
            lambda: store.transaction().__enter__(),
        ):
            with pytest.raises(StoreUnavailable, match="restore marker"):
                call()
