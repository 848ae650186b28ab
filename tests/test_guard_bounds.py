"""Tests of the table: it is bounded, and stays consistent if a signal interrupts it."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from ipguard import guard as guard_module
from ipguard.errors import StoreUnavailable
from ipguard.guard import Guard
from ipguard.guard._table import Entry, Position, Table
from ipguard.model import RESET
from ipguard.row import OPEN, Row, pack_columns
from tests.guards import ELSEWHERE, HOME, OFFICE, World, new_world


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


def test_capacity_of_one(world: World) -> None:
    world.register("a", "b")
    guard = world.guard(capacity=1)
    for _ in range(3):
        assert guard.is_allowed("a", HOME)
        assert guard.is_allowed("b", HOME)
    assert guard.stats().users == 1
    assert guard.stats().evictions == 5


def test_user_read_again_counts_once(world: World) -> None:
    guard = world.guard(capacity=2)
    for _ in range(3):
        guard.check("jsmith", HOME)
        world.restrict("jsmith", OFFICE) if not guard.revision else world.touch("jsmith")
        guard.sync()
    guard.check("jsmith", HOME)
    assert guard.stats().users == 1
    assert guard.stats().evictions == 0


# -------------------------------------------------------------------------- spellings, addresses


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


def entry_of(guard: Guard, name: str) -> Entry:
    entry = guard._table.rows[name]
    assert type(entry) is Entry
    return entry


def test_last_address_is_remembered(world: World) -> None:
    guard = world.guard()
    guard.check("jsmith", HOME)
    entry = entry_of(guard, "jsmith")
    for n in range(100):
        address = f"2001:db8::{n:x}"
        assert guard.is_allowed("jsmith", address)
        assert entry.text == address
    assert world.store.loads == ["jsmith"]


def test_late_address_of_a_dropped_row_is_lost(world: World) -> None:
    guard = world.guard()
    guard.check("jsmith", HOME)
    old = entry_of(guard, "jsmith")
    world.restrict("jsmith", OFFICE)
    guard.sync()
    old.text = HOME
    assert not guard.is_allowed("jsmith", HOME)
    assert not guard.is_allowed("jsmith", HOME)


# ------------------------------------------------------------------------------- rows


def test_row_of_a_stranger_is_replaced_by_one_of_a_user() -> None:
    table = Table(capacity=10, max_staleness=5.0, deny_unknown=False)
    table.remember("a", OPEN, 1, Position(0))
    assert (list(table.rows), table._ahead, len(table._strangers)) == (["a"], {"a": 1}, 1)
    known = Row.of(pack_columns(True, []))
    table.remember("a", known, 2, Position(2))
    assert (list(table.rows), len(table._users), len(table._strangers)) == (["a"], 1, 0)
    assert table.find("a") is known
    assert table._ahead == {}


# ------------------------------------------------------------------------------------ interrupts

FOLDER = str(Path(guard_module.__file__).parent)


@contextmanager
def interrupted_at(step: int) -> Iterator[list[str]]:
    """Raise KeyboardInterrupt at the `step`th line of the guard that runs, as a signal does.

    Not while a lock is acquired or released: Python checks for no signals there.
    """
    left, reached = [step], list[str]()

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        if event == "line":
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            if line.startswith("with ") or line.endswith(".release()"):
                return trace
            left[0] -= 1
            if not left[0]:
                reached.append(line)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield reached
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)


def at_every_line(act: Callable[[World, Guard], object]) -> Iterator[tuple[World, Guard]]:
    """Yield a world for each line of the guard that a call runs, interrupted at that line."""
    for step in range(1, 1_000):
        world = new_world()
        world.register("jsmith", "adoe")
        guard = world.guard(max_staleness=0.02, capacity=3)
        for name in ("jsmith", "JSmith", "adoe"):
            guard.is_allowed(name, HOME)
            guard.is_allowed(name, HOME)
        world.restrict("jsmith", OFFICE)
        with interrupted_at(step) as reached:
            act(world, guard)
        if not reached:
            assert step > 10
            return
        assert not guard._table.lock.locked(), reached
        yield world, guard
    raise AssertionError("the act does not end")


def still_right(world: World, guard: Guard) -> None:
    """Check the decisions after the lease and one sync."""
    world.pass_time(1)
    guard.sync()
    for _ in range(2):
        assert not guard.is_allowed("jsmith", HOME)
        assert not guard.is_allowed("JSmith", HOME)
        assert guard.is_allowed("jsmith", OFFICE)
        assert guard.is_allowed("adoe", HOME)
        assert guard.is_allowed("new", HOME)
    world.lift_all("jsmith")
    guard.sync()
    assert guard.is_allowed("JSmith", HOME)
    assert guard.stats().users <= 3


def test_sync_interrupted_at_any_line() -> None:
    for world, guard in at_every_line(lambda world, guard: guard.sync()):
        still_right(world, guard)


def test_sync_of_everybody_interrupted_at_any_line() -> None:
    def act(world: World, guard: Guard) -> None:
        world.touch()
        guard.sync()

    for world, guard in at_every_line(act):
        still_right(world, guard)


def test_load_interrupted_at_any_line() -> None:
    def act(world: World, guard: Guard) -> None:
        guard.check("New", HOME)
        guard.check("Newer", HOME)
        guard.check("ADOE", HOME)

    for world, guard in at_every_line(act):
        still_right(world, guard)


def test_reset_corrects_a_store_that_named_no_users(world: World) -> None:
    guard = world.guard()
    assert guard.is_allowed("jsmith", HOME)
    world.restrict("jsmith", OFFICE)
    world.store.changes = lambda changes: changes._replace(usernames=RESET)
    guard.sync()
    assert not guard.is_allowed("jsmith", HOME)
    world.store.down = StoreUnavailable("down")
    assert not guard.is_allowed("jsmith", ELSEWHERE)
