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
from types import SimpleNamespace
from typing import Any

import pytest

import ipguard
from ipguard import Actor, Reason, RequestClosed, StoreUnavailable
from ipguard.model import RESET, Action
from ipguard.stores.postgres import PostgresStore
from ipguard.testing import Outbox
from tests.conftest import rounds
from tests.pooler import transaction_pooler
from tests.postgres import Server, execute, fresh_schema, own_server, until
from tests.proxy import Proxy

pytestmark = pytest.mark.slow

BOSS = Actor(username="boss", email="boss@example.com", manages=Actor.EVERY_ACCOUNT)
TIMEOUT = 0.5
SLACK = 1.0  # a busy machine's; the deadline itself is TIMEOUT
DIRECT = {"sslmode": "disable", "gssencmode": "disable"}


def user(name: str) -> ipguard.User:
    return ipguard.User(username=name, full_name="Some One", account_id="A1", email="s@example.com")


def touch(store: PostgresStore, *names: str) -> int:
    with store.transaction() as turn:
        return turn.append(Action.IMPOSE, actor="boss", touches=frozenset(names)).revision


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
    """The statements of a read share the timeout, too."""
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


def test_a_backend_killed_in_a_transaction_undoes_it(server: Server, store: PostgresStore) -> None:
    """The transaction is rolled back as a whole, and the next one works."""
    before = store.changes_since(None)
    with pytest.raises(StoreUnavailable), store.transaction() as turn:  # noqa: PT012
        turn.set_failures("jo", 7)
        assert turn.failures("jo") == 7
        server.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state LIKE 'idle in%'"
        )
        turn.append(Action.IMPOSE, actor="boss")
    assert store.changes_since(None) == before
    with store.transaction() as turn:
        assert turn.failures("jo") == 0


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


def test_a_frozen_server_delays_no_call(server: Server, store: PostgresStore) -> None:
    """While every process of the server is stopped, each call ends at its deadline."""
    for call in calls(store):
        call()
    server.send(signal.SIGSTOP)
    try:
        for call in calls(store):
            began = time.monotonic()
            assert not works(call)
            assert time.monotonic() - began < 2 * TIMEOUT + SLACK
    finally:
        server.send(signal.SIGCONT)
    until(lambda: all(works(call) for call in calls(store)), "the store works again", 20)


def test_a_silent_network_delays_no_call(server: Server) -> None:
    """When packets vanish, calls end at their deadline, and the next one afterwards works."""
    with Proxy(server.port) as proxy:
        url = server.url(port=proxy.port, schema=fresh_schema(), **DIRECT)
        with PostgresStore(url, timeout=TIMEOUT) as store:
            store.put_users([user("jo")])
            proxy.silent = True
            for call in calls(store):
                began = time.monotonic()
                assert not works(call)
                assert time.monotonic() - began < 2 * TIMEOUT + SLACK
            proxy.silent = False
            assert all(works(call) for call in calls(store))


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


@pytest.mark.parametrize("keep", [True, False])
def test_a_lost_acknowledgement_is_unavailable(server: Server, keep: bool) -> None:
    """A confirm whose commit is not acknowledged may hold or not; trying again shows which."""
    with Proxy(server.port) as proxy:
        url = server.url(port=proxy.port, schema=fresh_schema(), listen="off", **DIRECT)
        with PostgresStore(url, timeout=TIMEOUT) as store:
            store.put_users([user("jo")])
            outbox = Outbox()
            flow = ipguard.Workflow(store, outbox, key=bytes(32))
            request = flow.request(BOSS, "jo", "203.0.113.7")
            number = outbox.number_for(request.id)
            proxy.lose = b"COMMIT\0" if keep else b"INSERT INTO"
            if not keep:
                proxy.silent = True
            with pytest.raises(StoreUnavailable):
                flow.confirm(BOSS, request.id, number)
            assert proxy.lost == int(keep)
            proxy.lose, proxy.silent = None, False
            if keep:
                with pytest.raises(RequestClosed, match="confirmed"):
                    flow.confirm(BOSS, request.id, number)
            else:
                flow.confirm(BOSS, request.id, number)
            assert len(store.load_policy("jo").restrictions) == 1


@pytest.mark.parametrize("sent", [True, False])
def test_a_confirm_cut_off_at_each_step(server: Server, sent: bool) -> None:
    """At whatever step the connection breaks, a confirm holds completely or not at all."""
    schema = fresh_schema()
    outbox, outcomes = Outbox(), []
    with (
        PostgresStore(server.url(schema=schema), listen="off") as sound,
        Proxy(server.port) as proxy,
        PostgresStore(
            server.url(port=proxy.port, schema=schema, listen="off", **DIRECT), timeout=5.0
        ) as store,
    ):
        settings = ipguard.WorkflowSettings(requests_per_hour=10**6)
        flows = [
            ipguard.Workflow(s, outbox, key=bytes(32), settings=settings) for s in (sound, store)
        ]
        sound.put_users([user("jo")])
        for n in range(rounds(1, 15)):
            for step in range(1, 9):  # begin, each question, the commit; then one that is not cut
                store.load_policy("jo")  # a connection is there
                request = flows[0].request(BOSS, "jo", f"10.{n}.{step}.1")
                number = outbox.number_for(request.id)
                before = sound.load_policy("jo")
                proxy.cut_when, proxy.cut_at = "after" if sent else "before", step
                try:
                    flows[1].confirm(BOSS, request.id, number)
                    acknowledged = True
                except StoreUnavailable:
                    acknowledged = False
                proxy.cut_at = 0
                until(lambda: works(lambda: touch(sound)), "the turn is free")
                after = sound.load_policy("jo")
                held = len(after.restrictions) - len(before.restrictions)
                confirmed = sound_state(sound, request.id) == "confirmed"
                assert confirmed == bool(held)
                assert confirmed or not acknowledged
                outcomes.append((step, acknowledged, confirmed))
    # The first step is tried again on a new connection; the seventh is the commit.
    assert {(step, *rest) for step, *rest in outcomes} == {
        (1, True, True),
        *((step, False, False) for step in range(2, 7)),
        (7, False, sent),
        (8, True, True),
    }


def sound_state(store: PostgresStore, request_id: str) -> str:
    with store.transaction() as turn:
        stored = turn.request(request_id)
        assert stored is not None
        return str(stored.request.state)


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


def test_a_promoted_standby_that_lagged(
    server: Server, store: PostgresStore, standby: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """A failover that lost commits is a RESET: guards drop the lost state."""
    schema = store._options.schema
    until(lambda: _replayed(server, standby), "the standby has caught up")
    # From here on it gets nothing.
    standby.execute("ALTER SYSTEM SET primary_conninfo = ''")
    standby.execute("SELECT pg_reload_conf()")
    until(lambda: not standby.execute("SELECT 1 FROM pg_stat_wal_receiver"), "it is cut off")
    with Proxy(server.port) as door:
        url = server.url(port=door.port, schema=schema, listen="off", **DIRECT)
        with (
            PostgresStore(url, timeout=TIMEOUT) as moving,
            ipguard.Guard(moving, max_staleness=1.0) as guard,
        ):
            flow = ipguard.Workflow(moving, Outbox(), key=bytes(32))
            lost = flow.impose(BOSS, "jo", "203.0.113.7", reason="lost in the failover")
            assert guard.check("jo", "203.0.113.7", at_least=lost.revision)
            cursor = moving.changes_since(None)[:2]
            standby_url = standby.url(schema=schema)
            standby.execute("SELECT pg_promote()")
            until(lambda: standby.execute("SELECT pg_is_in_recovery()") == [(False,)], "promotion")
            with PostgresStore(standby_url, timeout=TIMEOUT) as promoted:
                if promoted.changes_since(None).head >= lost.revision:
                    pytest.fail("the standby had the commit: nothing was lost")
                # As many other changes as were lost: the numbers alone would fit.
                ipguard.Workflow(promoted, Outbox(), key=bytes(32)).impose(
                    BOSS, "jo", "203.0.113.8", reason="after the failover"
                )
                assert promoted.changes_since(None).head == cursor[0]
            door._server = standby.port
            door.cut()
            until(
                lambda: (
                    not guard.is_allowed("jo", "203.0.113.7")
                    and guard.is_allowed("jo", "203.0.113.8")
                ),
                "the guard follows",
                20,
            )
            assert moving.changes_since(cursor).usernames is RESET
            until(lambda: "the store's history is not the one known" in caplog.text, "it is told")


# ------------------------------------------------------------------------------- the pooler


def test_through_a_transaction_pooler(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Everything works behind pgbouncer in transaction mode, with many threads."""
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
    errors: list[Any] = []

    def work(number: int) -> None:
        try:
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
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
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
