"""Tests of preloading: a user without a row is unrestricted, so no row may get lost."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, SimpleNamespace
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipguard.errors import StoreUnavailable
from ipguard.guard import Guard, _table
from ipguard.guard._preload import Preload
from ipguard.guard._table import Entry, Rows, Table
from ipguard.model import RESET, Reason
from ipguard.row import is_restricted, lists, pack
from ipguard.stores.memory import MemoryStore
from ipguard.testing import FakeClock
from tests.guards import (
    ELSEWHERE,
    HOME,
    OFFICE,
    Held,
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
from tests.tracing import traced
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


def pending(guard: Guard) -> set[str]:
    return guard._table.pending


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
    assert set(guard._table.rows) == {"jsmith", "adoe"}


def test_capacity_does_not_bound_preloaded_users(world: World) -> None:
    """Logins make no entries from their rows."""
    for name in ("jsmith", "adoe", "mlee"):
        world.restrict(name, HOME)
    guard = preloaded(world, capacity=1)
    for _ in range(3):
        for name in ("jsmith", "adoe", "mlee", "stranger"):
            assert guard.is_allowed(name, HOME)
            assert guard.is_allowed(name, OFFICE) is (name == "stranger")
    stats = guard.stats()
    assert (stats.users, stats.preloaded, stats.evictions) == (3, 3, 0)
    assert {type(row) for row in guard._table.rows.values()} == {bytes}
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


def test_pending_user_is_denied_while_the_store_is_down(world: World) -> None:
    guard = preloaded(world)
    assert guard.is_allowed("jsmith", HOME)
    world.restrict("jsmith", OFFICE)
    guard._lease.sync()
    world.store.down = StoreUnavailable("down")
    assert guard.check("jsmith", HOME).reason is Reason.STORE_UNAVAILABLE
    assert guard.check("jsmith", OFFICE).reason is Reason.STORE_UNAVAILABLE
    assert guard.is_allowed("adoe", HOME)


def test_login_of_a_pending_user_updates_the_table(world: World) -> None:
    guard = preloaded(world)
    world.restrict("jsmith", OFFICE)
    guard._lease.sync()
    assert pending(guard) == {"jsmith"}
    assert guard.stats().preloaded == 1
    assert not guard.is_allowed("jsmith", HOME)
    assert pending(guard) == set()
    assert not guard.is_allowed("jsmith", HOME)
    assert world.store.loads == ["jsmith"]
    world.lift_all("jsmith")
    guard._lease.sync()
    assert guard.is_allowed("jsmith", HOME)
    assert (pending(guard), guard.stats().preloaded) == (set(), 0)


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
    assert guard._table.discarded == {}


def test_discarded_rows_are_freed_by_the_next_snapshot(world: World) -> None:
    world.restrict("jsmith", HOME)
    guard = preloaded(world)
    world.touch()
    guard._lease.sync()
    assert set(guard._table.discarded) == {"jsmith"}
    world.touch()
    guard._lease.sync()
    assert set(guard._table.discarded) == {"jsmith"}
    guard.sync()
    assert guard._table.discarded == {}
    assert set(guard._table.rows) == {"jsmith"}


# -------------------------------------------------------------------------------- interleavings


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


def test_user_changed_during_a_snapshot_is_pending_in_it(memory: World) -> None:
    memory.restrict("jsmith", HOME)
    guard = memory.guard(preload=True)

    def change() -> None:
        memory.lift_all("jsmith")
        guard._lease.sync()

    memory.store.after_stream.append(change)
    guard._lease.sync()
    preload(guard).fill(threading.Event())
    assert guard.stats().preloaded == 1
    assert pending(guard) == {"jsmith"}
    assert guard._table.find("jsmith") is None
    assert guard.is_allowed("jsmith", ELSEWHERE)
    assert guard.stats().preloaded == 0


class Closing:
    """An iterator that counts how often it is closed."""

    def __init__(self, rows: Iterator[Any]) -> None:
        self._rows = rows
        self.closed = 0

    def __iter__(self) -> Closing:
        return self

    def __next__(self) -> Any:
        return next(self._rows)

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("kind", [lambda rows: iter(list(rows)), Closing], ids=["plain", "closing"])
def test_rows_are_closed_if_they_can_be(
    memory: World, caplog: pytest.LogCaptureFixture, kind: Any
) -> None:
    memory.restrict("jsmith", HOME)
    guard = memory.guard(preload=True)
    load, given = preload(guard)._load_all, list[Any]()

    def load_all() -> Any:
        revision, rows = load()
        given.append(kind(rows))
        return revision, given[-1]

    preload(guard)._load_all = load_all
    guard.sync()
    assert guard.stats().preloaded == 1
    assert [getattr(rows, "closed", 1) for rows in given] == [1]
    assert "failed" not in caplog.text


def test_preload_is_stopped_before_its_first_snapshot(memory: World) -> None:
    guard = memory.guard(preload=True)
    preload(guard).stop()
    guard.sync()
    assert guard.stats().preloaded == 0


def test_snapshot_made_invalid_at_its_end_is_read_again(memory: World) -> None:
    guard = memory.guard(preload=True)

    def change() -> None:
        memory.restrict("jsmith", HOME)
        memory.touch()
        guard._lease.sync()

    memory.store.after_stream.append(change)
    guard.sync()
    assert len(memory.store.streams) == 2
    assert not guard.is_allowed("jsmith", OFFICE)


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


def test_row_read_ahead_by_a_login_is_dropped_by_the_next_sync(restorable: Restorable) -> None:
    """Its revision may be one that a failover has lost."""
    world = restorable
    guard = preloaded(world)
    world.touch("jsmith")
    guard._lease.sync()
    restore = world.back_up()
    ahead = world.restrict("jsmith", HOME)
    for _ in range(2):
        assert guard.check("jsmith", OFFICE).revision == ahead > guard.revision
    assert world.store.loads == ["jsmith"]
    assert pending(guard) == set()
    restore()
    world.touch("adoe")
    guard._lease.sync()
    assert pending(guard) == {"jsmith", "adoe"}
    assert guard.is_allowed("jsmith", OFFICE)
    assert world.store.loads == ["jsmith", "jsmith"]


def test_user_restricted_ahead_of_a_snapshot_is_pending_in_it(memory: World) -> None:
    guard = memory.guard(preload=True, capacity=1)

    def ahead() -> None:
        memory.restrict("jsmith", HOME)
        assert not guard.is_allowed("jsmith", OFFICE)
        assert guard.is_allowed("stranger", OFFICE)

    memory.restrict("adoe", HOME)
    memory.store.in_stream.append(ahead)
    guard._lease.sync()
    preload(guard).fill(threading.Event())
    assert pending(guard) == {"jsmith"}  # strangers are not noted: there may be any number
    guard.is_allowed("adoe", HOME)
    assert not guard.is_allowed("jsmith", OFFICE)


def test_stranger_with_a_row_in_the_snapshot_is_pending_in_it(memory: World) -> None:
    """It was restricted in the snapshot, and has been removed since."""
    guard = memory.guard(preload=True, unknown_users="deny")

    def ahead() -> None:
        memory.lift_all("jsmith")
        memory.inner.remove_users(["jsmith"])
        assert not guard.is_allowed("jsmith", HOME)

    memory.restrict("jsmith", HOME)
    memory.store.in_stream.append(ahead)
    guard._lease.sync()
    preload(guard).fill(threading.Event())
    assert pending(guard) == {"jsmith"}
    assert not guard.is_allowed("jsmith", HOME)


def test_row_read_ahead_is_pending_once_it_is_evicted(memory: World) -> None:
    """Neither the older row nor its absence is found again."""
    for name in ("adoe", "jsmith"):
        memory.restrict(name, HOME)
    guard = preloaded(memory, capacity=1)
    memory.touch("adoe", "jsmith")
    guard._lease.sync()
    for name in ("adoe", "jsmith"):
        memory.lift_all(name)
        assert guard.is_allowed(name, OFFICE)
    assert (pending(guard), guard.stats().evictions) == ({"adoe"}, 1)
    assert set(guard._table.rows) == {"adoe", "jsmith"}
    assert guard.is_allowed("adoe", OFFICE)
    assert memory.store.loads == ["adoe", "jsmith", "adoe"]
    memory.wrong_guess()
    guard.sync()
    assert (pending(guard), guard._table.rows) == (set(), {})


def test_policy_read_again_ahead_of_the_guard_is_not_kept(world: World) -> None:
    guard = preloaded(world)
    world.touch("jsmith")
    guard._lease.sync()
    world.store.before_load.append(lambda: world.restrict("jsmith", OFFICE))
    preload(guard).read_again(float("inf"))
    assert pending(guard) == {"jsmith"}
    assert guard._table.find("jsmith") is None


def test_user_read_again_is_not_kept_if_the_table_was_emptied(world: World) -> None:
    guard = preloaded(world)
    world.touch()
    guard._lease.sync()
    assert guard._loads.read_again("jsmith")
    assert guard._table.rows == {}


def test_user_read_again_is_not_kept_after_a_swap(memory: World) -> None:
    """The swap forgets that a login was answered ahead of the position."""
    memory.restrict("jsmith", HOME)
    guard = preloaded(memory)
    memory.touch()
    guard._lease.sync()
    answered: list[int] = []

    def ahead() -> None:
        memory.restrict("jsmith", OFFICE)
        answered.append(guard.check("jsmith", OFFICE).revision)

    def swap() -> None:
        memory.store.in_stream.append(ahead)
        preload(guard).fill(threading.Event())

    memory.store.after_load.append(swap)
    assert guard._loads.read_again("jsmith")
    assert pending(guard) == {"jsmith"}
    assert guard.check("jsmith", OFFICE).revision == answered[0]


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


# ------------------------------------------------------------------------------------- readers


@contextmanager
def at_each_instruction(act: Callable[[], object]) -> Iterator[None]:
    """Call `act` before each instruction of the table, as if on a thread."""

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename != _table.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            act()
        return trace

    with traced(trace):
        yield


@pytest.mark.parametrize("deny", [False, True])
def test_no_step_shows_a_restricted_user_as_unrestricted(memory: World, deny: bool) -> None:
    """At each step of changes, a sync, a reset and a swap, for readers with new and old rows."""
    memory.restrict("jsmith", HOME)
    memory.register("mlee")
    guard = memory.guard(preload=True, unknown_users="deny" if deny else "allow")
    table, office = guard._table, bytes([198, 51, 100, 9])
    kept: list[Rows] = []
    seen: list[bool] = []

    def look() -> None:
        if all(rows is not table.rows for rows in kept):
            kept.append(table.rows)
        for rows in kept:
            reader: Any = SimpleNamespace(rows=rows, complete=table.complete, deny_unknown=deny)
            found = Table.find(reader, "jsmith")
            seen.append(found is None or (is_restricted(found) and not lists(found, office)))

    with at_each_instruction(look):
        for _ in range(2):
            guard.sync()
            memory.touch("jsmith", "mlee")
            guard._lease.sync()
            for name in ("jsmith", "mlee"):
                guard.check(name, HOME)
            memory.touch("jsmith")
            guard.sync()
            memory.touch()
            guard._lease.sync()
    assert len(seen) > 1_000
    assert all(seen)
    assert all(rows is not table.complete for rows in kept)
    assert len(kept) > 4


# ------------------------------------------------------------------ unknown users denied: extras


def extras(guard: Guard) -> set[str]:
    return {name for name, row in guard._table.rows.items() if isinstance(row, Entry)}


def test_with_unknown_users_denied_unrestricted_users_are_bounded(world: World) -> None:
    """Strangers are evicted first. An evicted user is read again, and never unrestricted."""
    world.restrict("jsmith", HOME)
    world.register("ann", "bob", "cid")
    guard = preloaded(world, unknown_users="deny", capacity=2)

    def check(name: str, reason: Reason, *, reads: bool) -> None:
        world.store.loads.clear()
        for _ in range(2 if reads else 1):
            assert guard.check(name, OFFICE).reason is reason
            assert guard.is_allowed(name, OFFICE) is (reason is Reason.UNRESTRICTED)
        assert world.store.loads == [name] * reads

    check("ann", Reason.UNRESTRICTED, reads=True)
    check("stranger1", Reason.UNKNOWN_USER, reads=True)
    assert extras(guard) == {"ann", "stranger1"}
    check("stranger2", Reason.UNKNOWN_USER, reads=True)
    assert extras(guard) == {"ann", "stranger2"}
    check("bob", Reason.UNRESTRICTED, reads=True)
    assert extras(guard) == {"ann", "bob"}
    check("cid", Reason.UNRESTRICTED, reads=True)
    assert extras(guard) == {"bob", "cid"}
    check("cid", Reason.UNRESTRICTED, reads=False)
    check("ann", Reason.UNRESTRICTED, reads=True)
    assert extras(guard) == {"cid", "ann"}
    assert guard._table.find("stranger1") is None
    assert guard._table.find("bob") is None
    for n in range(20):
        assert guard.check(f"invented{n}", OFFICE).reason is Reason.UNKNOWN_USER
        assert extras(guard) == {"cid", "ann"}
    stats = guard.stats()
    assert (stats.users, stats.preloaded, pending(guard)) == (3, 1, set())
    check("jsmith", Reason.NOT_LISTED, reads=False)


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
    """The others stay pending, and the circuit breaker opens."""
    guard = preloaded(world)
    world.touch("jsmith", "adoe")
    guard._lease.sync()
    world.store.down = StoreUnavailable("down")
    preload(guard).read_again(float("inf"))
    assert len(world.store.loads) == 1
    assert guard.stats().failures == 1
    preload(guard).read_again(float("inf"))
    assert len(world.store.loads) == 1
    assert pending(guard) == {"jsmith", "adoe"}
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
    assert pending(guard) == {"jsmith", "adoe"}
    preload(guard).read_again(float("inf"))
    assert pending(guard) == set()
    assert guard.stats().failures == 0
    assert guard.stats().loads == 4


# -------------------------------------------------------------------------------- odd stores


class Packing(Held):
    """A store that packs its snapshots itself, as PostgreSQL does; `change` changes their rows."""

    def __init__(self, world: World, change: Callable[[list[tuple[str, bytes]]], object]) -> None:
        super().__init__(world.inner)
        self._change = change
        self.closed = 0
        world.store = self

    def load_all_rows(self) -> tuple[int, Iterator[tuple[str, bytes]]]:
        revision, policies = self.store.load_all_policies()
        rows = [(name, pack(policy)) for name, policy in policies]
        self._change(rows)
        return revision, self._closing(rows)

    def _closing(self, rows: list[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
        try:
            yield from rows
        finally:
            self.closed += 1


UNRESTRICTED = b"\3\0\0\0\0"


def test_packed_rows_of_a_store_are_used(world: World) -> None:
    """The snapshot is closed at its end."""
    world.restrict("jsmith", HOME)
    store = Packing(world, lambda rows: None)
    guard = preloaded(world)
    assert (store.closed, store.streams) == (1, [])
    assert guard.stats().preloaded == 1
    assert not guard.is_allowed("jsmith", OFFICE)
    assert guard.check("jsmith", HOME).restriction_id == "r1"


@pytest.mark.parametrize("damaged", [b"", b"\1\0\1\0\0" + bytes(7), b"\x08\0\0\0\0"])
def test_damaged_row_is_read_from_the_store(world: World, damaged: bytes) -> None:
    """The other users of the snapshot are preloaded."""
    for name in ("adoe", "jsmith"):
        world.restrict(name, HOME)
    Packing(world, lambda rows: rows.__setitem__(1, ("jsmith", damaged)))
    guard = preloaded(world)
    for _ in range(2):
        assert not guard.is_allowed("jsmith", OFFICE)
        assert not guard.is_allowed("adoe", OFFICE)
    assert guard.check("jsmith", HOME).restriction_id == "r2"
    assert world.store.loads == ["jsmith"]


@pytest.mark.parametrize("apart", [1, 1_500])
def test_snapshot_with_a_user_in_several_parts_is_rejected(
    memory: World, apart: int, caplog: pytest.LogCaptureFixture
) -> None:
    memory.restrict("jsmith", HOME)
    more = [(f"user{n}", UNRESTRICTED) for n in range(apart)]
    Packing(memory, lambda rows: rows.extend([*more, rows[0]]))
    guard = memory.guard(preload=True)
    guard.sync()
    assert guard.stats().preloaded is None
    assert "several parts" in told(caplog)[0].getMessage()


# ---------------------------------------------------------------------------------- refresher


def test_refresher_reads_a_snapshot_and_changed_users(world: World) -> None:
    world.restrict("jsmith", HOME)
    with world.guard(preload=True, max_staleness=3600) as guard:
        comes_true(lambda: guard.stats().preloaded == 1)
        comes_true(lambda: not streaming())
        revision = world.restrict("adoe", OFFICE)
        comes_true(lambda: guard.revision == revision and not pending(guard))
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
        table = guard._table
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
    assert table.complete is None
    assert table.snapshot is None
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
    Packing(memory, lambda rows: rows.extend((f"user{n}", UNRESTRICTED) for n in range(4_500)))
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
