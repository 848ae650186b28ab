"""Tests of preloading: a user without a row is unrestricted, so no row may get lost."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipguard.aio import AsyncGuard
from ipguard.errors import StoreUnavailable
from ipguard.guard import Guard
from ipguard.guard._preload import Preload
from ipguard.guard._table import Preloaded, Table
from ipguard.model import RESET, Policy, Reason
from ipguard.packed import pack
from ipguard.stores.memory import MemoryStore
from ipguard.testing import FakeClock
from tests.guards import (
    ELSEWHERE,
    HOME,
    OFFICE,
    Restorable,
    World,
    comes_true,
    during,
    gate,
    told,
)
from tests.guards import memory as memory  # noqa: PLC0414
from tests.guards import restorable as restorable  # noqa: PLC0414
from tests.guards import world as world  # noqa: PLC0414
from tests.twins import STEPS, compare


def streaming() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "ipguard-preload"]


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    """Wait for the threads that read snapshots."""
    yield
    comes_true(lambda: not streaming())


def preloaded(world: World, **settings: Any) -> Guard:
    """Return a guard with a complete snapshot."""
    guard = world.guard(preload=True, **settings)
    guard.sync()
    assert guard.stats().preloaded is not None
    world.store.loads.clear()
    return guard


def table(guard: Guard) -> Preloaded:
    return guard._table.preloaded


def preload(guard: Guard) -> Preload:
    assert guard._preload is not None
    return guard._preload


# ----------------------------------------------------------------------------------- what it gives


def test_no_login_reads_the_store(world: World) -> None:
    """Restricted or not, registered or not, in any spelling."""
    world.restrict("jsmith", HOME)
    world.restrict("jsmith", "2001:db8::/32")
    world.restrict("adoe", OFFICE)
    world.register("mlee")
    plain, guard = world.guard(), preloaded(world)
    assert guard.stats().preloaded == 2
    for name in ("jsmith", "JSmith", "\uff4asmith", "adoe", "mlee", "stranger"):
        for address in (HOME, OFFICE, "2001:db8::7", "2001:db9::", "nonsense"):
            expected = plain.check(name, address)
            world.store.loads.clear()
            assert guard.check(name, address) == expected
            assert guard.is_allowed(name, address) is expected.allowed
            assert world.store.loads == []
    assert guard.stats().loads == 0
    assert "JSmith" in guard._table.rows


def test_evicted_users_return_without_a_read(world: World) -> None:
    for name in ("jsmith", "adoe", "mlee"):
        world.restrict(name, HOME)
    guard = preloaded(world, capacity=1)
    for _ in range(3):
        for name in ("jsmith", "adoe", "mlee", "stranger"):
            assert guard.is_allowed(name, HOME)
            assert guard.is_allowed(name, OFFICE) is (name == "stranger")
    assert (guard.stats().users, guard.stats().preloaded) == (1, 3)
    assert world.store.loads == []


def test_temporary_restriction_is_decided_by_the_stores_clock(world: World) -> None:
    world.restrict("temp", HOME, expires_in=3)
    world.restrict("adoe", HOME)
    guard = preloaded(world, capacity=1)
    for passing, allowed in ((2.9, True), (0.1, False)):
        world.pass_time(passing)
        assert guard.is_allowed("adoe", HOME)  # evicts the other user
        assert guard.is_allowed("temp", HOME) is allowed
        assert guard.check("temp", HOME).allowed is allowed
    assert not guard.is_allowed("temp", OFFICE)
    assert world.store.loads == []


def test_with_unknown_users_denied_unrestricted_users_are_read_singly(world: World) -> None:
    """A snapshot does not say whether they are registered."""
    world.restrict("jsmith", HOME)
    world.restrict("gone", HOME)
    world.inner.remove_users(["gone"])
    world.register("mlee")
    guard = preloaded(world, unknown_users="deny")
    for _ in range(2):
        assert guard.check("jsmith", HOME).reason is Reason.LISTED
        assert guard.check("gone", HOME).reason is Reason.UNKNOWN_USER
        assert guard.check("mlee", HOME).reason is Reason.UNRESTRICTED
        assert guard.check("stranger", HOME).reason is Reason.UNKNOWN_USER
        assert not guard.is_allowed("stranger", HOME)
    assert world.store.loads == ["mlee", "stranger"]
    world.register("stranger")
    guard.sync()
    assert guard.is_allowed("stranger", HOME)


def test_explain_reads_the_store(world: World) -> None:
    """Snapshots hold no labels and no authors."""
    world.restrict("jsmith", HOME)
    guard = preloaded(world)
    assert guard.is_allowed("jsmith", HOME)
    assert guard.explain("jsmith", HOME).restrictions[0].created_by == "admin"
    assert world.store.loads == ["jsmith"]


def test_first_async_check_stays_on_the_event_loop(memory: World) -> None:
    memory.restrict("jsmith", HOME)
    guard = AsyncGuard(memory.store, preload=True, monotonic=memory.clock.monotonic)

    async def main() -> None:
        await guard.sync()
        guard._logins.run = None  # type: ignore[assignment,method-assign]
        for _ in range(2):
            assert await guard.is_allowed("jsmith", HOME)
            assert not await guard.is_allowed("JSmith", OFFICE)
            assert await guard.is_allowed("stranger", OFFICE)
        assert "JSmith" in guard.guard._table.rows
        await guard.close()

    asyncio.run(main())
    assert memory.store.loads == []


# ------------------------------------------------------------------------------ until it is whole


def test_users_are_read_singly_until_the_snapshot_is_complete(world: World) -> None:
    world.restrict("jsmith", HOME)
    guard = world.guard(preload=True)
    for step in (world.store.before_stream, world.store.in_stream, world.store.after_stream):
        with during(step, guard.sync) as streaming:
            assert guard.stats().preloaded is None
            assert not guard.is_allowed("jsmith", OFFICE)
            assert guard.is_allowed("jsmith", HOME)
            guard._table._drop("jsmith")
            assert guard.sync() == guard.revision  # does not begin a second snapshot
        streaming.result()
        assert guard.stats().preloaded == 1
        assert len(world.store.streams) == 1
        world.store.streams.clear()
        world.touch()
        guard._lease.sync()
        assert guard.stats().preloaded is None


def test_checks_alone_read_no_snapshot(world: World) -> None:
    world.restrict("jsmith", HOME)
    guard = world.guard(preload=True)
    assert not guard.is_allowed("jsmith", OFFICE)
    assert guard.is_allowed("stranger", OFFICE)
    assert guard.wait_for(guard.revision, 0)
    assert world.store.loads == ["jsmith", "stranger"]
    assert world.store.streams == []
    assert guard.stats().preloaded is None


def test_without_preload_sync_reads_no_snapshot(world: World) -> None:
    guard = world.guard()
    guard.sync()
    assert world.store.streams == []


# -------------------------------------------------------------------------------- kept up to date


def test_only_changed_users_are_read_again(world: World) -> None:
    for name in ("jsmith", "adoe", "mlee"):
        world.restrict(name, HOME)
    guard = preloaded(world)
    world.lift_all("jsmith")
    world.restrict("adoe", OFFICE)
    world.restrict("new", OFFICE)
    guard.sync()
    assert sorted(world.store.loads) == ["adoe", "jsmith", "new"]
    assert len(world.store.streams) == 1
    assert guard.stats().preloaded == 3
    assert guard.is_allowed("jsmith", ELSEWHERE)
    assert guard.is_allowed("adoe", OFFICE)
    assert not guard.is_allowed("new", HOME)
    assert not guard.is_allowed("mlee", ELSEWHERE)
    assert len(world.store.loads) == 3


class WatchedTable(Table):
    """A table that records a preloaded policy when its position or deadline moves."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("position", "deadline") and "look" in self.__dict__:
            self.__dict__["seen"].append((name, self.__dict__["look"]()))
        super().__setattr__(name, value)


@pytest.mark.parametrize("everybody", [False, True])
def test_changed_user_is_unknown_before_the_position_moves(world: World, everybody: bool) -> None:
    """Neither the older policy nor its absence is found with the new position."""
    guard = preloaded(world)
    watched: Any = guard._table
    watched.__class__ = WatchedTable
    watched.seen = []
    watched.look = lambda: table(guard).policy("jsmith", 99)
    assert watched.look() == Policy(revision=99, restrictions=(), known=False)
    world.pass_time(1)
    revision = world.restrict("jsmith")
    if everybody:
        world.touch()
    guard._lease.sync()
    assert watched.seen == [("position", None), ("deadline", None)]
    assert revision


def test_unknown_user_is_denied_while_the_store_is_down(world: World) -> None:
    guard = preloaded(world)
    assert guard.is_allowed("jsmith", HOME)
    world.restrict("jsmith", OFFICE)
    guard._lease.sync()
    world.store.down = StoreUnavailable("down")
    assert guard.check("jsmith", HOME).reason is Reason.STORE_UNAVAILABLE
    assert guard.check("jsmith", OFFICE).reason is Reason.STORE_UNAVAILABLE
    assert guard.is_allowed("adoe", HOME)


def test_login_of_an_unknown_user_updates_the_table(world: World) -> None:
    world.restrict("adoe", HOME)
    guard = preloaded(world, capacity=1)
    world.restrict("jsmith", OFFICE)
    guard._lease.sync()
    assert table(guard).unknown == {"jsmith"}
    assert not guard.is_allowed("jsmith", HOME)
    assert table(guard).unknown == set()
    guard.is_allowed("adoe", HOME)
    assert not guard.is_allowed("jsmith", HOME)
    assert world.store.loads == ["jsmith"]
    world.lift_all("jsmith")
    guard._lease.sync()
    assert guard.is_allowed("jsmith", HOME)
    assert guard.stats().preloaded == 1


@pytest.mark.parametrize("reset", [False, True])
def test_everybody_and_reset_need_a_new_snapshot(world: World, reset: bool) -> None:
    """Users are read singly until it is complete."""
    world.restrict("jsmith", HOME)
    guard = preloaded(world)
    assert guard.is_allowed("stranger", OFFICE)
    world.restrict("stranger", HOME)
    world.touch()
    if reset:
        world.store.changes = lambda changes: changes._replace(usernames=RESET)
    with during(world.store.in_stream, guard.sync) as streaming:
        world.store.changes = lambda changes: changes
        assert guard.stats().preloaded is None
        for name in ("jsmith", "stranger"):
            assert not guard.is_allowed(name, OFFICE)
            assert guard.is_allowed(name, HOME)
        assert world.store.loads == ["jsmith", "stranger"]
    streaming.result()
    assert guard.stats().preloaded == 2
    assert len(world.store.streams) == 2
    guard.sync()
    assert len(world.store.loads) == 2
    assert table(guard).discarded == {}


def test_discarded_rows_are_freed_by_the_next_snapshot(world: World) -> None:
    world.restrict("jsmith", HOME)
    guard = preloaded(world)
    world.touch()
    guard._lease.sync()
    assert len(table(guard).discarded) == 1
    world.touch()
    guard._lease.sync()
    assert len(table(guard).discarded) == 1
    guard.sync()
    assert (table(guard).discarded, len(table(guard))) == ({}, 1)


# -------------------------------------------------------------------------------- interleavings


def test_stale_fill(world: World) -> None:
    """A policy read before a change arrives after the sync that named the user."""
    guard = preloaded(world)
    world.touch("jsmith")
    guard._lease.sync()
    with during(world.store.after_load, lambda: guard.is_allowed("jsmith", HOME)) as late:
        world.restrict("jsmith", OFFICE)
        guard._lease.sync()
    late.result()  # it may answer its own call
    assert table(guard).unknown == {"jsmith"}
    assert not guard.is_allowed("jsmith", HOME)
    assert guard.is_allowed("jsmith", OFFICE)


@pytest.mark.parametrize("what", ["named", "everybody", "sync"])
def test_user_read_again_during_a_change_stays_unknown(world: World, what: str) -> None:
    guard = preloaded(world)
    world.touch("jsmith")
    guard._lease.sync()
    with during(world.store.after_load, lambda: preload(guard).read_again(float("inf"))) as reading:
        if what == "sync":
            world.wrong_guess()
        else:
            world.restrict("jsmith", OFFICE)
        if what == "everybody":
            world.touch()
        guard._lease.sync()
    reading.result()
    assert table(guard).policy("jsmith", 99) is None
    assert guard.is_allowed("jsmith", HOME) is (what == "sync")
    guard.sync()
    assert table(guard).policy("jsmith", 99) is not None
    assert guard.is_allowed("jsmith", HOME) is (what == "sync")


def test_change_during_a_snapshot_is_not_lost(world: World) -> None:
    world.restrict("adoe", HOME)
    guard = world.guard(preload=True)
    for step, name in (
        (world.store.before_stream, "early"),
        (world.store.in_stream, "jsmith"),
        (world.store.after_stream, "adoe"),
    ):
        with during(step, guard.sync) as streaming:
            world.restrict(name, OFFICE)
            guard._lease.sync()
        streaming.result()
        assert not guard.is_allowed(name, ELSEWHERE)
        assert guard.is_allowed(name, OFFICE)
        world.touch()
        guard._lease.sync()


def test_snapshot_from_before_the_first_sync_is_rejected(memory: World) -> None:
    """It may have the revision 0 of a new guard, but its age is unknown."""
    guard = memory.guard(preload=True)
    memory.store.in_stream.append(lambda: memory.restrict("jsmith", HOME))
    preload(guard).fill(threading.Event())
    assert guard.revision == 0
    assert not guard.is_allowed("jsmith", OFFICE)
    guard.sync()
    assert guard.stats().preloaded == 1
    assert not guard.is_allowed("jsmith", OFFICE)


def test_user_changed_during_a_snapshot_is_unknown_in_it(memory: World) -> None:
    memory.restrict("jsmith", HOME)
    guard = memory.guard(preload=True)

    def change() -> None:
        memory.lift_all("jsmith")
        guard._lease.sync()

    memory.store.after_stream.append(change)
    guard._lease.sync()
    preload(guard).fill(threading.Event())
    assert guard.stats().preloaded == 1
    assert table(guard).unknown == {"jsmith"}
    assert table(guard).policy("jsmith", 9) is None
    assert guard.is_allowed("jsmith", ELSEWHERE)
    assert guard.stats().preloaded == 0


def test_snapshot_older_than_the_guard_is_rejected(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """This is logged once, and users are read singly."""
    world.restrict("jsmith", HOME)
    world.store.snapshot = lambda revision: revision - 1
    guard = world.guard(preload=True)
    guard.sync()
    assert guard.stats().preloaded is None
    assert len(world.store.streams) == 10
    assert not guard.is_allowed("jsmith", OFFICE)
    (record,) = told(caplog)
    assert record.getMessage().endswith("until it succeeds: no snapshot was of its revision")
    guard.sync()
    assert len(told(caplog)) == 1


def test_snapshot_ahead_of_the_guard_is_read_again(world: World) -> None:
    guard = world.guard(preload=True)
    world.store.before_stream.append(lambda: world.restrict("jsmith", HOME))
    guard.sync()
    revision = guard.revision
    assert world.store.streams == [revision, revision]
    assert guard.stats().preloaded == 1
    assert world.store.loads == []
    assert not guard.is_allowed("jsmith", OFFICE)


def test_snapshot_is_compared_with_the_revision_at_its_request(world: World) -> None:
    guard = world.guard(preload=True)

    def change() -> None:
        world.restrict("jsmith", HOME)
        guard._lease.sync()

    world.store.before_stream.append(change)
    guard.sync()
    assert len(world.store.streams) == 2
    assert not guard.is_allowed("jsmith", OFFICE)


def test_snapshot_of_a_lost_history_is_rejected(restorable: Restorable) -> None:
    """A backup is restored while it is being read."""
    world = restorable
    world.restrict("jsmith", HOME)
    restore = world.back_up()
    world.lift_all("jsmith")
    guard = world.guard(preload=True)
    with during(world.store.in_stream, guard.sync) as streaming:
        restore()
        world.touch("adoe")
        guard._lease.sync()
    streaming.result()
    assert len(world.store.streams) == 2
    assert guard.stats().preloaded == 1
    assert not guard.is_allowed("jsmith", OFFICE)
    assert world.store.loads == []


def test_lost_history_found_after_the_swap_invalidates_the_table(restorable: Restorable) -> None:
    world = restorable
    restore = world.back_up()
    world.restrict("jsmith", HOME)
    guard = world.guard(preload=True)
    guard._lease.sync()
    restore()
    world.register("jsmith")
    world.wrong_guess()
    preload(guard).fill(threading.Event())
    assert guard.stats().preloaded == 0
    assert guard.is_allowed("jsmith", OFFICE)  # unrestricted in the restored store
    world.restrict("jsmith", HOME)
    guard._lease.sync()
    assert guard.stats().preloaded is None
    assert not guard.is_allowed("jsmith", OFFICE)


def test_backup_restored_before_a_snapshot_ahead_is_read_again(restorable: Restorable) -> None:
    world = restorable
    guard = world.guard(preload=True)
    world.restrict("jsmith", HOME)
    guard._lease.sync()
    restore = world.back_up()

    def lift() -> None:
        world.lift_all("jsmith")

    def put_back() -> None:
        restore()
        world.touch("adoe")
        world.touch("adoe")

    world.store.before_stream.append(lift)
    world.store.before_sync.append(put_back)
    preload(guard).fill(threading.Event())
    guard._lease.sync()
    assert guard.stats().preloaded == 1
    assert not guard.is_allowed("jsmith", OFFICE)


def test_policy_read_ahead_by_a_login_is_not_kept(restorable: Restorable) -> None:
    """After its eviction the older policy is not used either."""
    world = restorable
    world.restrict("adoe", HOME)
    guard = preloaded(world, capacity=1)
    world.touch("jsmith")
    guard._lease.sync()
    restore = world.back_up()
    world.restrict("jsmith", HOME)
    assert not guard.is_allowed("jsmith", OFFICE)
    assert table(guard).unknown == {"jsmith"}
    guard.is_allowed("adoe", HOME)
    assert not guard.is_allowed("jsmith", OFFICE)
    assert world.store.loads == ["jsmith", "jsmith"]
    restore()
    world.touch("adoe")
    world.touch("adoe")
    guard.sync()
    assert guard.is_allowed("jsmith", OFFICE)


def test_user_restricted_ahead_of_a_snapshot_is_unknown_in_it(memory: World) -> None:
    guard = memory.guard(preload=True, capacity=1)

    def ahead() -> None:
        memory.restrict("jsmith", HOME)
        assert not guard.is_allowed("jsmith", OFFICE)
        assert guard.is_allowed("stranger", OFFICE)

    memory.restrict("adoe", HOME)
    memory.store.in_stream.append(ahead)
    guard._lease.sync()
    preload(guard).fill(threading.Event())
    assert table(guard).unknown == {"jsmith"}  # strangers are not noted: there may be any number
    guard.is_allowed("adoe", HOME)
    assert not guard.is_allowed("jsmith", OFFICE)


def test_preloaded_user_read_ahead_becomes_unknown(memory: World) -> None:
    memory.restrict("adoe", HOME)
    memory.restrict("jsmith", HOME)
    guard = preloaded(memory, capacity=1)
    memory.touch("jsmith")
    guard._lease.sync()
    memory.lift_all("jsmith")
    assert guard.is_allowed("jsmith", OFFICE)
    assert table(guard).unknown == {"jsmith"}
    guard.is_allowed("adoe", HOME)
    assert guard.is_allowed("jsmith", OFFICE)


def test_policy_read_again_ahead_of_the_guard_is_not_kept(world: World) -> None:
    guard = preloaded(world)
    world.touch("jsmith")
    guard._lease.sync()
    world.store.before_load.append(lambda: world.restrict("jsmith", OFFICE))
    preload(guard).read_again(float("inf"))
    assert table(guard).unknown == {"jsmith"}
    assert table(guard).policy("jsmith", 99) is None


def test_user_read_again_is_no_older_than_a_login(world: World) -> None:
    """A read that the refresher began before a login's must not replace what the login was told."""
    world.restrict("jsmith", HOME)
    guard = preloaded(world)
    world.restrict("jsmith", OFFICE)
    with during(world.store.after_load, guard.sync) as reading:
        with during(world.store.before_load, lambda: guard.check("jsmith", OFFICE)) as login:
            guard.sync()  # so that the login's row is not kept
            revision = world.lift_all("jsmith")
        assert login.result().revision == revision
    reading.result()
    assert guard.check("jsmith", ELSEWHERE).revision == revision


def test_nor_after_the_eviction_of_its_row(world: World) -> None:
    """The same if the login's row was kept and then evicted."""
    world.restrict("jsmith", HOME)
    world.restrict("adoe", HOME)
    guard = preloaded(world, capacity=1)
    world.restrict("jsmith", OFFICE)
    with during(world.store.after_load, guard.sync) as reading:
        revision = world.lift_all("jsmith")
        assert guard.check("jsmith", ELSEWHERE).revision == revision
        guard.check("adoe", HOME)
    reading.result()
    assert guard.check("jsmith", ELSEWHERE).revision == revision


def test_user_opened_ahead_of_a_snapshot_is_unknown_in_it(memory: World) -> None:
    """A login that was told of a deletion must not be followed by the older snapshot."""
    memory.restrict("jsmith", HOME)
    guard = memory.guard(preload=True)
    with during(memory.store.in_stream, guard.sync) as reading:
        with during(memory.store.before_load, lambda: guard.check("jsmith", ELSEWHERE)) as login:
            guard._lease.sync()  # so that the login's row is not kept
            revision = memory.lift_all("jsmith")
        assert login.result().revision == revision
    reading.result()
    assert guard.check("jsmith", ELSEWHERE).revision == revision


def test_policy_ahead_hides_the_row(world: World) -> None:
    """A user without a row stays absent."""
    world.restrict("jsmith", HOME)
    held = table(preloaded(world))
    unrestricted = Policy(revision=9, restrictions=(), known=False)
    for name in ("jsmith", "stranger"):
        held.put(name, unrestricted, ahead=True)
    assert held.unknown == {"jsmith"}
    assert held.policy("jsmith", 9) is None
    assert held.policy("stranger", 9) == unrestricted


# ------------------------------------------------------------------------------------- outages


@pytest.mark.parametrize("grace", [0.0, 10.0])
def test_store_down(world: World, grace: float) -> None:
    """All users are answered within the lease, and then only within `outage_grace`."""
    world.restrict("jsmith", HOME)
    guard = preloaded(world, outage_grace=grace)
    world.store.down = StoreUnavailable("down")
    world.pass_time(4.9)
    assert guard.check("JSmith", HOME).reason is Reason.LISTED
    assert guard.check("stranger", OFFICE).reason is Reason.UNRESTRICTED
    world.pass_time(0.1)
    for name in ("jsmith", "stranger", "new"):
        decision = guard.check(name, HOME)
        assert (decision.allowed, decision.stale) == (grace > 0, grace > 0)
        assert guard.check("jsmith", OFFICE).allowed is False
    world.pass_time(10)
    assert guard.check("new", HOME).reason is Reason.STORE_UNAVAILABLE
    world.store.down = None
    world.pass_time(1)
    assert guard.is_allowed("jsmith", HOME)
    assert guard.stats().preloaded == 1


def test_at_least(world: World) -> None:
    guard = preloaded(world)
    revision = world.restrict("jsmith", HOME)
    assert guard.check("jsmith", OFFICE, at_least=revision).reason is Reason.NOT_LISTED
    assert guard.check("adoe", OFFICE, at_least=revision).revision == revision
    assert guard.check("adoe", OFFICE, at_least=revision + 1).reason is Reason.STORE_UNAVAILABLE


@pytest.mark.parametrize("when", ["open", "stream"])
def test_failed_snapshot_is_logged_once_and_read_again(
    world: World, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ipguard.guard")
    world.restrict("jsmith", HOME)
    guard = world.guard(preload=True)

    def fail() -> None:
        raise StoreUnavailable("cut off")

    steps = world.store.before_stream if when == "open" else world.store.after_stream
    steps.extend([fail, fail])
    for _ in range(2):
        guard.sync()
        assert guard.stats().preloaded is None
        assert not guard.is_allowed("jsmith", OFFICE)
    guard.sync()
    assert guard.stats().preloaded == 1
    lines = [r.getMessage() for r in caplog.records if "preload" in r.getMessage()]
    assert len(lines) == 2
    assert lines[0] == (
        "preloading failed; users are loaded singly until it succeeds: StoreUnavailable: cut off"
    )
    assert lines[1].startswith("preloaded 1 restricted users in ")
    assert guard.stats().failures == 0
    world.touch()
    steps.append(fail)
    guard.sync()
    assert len(told(caplog)) == 2


def test_back_off_after_failed_snapshots(memory: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """One second, doubling to a minute."""
    now = [100.0]
    monkeypatch.setattr("ipguard.guard._preload.time.monotonic", lambda: now[0])
    monkeypatch.setattr("ipguard._backoff.random", lambda: 0.0)
    guard = memory.guard(preload=True)
    guard._lease.sync()
    memory.store.snapshot = lambda revision: -1
    pauses = []
    for _ in range(8):
        preload(guard).fill(threading.Event())
        pauses.append(preload(guard)._retry_at - now[0])
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    memory.store.streams.clear()
    now[0] += 59
    preload(guard).tend(0.1)
    assert not preload(guard)._reading.locked()
    assert memory.store.streams == []
    memory.store.snapshot = lambda revision: revision
    now[0] += 1
    preload(guard).tend(0.1)
    comes_true(lambda: guard.stats().preloaded == 0)
    comes_true(lambda: not preload(guard)._reading.locked())
    memory.touch()
    guard._lease.sync()
    memory.store.snapshot = lambda revision: -1
    preload(guard).fill(threading.Event())
    assert preload(guard)._retry_at - now[0] == 1


def test_failure_while_users_are_read_again(world: World) -> None:
    """The others stay unknown, and the circuit breaker opens."""
    guard = preloaded(world)
    world.touch("jsmith", "adoe")
    guard._lease.sync()
    world.store.down = StoreUnavailable("down")
    preload(guard).read_again(float("inf"))
    assert len(world.store.loads) == 1
    assert guard.stats().failures == 1
    preload(guard).read_again(float("inf"))
    assert len(world.store.loads) == 1
    assert table(guard).unknown == {"jsmith", "adoe"}
    world.store.down = None
    world.pass_time(1)
    world.store.policy = lambda policy: attrs.evolve(policy, restrictions=None)
    preload(guard).read_again(float("inf"))
    assert guard.stats().error == (
        "TypeError: restrictions must be a tuple: None would read as unrestricted"
    )
    world.store.policy = lambda policy: policy
    world.pass_time(1)
    preload(guard).read_again(time.monotonic() - 1)
    assert table(guard).unknown == {"jsmith", "adoe"}
    preload(guard).read_again(float("inf"))
    assert table(guard).unknown == set()
    assert guard.stats().failures == 0
    assert guard.stats().loads == 4


# -------------------------------------------------------------------------------- odd stores


class Packing:
    """A snapshot of a store that packs its rows, as PostgreSQL's does."""

    def __init__(self, policies: Any, rows: list[tuple[str, bytes]]) -> None:
        self._policies = policies
        self._rows = rows
        self.closed = False

    def __iter__(self) -> Any:
        raise AssertionError("packed() must be used")

    def packed(self) -> Iterator[tuple[str, bytes]]:
        return iter(self._rows)

    def close(self) -> None:
        self.closed = True


def packs(world: World, change: Callable[[list[tuple[str, bytes]]], object]) -> list[Packing]:
    """Make the store pack its snapshots, and change their rows."""
    streams: list[Packing] = []
    inner = world.inner

    def load_all_policies() -> tuple[int, Packing]:
        revision, policies = inner.load_all_policies()
        rows = [(name, pack(policy)) for name, policy in policies]
        change(rows)
        streams.append(Packing(policies, rows))
        return revision, streams[-1]

    world.store.load_all_policies = load_all_policies  # type: ignore[assignment,method-assign]
    return streams


def test_packed_rows_of_a_store_are_used(world: World) -> None:
    """The snapshot is closed at its end."""
    world.restrict("jsmith", HOME)
    streams = packs(world, lambda rows: None)
    guard = preloaded(world)
    assert [stream.closed for stream in streams] == [True]
    assert guard.stats().preloaded == 1
    assert not guard.is_allowed("jsmith", OFFICE)
    assert guard.check("jsmith", HOME).restriction_id == "r1"


def test_damaged_row_is_read_from_the_store(world: World) -> None:
    world.restrict("jsmith", HOME)
    packs(world, lambda rows: rows.__setitem__(0, ("jsmith", b"\1\0\1")))
    guard = preloaded(world)
    assert not guard.is_allowed("jsmith", OFFICE)
    assert world.store.loads == ["jsmith"]


@pytest.mark.parametrize("apart", [1, 1_500])
def test_snapshot_with_a_user_in_several_parts_is_rejected(
    memory: World, apart: int, caplog: pytest.LogCaptureFixture
) -> None:
    memory.restrict("jsmith", HOME)
    more = [(f"user{n}", b"\1") for n in range(apart)]
    packs(memory, lambda rows: rows.extend([*more, rows[0]]))
    guard = memory.guard(preload=True)
    guard.sync()
    assert guard.stats().preloaded is None
    assert "several parts" in told(caplog)[0].getMessage()


def test_policy_that_cannot_be_packed_is_kept_as_it_is(
    memory: World, caplog: pytest.LogCaptureFixture
) -> None:
    """This snapshot also has no `close`."""
    memory.restrict("jsmith", HOME)
    policy = memory.inner.load_policy("jsmith")
    odd = attrs.evolve(policy, restrictions=(attrs.evolve(policy.restrictions[0], id="a\0b"),))
    memory.store.load_all_policies = lambda: (  # type: ignore[method-assign]
        policy.revision,
        iter([("jsmith", odd)]),
    )
    guard = preloaded(memory)
    memory.wrong_guess()
    guard.sync()
    decision = guard.check("jsmith", HOME)
    assert (decision.restriction_id, decision.revision) == ("a\0b", guard.revision)
    assert not guard.is_allowed("jsmith", OFFICE)
    assert memory.store.loads == []
    assert told(caplog) == []


@pytest.mark.parametrize("restriction_id", ["r1", "a\0b"], ids=["packed", "as it is"])
def test_put_and_get_a_policy(memory: World, restriction_id: str) -> None:
    memory.restrict("jsmith", HOME)
    policy = memory.inner.load_policy("jsmith")
    (held,) = policy.restrictions
    policy = attrs.evolve(policy, restrictions=(attrs.evolve(held, id=restriction_id),))
    guard = preloaded(memory)
    table(guard).put("jsmith", policy, ahead=False)
    found = table(guard).policy("jsmith", 17)
    assert found is not None
    assert found.revision == 17
    ((name, addresses, found_id),) = [(r.username, r.addresses, r.id) for r in found.restrictions]
    assert (name, addresses, found_id) == ("jsmith", held.addresses, restriction_id)


# ---------------------------------------------------------------------------------- refresher


def test_refresher_reads_a_snapshot_and_changed_users(world: World) -> None:
    world.restrict("jsmith", HOME)
    with world.guard(preload=True, max_staleness=3600) as guard:
        comes_true(lambda: guard.stats().preloaded == 1)
        comes_true(lambda: not streaming())
        revision = world.restrict("adoe", OFFICE)
        comes_true(lambda: guard.revision == revision and not table(guard).unknown)
        assert not guard.is_allowed("adoe", HOME)
        assert set(world.store.loads) == {"adoe"}
        world.touch()
        comes_true(lambda: len(world.store.streams) == 2 and guard.stats().preloaded == 2)
        guard.sync()  # reads no snapshot itself
    assert len(world.store.streams) == 2


def test_refresher_syncs_while_a_snapshot_is_read(memory: World) -> None:
    with (
        gate(memory.store.in_stream) as held,
        memory.guard(preload=True, max_staleness=0.3) as guard,
    ):
        held.reached()
        (thread,) = streaming()
        assert thread.daemon
        count = len(memory.store.syncs)
        comes_true(lambda: len(memory.store.syncs) >= count + 3)
        held.let_go()
        comes_true(lambda: guard.stats().preloaded == 0)


def test_snapshot_waits_for_the_first_sync(memory: World) -> None:
    memory.store.down = StoreUnavailable("down")
    with memory.guard(preload=True) as guard:
        comes_true(lambda: memory.store.syncs)
        preload(guard).tend(0.1)
        assert not preload(guard)._reading.locked()
        memory.store.down = None
        memory.pass_time(1)
        comes_true(lambda: guard.stats().preloaded == 0)


@pytest.mark.parametrize("how", ["close", "dropped"])
def test_snapshot_ends_with_the_refresher(memory: World, how: str) -> None:
    """It gives its connection back."""
    for n in range(1_500):
        memory.restrict(f"user{n}", HOME)
    with gate(memory.store.in_stream) as held:
        guard = memory.guard(preload=True)
        guard.start()
        held.reached()
        held_table = table(guard)
        if how == "close":
            guard.close()
        else:
            (thread,) = streaming()
            gone = weakref.ref(guard)
            del guard
            gc.collect()
            assert gone() is None
            comes_true(lambda: not [t for t in threading.enumerate() if "refresher" in t.name])
            del thread
        held.let_go()
        comes_true(lambda: not streaming())
    assert not held_table.complete
    assert held_table.snapshot is None
    assert list(memory.store.after_stream) == []


def test_guard_started_again_reads_a_snapshot(memory: World) -> None:
    guard = memory.guard(preload=True)
    with gate(memory.store.in_stream) as held:
        guard.start()
        held.reached()
        guard.close()
        guard.start()
        held.let_go()
        comes_true(lambda: guard.stats().preloaded == 0)
    guard.close()


def test_snapshot_without_a_free_thread_is_tried_again(
    memory: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = preloaded(memory)
    memory.touch()
    guard._lease.sync()

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        preload(guard).tend(0.1)
    assert guard.stats().preloaded is None
    preload(guard).tend(0.1)
    comes_true(lambda: guard.stats().preloaded == 0)


def test_progress_is_logged_every_five_seconds(
    memory: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "ipguard.guard")
    packs(memory, lambda rows: rows.extend((f"user{n}", b"\1") for n in range(4_500)))
    now = [0.0]

    def monotonic() -> float:
        now[0] += 1.25
        return now[0]

    monkeypatch.setattr("ipguard.guard._preload.time.monotonic", monotonic)
    guard = memory.guard(preload=True)
    guard._lease.sync()
    preload(guard).fill(threading.Event())
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.INFO] == [
        "preloading: 4000 restricted users so far",
        "preloaded 4500 restricted users in 8.8 s",
    ]


# -------------------------------------------------------------------- against a guard without it


@given(steps=STEPS, deny=st.booleans(), capacity=st.integers(1, 4))
def test_same_decisions_as_a_guard_without_preload(
    steps: list[tuple[Any, bool, list[Any]]], deny: bool, capacity: int
) -> None:
    """Policies change before, between and during snapshots."""
    clock = FakeClock()
    compare(World(MemoryStore(clock=clock), clock), steps, deny=deny, capacity=capacity)
