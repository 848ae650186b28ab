"""Preloading from real stores: packed snapshots, equal answers, and a table that is refilled."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipguard import Actor, Guard, Reason, User, Workflow
from ipguard.stores.postgres import PostgresStore
from ipguard.stores.sqlite import SQLiteStore
from ipguard.testing import FakeClock, Outbox
from tests.conftest import rounds
from tests.guards import HOME, OFFICE, Held, World
from tests.postgres import PATIENCE, Given, Server, fresh_schema, until
from tests.twins import STEPS, compare


@pytest.fixture
def store(postgres: Server | Given) -> Iterator[PostgresStore]:
    with PostgresStore(postgres.url(), schema=fresh_schema(), listen="off") as opened:
        yield opened


@pytest.mark.parametrize("reads", [0, 1])
@pytest.mark.parametrize("load", ["load_all_rows", "load_all_policies"])
def test_a_closed_stream_returns_its_connection(
    store: PostgresStore, load: str, reads: int
) -> None:
    """A stream that is closed early, or never read, returns its connection to the pool."""
    world = World(store, FakeClock())
    for name in ("jsmith", "adoe"):
        world.restrict(name, HOME)
    _, stream = getattr(store, load)()
    for _ in range(reads):
        next(stream)
    stream.close()
    assert len(store._pool._slots) == len(store._pool._idle) == 1


class Packing(Held):
    """A store whose guards use the rows that the store itself packs."""

    def load_row(self, username: str) -> tuple[int, bytes]:
        found: tuple[int, bytes] = self.store.load_row(username)  # type: ignore[attr-defined]
        return found

    def load_all_rows(self) -> tuple[int, Iterator[tuple[str, bytes]]]:
        revision, rows = self.store.load_all_rows()  # type: ignore[attr-defined]
        return revision, self._streamed(rows)


@settings(max_examples=rounds(10, 500))
@given(steps=STEPS, deny=st.booleans(), capacity=st.integers(1, 4), packing=st.booleans())
def test_preloaded_answers_over_sqlite(
    steps: list[tuple[Any, bool, list[Any]]], deny: bool, capacity: int, packing: bool
) -> None:
    """A preloaded guard answers like one without preloading."""
    clock = FakeClock()
    with (
        tempfile.TemporaryDirectory() as folder,
        SQLiteStore(Path(folder) / "ipguard.db", clock=clock) as store,
    ):
        world = World(store, clock)
        if packing:
            world.store = Packing(store)
        compare(world, steps, deny=deny, capacity=capacity)


def test_preloaded_answers_over_postgresql(
    postgres: Server | Given,
) -> None:
    """A preloaded guard answers like one without, also from rows that the server packs."""

    @settings(max_examples=rounds(6, 300))
    @given(steps=STEPS, deny=st.booleans(), capacity=st.integers(1, 4), packing=st.booleans())
    def check(steps: Any, deny: bool, capacity: int, packing: bool) -> None:
        clock = FakeClock()
        url, name = postgres.url(), fresh_schema()
        with PostgresStore(url, schema=name, clock=clock, listen="off", timeout=60) as store:
            world = World(store, clock)
            if packing:
                world.store = Packing(store)
            compare(world, steps, deny=deny, capacity=capacity)
        postgres.execute(f'DROP SCHEMA "{name}" CASCADE')

    check()


class Logins:
    """Two threads that log users in all the time and record wrong answers.

    Args:
        guard: The preloaded guard.
        users: The number of users, named `user0`, `user1`, …

    Attributes:
        imported: The revision from which all users are restricted to `HOME`, and the monotonic
            time when its commit had returned; None before.
        wrong: The wrong decisions.
        answers: The number of decisions.
    """

    def __init__(self, guard: Guard, users: int) -> None:
        self.imported: tuple[int, float] | None = None
        self.wrong: list[object] = []
        self.answers = 0
        self._guard, self._users = guard, users
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(at,)) for at in (0, 1)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, at: int) -> None:
        while not self._stop.is_set():
            at = (at + 7919) % self._users
            self._check(f"user{at}")

    def _check(self, name: str) -> None:
        before, began = self.imported, time.monotonic()
        home, office = self._guard.check(name, HOME), self._guard.check(name, OFFICE)
        self.answers += 2
        if not home and home.reason is not Reason.STORE_UNAVAILABLE:
            self.wrong.append(home)
        # OFFICE is allowed only by the state before the import, until the lease is over.
        late = before is not None and began > before[1] + 5.0
        after = self.imported
        if office and (late or (after is not None and office.revision >= after[0])):
            self.wrong.append(office)


@pytest.mark.slow
def test_an_import_and_another_history_under_logins(
    postgres: Server | Given, caplog: pytest.LogCaptureFixture
) -> None:
    """No login is answered wrongly while an import and then a restored backup refill the table."""
    schema, users = fresh_schema(), rounds(3_000, 50_000)
    boss = Actor(username="boss", email="b@example.com", manages=Actor.EVERY_ACCOUNT)
    with PostgresStore(postgres.url(), schema=schema) as store:
        snapshots, load = [], store.load_all_rows

        def load_all_rows() -> Any:
            snapshots.append(time.monotonic())
            return load()

        store.load_all_rows = load_all_rows  # type: ignore[method-assign]
        names = [f"user{n}" for n in range(users)]
        store.put_users(User(username=name, full_name="U", account_id="A") for name in names)
        flow = Workflow(store, Outbox(), key=bytes(32))
        with (
            Guard(store, preload=True, capacity=2_000) as guard,
            Logins(guard, users) as logins,
        ):
            until(lambda: guard.stats().preloaded == 0, "the table is empty")
            applied = flow.impose_many(boss, ((name, HOME) for name in names), reason="import")
            logins.imported = (applied.revision, time.monotonic())
            assert guard.wait_for(applied.revision, PATIENCE)
            until(lambda: guard.stats().preloaded == users, "the import is in the table")
            # A restored backup with as many changes has another token for the last one.
            known = len(snapshots)
            for table in ("changes", "head"):
                postgres.execute(
                    f"UPDATE \"{schema}\".{table} SET token = 'another'"
                    f' WHERE token = (SELECT token FROM "{schema}".head)'
                )
            until(lambda: len(snapshots) > known, "the guard loads the other history")
            until(lambda: guard.stats().preloaded == users, "the other history is in the table")
            seen = logins.answers
            until(lambda: logins.answers > seen + 200, "logins are answered from it")
    assert logins.wrong == []
    assert "history is not the one known" in caplog.text
