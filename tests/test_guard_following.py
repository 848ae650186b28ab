"""Followers of a guard are told which users were dropped; and whether a guard is healthy."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from ipguard import EVERYBODY, InvalidValue, Reason
from ipguard.errors import StoreUnavailable
from ipguard.guard import Guard
from ipguard.guard._backlog import Backlog
from ipguard.model import RESET
from tests.guards import (
    HOME,
    OFFICE,
    PATIENCE,
    Call,
    Gate,
    Restorable,
    World,
    comes_true,
    new_world,
)
from tests.guards import restorable as restorable  # noqa: PLC0414
from tests.test_guard_fork import in_child
from tests.test_guard_fork import sqlite as sqlite  # noqa: PLC0414

JSMITH = frozenset({"jsmith"})

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@pytest.fixture
def world() -> World:
    world = new_world()
    world.restrict("jsmith", HOME)
    return world


class Told:
    """A callback that keeps what it was called with."""

    def __init__(self, act: Callable[[], object] = lambda: None) -> None:
        self.calls: list[tuple[Any, int]] = []
        self.threads: set[str] = set()
        self.act = act

    def __call__(self, usernames: Any, revision: int) -> None:
        self.calls.append((usernames, revision))
        self.threads.add(threading.current_thread().name)
        self.act()

    def after(self, count: int) -> list[tuple[Any, int]]:
        """Wait for so many calls, and return all."""
        comes_true(lambda: len(self.calls) >= count)
        return self.calls


def followed(guard: Guard, **settings: Any) -> Told:
    told = Told(**settings)
    guard.follow(told)
    guard.sync()
    return told


# ------------------------------------------------------------------------------- with a refresher


def test_refresher_calls_in_the_order_of_the_syncs(world: World) -> None:
    world.register("mlee")
    expected: list[tuple[Any, int]] = []
    with world.guard(max_staleness=3600) as guard:
        told = followed(guard)
        for name in ("jsmith", "mlee", "jsmith"):
            expected.append((frozenset({name}), world.restrict(name, OFFICE)))
            assert told.after(len(expected)) == expected
    assert told.threads == {"ipguard-refresher"}


def test_callback_gets_the_new_answer(world: World) -> None:
    """Without any time passing: the user was dropped before the call."""
    answers: list[Any] = []
    with world.guard(max_staleness=3600) as guard:
        assert guard.is_allowed("jsmith", HOME)
        told = followed(
            guard,
            act=lambda: answers.append(guard.check("jsmith", HOME).revision),
        )
        revision = world.restrict("jsmith", OFFICE)
        told.after(1)
        comes_true(lambda: answers)
        assert answers == [revision]


@pytest.mark.parametrize("preload", [False, True])
def test_what_drops_nobody_is_not_told(world: World, preload: bool) -> None:
    """The first sync, a wrong guess, and a sync without changes."""
    with world.guard(max_staleness=3600, preload=preload) as guard:
        told = followed(guard)
        assert guard.wait_for(world.wrong_guess(), PATIENCE)
        guard.sync()
        revision = world.restrict("jsmith", OFFICE)
        assert told.after(1) == [(JSMITH, revision)]


@pytest.mark.parametrize("preload", [False, True])
def test_change_before_the_first_sync_is_not_missed(world: World, preload: bool) -> None:
    """The guard syncs when it is followed; if it cannot, its first sync tells everybody."""
    guard = world.guard(preload=preload)
    told = Told()
    guard.follow(told)
    revision = world.restrict("jsmith", OFFICE)
    guard.sync()
    assert told.calls == [(JSMITH, revision)]
    late = world.guard(preload=preload)
    world.store.down = StoreUnavailable("down")
    late.follow(told)
    world.store.down = None
    revision = world.restrict("jsmith", OFFICE)
    late.sync()
    assert told.calls[1:] == [(EVERYBODY, revision)]


def test_everybody(world: World) -> None:
    with world.guard(max_staleness=3600) as guard:
        told = followed(guard)
        revision = world.touch()
        assert told.after(1) == [(EVERYBODY, revision)]


def test_lost_history_is_everybody(restorable: Restorable) -> None:
    """The revision of the backup may be an older one."""
    guard = restorable.guard()
    revision = restorable.restrict("jsmith", HOME)
    put_back = restorable.back_up()
    restorable.restrict("jsmith", OFFICE)
    told = followed(guard)
    put_back()
    guard.sync()
    assert told.calls == [(EVERYBODY, revision)]


def test_exception_is_logged_and_the_others_are_called(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with world.guard(max_staleness=3600) as guard:
        failing, told = Told(fail), Told()
        guard.follow(failing)
        guard.follow(told)
        guard.sync()
        world.restrict("jsmith", OFFICE)
        told.after(1)
        world.restrict("jsmith", OFFICE)
        assert len(told.after(2)) == len(failing.calls)
    assert "a callback of follow failed" in caplog.text


def test_ended_follower_is_not_called(world: World) -> None:
    """Not even for the change at which another follower ends it."""
    guard = world.guard()
    ends: list[Callable[[], None]] = []
    first, second = Told(lambda: [end() for end in ends[1:]]), Told()
    ends += [guard.follow(first), guard.follow(second)]
    guard.sync()
    world.restrict("jsmith", OFFICE)
    guard.sync()
    ends[0]()
    ends[0]()
    world.restrict("jsmith", OFFICE)
    guard.sync()
    assert (len(first.calls), second.calls) == (1, [])
    assert guard._table.backlog.first() is None
    assert guard._table.backlog.readers == set()


def test_callback_that_cannot_be_called(world: World) -> None:
    with pytest.raises(InvalidValue, match=r"^callback: must be callable"):
        world.guard().follow(None)  # type: ignore[arg-type]


def test_preloaded_user_is_read_again_for_the_callback(world: World) -> None:
    answers: list[Any] = []
    with world.guard(max_staleness=3600, preload=True) as guard:
        comes_true(lambda: guard.stats().preloaded == 1)
        told = followed(guard, act=lambda: answers.append(guard.check("jsmith", HOME).reason))
        world.lift_all("jsmith")
        told.after(1)
        comes_true(lambda: answers == [Reason.UNRESTRICTED])


def test_callback_does_not_keep_the_guard_alive(world: World) -> None:
    guard = world.guard()
    guard.follow(lambda usernames, revision: guard.revision)  # noqa: F821 - deleted below
    guard.start()
    thread = guard._refresher.thread
    assert thread is not None
    del guard
    gc.collect()
    thread.join(PATIENCE)
    assert not thread.is_alive()


# ----------------------------------------------------------------------- slow and hanging callbacks


def test_hanging_callback_does_not_stop_logins_or_renewals(world: World) -> None:
    """Logins renew the lease; the refresher goes on with the rest afterwards, in order."""
    gate = Gate()
    with world.guard() as guard:
        told = followed(guard, act=gate)
        revision = world.restrict("jsmith", OFFICE)
        gate.reached()
        later = [world.restrict("mlee", HOME)]
        world.pass_time(5)
        assert not guard.check("mlee", OFFICE)
        later.append(world.lift_all("mlee"))
        world.pass_time(5)
        assert guard.check("mlee", OFFICE).revision == later[-1]
        assert guard.healthy()
        assert told.calls == [(JSMITH, revision)]
        gate.let_go()
        assert told.after(3) == [(JSMITH, revision), *((frozenset({"mlee"}), r) for r in later)]
    assert told.threads == {"ipguard-refresher"}


def test_restarted_refresher_renews_while_the_old_one_hangs(world: World) -> None:
    gate = Gate()
    guard = world.guard(max_staleness=0.3, monotonic=None)
    told = followed(guard, act=gate)
    guard.start()
    revision = world.restrict("jsmith", OFFICE)
    gate.reached()
    guard.close()
    guard.start()
    syncs = len(world.store.syncs)
    comes_true(lambda: len(world.store.syncs) > syncs + 3)
    assert told.calls == [(JSMITH, revision)]
    gate.let_go()
    comes_true(lambda: guard._table.backlog.first() is None)
    guard.close()


def test_sync_comes_before_the_rest_of_a_backlog(world: World) -> None:
    """After each change that was told, the time is looked at."""
    guard = world.guard()
    told = followed(guard)
    for _ in range(3):
        world.restrict("jsmith", OFFICE)
        guard._lease.sync()
        assert told.calls == []
    for count in range(1, 4):
        guard._followers.deliver(0)
        assert len(told.calls) == count
    assert [revision for _, revision in told.calls] == sorted(r for _, r in told.calls)


def test_long_backlog_becomes_everybody(world: World) -> None:
    """Its size is bounded, and the newest revision stays."""
    guard = world.guard()
    told = followed(guard)
    revisions = []
    for _ in range(30):
        revisions.append(world.touch(*(f"u{n}" for n in range(50))))
        guard._lease.sync()
    guard.sync()
    assert len(told.calls) == 10
    assert told.calls[0][0] is EVERYBODY
    assert told.calls[-1][1] == revisions[-1]
    assert [names for names, _ in told.calls].count(EVERYBODY) == 1


def test_reset_is_told_as_everybody() -> None:
    told: list[Any] = []
    world = new_world()
    guard = world.guard()
    guard.follow(lambda *call: told.append(call))
    guard.sync()
    world.store.changes = lambda changes: changes._replace(usernames=RESET)
    guard.sync()
    assert told == [(EVERYBODY, guard.revision)]


# ---------------------------------------------------------------------------- without a refresher


def test_without_a_refresher_sync_calls(world: World) -> None:
    """A check syncs, and calls nothing: a login does not wait for the host's callbacks."""
    guard = world.guard()
    told = followed(guard)
    revision = world.restrict("jsmith", OFFICE)
    world.pass_time(5)
    assert guard.check("jsmith", OFFICE).revision == revision
    assert told.calls == []
    guard.sync()
    assert told.calls == [(JSMITH, revision)]
    assert told.threads == {threading.current_thread().name}


def test_started_refresher_tells_what_was_dropped_before(world: World) -> None:
    guard = world.guard(max_staleness=3600)
    told = followed(guard)
    revision = world.restrict("jsmith", OFFICE)
    guard._lease.sync()
    with guard:
        assert told.after(1) == [(JSMITH, revision)]


def test_callback_may_sync(world: World) -> None:
    """The users that this sync drops are told afterwards."""
    guard = world.guard()
    depth: list[int] = []

    def act() -> None:
        depth.append(len(told.calls))
        if len(told.calls) == 1:
            world.restrict("mlee", OFFICE)
            guard.sync()
            assert len(told.calls) == 1

    told = followed(guard, act=act)
    world.restrict("jsmith", OFFICE)
    guard.sync()
    assert [names for names, _ in told.calls] == [JSMITH, frozenset({"mlee"})]


def test_two_syncs_never_call_at_once(world: World) -> None:
    guard, gate = world.guard(), Gate()
    told = followed(guard, act=gate)
    first = world.restrict("jsmith", OFFICE)
    telling = Call(guard.sync)
    gate.reached()
    second = world.restrict("jsmith", OFFICE)
    Call(guard.sync).result()
    assert told.calls == [(JSMITH, first)]
    gate.let_go()
    telling.result()
    assert told.calls == [(JSMITH, first), (JSMITH, second)]


def test_backlog_that_another_thread_has_delivered(world: World) -> None:
    guard = world.guard()
    told = followed(guard)
    guard._followers._deliver_first()
    assert told.calls == []


def test_only_the_oldest_item_is_removed() -> None:
    """Another thread may have delivered it, and a long backlog may have replaced it."""
    backlog = Backlog(object())
    for revision in (1, 2):
        backlog.add(frozenset({"jsmith"}), revision)
    first = backlog.first()
    assert first is not None
    for _ in range(2):
        backlog.remove(first)
        assert backlog.first() == (frozenset({"jsmith"}), 2)


def test_exit_from_a_callback_ends_the_call_only(world: World) -> None:
    def leave() -> None:
        raise SystemExit

    guard = world.guard()
    told = followed(guard, act=leave)
    world.restrict("jsmith", OFFICE)
    with pytest.raises(SystemExit):
        guard.sync()
    guard.sync()
    assert len(told.calls) == 1


def test_no_change_is_left_out(rounds: Any) -> None:
    """Whichever thread syncs, each change is told, in order; some are told twice."""
    world, count = new_world(), rounds(60, 2_000)
    world.register("jsmith")
    guard = world.guard()
    told = followed(guard)
    stop = threading.Event()

    def keep_syncing(sync: Callable[[], object]) -> None:
        while not stop.is_set():
            sync()

    calls = [Call(partial(keep_syncing, sync)) for sync in (guard.sync, guard._lease.sync)]
    revisions = [world.touch("jsmith") for _ in range(count)]
    stop.set()
    for call in calls:
        call.result()
    guard.sync()
    found = [revision for _, revision in told.calls]
    assert found == sorted(found)
    assert found[-1] == revisions[-1]
    assert {names for names, _ in told.calls} <= {JSMITH, EVERYBODY}


# ------------------------------------------------------------------------------------------ forks


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_refresher_of_a_child_calls_the_childs_callbacks(sqlite: World) -> None:
    sqlite.restrict("jsmith", HOME)
    with sqlite.guard(max_staleness=3600) as guard:
        told = followed(guard)

        def child() -> list[object]:
            assert guard.healthy()
            revision = sqlite.restrict("jsmith", OFFICE)
            return [told.after(1)[0] == (JSMITH, revision), *told.threads]

        assert in_child(child) == [True, "ipguard-refresher"]
        assert [names for names, _ in told.after(1)] == [JSMITH]


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_call_during_a_fork_is_made_in_the_child_too(sqlite: World) -> None:
    gate = Gate()
    guard = sqlite.guard()
    told = followed(guard, act=gate)
    revision = sqlite.restrict("jsmith", OFFICE)
    calling = Call(guard.sync)
    gate.reached()

    def child() -> bool:
        told.calls.clear()
        told.act = bool
        guard.sync()
        return told.calls == [(JSMITH, revision)]

    assert in_child(child) is True
    gate.let_go()
    calling.result()
    assert told.calls == [(JSMITH, revision)]


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_child_that_dropped_everything_tells_everybody(sqlite: World) -> None:
    """It lost the position, so its first sync names no users."""
    sqlite.restrict("jsmith", HOME)
    guard = sqlite.guard()
    told = followed(guard)

    def child() -> list[object]:
        with guard._table.lock:
            dropping = Call(guard._table.after_fork)  # as if another thread had been writing
            dropping.result()
        sqlite.restrict("jsmith", OFFICE)
        guard.sync()
        return [told.calls == [(EVERYBODY, guard.revision)], guard.is_allowed("jsmith", HOME)]

    assert in_child(child) == [True, True]


# ---------------------------------------------------------------------------------------- healthy


def test_healthy_renews_the_lease(world: World) -> None:
    guard = world.guard()
    assert guard.healthy()
    assert guard.healthy()
    assert len(world.store.syncs) == 1
    world.pass_time(5)
    assert not guard.stats().ready
    assert guard.healthy()
    assert guard.stats().ready
    assert len(world.store.syncs) == 2


def test_not_healthy_while_the_store_is_down(world: World) -> None:
    """Within the lease it is; afterwards an open circuit breaker answers at once."""
    guard = world.guard()
    assert guard.healthy()
    world.store.down = StoreUnavailable("down")
    assert guard.healthy()
    world.pass_time(5)
    assert not guard.healthy()
    syncs = len(world.store.syncs)
    assert not guard.healthy()
    assert len(world.store.syncs) == syncs
    world.store.down = None
    world.pass_time(1)
    assert guard.healthy()


def test_healthy_within_the_outage_grace(world: World) -> None:
    """Remembered users are answered, so an answer is possible."""
    guard = world.guard(outage_grace=60)
    world.store.down = StoreUnavailable("down")
    assert not guard.healthy()
    world.store.down = None
    world.pass_time(1)
    assert guard.check("jsmith", HOME)
    world.store.down = StoreUnavailable("down")
    world.pass_time(64)
    assert guard.healthy()
    assert guard.check("jsmith", HOME).stale
    world.pass_time(1)
    assert not guard.healthy()


def test_healthy_keeps_its_timeout_while_the_store_hangs(world: World) -> None:
    guard, gate = world.guard(), Gate()
    world.store.before_sync.append(gate)
    began = time.monotonic()
    assert not guard.healthy(timeout=0.05)
    assert time.monotonic() - began < PATIENCE / 2
    helper = guard._lease._helper
    assert helper is not None
    assert (helper.name, helper.daemon) == ("ipguard-sync", True)
    gate.let_go()
    comes_true(lambda: guard.stats().ready)
    with pytest.raises(InvalidValue, match=r"^timeout: must be a finite number of seconds"):
        guard.healthy(timeout="1")  # type: ignore[arg-type]


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_becomes_healthy_without_a_login(sqlite: World) -> None:
    """A server that forks after loading the application, with a probe and no login."""
    with sqlite.guard() as guard:
        guard.sync()

        def child() -> list[object]:
            sqlite.pass_time(5)
            before = guard.stats().ready, guard.stats().woken_by
            return [*before, guard.healthy(), guard.stats().ready, guard.stats().woken_by]

        assert in_child(child) == [False, "callers", True, True, "refresher"]
