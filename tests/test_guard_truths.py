"""Tests of the guard's guarantees, by number; threads are held at each step."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from ipguard.errors import StoreUnavailable
from ipguard.guard import Guard
from ipguard.guard._slow_path import _Load
from ipguard.guard._table import Position, Table
from ipguard.model import RESET, Decision, Reason
from tests.guards import (
    ELSEWHERE,
    HOME,
    OFFICE,
    PATIENCE,
    Call,
    Gate,
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


class WatchedTable(Table):
    """A table that records what is written to it, and which rows it has at that time."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("position", "deadline"):
            written = self.__dict__.setdefault("written", [])
            written.append((name, value, sorted(self.rows)))
        super().__setattr__(name, value)


def after_look_up(guard: Guard, act: Callable[[], object]) -> None:
    """Call a function right after the next look-up of the slow path."""
    table: Any = guard._table
    find = table.find

    def found(name: str) -> object:
        row = find(name)
        table.find = find
        act()
        return row

    table.find = found


class SpyLock:
    """A lock that calls a hook before it is acquired, and notes for how long callers would wait."""

    def __init__(self, lock: Any, hook: Callable[[], object]) -> None:
        self._lock = lock
        self._hook = hook
        self.timeouts: list[float] = []

    def acquire(self, blocking: bool, timeout: float) -> bool:
        self.timeouts.append(timeout)
        self._hook()
        acquired: bool = self._lock.acquire(blocking, max(timeout, PATIENCE))
        return acquired

    def release(self) -> None:
        self._lock.release()

    def locked(self) -> bool:
        held: bool = self._lock.locked()
        return held


def change_hands(world: World, guard: Guard) -> Callable[[], None]:
    """Return a function that ends the lease, restricts the user and syncs."""

    def act() -> None:
        world.pass_time(5)
        world.lift_all("jsmith")
        world.restrict("jsmith", OFFICE)
        guard.sync()

    return act


# ------------------------------------------------------------------------------------ 1. reader


def test_slow_path_takes_the_deadline_before_it_looks_up(world: World) -> None:
    """A user that is dropped after the look-up is not allowed by the new deadline."""
    guard = world.guard()
    assert guard.is_allowed("jsmith", HOME)
    after_look_up(guard, change_hands(world, guard))
    assert not guard._slow_path.answer("jsmith", HOME, None)


def test_decision_names_the_revision_of_its_row(memory: World) -> None:
    """A sync and a read ahead of it replace the row while the call looks it up."""
    memory.restrict("jsmith", HOME)
    guard = memory.guard(outage_grace=10.0)
    guard.check("jsmith", HOME)
    path, home = guard._slow_path, bytes([203, 0, 113, 7])

    def replace() -> None:
        memory.touch("jsmith")
        guard._lease.sync()
        memory.touch("jsmith")
        assert guard.check("jsmith", HOME).revision > guard.revision

    asking: list[Callable[[], Decision]] = [
        lambda: path.answer("jsmith", HOME, None),
        lambda: path._in_grace("jsmith", home, 0),
    ]
    for ask in asking:
        known = guard.revision
        after_look_up(guard, replace)
        assert ask().revision == known + 2 == guard.revision + 1
        guard.sync()
        guard.check("jsmith", HOME)


@pytest.mark.parametrize("seen", [True, False], ids=["seen before", "first sight"])
def test_reader_compares_the_clock_with_the_deadline_it_took(memory: World, seen: bool) -> None:
    """The user is dropped, and the lease renewed, between the look-up and the comparison."""
    acts: list[Callable[[], None]] = []

    def monotonic() -> float:
        if acts:
            acts.pop()()
        return memory.clock.monotonic()

    guard = memory.guard(monotonic=monotonic)
    assert guard.is_allowed("jsmith", HOME)
    assert guard.is_allowed("jsmith", HOME)
    acts.append(change_hands(memory, guard))
    assert not guard.is_allowed("jsmith", HOME if seen else ELSEWHERE)
    assert not acts


def test_decision_that_is_overtaken_each_time_is_denied(world: World) -> None:
    world.restrict("jsmith", HOME, expires_in=60)
    guard = world.guard()
    world.store.at_now.extend([lambda: world.pass_time(5)] * 2)
    decision = guard.check("jsmith", HOME)
    assert (decision.allowed, decision.reason) == (False, Reason.STORE_UNAVAILABLE)
    assert guard.check("jsmith", HOME)


@pytest.mark.parametrize(("elapsed", "allowed"), [(4.999, True), (5.0, False)])
def test_lease_ends_at_max_staleness(world: World, elapsed: float, allowed: bool) -> None:
    guard = world.guard()
    assert guard.is_allowed("jsmith", HOME)
    world.store.down = StoreUnavailable("down")
    world.pass_time(elapsed)
    assert guard.is_allowed("jsmith", HOME) is allowed
    assert guard.is_allowed("jsmith", OFFICE) is allowed
    assert guard.check("jsmith", HOME).allowed is allowed
    assert guard.stats().ready is allowed


# -------------------------------------------------------------------------------------- 2. sync


@pytest.mark.parametrize("everybody", [False, True])
def test_sync_drops_then_moves_the_position_then_the_deadline(
    world: World, everybody: bool
) -> None:
    guard = world.guard()
    guard.check("jsmith", HOME)
    revision = world.touch() if everybody else world.restrict("jsmith")
    world.pass_time(1)
    table: Any = guard._table
    table.__class__ = WatchedTable
    guard.sync()
    until = world.clock.monotonic() + 5
    position = Position(revision, guard._table.position.token, 1, 2)
    assert table.written == [("position", position, []), ("deadline", until, [])]


def test_deadline_counts_from_the_start_of_the_read(world: World) -> None:
    guard = world.guard()
    world.store.after_sync.append(lambda: world.pass_time(4))
    guard.sync()
    assert guard.stats().lease_remaining == pytest.approx(1)
    assert guard.stats().last_sync_age == pytest.approx(4)


@pytest.mark.parametrize("changed", [True, False])
def test_deadline_and_revision_never_go_back(world: World, changed: bool) -> None:
    """The older of two overlapping syncs ends last."""
    guard = world.guard()
    guard.sync()
    with during(world.store.after_sync, guard.sync) as older:
        world.pass_time(3)
        revision = world.restrict("jsmith") if changed else guard.revision
        assert guard.sync() == revision
    older.result()
    assert guard.revision == revision
    assert guard.stats().lease_remaining == pytest.approx(5)
    assert guard.stats().last_sync_age == 0


def test_sync_that_is_always_overtaken_gives_up(world: World) -> None:
    guard = world.guard()
    guard.sync()

    def overtake() -> None:
        world.restrict("adoe")
        world.store.before_sync.appendleft(lambda: None)
        guard.sync()
        world.restrict("adoe", ELSEWHERE)
        world.lift_all("adoe")
        world.pass_time(1.5)

    world.store.before_sync.extend([overtake] * 3)
    with pytest.raises(StoreUnavailable, match="in time"):
        guard.sync()


@pytest.mark.parametrize("what", ["sync", "load"])
def test_no_lock_is_held_during_a_read(world: World, what: str) -> None:
    guard = world.guard()
    guard.check("jsmith", HOME)
    reads: dict[str, Callable[[], object]] = {
        "sync": guard.sync,
        "load": lambda: guard.check("adoe", HOME),
    }
    with during(getattr(world.store, f"before_{what}"), reads[what]) as hanging:
        assert Call(lambda: guard.is_allowed("jsmith", HOME)).result()
        assert Call(lambda: guard.check("third", HOME)).result()
        assert Call(guard.stats).result().users == 2
        assert Call(guard.sync).result() == 0
    hanging.result()


def test_sync_never_joins_an_earlier_read(world: World) -> None:
    guard = world.guard()
    guard.check("jsmith", HOME)
    with during(world.store.after_sync, guard.sync) as older:
        revision = world.restrict("jsmith")
        assert Call(guard.sync).result() == revision
        assert not guard.is_allowed("jsmith", HOME)
    older.result()
    assert not guard.is_allowed("jsmith", HOME)


def test_read_below_the_revision_is_a_failure(world: World) -> None:
    guard = world.guard()
    world.restrict("jsmith")
    guard.sync()
    world.store.changes = lambda changes: changes._replace(head=changes.head - 1)
    world.pass_time(2)
    with pytest.raises(StoreUnavailable, match="behind 2"):
        guard.sync()
    assert guard.stats().lease_remaining == pytest.approx(3)
    assert guard.stats().failures == 1
    assert guard.revision == 2


# -------------------------------------------------------------------------------------- 3. load


@pytest.mark.parametrize("stays", [False, True])
def test_policy_below_the_revision_is_loaded_once_more(world: World, stays: bool) -> None:
    guard = world.guard()
    old = world.inner.load_policy("jsmith")
    revision = world.restrict("jsmith")
    guard.sync()
    overtaken = [old] * (2 if stays else 1)
    world.store.policy = lambda policy: overtaken.pop() if overtaken else policy
    decision = guard.check("jsmith", HOME)
    reason = Reason.STORE_UNAVAILABLE if stays else Reason.NOT_LISTED
    assert (decision.reason, decision.revision) == (reason, revision)
    assert len(world.store.loads) == 2
    assert guard.stats().users == (0 if stays else 1)


def test_stale_fill(world: World) -> None:
    """A load that a sync overtakes may answer its own call, but is not remembered."""
    guard = world.guard()
    guard.sync()
    with during(world.store.after_load, lambda: guard.check("jsmith", HOME)) as late:
        world.restrict("jsmith")
        guard.sync()
    late.result()
    assert guard.stats().users == 0
    assert not guard.is_allowed("jsmith", HOME)
    assert not guard.check("jsmith", HOME)


def test_read_that_an_empty_sync_overtakes_is_remembered(world: World) -> None:
    """It was not ahead of the position when it began, so the sync has named what changed since."""
    guard = world.guard()
    guard.sync()
    with during(world.store.after_load, lambda: guard.check("jsmith", HOME)) as late:
        guard.sync()
    assert late.result()
    assert guard.is_allowed("jsmith", HOME)
    assert world.store.loads == ["jsmith"]


def test_single_flight(world: World, rounds: Any) -> None:
    """All threads that miss on one user share one read."""
    world.restrict("jsmith", HOME)
    guard = world.guard()
    guard.sync()
    many = rounds(200, 10_000)
    waiting: list[int] = []
    with during(world.store.before_load, lambda: guard.is_allowed("jsmith", HOME)) as first:
        (load,) = guard._loads._in_flight.values()
        load.done = SpyLock(load.done, lambda: waiting.append(1))  # type: ignore[assignment]
        calls = [Call(lambda: guard.is_allowed("jsmith", HOME)) for _ in range(many)]
        comes_true(lambda: len(waiting) == many)
    assert all(call.result() for call in [first, *calls])
    assert world.store.loads == ["jsmith"]


def test_miss_after_the_shared_load_reads_nothing(world: World) -> None:
    guard = world.guard()
    guard.sync()
    # The slow path's look-up missed, and another thread's load has ended since.
    until = guard._table.deadline
    assert guard.check("jsmith", HOME)
    assert guard._loads.load("jsmith", 0) == (guard._table.find("jsmith"), until, 0)
    assert world.store.loads == ["jsmith"]


def test_remembered_row_is_not_used_below_the_revision(world: World) -> None:
    guard = world.guard()
    guard.check("jsmith", HOME)
    assert guard._loads.load("jsmith", 1) is None
    assert world.store.loads == ["jsmith"] * 3


def test_row_of_a_slow_load_is_used_until_the_deadline(world: World) -> None:
    guard = world.guard()
    guard.sync()
    world.store.after_load.append(lambda: world.pass_time(4))
    assert guard.check("jsmith", HOME)
    world.store.down = StoreUnavailable("down")
    world.pass_time(0.9)
    assert guard.is_allowed("jsmith", HOME)
    world.pass_time(0.1)
    assert not guard.is_allowed("jsmith", HOME)


def test_load_that_hangs_is_not_joined_after_max_staleness(world: World) -> None:
    guard = world.guard()
    guard.sync()
    with during(world.store.before_load, lambda: guard.check("jsmith", HOME)) as hanging:
        world.pass_time(5)
        assert Call(lambda: guard.check("jsmith", HOME)).result()
    hanging.result()
    assert not guard._loads._in_flight
    assert guard.is_allowed("jsmith", HOME)


@pytest.mark.parametrize("kept", [False, True])
def test_row_of_a_hung_load_is_not_kept_after_a_younger_one(world: World, kept: bool) -> None:
    """The younger answer was newer; its row is not there any more, or was never kept."""
    guard = world.guard(capacity=1)
    world.register("jsmith", "adoe")
    guard.sync()
    with during(world.store.after_load, lambda: guard.check("jsmith", HOME)) as hung:
        world.pass_time(5)
        guard.sync()
        with during(world.store.before_load, lambda: guard.check("jsmith", HOME)) as younger:
            if not kept:
                guard.sync()
            revision = world.restrict("jsmith", OFFICE)
        assert younger.result().revision == revision
        guard.check("adoe", HOME)
    hung.result()
    assert guard.check("jsmith", HOME).revision == revision


def test_end_of_a_hung_load_leaves_the_next_one_in_flight(world: World) -> None:
    guard = world.guard()
    guard.sync()
    guard._lease.patience = 0.05  # the first call tries again, and joins the second load
    first, second = Gate(), Gate()
    world.store.before_load.extend([first, second])
    hung = Call(lambda: guard.check("jsmith", HOME))
    first.reached()
    world.pass_time(5)
    guard.sync()
    following = Call(lambda: guard.check("jsmith", HOME))
    second.reached()
    (load,) = guard._loads._in_flight.values()
    world.touch("jsmith")
    guard.sync()
    first.let_go()
    hung.result()
    assert list(guard._loads._in_flight.values()) == [load]
    second.let_go()
    assert following.result()


def test_time_left_to_wait_for_a_load() -> None:
    load = _Load(0.0, 0.0, Position())
    assert 1_000.0 - PATIENCE < load.left(1_000.0) <= 1_000.0
    assert load.left(0.0) == 0.0


# ------------------------------------------------------------------ 4. unrestricted is a policy


@pytest.mark.parametrize("everybody", [False, True])
@pytest.mark.parametrize("registered", [False, True])
def test_unrestricted_user_is_dropped_like_any_other(
    world: World, everybody: bool, registered: bool
) -> None:
    """The first restriction holds from the next sync on."""
    if registered:
        world.register("jsmith")
    guard = world.guard()
    assert guard.is_allowed("jsmith", HOME)
    assert guard.is_allowed("JSmith", HOME)
    assert world.store.loads == ["jsmith"]
    world.restrict("jsmith")
    if everybody:
        world.touch()
    guard.sync()
    assert not guard.is_allowed("jsmith", HOME)
    assert not guard.is_allowed("JSmith", HOME)
    assert guard.is_allowed("jsmith", OFFICE)


# -------------------------------------------------------------------- 5. temporary restrictions


def test_temporary_restriction_ends_within_the_lease(world: World) -> None:
    """The allow is decided each time by the store's clock."""
    world.restrict("jsmith", HOME, expires_in=2)
    guard = world.guard()
    for _ in range(3):
        assert guard.is_allowed("jsmith", HOME)
        assert guard.check("jsmith", HOME).reason is Reason.LISTED
    world.pass_time(2 - 1e-6)
    assert guard.is_allowed("jsmith", HOME)
    world.pass_time(1e-6)
    assert not guard.is_allowed("jsmith", HOME)
    assert guard.check("jsmith", HOME).reason is Reason.NOT_LISTED
    assert len(world.store.loads) == 1


def test_only_the_stores_clock_decides_expiry(world: World) -> None:
    world.restrict("jsmith", HOME, expires_in=3600)
    guard = world.guard()
    assert guard.is_allowed("jsmith", HOME)
    world.clock.set(world.clock() + timedelta(hours=1))
    assert not guard.is_allowed("jsmith", HOME)
    assert len(world.store.syncs) == 1


def test_expiry_never_opens_a_user(world: World) -> None:
    """After the last restriction has expired, the user is restricted to no address."""
    world.restrict("jsmith", HOME, expires_in=2)
    guard = world.guard()
    guard.check("jsmith", HOME)
    world.pass_time(2)
    for asked in (guard, world.guard()):
        for address in (HOME, OFFICE, "2001:db8::1"):
            assert not asked.is_allowed("jsmith", address)
            assert asked.check("jsmith", address).reason is Reason.NOT_LISTED


# ---------------------------------------------------------------------------- 6. diverged history


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in told(caplog) if r.levelno == logging.ERROR]


@pytest.mark.parametrize("further", [0, 1], ids=["the same revision", "a lower one"])
def test_restored_backup(
    restorable: Restorable, further: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Its history is adopted: everything is dropped, and an ERROR is logged once."""
    world = restorable
    world.restrict("jsmith")
    restore = world.back_up()
    world.lift_all("jsmith")
    lost = world.touch("adoe") if further else 0
    guard = world.guard()
    assert guard.is_allowed("jsmith", HOME)
    before = guard.revision
    restore()
    adopted = world.touch("adoe")
    assert adopted == before - further
    world.pass_time(5)
    decision = guard.check("jsmith", HOME)
    assert (decision.reason, decision.revision) == (Reason.NOT_LISTED, adopted)
    assert guard.revision == adopted
    guard.sync()
    (error,) = errors(caplog)
    assert "history" in error
    if further:
        assert guard.check("jsmith", HOME, at_least=lost).reason is Reason.STORE_UNAVAILABLE


def test_row_at_the_position_survives_syncs(world: World) -> None:
    """A row that was read ahead of it is dropped by the first."""
    guard = world.guard()
    guard.check("jsmith", HOME)
    world.restrict("adoe")
    guard.sync()
    guard.sync()
    assert guard.is_allowed("jsmith", HOME)
    assert world.store.loads == ["jsmith"]
    world.touch("third")
    guard.check("ahead", HOME)
    guard.sync()
    guard.check("ahead", HOME)
    guard.sync()
    guard.check("ahead", HOME)
    assert world.store.loads == ["jsmith", "ahead", "ahead"]


def test_reset_at_the_first_sync_is_not_logged(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.store.changes = lambda changes: changes._replace(usernames=RESET)
    guard = world.guard()
    guard.sync()
    assert errors(caplog) == []
    assert guard.stats().ready


def test_two_overlapping_syncs_find_another_history(
    restorable: Restorable, caplog: pytest.LogCaptureFixture
) -> None:
    """It is adopted and logged once."""
    world = restorable
    restore = world.back_up()
    world.touch("jsmith")
    guard = world.guard()
    guard.sync()
    restore()
    world.touch("adoe")
    with during(world.store.after_sync, guard.sync) as one:
        guard.sync()
    one.result()
    assert guard.revision == 1
    assert guard.stats().ready
    assert len(errors(caplog)) == 1


def test_sync_overtaken_by_another_history_of_the_same_length_reads_again(
    restorable: Restorable,
) -> None:
    """Its answer is of the lost history, so that it says nothing about the time since it began."""
    world = restorable
    guard = world.guard()
    guard.sync()
    restore = world.back_up()
    world.touch("jsmith")
    with during(world.store.after_sync, guard.sync) as one:
        restore()
        world.touch("adoe")
        guard.sync()
        position = guard._table.position
    one.result()
    assert guard._table.position.cursor == position.cursor
    assert world.store.syncs[-1] == position.cursor
    assert len(world.store.syncs) == 4


def test_overtaken_reset_still_drops_everything(world: World) -> None:
    """The store may report RESET only once."""
    guard = world.guard()
    guard.sync()
    world.store.changes = lambda changes: changes._replace(usernames=RESET)
    with during(world.store.after_sync, guard.sync) as one:
        world.store.changes = lambda changes: changes
        revision = world.touch("adoe")
        guard.sync()
        assert guard.is_allowed("jsmith", HOME)
    assert one.result() == revision
    assert guard.stats().users == 0
    assert len(world.store.syncs) == 4


# ------------------------------------------------------------------------- 10. a store that hangs


def test_one_inline_sync_at_a_time(world: World) -> None:
    """Other callers wait for a limited time and are denied."""
    guard = world.guard(max_staleness=0.2)
    assert guard._lease.patience == pytest.approx(0.1)
    guard.check("jsmith", HOME)
    world.pass_time(1)
    with during(world.store.before_sync, lambda: guard.check("jsmith", HOME)) as hanging:
        asked = [
            Call(lambda: guard.check("jsmith", HOME)),
            Call(lambda: guard.check("adoe", HOME)),
            Call(lambda: guard.check("jsmith", HOME, at_least=1)),
        ]
        assert [call.result().reason for call in asked] == [Reason.STORE_UNAVAILABLE] * 3
        assert len(world.store.syncs) == 2
        assert world.store.loads == ["jsmith"]
    assert hanging.result()
    assert guard.is_allowed("jsmith", HOME)


def test_no_queue_behind_a_sync_that_hangs(world: World) -> None:
    """Once it has lasted as long as callers wait, later callers are answered at once."""
    guard = world.guard(max_staleness=1, outage_grace=60)
    guard.check("jsmith", HOME)
    world.pass_time(2)
    guard._lease.patience = PATIENCE * 2  # a caller that waits this long fails the test
    with during(world.store.before_sync, lambda: guard.check("jsmith", HOME)) as hanging:
        assert guard._lease._turn_since is not None
        guard._lease._turn_since -= PATIENCE * 2
        assert Call(lambda: guard.check("jsmith", HOME)).result().stale
        unknown = Call(lambda: guard.check("adoe", HOME)).result()
        assert unknown.reason is Reason.STORE_UNAVAILABLE
    assert hanging.result()
    assert guard.check("adoe", HOME)


def test_no_queue_behind_a_load_that_hangs(world: World) -> None:
    guard = world.guard()
    guard.sync()
    guard._lease.patience = PATIENCE * 2
    with during(world.store.before_load, lambda: guard.check("jsmith", HOME)) as hanging:
        guard._loads._in_flight["jsmith"]._began -= PATIENCE * 2
        denied = Call(lambda: guard.check("jsmith", HOME)).result()
        assert denied.reason is Reason.STORE_UNAVAILABLE
        assert world.store.loads == ["jsmith"]
    assert hanging.result()


def test_caller_that_waited_for_a_sync_does_not_repeat_it(world: World) -> None:
    guard = world.guard()
    guard._lease.patience = PATIENCE
    with during(world.store.before_sync, lambda: guard.check("jsmith", HOME)) as first:
        waiting = threading.Event()
        spy = SpyLock(guard._lease._turn, waiting.set)
        guard._lease._turn = spy  # type: ignore[assignment]
        second = Call(lambda: guard.check("jsmith", HOME))
        assert waiting.wait(PATIENCE)
    assert first.result()
    assert second.result()
    assert len(world.store.syncs) == 1
    assert 0 < spy.timeouts[0] <= PATIENCE


def test_caller_that_waited_for_a_failed_sync_does_not_repeat_it(world: World) -> None:
    guard = world.guard()
    turn = guard._lease._turn
    waiting = threading.Event()

    with during(world.store.before_sync, lambda: guard._lease.ensure(0)) as first:
        guard._lease._turn = SpyLock(turn, waiting.set)  # type: ignore[assignment]
        second = Call(lambda: guard._lease.ensure(0))
        assert waiting.wait(PATIENCE)
        world.store.down = StoreUnavailable("down")
        guard._lease._turn = turn
    assert first.result() is False
    assert second.result() is False
    assert len(world.store.syncs) == 1


def test_patience(memory: World) -> None:
    """It is half of `max_staleness`, and at most two seconds."""
    assert memory.guard(max_staleness=1)._lease.patience == 0.5
    assert memory.guard(max_staleness=60)._lease.patience == 2.0


@pytest.mark.parametrize("what", ["sync", "load"])
def test_circuit_breaker_backs_off(
    world: World, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100, 200, 400, 800 ms, then 1 s, without jitter: no attempt before, one after."""
    monkeypatch.setattr("ipguard._backoff.random", lambda: 0.0)
    guard = world.guard(max_staleness=1000 if what == "load" else 0.001)
    guard.sync()
    world.pass_time(0.001)
    world.store.down = StoreUnavailable("down")
    tried = world.store.loads if what == "load" else world.store.syncs
    count = len(tried)
    for pause in (0.1, 0.2, 0.4, 0.8, 1.0, 1.0):
        assert guard.check("jsmith", HOME).reason is Reason.STORE_UNAVAILABLE
        count += 1
        assert len(tried) == count
        world.pass_time(pause - 0.001)
        assert guard.check("jsmith", HOME).reason is Reason.STORE_UNAVAILABLE
        assert len(tried) == count
        world.pass_time(0.001 + 1e-6)
    world.store.down = None
    assert guard.check("jsmith", HOME)
    assert (guard.stats().error, guard.stats().failures) == (None, 0)
    world.store.down = StoreUnavailable("down again")
    world.pass_time(0.002)
    assert not guard.check("adoe", HOME)
    count = len(tried)
    assert not guard.check("adoe", HOME)
    assert len(tried) == count
    world.pass_time(0.1 + 1e-6)
    world.store.down = None
    assert guard.check("adoe", HOME)


def test_concurrent_failures_lengthen_the_back_off_once(world: World) -> None:
    guard = world.guard(max_staleness=1000)
    guard.sync()
    with gate(*[world.store.before_load] * 8) as held:
        calls = [Call(partial(guard.check, f"user{n}", HOME)) for n in range(8)]
        comes_true(lambda: len(world.store.loads) == 8)
        world.store.down = StoreUnavailable("down")
        held.let_go()
        assert not any(call.result() for call in calls)
    assert guard.stats().failures == 8
    world.store.down = None
    assert not guard.check("jsmith", HOME)
    world.pass_time(0.1 + 1e-6)
    assert guard.check("jsmith", HOME)


def test_outage_and_its_end_are_logged_once(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "ipguard")
    guard = world.guard()
    guard.sync()
    world.store.down = StoreUnavailable("gone fishing")
    for _ in range(5):
        with pytest.raises(StoreUnavailable, match="gone fishing"):
            guard.sync()
    stats = guard.stats()
    assert (stats.failures, stats.error) == (5, "StoreUnavailable: gone fishing")
    world.store.down = None
    guard.sync()
    guard.sync()
    assert [record.getMessage() for record in told(caplog)] == [
        "the store does not answer: StoreUnavailable: gone fishing",
        "the store answers again after 5 failures",
    ]


# --------------------------------------------------------------------------------------- 11. sleep


class Asleep:
    """How long a guard's machine has slept."""

    def __init__(self, guard: Guard) -> None:
        self.seconds = 1000.0
        guard._lease._asleep = lambda: self.seconds
        guard._lease._slept = self.seconds


def test_sync_after_a_sleep_ends_the_lease(world: World) -> None:
    """The monotonic clock stood still. This holds even if the store is down."""
    guard = world.guard()
    asleep = Asleep(guard)
    assert guard.is_allowed("jsmith", HOME)
    asleep.seconds += 3600
    world.store.down = StoreUnavailable("down")
    with pytest.raises(StoreUnavailable):
        guard.sync()
    assert not guard.is_allowed("jsmith", HOME)
    assert guard.stats().lease_remaining == 0
    world.store.down = None
    world.pass_time(1)
    assert guard.is_allowed("jsmith", HOME)
    world.pass_time(1)
    guard.sync()
    assert guard.stats().lease_remaining == pytest.approx(5)


def test_sleep_ends_the_outage_grace(world: World) -> None:
    guard = world.guard(outage_grace=3600)
    asleep = Asleep(guard)
    assert guard.is_allowed("jsmith", HOME)
    asleep.seconds += 1
    world.store.down = StoreUnavailable("down")
    with pytest.raises(StoreUnavailable):
        guard.sync()
    assert not guard.is_allowed("jsmith", HOME)


@pytest.mark.parametrize("down", [False, True])
def test_load_during_a_sleep_answers_nothing(world: World, down: bool) -> None:
    guard = world.guard()
    asleep = Asleep(guard)
    guard.sync()

    def sleep() -> None:
        asleep.seconds += 3600
        world.restrict("jsmith", OFFICE)
        world.store.down = StoreUnavailable("down") if down else None

    world.store.after_load.append(sleep)
    reason = Reason.STORE_UNAVAILABLE if down else Reason.NOT_LISTED
    assert guard.check("jsmith", HOME).reason is reason
    assert not guard.is_allowed("jsmith", HOME)


def test_sync_during_a_sleep_is_repeated(world: World) -> None:
    """The age of its read is unknown."""
    guard = world.guard()
    asleep = Asleep(guard)
    guard.sync()
    remaining: list[float] = []

    def sleep() -> None:
        asleep.seconds += 3600

    world.store.after_sync.append(sleep)
    world.store.before_sync.extend(
        [lambda: None, lambda: remaining.append(guard.stats().lease_remaining)]
    )
    guard.sync()
    assert remaining == [0]
    assert len(world.store.syncs) == 3
    assert guard.stats().lease_remaining == pytest.approx(5)


def test_sleep_ends_the_lease_if_the_sync_gives_up(world: World) -> None:
    guard = world.guard()
    asleep = Asleep(guard)
    guard.sync()

    def sleep() -> None:
        asleep.seconds += 3600
        world.pass_time(3)

    world.store.after_sync.append(sleep)
    with pytest.raises(StoreUnavailable, match="in time"):
        guard.sync()
    assert guard.stats().lease_remaining == 0


def test_differences_below_ten_milliseconds_are_not_a_sleep(world: World) -> None:
    """Two clocks cannot be read at the same moment."""
    guard = world.guard()
    asleep = Asleep(guard)
    guard.sync()
    asleep.seconds += 0.009
    world.store.down = StoreUnavailable("down")
    with pytest.raises(StoreUnavailable):
        guard.sync()
    assert guard.stats().ready
    asleep.seconds += 0.009
    with pytest.raises(StoreUnavailable):
        guard.sync()
    assert not guard.stats().ready


# --------------------------------------------------------------------------------------- 12. start


def test_new_guard_reads_nothing_and_its_first_sync_no_changes(world: World) -> None:
    revision = world.restrict("jsmith")
    guard = world.guard()
    assert (world.store.syncs, world.store.loads, guard.revision) == ([], [], 0)
    assert not guard.stats().ready
    guard.sync()
    assert world.store.syncs == [None]
    assert guard.revision == revision
    guard.sync()
    assert world.store.syncs[1] is not None
    assert world.store.syncs[1][0] == revision


# ------------------------------------------------------------------------------------- 13. watcher


def test_wait_notices_a_change_from_before_it(world: World) -> None:
    guard = world.guard()
    guard.sync()
    world.touch("jsmith")
    began = time.monotonic()
    assert guard._lease.wait(PATIENCE)
    assert time.monotonic() - began < PATIENCE


def test_wait_notices_a_change(world: World) -> None:
    guard = world.guard()
    guard.sync()
    waiting = Call(lambda: guard._lease.wait(PATIENCE))
    world.restrict("jsmith")
    assert waiting.result()
