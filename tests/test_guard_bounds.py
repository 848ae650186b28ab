"""What a guard remembers is bounded, whatever is asked, and dropped whole, whatever interrupts."""

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
from ipguard.guard._table import Position, Row, Table
from ipguard.model import RESET, Policy
from tests.guards import ELSEWHERE, HOME, OFFICE, World, new_world


@pytest.fixture
def world() -> World:
    return new_world()


def users(guard: Guard) -> list[str]:
    return sorted({entry.spellings[0] for entry in guard._table.rows.values()})


# ------------------------------------------------------------------------------------- capacity


def test_the_oldest_user_goes_first(world: World) -> None:
    """At `capacity` users, one more takes the place of the one that came first."""
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


def test_strangers_go_before_users(world: World) -> None:
    """Whom nobody registered and nobody restricted is forgotten first, however late it came."""
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


def test_a_flood_of_invented_names_pushes_out_nobody(world: World, rounds: Any) -> None:
    """However many names a client invents, real users stay remembered and memory stays bounded."""
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
    assert len(guard._table.rows) == 50 + 10 * 2
    assert len(guard._table._users) == 50
    assert len(guard._table._ahead) == 0
    world.store.loads.clear()
    assert all(guard.is_allowed(name, HOME) for name in real)
    assert world.store.loads == []


def test_who_is_read_ahead_and_evicted_is_forgotten_altogether(world: World) -> None:
    """What is kept to drop at the next sync is bounded by the capacity too."""
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


def test_a_capacity_of_one(world: World) -> None:
    """The smallest cache there is still answers each user."""
    world.register("a", "b")
    guard = world.guard(capacity=1)
    for _ in range(3):
        assert guard.is_allowed("a", HOME)
        assert guard.is_allowed("b", HOME)
    assert guard.stats().users == 1
    assert guard.stats().evictions == 5


def test_a_user_read_again_takes_no_second_place(world: World) -> None:
    """A change of a user, and its reading, leave one entry, with the new answer."""
    guard = world.guard(capacity=2)
    for _ in range(3):
        guard.check("jsmith", HOME)
        world.restrict("jsmith", OFFICE) if not guard.revision else world.touch("jsmith")
        guard.sync()
    guard.check("jsmith", HOME)
    assert guard.stats().users == 1
    assert guard.stats().evictions == 0


# -------------------------------------------------------------------------- spellings, addresses


def test_a_user_is_dropped_under_every_spelling(world: World) -> None:
    """Each spelling is answered fast, and none outlives a change."""
    spellings = ["jsmith", "JSmith", "JSMITH", "\uff4asmith"]
    guard = world.guard()
    for spelling in spellings:
        assert guard.is_allowed(spelling, HOME)
        assert guard.is_allowed(spelling, HOME)
    assert sorted(guard._table.rows) == sorted(spellings)
    assert world.store.loads == ["jsmith"]
    world.restrict("jsmith", OFFICE)
    guard.sync()
    assert guard._table.rows == {}
    for spelling in spellings:
        assert not guard.is_allowed(spelling, HOME)
        assert guard.is_allowed(spelling, OFFICE)


def test_an_evicted_user_is_gone_under_every_spelling(world: World) -> None:
    """Nothing is left that a reader could find and no drop would."""
    world.register("jsmith", "adoe")
    guard = world.guard(capacity=1)
    for spelling in ("jsmith", "JSmith"):
        guard.check(spelling, HOME)
    guard.check("adoe", HOME)
    assert list(guard._table.rows) == ["adoe"]


def test_the_first_spelling_is_remembered_at_once(world: World) -> None:
    """A user first seen under another spelling is found by it the next time, without a lock."""
    guard = world.guard()
    guard.check("JSmith", HOME)
    assert sorted(guard._table.rows) == ["JSmith", "jsmith"]
    assert guard._table.rows["JSmith"] is guard._table.rows["jsmith"]


def test_spellings_are_bounded(world: World) -> None:
    """A name of eight letters has 256 spellings: eight are remembered, all are answered."""
    guard = world.guard()
    for n in range(256):
        spelling = "".join(
            letter.upper() if n >> i & 1 else letter for i, letter in enumerate("username")
        )
        assert guard.is_allowed(spelling, HOME)
        assert guard.is_allowed(spelling, HOME)
    assert len(guard._table.rows) == 8
    assert world.store.loads == ["username"]


def test_addresses_are_bounded(world: World) -> None:
    """A client with a whole network fills no memory, and is answered from it all the same."""
    guard = world.guard()
    guard.check("jsmith", HOME)
    entry = guard._table.rows["jsmith"]
    sizes = set()
    for n in range(1_000):
        assert guard.is_allowed("jsmith", f"2001:db8::{n:x}")
        sizes.add(len(entry))
    assert sizes == set(range(1, 65))
    assert world.store.loads == ["jsmith"]


def test_what_is_not_allowed_is_not_remembered(world: World) -> None:
    """Denials take no memory: they may be tried without end."""
    world.restrict("jsmith", OFFICE)
    guard = world.guard()
    for n in range(200):
        assert not guard.is_allowed("jsmith", f"10.0.0.{n}")
        assert not guard.is_allowed("jsmith", f"10.0.0.{n}x")
    assert guard._table.rows["jsmith"] == set()


def test_a_late_spelling_of_a_dropped_user_is_not_kept(world: World) -> None:
    """A thread that still holds an entry after its drop cannot bring it back."""
    guard = world.guard()
    guard.check("jsmith", HOME)
    old = guard._table.rows["jsmith"]
    world.restrict("jsmith", OFFICE)
    guard.sync()
    guard._table._spell(old, "JSmith")
    assert guard._table.rows == {}
    guard.check("jsmith", HOME)
    guard._table._spell(old, "JSmith")
    assert "JSmith" not in guard._table.rows
    assert not guard.is_allowed("JSmith", HOME)


def test_a_late_address_of_a_dropped_user_is_lost(world: World) -> None:
    """What a late reader adds to a dropped entry nobody finds."""
    guard = world.guard()
    guard.check("jsmith", HOME)
    old = guard._table.rows["jsmith"]
    world.restrict("jsmith", OFFICE)
    guard.sync()
    old.add(HOME)
    assert not guard.is_allowed("jsmith", HOME)
    assert not guard.is_allowed("jsmith", HOME)


# ------------------------------------------------------------------------------- rows


def test_a_drop_names_users_not_spellings(world: World) -> None:
    """Names that are not held are passed over, and other users stay."""
    guard = world.guard()
    for name in ("A", "B"):
        guard.check(name, HOME)
    world.touch("unheard", "a")
    guard.sync()
    assert sorted(guard._table.rows) == ["B", "b"]
    assert guard.stats().users == 1


def test_a_user_who_becomes_known_is_no_longer_a_stranger() -> None:
    """A row that is replaced changes its place and its spellings, and is not ahead any more."""
    table = Table(capacity=10, max_staleness=5.0, deny_unknown=False)
    stranger = Policy(revision=1, restrictions=(), known=False)
    table.remember("a", "A", stranger, Position(0))
    assert (list(table.rows), table._ahead) == (["a", "A"], {"a"})
    known = Policy(revision=2, restrictions=(), known=True)
    table.remember("a", "a", known, Position(2))
    assert (len(table), list(table.rows), len(table._strangers)) == (1, ["a"], 0)
    assert table._ahead == set()


def test_bounds_of_the_three_kinds_of_user(world: World) -> None:
    """Anywhere, nowhere, and what is listed: as the flat bounds that a bisection wants."""
    unknown = Policy(revision=1, restrictions=(), known=False)
    assert Row("a", unknown, deny_unknown=False).ipv4 == (0,)
    assert Row("a", unknown, deny_unknown=False).ipv6 == (0,)
    assert Row("a", unknown, deny_unknown=True).ipv4 == ()
    assert Row("a", unknown, deny_unknown=True).ipv6 == ()
    world.restrict("jsmith", "10.0.0.0/8")
    world.restrict("jsmith", "2001:db8::/32")
    world.restrict("jsmith", HOME, expires_in=60)
    listed = Row("jsmith", world.inner.load_policy("jsmith"), deny_unknown=True)
    assert listed.ipv4 == (10 << 24, 11 << 24)
    assert listed.ipv6 == (0x20010DB8 << 96, 0x20010DB9 << 96)


# ------------------------------------------------------------------------------------ interrupts

FOLDER = str(Path(guard_module.__file__).parent)


@contextmanager
def interrupted_at(step: int) -> Iterator[list[str]]:
    """Raise KeyboardInterrupt at a line of the guard, the `step`th to run, as a signal does.

    Not where a lock is being taken or let go: Python lets no signal in between those.
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
    """Give a world for each line of the guard that an act runs, interrupted at that line."""
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
    """Past the lease and one sync, nobody is let in who should not be, and all are answered."""
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
    assert len(guard._table) <= 3


def test_a_sync_interrupted_at_any_line_leaves_nobody_behind() -> None:
    """A change that was being taken over is taken over by the next sync, under every spelling."""
    for world, guard in at_every_line(lambda world, guard: guard.sync()):
        still_right(world, guard)


def test_a_sync_of_everybody_interrupted_at_any_line_leaves_nobody_behind() -> None:
    """So it is where everything is dropped."""

    def act(world: World, guard: Guard) -> None:
        world.touch()
        guard.sync()

    for world, guard in at_every_line(act):
        still_right(world, guard)


def test_a_load_interrupted_at_any_line_leaves_nobody_behind() -> None:
    """A user that was being remembered, and one being forgotten for it, are dropped as ever."""

    def act(world: World, guard: Guard) -> None:
        guard.check("New", HOME)
        guard.check("Newer", HOME)
        guard.check("ADOE", HOME)

    for world, guard in at_every_line(act):
        still_right(world, guard)


def test_a_store_that_names_nobody_it_touched_is_bounded_by_the_lease(world: World) -> None:
    """What a store forgets to name is a defect of the store; a RESET mends it."""
    guard = world.guard()
    assert guard.is_allowed("jsmith", HOME)
    world.restrict("jsmith", OFFICE)
    world.store.changes = lambda changes: changes._replace(usernames=RESET)
    guard.sync()
    assert not guard.is_allowed("jsmith", HOME)
    world.store.down = StoreUnavailable("down")
    assert not guard.is_allowed("jsmith", ELSEWHERE)
