"""Preloading over real stores: the same answers, and none wrong while a store is turned over."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipguard.packed import pack
from ipguard.stores.postgres import PostgresStore
from ipguard.stores.sqlite import SQLiteStore
from ipguard.testing import FakeClock
from tests.conftest import rounds
from tests.guards import HOME, OFFICE, World
from tests.postgres import Given, Server, fresh_schema
from tests.turnover import another_history, turned_over
from tests.twins import STEPS, compare


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
    assert len(store._pool._idle) == 1


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
        assert store._pool._open == len(store._pool._idle) == 1


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


def test_an_import_and_another_history_under_logins(
    postgres: Server | Given, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody gets in who should not, nor is kept out, while the whole table is filled anew."""
    schema = fresh_schema()
    with PostgresStore(postgres.url(), schema=schema) as store:
        logins = turned_over(
            store, rounds(3_000, 50_000), lambda: another_history(postgres.execute, schema)
        )
    assert logins.wrong == []
    assert logins.answers > 1_000
    assert "history is not the one known" in caplog.text
