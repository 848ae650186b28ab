"""The settings of a PostgreSQL session: those the queries depend on, and outdated sessions.

Tests run on a direct connection, and through pgbouncer in transaction mode if that matters.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import psycopg
import pytest

import ipguard
from ipguard import Actor, Reason, StoreConfigError, StoreError, StoreUnavailable
from ipguard.stores import open_store
from ipguard.stores.postgres import PostgresStore, grants
from ipguard.stores.postgres._connection import SETTINGS, ServerClock, dialect, ticks
from ipguard.testing import Outbox
from tests.pooler import transaction_pooler
from tests.postgres import Given, Server, fresh_schema, until

pytestmark = pytest.mark.slow

BOSS = Actor(username="boss", email="boss@example.com", manages=Actor.EVERY_ACCOUNT)
HOME, ELSEWHERE = "203.0.113.7", "198.51.100.7"
MANY = 150  # more users than are compared one by one


def user(name: str, *, email: str | None = None) -> ipguard.User:
    return ipguard.User(username=name, full_name="Some One", account_id="A1", email=email)


def workflow(store: PostgresStore) -> ipguard.Workflow:
    settings = ipguard.WorkflowSettings(requests_per_hour=10**6)
    return ipguard.Workflow(store, Outbox(), key=bytes(32), settings=settings)


class Site:
    """A database of its own with a schema, a role, and a URL that leads there.

    Attributes:
        name: The name of the database and of the role.
        url: The role's URL.
        server: The server.
        pooled: Whether the URL leads through pgbouncer.
    """

    def __init__(self, server: Server, name: str, *, port: int | None) -> None:
        self.server = server
        self.name = name
        self.pooled = port is not None
        self.url = server.url(name, user=name, port=port, listen="off")

    def execute(self, statement: str) -> list[tuple[object, ...]]:
        """Run statements in the database as the superuser."""
        return self.server.execute(statement, database=self.name)

    def end_sessions(self) -> None:
        """End every session, as an administrator does after a change of settings.

        It waits until they have ended, and until the pooler has noticed.
        """
        ended = self.execute(
            "SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        pids = ",".join(str(pid) for pid, _ in ended) or "0"
        alive = f"SELECT 1 FROM pg_stat_activity WHERE pid IN ({pids})"
        until(lambda: not self.execute(alive), "the sessions have ended")
        until(self._responds, "the pooler has noticed")

    def _responds(self) -> bool:
        try:
            psycopg.connect(self.url.replace("&listen=off", "")).close()
        except psycopg.OperationalError:
            return False
        return True


@pytest.fixture(params=["direct", "pooler"])
def site(request: pytest.FixtureRequest, own_postgres: Server) -> Iterator[Site]:
    """A database whose schema belongs to another role than the one that the URL names."""
    name = fresh_schema()
    own_postgres.execute(f"CREATE ROLE {name} LOGIN")
    own_postgres.execute(f"CREATE DATABASE {name}")
    open_store(own_postgres.url(name, listen="off")).close()
    own_postgres.execute(grants(reader=name, writer=name), database=name)
    with contextlib.ExitStack() as stack:
        port = None
        if request.param == "pooler":
            port = stack.enter_context(transaction_pooler(own_postgres, user=name))
        yield Site(own_postgres, name, port=port)


# ------------------------------------------------------------------------------- row security


@pytest.mark.parametrize("table", ["restrictions", "users", "head", "changes", "schema_version"])
def test_hidden_rows_are_no_answer(
    site: Site, table: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Row-level security on any table that logins read: STORE_UNAVAILABLE, never unrestricted."""
    with PostgresStore(site.url) as store:
        store.put_users([user("jo")])
        workflow(store).impose(BOSS, "jo", HOME, reason="r")
        for _ in range(8):  # more often than a statement is run before it is prepared
            assert len(store.load_policy("jo").restrictions) == 1
        site.execute(f"ALTER TABLE ipguard.{table} ENABLE ROW LEVEL SECURITY")
        calls: list[Callable[[], int]] = [
            lambda: len(store.load_policy("jo").restrictions),
            lambda: len(list(store.load_all_policies()[1])),
            lambda: store.changes_since(None).head - 1,
        ]
        assert sum(_refused(call) for call in calls) >= 1  # not every call reads every table
        caplog.clear()
        with PostgresStore(site.url) as later:
            assert "row-level security" in caplog.text
            for preload in (False, True):
                guard = ipguard.Guard(later, preload=preload)
                assert guard.check("jo", ELSEWHERE).reason is Reason.STORE_UNAVAILABLE
        site.execute(f"ALTER TABLE ipguard.{table} DISABLE ROW LEVEL SECURITY")
        assert len(store.load_policy("jo").restrictions) == 1
        assert store.changes_since(None).head == 2


def _refused(call: Callable[[], int]) -> bool:
    try:
        assert call() == 1
    except StoreUnavailable as exc:
        if "row-level security" not in str(exc):
            raise
        return True
    return False


def test_a_policy_for_one_role_is_no_answer(site: Site) -> None:
    """A policy that shows the role some rows is refused too, although it may show all of them."""
    site.execute(
        "ALTER TABLE ipguard.restrictions ENABLE ROW LEVEL SECURITY;"
        f"CREATE POLICY own ON ipguard.restrictions TO {site.name} USING (true)"
    )
    with PostgresStore(site.url) as store:
        with pytest.raises(StoreUnavailable, match=r"hides rows of restrictions"):
            store.load_policy("jo")
        # A role that bypasses row-level security, as the owner does, reads all rows.
        site.execute(f"ALTER ROLE {site.name} BYPASSRLS")
        assert store.load_policy("jo").restrictions == ()


def test_a_view_in_place_of_a_table_is_no_answer(site: Site) -> None:
    """A view may show fewer rows than there are."""
    with PostgresStore(site.url) as store:
        store.put_users([user("jo")])
        site.execute(
            "ALTER TABLE ipguard.restrictions RENAME TO kept;"
            "CREATE VIEW ipguard.restrictions AS SELECT * FROM ipguard.kept WHERE false;"
            f"GRANT SELECT ON ipguard.restrictions TO {site.name}"
        )
        with PostgresStore(site.url) as later:
            with pytest.raises(StoreUnavailable, match="restrictions must be a table"):
                later.load_policy("jo")
            with pytest.raises(StoreUnavailable, match="restrictions must be a table"):
                later.changes_since(None)


def test_a_server_that_drops_damaged_rows_is_no_answer(site: Site) -> None:
    """With zero_damaged_pages a damaged page is read as an empty one."""
    site.execute(f"ALTER DATABASE {site.name} SET zero_damaged_pages = on")
    site.end_sessions()
    with PostgresStore(site.url) as store:
        with pytest.raises(StoreUnavailable, match="zero_damaged_pages"):
            store.load_policy("jo")
        site.execute(f"ALTER DATABASE {site.name} RESET zero_damaged_pages")
        site.end_sessions()
        assert store.load_policy("jo").restrictions == ()


def test_hidden_rows_of_requests_stop_a_change(site: Site) -> None:
    """Tables that logins do not read are read with the same setting."""
    with PostgresStore(site.url) as store:
        store.put_users([user("jo")])
        site.execute("ALTER TABLE ipguard.requests ENABLE ROW LEVEL SECURITY")
        with pytest.raises(StoreUnavailable, match="row-level security"):
            workflow(store).request(BOSS, "jo", HOME)
        assert store.load_policy("jo").known


# ------------------------------------------------------------------------------- the search path

EVIL = """
CREATE SCHEMA evil;
GRANT ALL ON SCHEMA evil TO public;
CREATE TABLE evil.ended_restrictions (id TEXT);
CREATE TABLE evil.staged_restrictions (seq BIGINT, username TEXT);
CREATE TABLE evil.staged_users (seq BIGINT, username TEXT);
CREATE TABLE evil.changed_users (username TEXT);
CREATE TABLE evil.staged_names (seq BIGINT, username TEXT);
CREATE TABLE evil.loot (what TEXT);
GRANT ALL ON ALL TABLES IN SCHEMA evil TO public;
CREATE FUNCTION evil.steal() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF pg_trigger_depth() = 1 THEN
        INSERT INTO evil.loot SELECT email FROM ipguard.users;
        INSERT INTO evil.ended_restrictions SELECT id FROM ipguard.restrictions;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER steal AFTER INSERT ON evil.ended_restrictions
    FOR EACH STATEMENT EXECUTE FUNCTION evil.steal();
CREATE FUNCTION evil.pg_is_in_recovery() RETURNS boolean LANGUAGE sql AS 'SELECT true';
CREATE FUNCTION evil.clock_timestamp() RETURNS timestamptz
    LANGUAGE sql AS $$SELECT timestamptz '1999-01-01'$$;
CREATE FUNCTION evil.length(bytea) RETURNS int LANGUAGE sql AS 'SELECT 4';
CREATE FUNCTION evil.set_config(text, text, boolean) RETURNS text
    LANGUAGE sql AS $$SELECT ''$$;
CREATE FUNCTION evil.never(text, text) RETURNS boolean LANGUAGE sql AS 'SELECT false';
CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.never);
CREATE FUNCTION evil.always(bigint, integer) RETURNS boolean LANGUAGE sql AS 'SELECT true';
CREATE OPERATOR evil.<> (LEFTARG = bigint, RIGHTARG = integer, FUNCTION = evil.always);
CREATE FUNCTION evil.never(bigint, integer) RETURNS boolean LANGUAGE sql AS 'SELECT false';
CREATE OPERATOR evil.= (LEFTARG = bigint, RIGHTARG = integer, FUNCTION = evil.never);
"""


@pytest.mark.parametrize("path", ["evil, pg_temp", "evil, pg_catalog", "evil, pg_catalog, pg_temp"])
def test_a_search_path_changes_no_query(site: Site, path: str) -> None:
    """Tables, functions and operators of another schema are not used, whatever the default path."""
    site.execute(EVIL)
    site.execute(f"ALTER DATABASE {site.name} SET search_path = {path}")
    site.end_sessions()
    names = [f"u{n:03}" for n in range(MANY)]
    with PostgresStore(site.url) as store:
        store.put_users([user("jo", email="jo@example.com"), user("lee")])
        flow = workflow(store)
        flow.impose(BOSS, "lee", HOME, reason="r")
        store.put_users([user(name) for name in names])
        flow.impose_many(BOSS, [("jo", "2001:db8::1"), ("u001", HOME)], reason="r")
        store.remove_users(["u002"])
        assert [str(each.addresses) for each in store.load_policy("lee").restrictions] == [HOME]
        assert len(flow.overview(BOSS, search="u", limit=MANY).items) == MANY - 1
        assert abs(store.now() - datetime.now(UTC)).total_seconds() < 60
        for preload in (False, True):
            guard = ipguard.Guard(store, preload=preload)
            guard.sync()
            assert guard.check("lee", ELSEWHERE).reason is Reason.NOT_LISTED
            assert guard.check("jo", "2001:db8::1").reason is Reason.LISTED
            assert guard.check("u002", HOME).reason is not Reason.LISTED
    taken = "evil.loot", "evil.staged_restrictions", "evil.staged_users", "evil.staged_names"
    assert [site.execute(f"SELECT count(*) FROM {each}") for each in taken] == [[(0,)]] * 4


def test_other_settings_change_no_query(site: Site) -> None:
    """Imports and reads do not depend on how values are written in SQL."""
    for name, value in (
        ("standard_conforming_strings", "off"),
        ("bytea_output", "escape"),
        ("DateStyle", "German, DMY"),
        ("TimeZone", "Asia/Kathmandu"),
        ("IntervalStyle", "sql_standard"),
        ("default_transaction_isolation", "serializable"),
        ("default_transaction_deferrable", "on"),
    ):
        site.execute(f"ALTER DATABASE {site.name} SET {name} = '{value}'")
    site.end_sessions()
    with PostgresStore(site.url) as store:
        store.put_users([user(f"u{n}") for n in range(MANY)])
        flow = workflow(store)
        flow.impose_many(BOSS, [(f"u{n}", f"192.0.2.{n}") for n in range(MANY)], reason="r")
        label = "L\u00f6 'x' \\ \"q\""
        flow.impose(BOSS, "u1", "2001:db8::5c/128", reason="r", label=label)
        held = store.load_policy("u1").restrictions
        assert {str(each.addresses) for each in held} == {"192.0.2.1", "2001:db8::5c"}
        assert {each.label for each in held} == {"", label}
        assert abs(store.now() - datetime.now(UTC)).total_seconds() < 60


def test_the_settings_last_as_long_as_the_connection_is_ours(site: Site) -> None:
    """A direct session keeps them; through a pooler no other client gets to see them."""
    with PostgresStore(site.url) as store:
        store.put_users([user(f"u{n}") for n in range(MANY)])
        store.load_policy("jo")
        store.changes_since(None)
        (idle,) = store._pool._idle
        assert idle.settled is not site.pooled
        shown = {name: idle.execute(f"SHOW {name}").fetchone() for name in SETTINGS}
        if not site.pooled:
            assert shown == {name: (value,) for name, value in SETTINGS.items()}
            return
    url = site.url.replace("&listen=off", "")
    for _ in range(8):  # each of the pooler's sessions
        with psycopg.connect(url, autocommit=True) as other:
            assert other.execute("SHOW search_path").fetchone() == ('"$user", public',)
            assert other.execute("SHOW row_security").fetchone() == ("on",)


@pytest.mark.parametrize("site", ["direct"], indirect=True)
def test_without_prepared_statements_no_setting_lasts(site: Site) -> None:
    """A pooler that reports the server's own process number looks like a direct connection."""
    with PostgresStore(site.url, prepare="off") as store:
        store.put_users([user("jo")])
        (idle,) = store._pool._idle
        assert idle.execute("SHOW row_security").fetchone() == ("on",)
        site.execute("ALTER TABLE ipguard.restrictions ENABLE ROW LEVEL SECURITY")
        with pytest.raises(StoreUnavailable, match="row-level security"):
            store.load_policy("jo")


# ------------------------------------------------------------------------------- times

FIRST, LAST = -(2**63), 2**63 - 1


@pytest.mark.parametrize("preload", [False, True])
@pytest.mark.parametrize(
    ("expires_at", "reason"), [(LAST, Reason.LISTED), (FIRST, Reason.NOT_LISTED)]
)
@pytest.mark.parametrize("scheme", ["postgresql", "sqlite"])
def test_a_time_beyond_the_calendar_breaks_no_login(
    scheme: str,
    expires_at: int,
    reason: Reason,
    preload: bool,
    postgres: Server | Given,
    tmp_path: Path,
) -> None:
    """Another program may have stored one; it decides what the number says, in every column."""
    name = fresh_schema()
    path = tmp_path / "a.db"
    url = postgres.url(schema=name) if scheme == "postgresql" else f"sqlite:///{path}"
    with contextlib.closing(open_store(url)) as store:
        store.put_users([user("jo")])
        outbox = Outbox()
        flow = ipguard.Workflow(store, outbox, key=bytes(32))
        flow.impose(BOSS, "jo", HOME, reason="r")
        flow.request(BOSS, "jo", ELSEWHERE)
        for statement in (
            f"UPDATE restrictions SET created_at = {-expires_at - 1}, expires_at = {expires_at}",
            f"UPDATE requests SET requested_at = {FIRST}, restriction_expires_at = {LAST}",
            f"UPDATE changes SET at = {expires_at}",
        ):
            if scheme == "postgresql":
                postgres.execute(f"SET search_path TO {name}; {statement}")
            else:
                with contextlib.closing(sqlite3.connect(path)) as connection, connection:
                    connection.execute(statement)
        guard = ipguard.Guard(store, preload=preload)
        guard.sync()
        assert guard.check("jo", HOME).reason is reason
        assert guard.check("jo", ELSEWHERE).reason is Reason.NOT_LISTED
        assert len(flow.overview(BOSS).items) == 1
        assert {change.at.year for change in flow.history(BOSS).items} <= {1, 9999}
        assert flow.request(BOSS, "jo", "192.0.2.1").requested_at.year > 2000


def test_a_clock_beyond_the_calendar_stops_at_its_end() -> None:
    clock = ServerClock()
    for micros, year in ((LAST, 9999), (FIRST, 1), (253_402_300_799_999_999, 9999)):
        clock.set(micros, ticks() - 5)
        assert clock.now().year == year


# ------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "schema",
    ["50%off", "a%sb", "%(x)s", "a?b", "back\\slash", 'q"uo"te', "a'b", "FROM head", "{x}", "$1"],
)
def test_a_schema_may_have_any_name(postgres: Server | Given, schema: str) -> None:
    """No character of a schema's name is taken for a placeholder, a quote or a table."""
    postgres.execute(f"DROP SCHEMA IF EXISTS {psycopg.sql.Identifier(schema).as_string()} CASCADE")
    with PostgresStore(postgres.url(), schema=schema, timeout=30.0) as store:
        store.put_users([user("jo")])
        store.put_users([user(f"u{n}") for n in range(MANY)])
        flow = workflow(store)
        revision = flow.impose(BOSS, "jo", HOME, reason="r").revision
        flow.impose_many(BOSS, [("u1", HOME)], reason="r")
        store.remove_users(["u2"])
        assert len(flow.overview(BOSS, search="u", limit=MANY).items) == MANY - 1
        assert store.wait(revision - 1, 5.0)
        assert [len(policy.restrictions) for _, policy in store.load_all_policies()[1]] == [1, 1]


def test_the_reserved_names_are_refused() -> None:
    """PostgreSQL lets no one create a schema whose name begins with pg_."""
    with pytest.raises(StoreConfigError, match="reserves"):
        PostgresStore("postgresql://127.0.0.1:1/x", schema="pg_temp2x")


def test_temporary_tables_are_qualified() -> None:
    """Every reference to one is qualified, except in its CREATE statement."""
    found = dialect(
        "INSERT INTO changed_users SELECT username FROM staged_users s JOIN staged_names n"
        " ON n.username = s.username",
        "x",
    )
    assert found.count("pg_temp.") == 3
    assert "ON pg_temp.staged_users (" in dialect("CREATE INDEX i ON staged_users (seq)", "x")


# ------------------------------------------------------------------------------- outdated sessions


def read_only(site: Site, on: bool) -> None:
    value = "on" if on else "off"
    site.server.execute(f"ALTER DATABASE {site.name} SET default_transaction_read_only = {value}")


def role_of_the_session(site: Site, on: bool) -> None:
    site.execute(f"ALTER ROLE {site.name} {'SET role = nothing' if on else 'RESET role'}")


@pytest.mark.parametrize("mode", [read_only, role_of_the_session])
@pytest.mark.parametrize("site", ["direct"], indirect=True)
def test_a_session_from_a_bad_time_is_not_used_again(
    site: Site, mode: Callable[[Site, bool], None]
) -> None:
    """Sessions keep the defaults of when they began: once these are right, the next change works.

    Both kinds of change are tried while the database refuses them: one that is refused by its
    first statement, and one that has staged rows before it is refused.
    """
    with contextlib.suppress(psycopg.errors.DuplicateObject):
        site.execute("CREATE ROLE nothing; GRANT USAGE ON SCHEMA ipguard TO nothing")
    site.execute(f"GRANT nothing TO {site.name}")
    with PostgresStore(site.url) as store:
        store.put_users([user("jo")])
        flow = workflow(store)
        mode(site, True)
        site.end_sessions()
        with pytest.raises(StoreError):
            flow.impose(BOSS, "jo", HOME, reason="r")
        with pytest.raises(StoreError):
            flow.impose_many(BOSS, [("jo", HOME)], reason="r")
        with contextlib.suppress(StoreError):
            store.load_policy("jo")  # a read works on a read-only session, which stays idle
        mode(site, False)
        flow.impose(BOSS, "jo", HOME, reason="r")
        assert len(store.load_policy("jo").restrictions) == 1


@pytest.mark.parametrize("site", ["direct"], indirect=True)
def test_a_bulk_change_drops_every_outdated_session(site: Site) -> None:
    """A failure after the first statement is reported, and the next attempt works."""
    with PostgresStore(site.url) as store:
        store.put_users([user("jo")])
        read_only(site, True)
        site.end_sessions()
        pool = store._pool
        sessions = [pool.take(store._pool.deadline()) for _ in range(3)]
        for session in sessions:
            pool.give(session)
        read_only(site, False)
        with pytest.raises(StoreUnavailable, match="read-only"):
            workflow(store).impose_many(BOSS, [("jo", HOME)], reason="r")
        assert not pool._idle
        workflow(store).impose_many(BOSS, [("jo", HOME)], reason="r")
        assert len(pool._slots) == len(pool._idle)


def test_a_session_that_ends_within_a_batch(site: Site) -> None:
    """The error is the server's, not the driver's that it cannot leave its pipeline mode."""
    with PostgresStore(site.url) as store:
        store.put_users([user("jo")])
        (idle,) = store._pool._idle
        end = ("SELECT pg_terminate_backend(pg_backend_pid())", ())
        for statements in ([end], [end, ("SELECT 1", ())]):
            connection = store._pool.take(store._pool.deadline())
            with pytest.raises(StoreUnavailable, match=r"terminating|closed|crash"):
                connection.run_batch(statements)
            assert not connection.usable
            store._pool.give(connection)
            assert connection.closed
        assert idle.closed
        assert store.load_policy("jo").known
        assert len(store._pool._slots) == len(store._pool._idle)


@pytest.mark.parametrize("site", ["direct"], indirect=True)
def test_an_error_of_the_statement_keeps_the_connection(site: Site) -> None:
    """A duplicate key says nothing about the session."""
    with PostgresStore(site.url) as store:
        store.load_policy("jo")
        (before,) = store._pool._idle
        with pytest.raises(StoreError):
            store._pool.read(lambda it: it.rows("SELECT 1 / 0"))
        assert list(store._pool._idle) == [before]
