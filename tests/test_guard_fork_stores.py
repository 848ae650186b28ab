"""Tests of forks in C, as uWSGI's, which run no at-fork hooks."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import ipguard
from ipguard import Guard, Reason, StoreUnavailable, _fork
from ipguard.aio._executor import Executor
from ipguard.stores import _sql, open_store
from ipguard.testing import Outbox
from tests.guards import HOME, OFFICE, comes_true
from tests.postgres import Given, Server, fresh_schema
from tests.test_guard_fork import in_child

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

BOSS = ipguard.Actor(username="boss", email="b@example.com", manages=ipguard.Actor.EVERY_ACCOUNT)


def fork_in_c() -> int:
    """Fork as a C program does that embeds Python, with the GIL held.

    Without hooks, the child's GIL still counts the parent's threads that wait for it, and may wait
    for them. So let them all come to rest first.
    """
    fork = ctypes.PyDLL(None).fork
    threading.Event().wait(0.02)
    return int(fork())


def workflow(store: Any) -> ipguard.Workflow:
    return ipguard.Workflow(store, Outbox(), key=bytes(32))


def restrict(store: Any, name: str, address: str = HOME) -> int:
    return workflow(store).impose(BOSS, name, address, reason="a test").revision


@pytest.fixture(params=["sqlite", "postgres"])
def store(
    request: pytest.FixtureRequest, tmp_path: Path, postgres: Server | Given
) -> Iterator[Any]:
    kind = request.param
    url = (
        f"sqlite:///{tmp_path / 'f.db'}"
        if kind == "sqlite"
        else postgres.url(schema=fresh_schema(), timeout=20)
    )
    with open_store(url) as opened:
        names = ("jsmith", "mlee")
        opened.put_users(
            [ipguard.User(username=name, full_name="", account_id="A1") for name in names]
        )
        restrict(opened, "jsmith")
        yield opened


def test_child_shares_no_connection(store: Any) -> None:
    """With a refresher, an idle connection and remembered users."""
    parked, go_on = threading.Event(), threading.Event()
    wait = store.wait

    def park(revision: int, timeout: float) -> bool:
        parked.set()
        go_on.wait()  # the refresher must not wait for the GIL at the fork: see `fork_in_c`
        return bool(wait(revision, timeout))

    store.wait = park
    with Guard(store, max_staleness=1.0) as guard:
        parked.wait()
        guard.sync()
        assert guard.check("jsmith", OFFICE).reason is Reason.NOT_LISTED

        def child() -> list[object]:
            store.wait = wait
            answers = [guard.check(name, OFFICE).reason for name in ("jsmith", "mlee")]
            revision = restrict(store, "mlee")
            comes_true(lambda: guard.revision >= revision)
            return [*answers, guard.check("mlee", OFFICE).reason, guard.stats().woken_by]

        assert in_child(child, fork_in_c) == [
            "not_listed",
            "unrestricted",
            "not_listed",
            "refresher",
        ]
        go_on.set()
        assert guard.wait_for(store.changes_since(None).head, 10)
        assert guard.check("mlee", OFFICE).reason is Reason.NOT_LISTED
        restrict(store, "mlee", OFFICE)
        assert guard.wait_for(store.changes_since(None).head, 10)
        assert guard.check("mlee", OFFICE)


def test_child_of_a_child_has_its_own_connections(store: Any) -> None:
    """A fork without hooks, then one with, then one without."""
    store.load_policy("jsmith")

    def grandchild() -> int:
        return restrict(store, "mlee")

    def child() -> list[int]:
        found = [len(store.load_policy("jsmith").restrictions)]
        return [*found, in_child(lambda: in_child(grandchild, fork_in_c))]

    head = store.changes_since(None).head
    assert in_child(child, fork_in_c) == [1, head + 1]
    assert store.load_policy("mlee").restrictions
    assert store.changes_since(None).head == head + 1


def test_commit_of_a_child_outlives_its_parents_connection(tmp_path: Path) -> None:
    """SQLite: a child with an inherited lock table would lose its log when the parent closes."""
    path = tmp_path / "f.db"
    store = open_store(f"sqlite:///{path}")
    store.put_users([ipguard.User(username="jsmith", full_name="", account_id="A1")])
    store.load_policy("jsmith")
    ready, go = os.pipe(), os.pipe()

    def child() -> int:
        store.load_policy("jsmith")
        os.write(ready[1], b".")
        os.read(go[0], 1)
        return restrict(store, "jsmith")

    def close() -> None:
        os.read(ready[0], 1)
        store.close()
        os.write(go[1], b".")

    closing = threading.Thread(target=close)

    def fork() -> int:
        pid = fork_in_c()
        if pid:
            closing.start()
        return pid

    assert in_child(child, fork) == 2
    closing.join()
    for end in (*ready, *go):
        os.close(end)
    with open_store(f"sqlite:///{path}") as again:
        assert len(again.load_policy("jsmith").restrictions) == 1


def test_child_refuses_a_file_that_a_statement_was_reading(tmp_path: Path) -> None:
    """SQLite: the connection's thread does not exist in the child, so it cannot be closed."""
    with open_store(f"sqlite:///{tmp_path / 'f.db'}") as store:
        inner: Any = store
        connection = inner._pool.take()
        connection.busy = True

        def child() -> str:
            with suppress(StoreUnavailable):
                return str(store.load_policy("jsmith"))
            return "refused"

        assert in_child(child, fork_in_c) == "refused"
        inner._pool.discard(connection)
        assert store.load_policy("jsmith").revision == 0


def test_transaction_of_the_parent_is_refused_in_the_child(store: Any) -> None:
    with store.transaction() as turn:

        def child() -> list[str]:
            found = []
            acts: list[Callable[[], object]] = [
                lambda: turn.failures("jsmith"),
                lambda: turn.user("jsmith"),
            ]
            for act in acts:
                with suppress(StoreUnavailable):
                    found.append(str(act()))
            return found

        assert in_child(child, fork_in_c) == []
        turn.append(ipguard.Action.IMPOSE, actor="boss", touches=frozenset({"jsmith"}))
    assert store.load_policy("jsmith").restrictions


def test_child_drops_a_table_that_was_being_written(store: Any) -> None:
    guard = Guard(store)
    assert guard.check("jsmith", HOME)
    inside, leave = threading.Event(), threading.Event()

    def write() -> None:
        with guard._table.lock:
            inside.set()
            leave.wait()

    thread = threading.Thread(target=write)
    thread.start()
    inside.wait()

    def child() -> list[object]:
        # From memory, then from the store, which it must not reach with the parent's lock.
        answers: list[object] = [
            guard.check("jsmith", address).reason for address in (HOME, OFFICE)
        ]
        guard._lease.try_sync()
        return [*answers, guard.stats().users, guard.check("jsmith", OFFICE).reason]

    assert in_child(child, fork_in_c) == ["listed", "not_listed", 0, "not_listed"]
    leave.set()
    thread.join()
    assert guard.check("jsmith", HOME)


def test_child_replaces_locks_that_threads_of_the_parent_hold(
    store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ipguard.guard")
    guard = Guard(store)
    guard.check("jsmith", OFFICE)
    executor = Executor(1, 1)
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with (
            guard._tally._lock,
            guard._denial_log._lock,
            guard._lease.breaker._lock,
            executor._lock,
            store.transaction(),
        ):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()

    def child() -> list[object]:
        guard.check("jsmith", OFFICE)
        counted = guard.stats().denials[Reason.NOT_LISTED]
        return [counted, executor._submit(lambda: 5).result(10)]

    assert in_child(child, fork_in_c) == [2, 5]
    leave.set()
    thread.join()


def test_memory_store_is_refused_in_a_child() -> None:
    store = open_store("memory://")
    guard = Guard(store)
    guard.check("jsmith", HOME)

    def child() -> list[object]:
        first = guard.is_allowed("jsmith", HOME)
        with suppress(StoreUnavailable):
            store.load_policy("jsmith")
            first = False
        return [first, guard.check("mlee", HOME).reason]

    assert in_child(child, fork_in_c) == [True, "store_unavailable"]


def test_interrupted_repair_is_repeated() -> None:
    done: list[str] = []

    class Once(_fork.Forkable):
        def _after_fork_in_child(self) -> None:
            done.append("repair")
            if len(done) == 1:
                raise KeyboardInterrupt

    once = Once()
    _fork.register(once)

    def child() -> list[str]:
        with suppress(KeyboardInterrupt):
            _fork.check()
        _fork.check()
        _fork.check()
        return done

    assert in_child(child, fork_in_c) == ["repair", "repair"]
    assert done == []
    _fork._objects.pop(once)


def test_rows_of_another_user_are_refused(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes on one connection would read each other's rows; it is dropped."""
    asked: list[str] = []
    packed_row_of = _sql.packed_row_of

    def of_another(username: str, rows: Any) -> Any:
        asked.append(username)
        return packed_row_of("mlee" if len(asked) == 1 else username, rows)

    guard = Guard(store)
    pool = store._pool
    store.load_policy("jsmith")
    before = tuple(pool._idle)
    monkeypatch.setattr(sys.modules[type(store).__module__], "packed_row_of", of_another)
    with suppress(StoreUnavailable):
        assert guard.check("jsmith", OFFICE).reason in {Reason.STORE_UNAVAILABLE, Reason.NOT_LISTED}
    assert asked
    assert not set(before) & set(pool._idle)
