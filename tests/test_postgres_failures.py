"""Failures and recovery of the PostgreSQL store, with real servers that are killed and frozen.

Calls end in bounded time, with errors of this library, never with an outdated answer; and the store
recovers by itself.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

import ipguard
from ipguard import Actor, Reason, StoreUnavailable
from ipguard.model import Action
from ipguard.stores.postgres import PostgresStore
from ipguard.testing import Outbox
from ipguard.testing._case import together
from tests.pooler import transaction_pooler
from tests.postgres import Server, execute, fresh_schema, own_server, until
from tests.proxy import Proxy
from tests.test_postgres import BOSS, touch, user

pytestmark = pytest.mark.slow

TIMEOUT = 0.5
SLACK = 1.0  # a busy machine's; the deadline itself is TIMEOUT
DIRECT = {"sslmode": "disable", "gssencmode": "disable"}


def works(call: Callable[[], object]) -> bool:
    with suppress(StoreUnavailable):
        call()
        return True
    return False


def calls(store: PostgresStore) -> list[Callable[[], object]]:
    return [
        lambda: store.load_policy("jo"),
        lambda: store.changes_since(None),
        lambda: list(store.load_all_policies()[1]),
        lambda: touch(store, "jo"),
        lambda: store.put_users([user("new")]),
        lambda: store.overview(Actor.EVERY_ACCOUNT),
        lambda: store.history(Actor.EVERY_ACCOUNT),
    ]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server that a test may damage."""
    with own_server() as server:
        yield server


@pytest.fixture
def store(server: Server) -> Iterator[PostgresStore]:
    with PostgresStore(server.url(schema=fresh_schema()), timeout=TIMEOUT) as store:
        store.put_users([user("jo")])
        yield store


# ------------------------------------------------------------------------------- deadlines


def ask_slowly(db: Any) -> None:
    for _ in range(10):
        db.rows("SELECT 1 FROM pg_sleep(?)", (0.4 * TIMEOUT,))


def test_the_waits_of_a_transaction_share_the_timeout(store: PostgresStore) -> None:
    """Statements that are each fast enough fail if together they exceed the timeout."""
    with pytest.raises(StoreUnavailable, match="in time"), store.transaction() as turn:
        ask_slowly(turn.db)  # type: ignore[attr-defined]
    assert touch(store, "jo") == 2


def test_the_waits_of_a_page_share_the_timeout(store: PostgresStore) -> None:
    with pytest.raises(StoreUnavailable, match="in time"), store._pool.snapshot() as session:
        ask_slowly(session)
    assert store.overview(Actor.EVERY_ACCOUNT).items


def test_the_time_of_the_caller_does_not_count(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller that computes for an hour inside a transaction can still commit it."""
    passed = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + passed)
    with store.transaction() as turn:
        monkeypatch.setattr("ipguard.stores.postgres._connection.time", clock)
        for _ in range(2):
            passed += 3600.0
            assert turn.user("jo") is not None
            turn.append(Action.IMPOSE, actor="boss", touches=frozenset({"jo"}))
    monkeypatch.undo()
    assert store.changes_since(None).head == 3


# ------------------------------------------------------------------------------- connections


def test_killed_backends_are_not_noticed(server: Server, store: PostgresStore) -> None:
    """Idle connections that died cost a read or a change nothing but a new connection."""
    for call in calls(store):
        call()
        server.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'ipguard' AND state = 'idle'"
        )
        call()


def test_a_restarted_server_is_found_again(server: Server, store: PostgresStore) -> None:
    """Calls fail at once while it is down, and succeed within two seconds of its return."""
    store.load_policy("jo")
    server.stop()
    for call in calls(store):
        began = time.monotonic()
        assert not works(call)
        assert time.monotonic() - began < SLACK  # no call waits for the deadline
    server.start()
    began = time.monotonic()
    until(lambda: all(works(call) for call in calls(store)), "the store works again", 20)
    assert time.monotonic() - began < 2.0 + SLACK


@pytest.mark.parametrize("what", ["server", "network"])
def test_a_silent_server_or_network_delays_no_call(server: Server, what: str) -> None:
    """While its processes are stopped, or packets vanish, each call ends at its deadline."""
    with Proxy(server.port) as proxy:
        url = server.url(port=proxy.port, schema=fresh_schema(), **DIRECT)
        with PostgresStore(url, timeout=TIMEOUT) as store:
            store.put_users([user("jo")])
            for call in calls(store):
                call()
            proxy.silent = what == "network"
            if what == "server":
                server.send(signal.SIGSTOP)
            try:
                for call in calls(store):
                    began = time.monotonic()
                    assert not works(call)
                    assert time.monotonic() - began < 2 * TIMEOUT + SLACK
            finally:
                proxy.silent = False
                server.send(signal.SIGCONT)
            if what == "network":  # the next call works
                assert all(works(call) for call in calls(store))
            until(lambda: all(works(call) for call in calls(store)), "the store works again", 20)


def test_a_server_that_is_down_at_the_start(server: Server) -> None:
    """A login server starts without the database, denies, and recovers by itself."""
    schema = fresh_schema()
    url = server.url(schema=schema)
    PostgresStore(url).close()
    server.stop()
    with pytest.raises(StoreUnavailable):
        PostgresStore(url, migrate=True)
    with PostgresStore(url, timeout=TIMEOUT) as store, ipguard.Guard(store) as guard:
        assert guard.check("jo", "203.0.113.7").reason is Reason.STORE_UNAVAILABLE
        server.start()
        until(lambda: guard.is_allowed("jo", "203.0.113.7"), "the guard answers", 20)


def test_a_schema_is_not_created_later(server: Server) -> None:
    """If the database was down at the start and has no schema, the store denies."""
    server.stop()
    with PostgresStore(server.url(schema=fresh_schema()), timeout=TIMEOUT) as store:
        server.start()
        with pytest.raises(StoreUnavailable, match="schema"):
            store.load_policy("jo")


def test_the_next_server_is_tried(server: Server, store: PostgresStore) -> None:
    """A host that is dead, or hangs, leaves time for the others."""
    with Proxy(server.port) as hangs:
        hangs.silent = True
        schema = store._options.schema
        url = (
            f"postgresql://postgres@127.0.0.1:1,127.0.0.1:{hangs.port},127.0.0.1:{server.port}"
            f"/postgres?schema={schema}"
        )
        with PostgresStore(url, timeout=1.5) as other:
            began = time.monotonic()
            assert other.load_policy("jo").known
            assert time.monotonic() - began < 1.5 + SLACK
            other._pool.forget()
            began = time.monotonic()
            assert other.load_policy("jo").known  # the one that answered last comes first
            assert time.monotonic() - began < 0.5


# ------------------------------------------------------------------------------- turns


def test_a_lock_that_is_held_is_waited_for_in_bounds(server: Server, store: PostgresStore) -> None:
    """Another client that keeps the writer's lock causes an error, but not a new connection."""
    import psycopg

    schema = store._options.schema
    with psycopg.connect(server.url()) as connection:
        connection.execute(f"SELECT 1 FROM {schema}.head FOR UPDATE")
        for call in (lambda: touch(store, "jo"), lambda: store.put_users([user("al")])):
            began = time.monotonic()
            with pytest.raises(StoreUnavailable, match="lock"):
                call()
            assert time.monotonic() - began < TIMEOUT + SLACK
        assert store.load_policy("jo").known
    assert touch(store, "jo") == 2


def test_a_client_that_vanished_releases_the_lock(server: Server) -> None:
    """If a client is cut off inside a transaction, the server soon ends it."""
    schema = fresh_schema()
    with (
        PostgresStore(server.url(schema=schema), timeout=TIMEOUT) as other,
        Proxy(server.port) as proxy,
    ):
        url = server.url(port=proxy.port, schema=schema, **DIRECT)
        with PostgresStore(url, timeout=TIMEOUT) as store:
            with suppress(StoreUnavailable), store.transaction() as turn:
                turn.set_failures("jo", 7)
                assert turn.failures("jo") == 7
                proxy.silent = True  # the server hears nothing any more
                until(lambda: works(lambda: touch(other, "jo")), "the turn is free", 10)
                turn.append(Action.IMPOSE, actor="boss")
            proxy.cut()
        assert other.changes_since(None).head == 1


def test_a_commit_is_durable(server: Server, store: PostgresStore) -> None:
    """An acknowledged commit survives kill -9, even if the role's default is weaker."""
    server.execute("ALTER ROLE postgres SET synchronous_commit = off")
    try:
        with PostgresStore(server.url(schema=store._options.schema), timeout=TIMEOUT) as lax:
            revision = touch(lax, "jo")
            server.stop(signal.SIGKILL)
            server.start()
            until(lambda: works(lambda: lax.load_policy("jo")), "the store works again", 20)
            assert lax.changes_since(None).head == revision
    finally:
        server.execute("ALTER ROLE postgres RESET synchronous_commit")


# ------------------------------------------------------------------------------- standby


@pytest.fixture
def standby(server: Server) -> Iterator[Server]:
    """A standby of the server, which follows it."""
    other = Server()
    try:
        other.follow(server)
        other.start()
        yield other
    finally:
        other.remove()


def _replayed(primary: Server, standby: Server) -> bool:
    ((sent,),) = primary.execute("SELECT pg_current_wal_lsn()")
    ((replayed,),) = standby.execute("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", str(sent))
    return bool(replayed)


def test_a_standby_gives_no_answers(
    server: Server, store: PostgresStore, standby: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """A server in recovery fails every call; with replica=allow it answers, and the log warns."""
    until(lambda: _replayed(server, standby), "the standby has caught up")
    url = standby.url(schema=store._options.schema)
    with PostgresStore(url, timeout=TIMEOUT) as refused:
        for call in calls(refused):
            with pytest.raises(StoreUnavailable, match="recovery"):
                call()
        with ipguard.Guard(refused) as guard:
            assert guard.check("jo", "203.0.113.7").reason is Reason.STORE_UNAVAILABLE
    caplog.clear()
    with PostgresStore(url, timeout=TIMEOUT, replica="allow") as allowed:
        assert "replica=allow" in caplog.text
        assert allowed.load_policy("jo").known
        assert allowed.changes_since(None).head == 1
        assert allowed.wait(0, 0.0)
        with pytest.raises(StoreUnavailable):
            touch(allowed, "jo")


def test_a_standby_behind_an_open_connection_is_noticed(
    server: Server, store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pooler may change servers: each load and each sync checks for recovery."""
    from ipguard.stores import postgres

    store.load_policy("jo")
    for name in ("_POLICY", "_CHANGES"):
        statement = getattr(postgres, name).replace("pg_is_in_recovery()", "true")
        monkeypatch.setattr(postgres, name, statement)
    with pytest.raises(StoreUnavailable, match="recovery"):
        store.load_policy("jo")
    with pytest.raises(StoreUnavailable, match="recovery"):
        store.changes_since(None)


# ------------------------------------------------------------------------------- the pooler


def test_through_a_transaction_pooler(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ipguard")
    schema = fresh_schema()
    with transaction_pooler(server) as port:
        with PostgresStore(server.url(port=port, schema=schema), timeout=5.0) as store:
            everything_works(store)
            assert store._pool._idle[0].prepare_threshold is None
            until(lambda: store.wait(10**6, 0.1) or "polling" in caplog.text, "it says so", 10)
            caplog.clear()
        with PostgresStore(
            server.url(port=port, schema=schema, listen=server.url()), timeout=5.0
        ) as store:
            until(lambda: store.wait(10**6, 0.1) or "listening" in caplog.text, "it says so", 10)
            head = store.changes_since(None).head
            call = threading.Timer(0.2, touch, (store, "jo"))
            call.start()
            assert store.wait(head, 20.0)
            call.join()


def everything_works(store: PostgresStore) -> None:
    """Run the core functions of a store from several threads at once."""
    store.put_users([user(f"u{n}") for n in range(150)])
    outbox = Outbox()
    flow = ipguard.Workflow(store, outbox, key=bytes(32))

    def work(number: int) -> None:
        name = f"u{number}"
        for address in ("203.0.113.7", "203.0.113.8"):
            request = flow.request(BOSS, name, address)
            flow.confirm(BOSS, request.id, outbox.number_for(request.id))
        flow.impose_many(BOSS, [(f"u{100 + number}", "203.0.113.7")], reason="import")
        assert len(store.load_policy(name).restrictions) == 2
        assert len(flow.overview(BOSS, search=name).items) > 0
        assert len(dict(store.load_all_policies()[1])) > 0
        assert flow.history(BOSS, username=name).items
        with pytest.raises(ZeroDivisionError), store.transaction():
            raise ZeroDivisionError
        store.remove_users([name])

    together(partial(work, n) for n in range(8))
    with ipguard.Guard(store) as guard:
        assert guard.is_allowed("u0", "203.0.113.7")
        assert not guard.is_allowed("u0", "203.0.113.9")
        assert guard.is_allowed("u107", "203.0.113.7")


def test_prepared_statements_behind_a_pooler_are_the_hosts_choice(server: Server) -> None:
    """`prepare=on` always prepares; `off` never does."""
    with PostgresStore(server.url(schema=fresh_schema()), prepare="off") as store:
        for _ in range(10):
            store.load_policy("jo")
        ask = "SELECT count(*) FROM pg_prepared_statements"
        assert store._pool.read(lambda s: s.rows(ask)) == [(0,)]
    with PostgresStore(server.url(schema=fresh_schema()), prepare="on") as store:
        store.load_policy("jo")
        assert store._pool.read(lambda s: s.rows(ask))[0][0] > 0


def test_statements_are_prepared_on_direct_connections(server: Server) -> None:
    """The queries of logins are prepared at their first use."""
    with PostgresStore(server.url(schema=fresh_schema())) as store:
        store.load_policy("jo")
        ask = "SELECT statement FROM pg_prepared_statements"
        ((found,),) = store._pool.read(lambda s: s.rows(ask))
        assert "restrictions" in found
    assert execute(server.url(), "SELECT 1") == [(1,)]
