"""How guards are woken over PostgreSQL: by notifications, and by polling when these fail."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

import ipguard
from ipguard.model import Action
from ipguard.stores.postgres import PostgresStore
from ipguard.testing._case import Call
from tests.postgres import Given, Server, fresh_schema, until
from tests.test_postgres import touch

PATIENCE = 20.0


@pytest.fixture
def url(postgres: Server | Given) -> str:
    return postgres.url(schema=fresh_schema())


@pytest.fixture
def writer(url: str) -> Iterator[PostgresStore]:
    """The store as another process has it."""
    with PostgresStore(url, listen="off") as store:
        yield store


@pytest.fixture
def store(writer: PostgresStore, url: str) -> Iterator[PostgresStore]:
    with PostgresStore(url) as store:
        yield store


def listening(store: PostgresStore) -> bool:
    store.wait(10**6, 0.01)
    return store.wake_ups == "listening for changes"


def backend(postgres: Server | Given, store: PostgresStore) -> int:
    """The backend of the store's listener."""
    ask = (
        "SELECT pid FROM pg_stat_activity"
        " WHERE application_name = 'ipguard listener' AND query LIKE %s"
    )
    ((pid,),) = postgres.execute(ask, f"%{store._options.schema}%")
    return int(pid)


def wakes(store: PostgresStore, writer: PostgresStore) -> bool:
    """Return whether a change by the other store wakes a waiter, long before any fallback."""
    head = writer.changes_since(None).head
    threading.Timer(0.05, touch, (writer, "jo")).start()
    return store.wait(head, PATIENCE)


def test_only_changes_of_policies_wake(store: PostgresStore, writer: PostgresStore) -> None:
    """A change that touches no policy, and one that is rolled back, send no notification."""
    until(lambda: listening(store), "it listens")
    count = store._listener.count
    with writer.transaction() as turn:
        turn.append(Action.WRONG_NUMBER, actor="boss")
    with pytest.raises(ZeroDivisionError), writer.transaction() as turn:  # noqa: PT012
        turn.append(Action.IMPOSE, actor="boss", touches=frozenset({"jo"}))
        raise ZeroDivisionError
    assert wakes(store, writer)  # an earlier notification would have arrived before
    assert store._listener.count == count + 1
    assert store._listener.touching == 2


def test_all_waiters_share_one_listener(
    postgres: Server | Given, store: PostgresStore, writer: PostgresStore
) -> None:
    """Many waiters on one store are woken over one connection and one thread."""
    until(lambda: listening(store), "it listens")
    calls = [Call(lambda: store.wait(0, PATIENCE)) for _ in range(10)]
    assert sum(t.name == "ipguard-listener" for t in threading.enumerate()) == 1
    assert backend(postgres, store)
    touch(writer, "jo")
    assert [call.result() for call in calls] == [True] * 10


def test_a_signal_ends_the_wait_and_not_the_listening(
    store: PostgresStore, writer: PostgresStore
) -> None:
    """If a signal handler raises in a waiter, only its wait ends."""

    def late(*_: object) -> None:
        raise TimeoutError("the host's own")

    until(lambda: listening(store), "it listens")
    before = signal.signal(signal.SIGALRM, late)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(TimeoutError, match="the host's own"):
            store.wait(0, PATIENCE)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert listening(store)
    assert wakes(store, writer)


def test_notifications_are_read_without_a_waiter(
    store: PostgresStore, writer: PostgresStore
) -> None:
    """The server's queue does not fill up because of a guard that is busy, or closed."""
    until(lambda: listening(store), "it listens")
    revision = touch(writer, "jo")
    until(lambda: store._listener.touching == revision, "it is read")


def test_a_killed_listener_comes_back(
    postgres: Server | Given, store: PostgresStore, writer: PostgresStore
) -> None:
    """After its backend is terminated it listens again, and misses no change."""
    until(lambda: listening(store), "it listens")
    postgres.execute("SELECT pg_terminate_backend(%s)", backend(postgres, store))
    revision = touch(writer, "jo")
    assert store.wait(revision - 1, PATIENCE)
    until(lambda: listening(store), "it listens again")
    assert wakes(store, writer)


@pytest.mark.slow
def test_a_frozen_listener_costs_no_more_than_time(own_postgres: Server) -> None:
    """While the listener's backend is stopped, a guard syncs each second; then it is replaced."""
    url = own_postgres.url(schema=fresh_schema())
    with (
        PostgresStore(url, listen="off") as writer,
        PostgresStore(url, timeout=0.5) as store,
        ipguard.Guard(store) as guard,
    ):
        until(lambda: listening(store), "it listens")
        frozen = backend(own_postgres, store)
        os.kill(frozen, signal.SIGSTOP)
        try:
            began = time.monotonic()
            revision = touch(writer, "jo")
            assert guard.wait_for(revision, PATIENCE)
            assert time.monotonic() - began < 1.5 + 1.0  # and a busy machine's slack
            until(lambda: not listening(store) or backend(own_postgres, store) != frozen, "gone")
        finally:
            os.kill(frozen, signal.SIGCONT)
        until(lambda: listening(store), "it listens again")
        assert wakes(store, writer)


def test_without_a_listener_a_wait_times_out(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """With `listen=off` there is neither a thread nor a wake-up; the log says so."""
    caplog.set_level(logging.INFO, "ipguard")
    with PostgresStore(url, listen="off") as store:
        assert "polling" in caplog.text
        assert store.wake_ups == "polling: listen=off"
        began = time.monotonic()
        assert not store.wait(0, 0.05)
        assert time.monotonic() - began >= 0.05
        assert store._listener._thread is None
        assert store.wait(touch(store, "jo") - 1, 0.0)


def test_a_listener_that_cannot_connect_logs_it_once(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong listen URL costs wake-ups and one line in the log."""
    with PostgresStore(url, listen="postgresql://u:hunter2@127.0.0.1:1/none") as store:
        until(lambda: store.wait(10**6, 0.5) or "polling" in caplog.text, "it says so")
        store.wait(10**6, 0.5)
        assert caplog.text.count("polling") == 1
        assert "hunter2" not in caplog.text
        assert touch(store, "jo") == 1


def test_a_listener_in_another_database_is_detected(
    postgres: Server | Given, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """If a notification over the pool does not arrive, the log says that the store polls."""
    name = fresh_schema()
    postgres.execute(f"CREATE DATABASE {name}")
    schema = url.partition("schema=")[2].partition("&")[0]
    PostgresStore(postgres.url(name, schema=schema)).close()
    with PostgresStore(url, listen=postgres.url(name)) as store:
        until(lambda: store.wait(10**6, 0.1) or "do not arrive" in caplog.text, "it says so")


def test_notifications_of_others_do_no_harm(
    postgres: Server | Given, store: PostgresStore, writer: PostgresStore
) -> None:
    """Any text on the channel is only a hint."""
    until(lambda: listening(store), "it listens")
    channel = store._options.schema
    for payload in ("", "x", "-1", "1e9", "9" * 30, "999999999", "٣"):
        postgres.execute("SELECT pg_notify(%s, %s)", channel, payload)
    until(lambda: store.wait(0, 0.1), "the one that looks like a revision wakes")
    assert store.changes_since(None).head == 0
    assert not store.wait(0, 0.0)  # the sync has set it right
    assert wakes(store, writer)


def test_closing_ends_the_waiting_and_the_thread(store: PostgresStore) -> None:
    until(lambda: listening(store), "it listens")
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(store.wait(0, 3600.0)))
    thread.start()
    began = time.monotonic()
    store.close()
    thread.join(PATIENCE)
    assert time.monotonic() - began < 2.0
    assert answers in ([False], [])
    assert not any(t.name == "ipguard-listener" for t in threading.enumerate())


def test_a_store_without_waiters_stops_listening(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread ends after a while without waiters, and starts again with the next one."""
    from ipguard.stores.postgres import _listener as _postgres_listen

    until(lambda: listening(store), "it listens")
    monkeypatch.setattr(_postgres_listen, "_IDLE_SECONDS", 0.0)
    until(lambda: store._listener._thread is None, "it stops")
    monkeypatch.undo()
    until(lambda: listening(store), "it listens again")
