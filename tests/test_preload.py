"""Preloading over real stores: the same answers, and none wrong while a store is turned over."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ipguard
from ipguard.guard import Guard
from ipguard.model import Reason
from ipguard.packed import pack
from ipguard.stores.postgres import PostgresStore
from ipguard.stores.sqlite import SQLiteStore
from ipguard.testing import FakeClock, Outbox
from tests.conftest import rounds
from tests.guards import HOME, OFFICE, World, comes_true
from tests.postgres import Given, Server, fresh_schema
from tests.twins import STEPS, compare

BOSS = ipguard.Actor(username="boss", email="b@example.com", manages=ipguard.Actor.EVERY_ACCOUNT)


@pytest.fixture
def store(postgres: Server | Given) -> Iterator[PostgresStore]:
    with PostgresStore(postgres.url(), schema=fresh_schema(), listen="off") as opened:
        yield opened


def test_what_the_server_packs_is_what_pack_makes(store: PostgresStore) -> None:
    """Both versions, ranges, expiries, ids and who is not registered: byte for byte."""
    clock = FakeClock()
    world = World(store, clock)
    for n, (text, expires_in) in enumerate(
        [(HOME, None), ("10.0.0.0/8", 60), ("2001:db8::/32", None), ("::1", 0.000001), (OFFICE, -9)]
    ):
        world.restrict("jsmith", text, expires_in=expires_in)
        world.restrict(f"us\u00e9r{n}", text, expires_in=expires_in)
    world.restrict("gone", HOME)
    world.restrict("gone", OFFICE)
    world.register("free")
    store.remove_users(["gone", "us\u00e9r0"])
    revision, policies = store.load_all_policies()
    expected = [(name, pack(policy)) for name, policy in policies]
    assert len(expected) == 7
    again, stream = store.load_all_policies()
    packed: Any = stream
    assert sorted(packed.packed()) == sorted(expected)
    assert again == revision
    assert len(store._client.pool._idle) == 1


def test_a_packed_stream_can_be_left_half_read(store: PostgresStore) -> None:
    """Closed, it gives its connection back; one that was never read, too."""
    world = World(store, FakeClock())
    for name in ("jsmith", "adoe"):
        world.restrict(name, HOME)
    for reads in (0, 1):
        _, stream = store.load_all_policies()
        packed: Any = stream
        rows = packed.packed()
        for _ in range(reads):
            next(rows)
        packed.close()
        assert store._client.pool._open == len(store._client.pool._idle) == 1


@settings(max_examples=rounds(10, 500))
@given(steps=STEPS, deny=st.booleans(), capacity=st.integers(1, 4))
def test_over_sqlite_it_answers_as_a_guard_without_a_table(
    steps: list[tuple[Any, bool, list[Any]]], deny: bool, capacity: int
) -> None:
    """As over the memory store, in `test_guard_preload.py`."""
    clock = FakeClock()
    with (
        tempfile.TemporaryDirectory() as folder,
        SQLiteStore(Path(folder) / "ipguard.db", clock=clock) as store,
    ):
        compare(World(store, clock), steps, deny=deny, capacity=capacity)


def test_over_postgresql_it_answers_as_a_guard_without_a_table(
    postgres: Server | Given,
) -> None:
    """Likewise, whose snapshots are streamed packed where nothing stands between."""

    @settings(max_examples=rounds(6, 300))
    @given(steps=STEPS, deny=st.booleans(), capacity=st.integers(1, 4), direct=st.booleans())
    def check(steps: Any, deny: bool, capacity: int, direct: bool) -> None:
        clock = FakeClock()
        url, name = postgres.url(), fresh_schema()
        with PostgresStore(url, schema=name, clock=clock, listen="off", timeout=60) as store:
            world = World(store, clock)
            if direct:
                world.store.load_all_policies = store.load_all_policies  # type: ignore[method-assign]
            compare(world, steps, deny=deny, capacity=capacity)
        postgres.execute(f'DROP SCHEMA "{name}" CASCADE')

    check()


class Logins:
    """Threads that log users in without end, and note each answer that cannot be right.

    Args:
        guard: Who is asked.
        users: How many; `user0`, `user1`, …
        imported: Returns the revision from which on all may log in from `HOME` alone, and when its
            commit had returned; None before.
    """

    def __init__(
        self, guard: Guard, users: int, imported: Callable[[], tuple[int, float] | None]
    ) -> None:
        self._guard = guard
        self._users = users
        self._imported = imported
        self._stop = threading.Event()
        self.wrong: list[object] = []
        self.answers = 0
        self.unavailable = 0
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
        step = 7919
        while not self._stop.is_set():
            at = (at + step) % self._users
            self._judge(f"user{at}")

    def _judge(self, name: str) -> None:
        imported, began = self._imported(), time.monotonic()
        home = self._guard.check(name, HOME)
        office = self._guard.check(name, OFFICE)
        self.answers += 2
        self.unavailable += (home.reason, office.reason).count(Reason.STORE_UNAVAILABLE)
        if not home and home.reason is not Reason.STORE_UNAVAILABLE:
            self.wrong.append(home)
        # An allow has to rest on what was so before the import, and that not too long ago.
        late = imported is not None and began > imported[1] + 5.0
        now = self._imported()
        if office and (late or (now is not None and office.revision >= now[0])):
            self.wrong.append(office)


def turned_over(store: PostgresStore, users: int, forge: Callable[[], object]) -> Logins:
    """Import a restriction for each user, then make another history of it, under logins."""
    flow = ipguard.Workflow(store, Outbox(), key=bytes(32))
    store.put_users(
        ipguard.User(username=f"user{n}", full_name="U", account_id="A") for n in range(users)
    )
    done: list[tuple[int, float]] = []
    with (
        ipguard.Guard(store, preload=True, capacity=2_000) as guard,
        Logins(guard, users, lambda: done[0] if done else None) as logins,
    ):
        comes_true(lambda: guard.stats().preloaded == 0)
        applied = flow.impose_many(
            BOSS, ((f"user{n}", HOME) for n in range(users)), reason="import"
        )
        done.append((applied.revision, time.monotonic()))
        assert guard.wait_for(applied.revision, 30)
        comes_true(lambda: guard.stats().preloaded == users)
        forge()
        comes_true(lambda: guard.stats().preloaded is None)
        comes_true(lambda: guard.stats().preloaded == users)
        seen = logins.answers
        comes_true(lambda: logins.answers > seen + 200)
    return logins


def test_an_import_and_another_history_under_logins(
    postgres: Server | Given, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody gets in who should not, nor is kept out, while the whole table is filled anew."""
    schema = fresh_schema()
    with PostgresStore(postgres.url(), schema=schema) as store:

        def forge() -> None:
            for table, where in (("changes", "revision = (SELECT revision FROM s.head)"),
                                 ("head", "id = 1")):  # fmt: skip
                postgres.execute(
                    f"UPDATE s.{table} SET token = 'another' WHERE {where}".replace(
                        "s.", f"{schema}."
                    )
                )

        logins = turned_over(store, rounds(3_000, 50_000), forge)
    assert logins.wrong == []
    assert logins.answers > 1_000
    assert "history is not the one known" in caplog.text
