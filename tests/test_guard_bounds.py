"""Tests of the table: it is bounded, and has one row for each user."""

from __future__ import annotations

from typing import Any

import pytest

from ipguard.guard import Guard
from ipguard.guard._table import Position, Table
from ipguard.model import RESET
from ipguard.row import OPEN, pack_columns
from tests.guards import HOME, OFFICE, World, new_world


@pytest.fixture
def world() -> World:
    return new_world()


def users(guard: Guard) -> list[str]:
    return sorted(guard._table.rows)


# ------------------------------------------------------------------------------------- capacity


def test_oldest_user_is_evicted_first(world: World) -> None:
    world.register("a", "b", "c", "d")
    guard = world.guard(capacity=3)
    for name in "abc":
        guard.check(name, HOME)
    assert guard.stats().evictions == 0
    guard.check("d", HOME)
    assert users(guard) == ["b", "c", "d"]
    assert (guard.stats().users, guard.stats().evictions) == (3, 1)
    assert guard.is_allowed("a", HOME)
    assert users(guard) == ["a", "c", "d"]


def test_strangers_are_evicted_before_users(world: World) -> None:
    world.register("registered")
    world.restrict("restricted", HOME)
    world.inner.remove_users(["restricted"])
    guard = world.guard(capacity=3)
    for name in ("registered", "restricted", "stranger", "another"):
        guard.check(name, HOME)
    assert users(guard) == ["another", "registered", "restricted"]
    world.register("third")
    guard.check("third", HOME)
    assert users(guard) == ["registered", "restricted", "third"]
    guard.check("more", HOME)
    assert users(guard) == ["registered", "restricted", "third"]
    assert guard.stats().evictions == 3


def test_invented_usernames_evict_no_real_user(world: World, rounds: Any) -> None:
    real = [f"user{n}" for n in range(50)]
    world.register(*real)
    guard = world.guard(capacity=60)
    for name in real:
        guard.check(name, HOME)
    flood = rounds(2_000, 200_000)
    for n in range(flood):
        guard.is_allowed(f"Invented{n}", HOME)
    stats = guard.stats()
    assert (stats.users, stats.evictions) == (60, flood - 10)
    assert len(guard._table._users) == 50
    assert len(guard._table._ahead) == 0
    world.store.loads.clear()
    assert all(guard.is_allowed(name, HOME) for name in real)
    assert world.store.loads == []


def test_rows_read_ahead_are_bounded_by_the_capacity(world: World) -> None:
    guard = world.guard(capacity=5)
    guard.sync()
    world.wrong_guess()
    for n in range(100):
        guard.check(f"invented{n}", HOME)
    assert len(guard._table._ahead) == 5
    world.store.changes = lambda changes: changes._replace(usernames=RESET)
    guard.sync()
    assert len(guard._table._ahead) == 0
    assert guard.stats().users == 0


def test_user_read_again_counts_once(world: World) -> None:
    guard = world.guard(capacity=2)
    for _ in range(3):
        guard.check("jsmith", HOME)
        world.restrict("jsmith", OFFICE) if not guard.revision else world.touch("jsmith")
        guard.sync()
    guard.check("jsmith", HOME)
    assert guard.stats().users == 1
    assert guard.stats().evictions == 0


def test_dropped_user_leaves_its_place(world: World) -> None:
    world.register("a", "b", "c")
    guard = world.guard(capacity=2)
    for name in "ab":
        guard.check(name, HOME)
    world.touch("a")
    guard.sync()
    guard.check("c", HOME)
    assert users(guard) == ["b", "c"]
    assert guard.stats().evictions == 0


def test_users_and_strangers_are_not_counted_as_preloaded(world: World) -> None:
    world.register("mlee")
    world.restrict("jsmith", HOME)
    guard = world.guard(preload=True, unknown_users="deny")
    guard.sync()
    for name in ("mlee", "stranger", "another"):
        guard.check(name, HOME)
    assert (guard.stats().users, guard.stats().preloaded) == (4, 1)


# ------------------------------------------------------------------------------------ spellings


def test_user_is_remembered_once_for_all_spellings(world: World) -> None:
    spellings = ["jsmith", "JSmith", "JSMITH", "\uff4asmith"]
    guard = world.guard()
    for spelling in spellings:
        assert guard.is_allowed(spelling, HOME)
        assert guard.is_allowed(spelling, HOME)
    assert users(guard) == ["jsmith"]
    assert world.store.loads == ["jsmith"]
    world.restrict("jsmith", OFFICE)
    guard.sync()
    assert users(guard) == []
    for spelling in spellings:
        assert not guard.is_allowed(spelling, HOME)
        assert guard.is_allowed(spelling, OFFICE)
    assert world.store.loads == ["jsmith", "jsmith"]


# ------------------------------------------------------------------------------- rows


def test_row_of_a_stranger_is_replaced_by_one_of_a_user() -> None:
    table = Table(capacity=10, max_staleness=5.0, deny_unknown=False)
    table.remember("a", OPEN, 1, Position(0))
    assert (list(table.rows), table._ahead, len(table._strangers)) == (["a"], {"a": 1}, 1)
    known = pack_columns(True, [])
    table.remember("a", known, 2, Position(2))
    assert (list(table.rows), len(table._users), len(table._strangers)) == (["a"], 1, 0)
    assert table.find("a") is known
    assert table._ahead == {}
