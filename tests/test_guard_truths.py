"""The numbered truths of the guard: each step held and let go, so that nothing depends on luck."""

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
from ipguard.guard._table import Position, Table
from ipguard.model import RESET, Reason
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
    gate,
    told,
)
from tests.guards import memory as memory  # noqa: PLC0414
from tests.guards import restorable as restorable  # noqa: PLC0414
from tests.guards import world as world  # noqa: PLC0414


class WatchedTable(Table):
    """A table that calls a hook when its deadline is read, and records what is written to it."""

    def watch(self, guard: Guard, at_read: Callable[[], object] | None = None) -> None:
        self.__dict__["at_read"] = at_read
        self.__dict__["written"] = []
        self.__dict__["cached"] = guard._table.rows

    def __setattr__(self, name: str, value: Any) -> None:
        if "written" in self.__dict__ and name in ("position", "deadline"):
            self.__dict__["written"].append((name, value, sorted(self.__dict__["cached"])))
        super().__setattr__(name, value)

    def __getattribute__(self, name: str) -> Any:
        if name == "deadline":
            own = super().__getattribute__("__dict__")
            at_read, own["at_read"] = own.get("at_read"), None
            if at_read is not None:
                at_read()
        return super().__getattribute__(name)


def watch(guard: Guard, at_read: Callable[[], object] | None = None) -> list[Any]:
    """Watch a guard's table, and return the list of what is written to it from now on."""
    table: Any = guard._table
    table.__class__ = WatchedTable
    table.watch(guard, at_read)
    written: list[Any] = table.__dict__["written"]
    return written


class SpyLock:
    """A lock that calls a hook before it is acquired."""

    def __init__(self, lock: Any, hook: Callable[[], object]) -> None:
        self._lock = lock
        self._hook = hook

    def acquire(self, blocking: bool, timeout: float) -> bool:
        self._hook()
        acquired: bool = self._lock.acquire(blocking, max(timeout, PATIENCE))
        return acquired

    def release(self) -> None:
        self._lock.release()

    def locked(self) -> bool:
        held: bool = self._lock.locked()
        return held


def change_hands(world: World, guard: Guard) -> Callable[[], None]:
    """Return an act: the lease ends, the user is restricted, and a sync renews the lease."""

    def act() -> None:
        world.pass_time(5)
        world.restrict("jsmith", OFFICE)
        guard.sync()

    return act


# ------------------------------------------------------------------------------------ 1. reader


@pytest.mark.parametrize("ask", ["is_allowed", "check"])
def test_reader_takes_the_moment_before_it_looks_up(world: World, ask: str) -> None:
    """A user dropped while the moment is read is not let in by the renewed moment."""
    guard = world.guard()
    assert guard.is_allowed("jsmith", HOME)
    assert guard.is_allowed("jsmith", HOME)
    act = change_hands(world, guard)
    if ask == "check":
        # The slow path reads the moment twice: to hold the lease, and for the answer.
        watch(guard, lambda: watch(guard, act))
    else:
        watch(guard, act)
    assert not getattr(guard, ask)("jsmith", HOME)


@pytest.mark.parametrize("seen", [True, False], ids=["seen before", "first sight"])
def test_reader_tests_the_clock_against_the_moment_that_it_took(memory: World, seen: bool) -> None:
    """A drop and a renewal between the look-up and the test of the clock let nobody in."""
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


@pytest.mark.parametrize("cached", [True, False])
def test_slow_path_ends_with_the_same_test(world: World, cached: bool) -> None:
    """What the slow path found is not an answer once its moment has passed."""
    guard = world.guard()
    if cached:
        guard.check("jsmith", HOME)
    else:
        guard.sync()
    world.store.at_now.append(change_hands(world, guard))
    decision = guard.check("jsmith", HOME)
    assert (decision.allowed, decision.reason) == (False, Reason.NOT_LISTED)


def test_an_answer_that_is_overtaken_each_time_is_none(world: World) -> None:
    """Where the moment has passed at the end of each try, the login is not allowed."""
    guard = world.guard()
    world.store.at_now.extend([lambda: world.pass_time(5)] * 2)
    decision = guard.check("jsmith", HOME)
    assert (decision.allowed, decision.reason) == (False, Reason.STORE_UNAVAILABLE)
    assert guard.check("jsmith", HOME)


@pytest.mark.parametrize(("elapsed", "allowed"), [(4.999, True), (5.0, False)])
def test_the_lease_ends_at_its_moment(world: World, elapsed: float, allowed: bool) -> None:
    """At `max_staleness` after the start of the read the answer is no longer from memory."""
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
def test_sync_drops_then_moves_the_revision_then_the_moment(world: World, everybody: bool) -> None:
    """Whoever sees the new revision, or the new moment, can no longer find what was dropped."""
    guard = world.guard()
    guard.check("jsmith", HOME)
    revision = world.touch() if everybody else world.restrict("jsmith")
    world.pass_time(1)
    written = watch(guard)
    guard.sync()
    until = world.clock.monotonic() + 5
    position = Position(revision, guard._table.position.token, 1, 2)
    assert written == [("position", position, []), ("deadline", until, [])]


def test_the_moment_is_counted_from_the_start_of_the_read(world: World) -> None:
    """A read that took four seconds gives a lease of one."""
    guard = world.guard()
    world.store.after_sync.append(lambda: world.pass_time(4))
    guard.sync()
    assert guard.stats().lease_remaining == pytest.approx(1)
    assert guard.stats().last_sync_age == pytest.approx(4)


def test_neither_moment_nor_revision_goes_back(world: World) -> None:
    """Of two overlapping syncs the older may end last, and takes nothing back."""
    guard = world.guard()
    guard.sync()
    with gate(world.store.after_sync) as held:
        older = Call(guard.sync)
        held.reached()
        world.pass_time(3)
        revision = world.restrict("jsmith")
        assert guard.sync() == revision
        held.let_go()
        older.result()
    assert guard.revision == revision
    assert guard.stats().lease_remaining == pytest.approx(5)
    assert guard.stats().last_sync_age == 0


def test_the_moment_does_not_go_back_where_nothing_changed(world: World) -> None:
    """Of two overlapping syncs that find the same, the older one ending last shortens nothing."""
    guard = world.guard()
    guard.sync()
    with gate(world.store.after_sync) as held:
        older = Call(guard.sync)
        held.reached()
        world.pass_time(3)
        guard.sync()
        held.let_go()
        older.result()
    assert guard.stats().lease_remaining == pytest.approx(5)
    assert guard.stats().last_sync_age == 0


def test_a_newer_reading_from_an_overtaken_position_is_read_again(world: World) -> None:
    """A reading begun before another sync ended is used only if it is surely of one history."""
    guard = world.guard()
    guard.sync()
    with gate(world.store.before_sync) as held:
        one = Call(guard.sync)
        held.reached()
        world.restrict("jsmith")
        guard.sync()
        last = world.restrict("adoe")
        held.let_go()
        assert one.result() == last
    assert [None if cursor is None else cursor[0] for cursor in world.store.syncs] == [
        None,
        0,
        0,
        last - 2,
    ]


def test_a_sync_that_is_always_overtaken_ends(world: World) -> None:
    """A sync that others overtake each time gives up in bounded time."""
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


def test_no_lock_is_held_during_a_sync(world: World) -> None:
    """While a sync hangs in the store, others are answered, read and look at the figures."""
    guard = world.guard()
    guard.check("jsmith", HOME)
    with gate(world.store.before_sync) as held:
        hanging = Call(guard.sync)
        held.reached()
        assert Call(lambda: guard.is_allowed("jsmith", HOME)).result()
        assert Call(lambda: guard.check("adoe", HOME)).result()
        assert Call(guard.stats).result().users == 2
        assert Call(guard.sync).result() == 0
        held.let_go()
        hanging.result()


def test_no_lock_is_held_during_a_load(world: World) -> None:
    """While a load hangs in the store, others are answered, read and sync."""
    guard = world.guard()
    guard.check("jsmith", HOME)
    with gate(world.store.before_load) as held:
        hanging = Call(lambda: guard.check("adoe", HOME))
        held.reached()
        assert Call(lambda: guard.is_allowed("jsmith", HOME)).result()
        assert Call(lambda: guard.check("third", HOME)).result()
        assert Call(guard.sync).result() == 0
        held.let_go()
        assert hanging.result()


def test_a_sync_never_joins_a_read_that_began_before_it(world: World) -> None:
    """A sync called after a commit brings it, whatever older read is still under way."""
    guard = world.guard()
    guard.check("jsmith", HOME)
    with gate(world.store.after_sync) as held:
        older = Call(guard.sync)
        held.reached()
        revision = world.restrict("jsmith")
        assert Call(guard.sync).result() == revision
        assert not guard.is_allowed("jsmith", HOME)
        held.let_go()
        older.result()
    assert not guard.is_allowed("jsmith", HOME)


def test_a_read_below_the_revision_never_extends_the_lease(world: World) -> None:
    """A store that answers from behind what the guard knows counts as down."""
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


def test_a_policy_below_the_revision_answers_nothing_and_is_loaded_again(world: World) -> None:
    """A policy read before a change that the guard knew when the call began is not used."""
    guard = world.guard()
    old = world.inner.load_policy("jsmith")
    revision = world.restrict("jsmith")
    guard.sync()
    overtaken = [old]
    world.store.policy = lambda policy: overtaken.pop() if overtaken else policy
    decision = guard.check("jsmith", HOME)
    assert (decision.reason, decision.revision) == (Reason.NOT_LISTED, revision)
    assert len(world.store.loads) == 2


def test_a_store_that_stays_behind_is_no_answer(world: World) -> None:
    """Two policies below the guard's revision: the login is not allowed, nor is it remembered."""
    guard = world.guard()
    old = world.inner.load_policy("jsmith")
    world.restrict("jsmith")
    guard.sync()
    world.store.policy = lambda policy: old
    assert guard.check("jsmith", HOME).reason is Reason.STORE_UNAVAILABLE
    assert len(world.store.loads) == 2
    assert guard.stats().users == 0


def test_what_was_read_before_a_change_is_not_remembered_after_it(world: World) -> None:
    """The stale fill: a load overtaken by a sync may answer its own call, but is not kept."""
    guard = world.guard()
    guard.sync()
    with gate(world.store.after_load) as held:
        late = Call(lambda: guard.check("jsmith", HOME))
        held.reached()
        world.restrict("jsmith")
        guard.sync()
        held.let_go()
        late.result()
    assert guard.stats().users == 0
    assert not guard.is_allowed("jsmith", HOME)
    assert not guard.check("jsmith", HOME)


def test_a_policy_at_the_revision_is_remembered(world: World) -> None:
    """What was read at exactly the guard's revision is remembered: one read, then none."""
    world.restrict("jsmith", HOME)
    guard = world.guard()
    assert [guard.is_allowed("jsmith", HOME) for _ in range(3)] == [True] * 3
    assert world.store.loads == ["jsmith"]


def test_who_misses_together_shares_one_load(world: World, rounds: Any) -> None:
    """Any number of threads that miss on one user at once make one read."""
    world.restrict("jsmith", HOME)
    guard = world.guard()
    guard.sync()
    many = rounds(200, 10_000)
    waiting: list[int] = []
    with gate(world.store.before_load) as held:
        first = Call(lambda: guard.is_allowed("jsmith", HOME))
        held.reached()
        (load,) = guard._loads._in_flight.values()
        load.done = SpyLock(load.done, lambda: waiting.append(1))  # type: ignore[assignment]
        calls = [Call(lambda: guard.is_allowed("jsmith", HOME)) for _ in range(many)]
        comes_true(lambda: len(waiting) == many)
        held.let_go()
        assert all(call.result() for call in [first, *calls])
    assert world.store.loads == ["jsmith"]


def test_who_comes_after_the_shared_load_reads_nothing(world: World) -> None:
    """A thread that missed before another's load ended finds what that one remembered."""
    guard = world.guard()
    guard.sync()
    # The look-up of the slow path misses; the load ends before this thread gets to its own.
    until = guard._table.deadline
    assert guard.check("jsmith", HOME)
    found = guard._loads.load("jsmith", "jsmith", 0)
    assert found is not None
    assert found == (guard._table.rows["jsmith"], until)
    assert world.store.loads == ["jsmith"]


def test_what_others_remembered_is_not_used_below_the_revision(world: World) -> None:
    """Where the guard is not at the revision asked for, what it remembers is no answer."""
    guard = world.guard()
    guard.check("jsmith", HOME)
    assert guard._loads.load("jsmith", "jsmith", 1) is None
    assert world.store.loads == ["jsmith"] * 3


def test_who_joins_does_not_take_an_older_load(world: World) -> None:
    """Who began after a sync loads again rather than share what was read before it."""
    guard = world.guard()
    guard.sync()
    with gate(world.store.after_load) as held:
        older = Call(lambda: guard.check("jsmith", HOME))
        held.reached()
        revision = world.restrict("jsmith")
        guard.sync()
        (load,) = guard._loads._in_flight.values()
        joined = threading.Event()
        load.done = SpyLock(load.done, joined.set)  # type: ignore[assignment]
        younger = Call(lambda: guard.check("jsmith", HOME))
        assert joined.wait(PATIENCE)
        held.let_go()
        assert older.result()
        decision = younger.result()
    assert (decision.reason, decision.revision) == (Reason.NOT_LISTED, revision)


def test_a_waiter_does_not_use_a_load_of_a_revision_that_was_lost(restorable: Restorable) -> None:
    """A policy read ahead does not answer a call that began after a later sync.

    The revision has been replaced by another commit, and `at_least` means that one.
    """
    world = restorable
    world.restrict("jsmith", OFFICE)
    guard = world.guard()
    guard.sync()
    restore = world.back_up()
    lost = world.lift_all("jsmith")
    joined = threading.Event()
    with gate(world.store.after_load) as held:
        first = Call(lambda: guard.check("jsmith", HOME))
        held.reached()
        restore()
        assert world.touch("adoe") == lost
        assert guard.sync() == lost
        (load,) = guard._loads._in_flight.values()
        load.done = SpyLock(load.done, joined.set)  # type: ignore[assignment]
        second = Call(lambda: guard.check("jsmith", HOME, at_least=lost))
        assert joined.wait(PATIENCE)
        held.let_go()
        assert first.result()  # it began when the commit was there
        assert second.result().reason is Reason.NOT_LISTED
    assert world.store.loads == ["jsmith"] * 2


def test_a_load_overtaken_by_a_sync_is_not_remembered_and_hides_what_is_older(
    world: World,
) -> None:
    """A policy read ahead is not remembered after a sync, nor is the older one answered again."""
    guard = world.guard(preload=True)
    world.restrict("jsmith", OFFICE)
    guard.sync()
    table = guard._table.preloaded
    assert table is not None
    table.mark(["jsmith"])
    behind = world.inner.changes_since(None)._replace(usernames=frozenset())
    world.lift_all("jsmith")
    with gate(world.store.after_load) as held:
        call = Call(lambda: guard.check("jsmith", HOME))
        held.reached()
        # A server that is one commit behind answers the sync: the guard's revision stays.
        world.store.changes = lambda _: behind
        guard._lease.sync()
        held.let_go()
        assert call.result()
    assert "jsmith" not in guard._table.rows
    assert table.policy("jsmith", guard.revision) is None
    assert guard.check("jsmith", HOME)


def test_a_load_that_took_longer_than_max_staleness_answers_nothing(world: World) -> None:
    """A policy that took five seconds to come may be five seconds old."""
    guard = world.guard()
    guard.sync()

    def slow_then_down() -> None:
        world.pass_time(5)
        world.store.down = StoreUnavailable("down")

    world.store.after_load.append(slow_then_down)
    assert guard.check("jsmith", HOME).reason is Reason.STORE_UNAVAILABLE
    assert world.store.loads == ["jsmith"]


def test_a_slow_load_that_was_remembered_is_used_within_the_lease_alone(world: World) -> None:
    """How long its load took takes nothing from a remembered user, and adds nothing."""
    guard = world.guard()
    guard.sync()
    world.store.after_load.append(lambda: world.pass_time(4))
    assert guard.check("jsmith", HOME)
    world.store.down = StoreUnavailable("down")
    world.pass_time(0.9)
    assert guard.is_allowed("jsmith", HOME)
    world.pass_time(0.1)
    assert not guard.is_allowed("jsmith", HOME)


def test_a_load_that_hangs_is_not_joined_for_ever(world: World) -> None:
    """Past `max_staleness` a read under way can answer nothing, and another one begins."""
    guard = world.guard()
    guard.sync()
    with gate(world.store.before_load) as held:
        hanging = Call(lambda: guard.check("jsmith", HOME))
        held.reached()
        world.pass_time(5)
        assert Call(lambda: guard.check("jsmith", HOME)).result()
        held.let_go()
        hanging.result()
    assert not guard._loads._in_flight
    assert guard.is_allowed("jsmith", HOME)


def test_the_end_of_a_hung_load_leaves_the_next_one_under_way(world: World) -> None:
    """A load that nobody waits for any more does not take away the one that followed it."""
    guard = world.guard()
    guard.sync()
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


# ------------------------------------------------------------------ 4. unrestricted is a policy


@pytest.mark.parametrize("everybody", [False, True])
@pytest.mark.parametrize("registered", [False, True])
def test_an_unrestricted_user_is_dropped_like_any_other(
    world: World, everybody: bool, registered: bool
) -> None:
    """The first restriction on a user who could come from anywhere holds at the next sync."""
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


def test_a_restriction_lifted_opens_the_user_at_the_next_sync(world: World) -> None:
    """A denial is dropped like an allow."""
    world.restrict("jsmith")
    guard = world.guard()
    assert not guard.is_allowed("jsmith", HOME)
    world.lift_all("jsmith")
    guard.sync()
    assert guard.is_allowed("jsmith", HOME)


# -------------------------------------------------------------------- 5. temporary restrictions


def test_a_temporary_restriction_ends_at_its_moment_by_the_store(world: World) -> None:
    """An allow that rests on time is decided each time, by the store's clock, in the lease too."""
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


def test_only_the_store_s_clock_judges_expiry(world: World) -> None:
    """The time of day may be set: the lease goes on, the restriction ends by that clock."""
    world.restrict("jsmith", HOME, expires_in=3600)
    guard = world.guard()
    assert guard.is_allowed("jsmith", HOME)
    world.clock.set(world.clock() + timedelta(hours=1))
    assert not guard.is_allowed("jsmith", HOME)
    assert len(world.store.syncs) == 1


def test_time_never_opens_a_user(world: World) -> None:
    """When the last restriction has ended, nobody comes in from anywhere, cached or loaded."""
    world.restrict("jsmith", HOME, expires_in=2)
    guard = world.guard()
    guard.check("jsmith", HOME)
    world.pass_time(2)
    for asked in (guard, world.guard()):
        for address in (HOME, OFFICE, "2001:db8::1"):
            assert not asked.is_allowed("jsmith", address)
            assert asked.check("jsmith", address).reason is Reason.NOT_LISTED


def test_a_lasting_restriction_beside_a_temporary_one_is_remembered(world: World) -> None:
    """What is allowed whatever the time is answered from memory, and goes on after the other."""
    world.restrict("jsmith", HOME, expires_in=2)
    world.restrict("jsmith", OFFICE)
    guard = world.guard()
    assert guard.is_allowed("jsmith", HOME)
    assert guard.is_allowed("jsmith", OFFICE)
    assert guard._table.rows["jsmith"] == {OFFICE}
    world.pass_time(2)
    assert not guard.is_allowed("jsmith", HOME)
    assert guard.is_allowed("jsmith", OFFICE)


# ---------------------------------------------------------------------------- 6. diverged history


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in told(caplog) if r.levelno == logging.ERROR]


def test_a_restored_backup_with_as_many_other_changes_is_found_out(
    restorable: Restorable, caplog: pytest.LogCaptureFixture
) -> None:
    """Equal revisions of another history are told apart, all is dropped, and an ERROR says so."""
    world = restorable
    world.restrict("jsmith")
    restore = world.back_up()
    world.lift_all("jsmith")
    guard = world.guard()
    assert guard.is_allowed("jsmith", HOME)
    restore()
    world.touch("adoe")
    before = guard.revision
    world.pass_time(5)
    assert not guard.is_allowed("jsmith", HOME)
    assert guard.revision == before
    assert len(errors(caplog)) == 1
    assert "history" in errors(caplog)[0]
    guard.sync()
    assert len(errors(caplog)) == 1


def test_a_lower_revision_of_another_history_is_taken_over(
    restorable: Restorable, caplog: pytest.LogCaptureFixture
) -> None:
    """After a restored backup the guard goes back to its revision, and answers at once."""
    world = restorable
    world.restrict("jsmith")
    restore = world.back_up()
    world.lift_all("jsmith")
    last = world.touch("adoe")
    guard = world.guard()
    assert guard.is_allowed("jsmith", HOME)
    assert guard.revision == last
    restore()
    world.pass_time(5)
    decision = guard.check("jsmith", HOME)
    assert (decision.reason, decision.revision) == (Reason.NOT_LISTED, last - 2)
    assert guard.revision == last - 2
    assert len(errors(caplog)) == 1
    assert guard.check("jsmith", HOME, at_least=last).reason is Reason.STORE_UNAVAILABLE


def test_a_load_of_the_history_that_ended_is_not_remembered(restorable: Restorable) -> None:
    """A policy read before a restored backup was noticed is not kept, however high its revision."""
    world = restorable
    world.restrict("jsmith")
    restore = world.back_up()
    world.lift_all("jsmith")
    guard = world.guard()
    guard.sync()
    world.store.changes = lambda changes: changes._replace(usernames=RESET)
    guard.sync()  # not the first time that this happens
    world.store.changes = lambda changes: changes
    with gate(world.store.after_load) as held:
        late = Call(lambda: guard.check("jsmith", HOME))
        held.reached()
        restore()
        guard.sync()
        held.let_go()
        assert not late.result()
    assert len(world.store.loads) == 2
    assert not guard.is_allowed("jsmith", HOME)


def test_what_was_read_ahead_of_the_position_is_dropped_by_the_next_sync(
    restorable: Restorable,
) -> None:
    """A policy of a revision that the guard never stood at may be of a history that has ended."""
    world = restorable
    world.restrict("jsmith")
    guard = world.guard()
    guard.sync()
    restore = world.back_up()
    world.lift_all("jsmith")
    assert guard.is_allowed("jsmith", HOME)
    restore()
    world.touch("adoe")
    world.pass_time(5)
    assert not guard.is_allowed("jsmith", HOME)


def test_a_load_ahead_of_its_beginning_is_dropped_by_the_next_sync(restorable: Restorable) -> None:
    """Nor does a sync during the load vouch for a revision that it had not come to before."""
    world = restorable
    world.restrict("jsmith")
    guard = world.guard()
    guard.sync()
    restore = world.back_up()
    last = world.lift_all("jsmith")
    with gate(world.store.after_load) as held:
        late = Call(lambda: guard.check("jsmith", HOME))
        held.reached()
        restore()
        world.touch("adoe")
        assert guard.sync() == last
        held.let_go()
        late.result()
    world.pass_time(5)
    assert not guard.is_allowed("jsmith", HOME)


def test_what_was_read_at_the_position_stays_over_a_sync(world: World) -> None:
    """A sync that names others drops nobody else."""
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


def test_reset_drops_everything(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Where the store says RESET (pruned changes), nothing remembered is used again."""
    world.restrict("jsmith")
    guard = world.guard()
    assert guard.is_allowed("adoe", HOME)
    assert not guard.is_allowed("jsmith", HOME)
    world.store.changes = lambda changes: changes._replace(usernames=RESET)
    guard.sync()
    assert guard.stats().users == 0
    assert len(errors(caplog)) == 1


def test_the_first_sync_is_no_divergence(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """A store that begins with RESET is taken over without an alarm."""
    world.store.changes = lambda changes: changes._replace(usernames=RESET)
    guard = world.guard()
    guard.sync()
    assert errors(caplog) == []
    assert guard.stats().ready


def test_of_two_syncs_that_find_another_history_both_end_well(
    restorable: Restorable, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever of two overlapping syncs tells of the new history, it is taken over once."""
    world = restorable
    restore = world.back_up()
    world.touch("jsmith")
    guard = world.guard()
    guard.sync()
    restore()
    world.touch("adoe")
    with gate(world.store.after_sync) as held:
        one = Call(guard.sync)
        held.reached()
        guard.sync()
        held.let_go()
        one.result()
    assert guard.revision == 1
    assert guard.stats().ready
    assert len(errors(caplog)) == 1


def test_a_reading_of_another_history_at_the_same_revision_is_read_again(
    restorable: Restorable,
) -> None:
    """Of two overlapping syncs, the one that read before a backup was restored reads anew."""
    world = restorable
    guard = world.guard()
    guard.sync()
    restore = world.back_up()
    world.touch("jsmith")
    with gate(world.store.after_sync) as held:
        one = Call(guard.sync)
        held.reached()
        restore()
        world.touch("adoe")
        guard.sync()
        held.let_go()
        assert one.result() == 1
    assert len(world.store.syncs) == 4
    guard.sync()
    assert len(world.store.syncs) == 5


def test_an_overtaken_reset_still_drops_everything(world: World) -> None:
    """RESET may be said only once: who was told drops, though another sync moved on meanwhile."""
    guard = world.guard()
    guard.sync()
    world.store.changes = lambda changes: changes._replace(usernames=RESET)
    with gate(world.store.after_sync) as held:
        one = Call(guard.sync)
        held.reached()
        world.store.changes = lambda changes: changes
        revision = world.touch("adoe")
        guard.sync()
        assert guard.is_allowed("jsmith", HOME)
        held.let_go()
        assert one.result() == revision
    assert guard.stats().users == 0
    assert len(world.store.syncs) == 4


# ------------------------------------------------------------------------- 10. a store that hangs


def test_while_the_store_hangs_cached_users_are_answered(world: World) -> None:
    """A hanging load holds up its own user and nobody who is remembered."""
    guard = world.guard()
    guard.check("jsmith", HOME)
    with gate(world.store.before_load) as held:
        hanging = Call(lambda: guard.check("adoe", HOME))
        held.reached()
        assert guard.is_allowed("jsmith", HOME)
        held.let_go()
        assert hanging.result()


def test_one_inline_sync_at_a_time_and_others_wait_no_longer_than_their_patience(
    world: World,
) -> None:
    """When the lease is over and the store hangs, one caller reads, the others are denied soon."""
    guard = world.guard(max_staleness=0.2)
    assert guard._lease.patience == pytest.approx(0.1)
    guard.check("jsmith", HOME)
    world.pass_time(1)
    with gate(world.store.before_sync) as held:
        hanging = Call(lambda: guard.check("jsmith", HOME))
        held.reached()
        asked = [
            Call(lambda: guard.check("jsmith", HOME)),
            Call(lambda: guard.check("adoe", HOME)),
            Call(lambda: guard.check("jsmith", HOME, at_least=1)),
        ]
        assert [call.result().reason for call in asked] == [Reason.STORE_UNAVAILABLE] * 3
        assert len(world.store.syncs) == 2
        assert world.store.loads == ["jsmith"]
        held.let_go()
        assert hanging.result()
    assert guard.is_allowed("jsmith", HOME)


def test_behind_an_attempt_that_hangs_nobody_queues(world: World) -> None:
    """Once an attempt has lasted as long as is waited for, later callers are answered at once."""
    guard = world.guard(max_staleness=1, outage_grace=60)
    guard.check("jsmith", HOME)
    world.pass_time(2)
    guard._lease.patience = PATIENCE * 2  # who waited for this long would fail the test
    with gate(world.store.before_sync) as held:
        hanging = Call(lambda: guard.check("jsmith", HOME))
        held.reached()
        assert guard._lease._turn_since is not None
        guard._lease._turn_since -= PATIENCE * 2
        assert Call(lambda: guard.check("jsmith", HOME)).result().stale
        unknown = Call(lambda: guard.check("adoe", HOME)).result()
        assert unknown.reason is Reason.STORE_UNAVAILABLE
        held.let_go()
        assert hanging.result()
    assert guard.check("adoe", HOME)


def test_behind_a_load_that_hangs_nobody_queues(world: World) -> None:
    """Who misses on a user whose read has hung for long is denied at once."""
    guard = world.guard()
    guard.sync()
    guard._lease.patience = PATIENCE * 2
    with gate(world.store.before_load) as held:
        hanging = Call(lambda: guard.check("jsmith", HOME))
        held.reached()
        guard._loads._in_flight["jsmith"]._began -= PATIENCE * 2
        denied = Call(lambda: guard.check("jsmith", HOME)).result()
        assert denied.reason is Reason.STORE_UNAVAILABLE
        assert world.store.loads == ["jsmith"]
        held.let_go()
        assert hanging.result()


def test_at_least_waits_its_turn_within_the_lease(world: World) -> None:
    """Where the lease runs, callers that ask for a later revision make one sync between them."""
    guard = world.guard(max_staleness=0.2)
    guard.sync()
    revision = world.restrict("jsmith", HOME)
    with gate(world.store.before_sync) as held:
        hanging = Call(lambda: guard.check("jsmith", HOME, at_least=revision))
        held.reached()
        denied = Call(lambda: guard.check("jsmith", HOME, at_least=revision)).result()
        assert denied.reason is Reason.STORE_UNAVAILABLE
        assert len(world.store.syncs) == 2
        held.let_go()
        assert hanging.result()


def test_who_had_to_wait_for_the_turn_finds_the_work_done(world: World) -> None:
    """Who gets the turn after a sync that renewed the lease makes none of their own."""
    guard = world.guard()
    with gate(world.store.before_sync) as held:
        first = Call(lambda: guard.check("jsmith", HOME))
        held.reached()
        second = Call(lambda: guard.check("jsmith", HOME))
        comes_true(lambda: second.running)
        held.let_go()
        assert first.result()
        assert second.result()
    assert len(world.store.syncs) == 1


def test_who_had_to_wait_for_the_turn_finds_the_store_down(world: World) -> None:
    """Who gets the turn after a sync that failed does not try again at once."""
    guard = world.guard()
    turn = guard._lease._turn
    waiting = threading.Event()

    with gate(world.store.before_sync) as held:
        first = Call(lambda: guard._lease.ensure(0))
        held.reached()
        guard._lease._turn = SpyLock(turn, waiting.set)  # type: ignore[assignment]
        second = Call(lambda: guard._lease.ensure(0))
        assert waiting.wait(PATIENCE)
        world.store.down = StoreUnavailable("down")
        guard._lease._turn = turn
        held.let_go()
        assert first.result() is False
        assert second.result() is False
    assert len(world.store.syncs) == 1


def test_who_joins_a_hanging_load_waits_no_longer_than_their_patience(world: World) -> None:
    """A second caller for a user whose load hangs is denied soon, without another read."""
    guard = world.guard(max_staleness=0.2)
    guard.sync()
    with gate(world.store.before_load) as held:
        hanging = Call(lambda: guard.check("jsmith", HOME))
        held.reached()
        assert guard.check("jsmith", HOME).reason is Reason.STORE_UNAVAILABLE
        assert world.store.loads == ["jsmith"]
        held.let_go()
        assert hanging.result()


def test_patience_is_below_max_staleness_and_bounded(memory: World) -> None:
    """Nobody waits for another's sync longer than half a lease, or two seconds."""
    assert memory.guard(max_staleness=1)._lease.patience == 0.5
    assert memory.guard(max_staleness=60)._lease.patience == 2.0


@pytest.mark.parametrize("what", ["sync", "load"])
def test_back_off_after_failures_doubles(
    world: World, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100, 200, 400, 800 ms, then each second, without jitter: no attempt before, one after."""
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


def test_reads_that_fail_together_are_one_failure(world: World) -> None:
    """Many logins at the moment of an outage do not stretch the pause to its longest."""
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


def test_an_outage_is_told_once_and_so_is_its_end(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has one line when the store goes and one when it comes back, however long it took."""
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
    """How long a machine has slept, as a test has it."""

    def __init__(self, guard: Guard) -> None:
        self.seconds = 1000.0
        guard._lease._asleep = lambda: self.seconds
        guard._lease._slept = self.seconds


def test_after_a_sleep_the_lease_is_over_at_the_next_sync(world: World) -> None:
    """The monotonic clock stood still: its moment means nothing, even where the store is down."""
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


def test_a_sleep_ends_the_outage_grace_as_well(world: World) -> None:
    """Nobody can tell how stale an answer would be, so there is none."""
    guard = world.guard(outage_grace=3600)
    asleep = Asleep(guard)
    assert guard.is_allowed("jsmith", HOME)
    asleep.seconds += 1
    world.store.down = StoreUnavailable("down")
    with pytest.raises(StoreUnavailable):
        guard.sync()
    assert not guard.is_allowed("jsmith", HOME)


@pytest.mark.parametrize("down", [False, True])
def test_a_load_during_which_the_machine_slept_answers_nothing(world: World, down: bool) -> None:
    """The policy is as old as the sleep was long: a sync and another load answer, or nothing."""
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


def test_a_sleep_during_the_read_does_not_extend_the_lease(world: World) -> None:
    """A reading that lay there while the machine slept is of unknown age: it is read again."""
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


def test_a_sleep_ends_the_lease_though_the_sync_gives_up(world: World) -> None:
    """A reading that slept, and then no time to read again: the old lease does not run on."""
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


def test_no_sleep_is_seen_where_there_was_none(world: World) -> None:
    """Up to ten milliseconds are how exactly two clocks can be read one after the other."""
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


def test_a_new_guard_reads_nothing_and_begins_with_the_head_alone(world: World) -> None:
    """The constructor does no I/O; the first sync asks where the store is, and no rows."""
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


def test_two_guards_first_syncs_overlap_without_harm(world: World) -> None:
    """The older of two first syncs, ending last, takes nothing back and loses no change."""
    guard = world.guard()
    with gate(world.store.after_sync) as held:
        older = Call(guard.sync)
        held.reached()
        world.register("jsmith")
        guard.sync()
        guard.check("jsmith", HOME)
        revision = world.restrict("jsmith")
        held.let_go()
        older.result()
    guard.sync()
    assert guard.revision == revision
    assert not guard.is_allowed("jsmith", HOME)


def test_a_newer_first_reading_does_not_hide_a_change(world: World) -> None:
    """A first reading names nobody: after another sync it is not taken for `nobody changed`."""
    guard = world.guard()
    with gate(world.store.before_sync) as held:
        late = Call(guard.sync)
        held.reached()
        guard.sync()
        assert guard.is_allowed("jsmith", HOME)
        world.restrict("jsmith")
        held.let_go()
        late.result()
    assert not guard.is_allowed("jsmith", HOME)


# ------------------------------------------------------------------------------------- 13. watcher


def test_a_change_before_the_wait_is_not_slept_through(world: World) -> None:
    """The store is asked to wait from the guard's own revision, so nothing falls between."""
    guard = world.guard()
    guard.sync()
    world.touch("jsmith")
    began = time.monotonic()
    assert guard._lease.wait(PATIENCE)
    assert time.monotonic() - began < PATIENCE


def test_a_change_wakes_the_wait(world: World) -> None:
    """Another thread's commit ends a wait that is under way."""
    guard = world.guard()
    guard.sync()
    waiting = Call(lambda: guard._lease.wait(PATIENCE))
    world.restrict("jsmith")
    assert waiting.result()
