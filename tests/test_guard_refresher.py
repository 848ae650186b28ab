"""The refresher: one daemon thread that nobody needs for an answer to be right."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from ipguard.errors import StoreUnavailable
from ipguard.guard import Guard
from tests.guards import HOME, OFFICE, PATIENCE, Call, World, comes_true, new_world, told


@pytest.fixture
def world() -> World:
    return new_world()


def refreshers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "ipguard-refresher"]


def refuses(ask: Callable[[str, str], bool]) -> bool:
    return not ask("jsmith", HOME)


def is_at(guard: Guard, revision: int) -> bool:
    return guard.revision == revision


def thread_of(guard: Guard) -> threading.Thread:
    assert guard._refresher.thread is not None
    return guard._refresher.thread


def test_no_thread_before_start(world: World) -> None:
    """Neither the constructor nor a question starts a thread."""
    guard = world.guard()
    guard.check("jsmith", HOME)
    guard.sync()
    assert refreshers() == []
    assert guard.stats().woken_by == "callers"
    guard.close()


def test_one_daemon_thread_from_start_to_close(world: World) -> None:
    """`start` and `close` may each be called twice; after `close` the thread is gone at once."""
    guard = world.guard()
    guard.start()
    guard.start()
    (thread,) = refreshers()
    assert thread.daemon
    assert guard.stats().woken_by == "refresher"
    began = time.monotonic()
    guard.close()
    assert time.monotonic() - began < 1
    assert not thread.is_alive()
    guard.close()
    assert guard.stats().woken_by == "callers"
    assert guard.check("jsmith", HOME)
    assert refreshers() == []


def test_a_with_block_starts_and_closes_and_may_be_entered_again(world: World) -> None:
    """`with` gives the guard itself, and closes it when the block raises as well."""
    guard = world.guard()

    def fail() -> None:
        with guard as entered:
            assert entered is guard
            assert len(refreshers()) == 1
            raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fail()
        assert refreshers() == []


def test_a_change_holds_as_soon_as_the_store_tells(world: World) -> None:
    """The refresher is woken by the commit, long before the lease is over."""
    with world.guard(max_staleness=3600) as guard:
        assert guard.is_allowed("jsmith", HOME)
        revision = world.restrict("jsmith", OFFICE)
        comes_true(lambda: guard.revision == revision)
        assert not guard.is_allowed("jsmith", HOME)


def test_the_lease_is_renewed_without_any_wake_up(world: World) -> None:
    """Where the store never wakes anybody, the thread syncs on its own, in time for the lease."""
    world.store.wait = lambda revision, timeout: False  # type: ignore[method-assign]
    with world.guard(max_staleness=0.3):
        comes_true(lambda: len(world.store.syncs) >= 4)


def test_how_often_it_syncs(world: World) -> None:
    """At least each second, three times in a lease; ten times a second it looks whether to stop."""
    for staleness, interval, piece in ((60, 1.0, 0.1), (1.5, 0.5, 0.1), (0.15, 0.05, 0.05)):
        with world.guard(max_staleness=staleness) as guard:
            assert guard._refresher._interval == pytest.approx(interval)
            assert guard._refresher._slice == pytest.approx(piece)


def test_between_two_rounds_it_does_not_sync(world: World) -> None:
    """A wait that brought nothing is no reason to read before the interval is over."""
    waits: list[float] = []

    def wait(revision: int, timeout: float) -> bool:
        waits.append(timeout)
        return False

    world.store.wait = wait  # type: ignore[method-assign]
    with world.guard(max_staleness=3600):
        comes_true(lambda: len(waits) >= 5)
        assert len(world.store.syncs) == 1
    assert set(waits) == {0.1}


@pytest.mark.parametrize("behaviour", ["true", "false", "raises"])
def test_a_store_whose_wait_returns_at_once_does_not_make_it_spin(
    world: World, behaviour: str
) -> None:
    """However a store's `wait` fails to wait, the thread takes its time."""
    waits: list[float] = []

    def wait(revision: int, timeout: float) -> bool:
        waits.append(time.monotonic())
        if behaviour == "raises":
            raise RuntimeError("no wait here")
        return behaviour == "true"

    world.store.wait = wait  # type: ignore[method-assign]
    began = time.monotonic()
    with world.guard():
        comes_true(lambda: len(waits) >= 4)
    took = time.monotonic() - began
    # The first wake-up is followed by the first sync, which brings something.
    assert len(waits) <= took / 0.1 + 3
    assert len(world.store.syncs) <= took / 0.1 + 3


@pytest.mark.parametrize("raises", [False, True])
def test_a_wait_that_brings_nothing_lasts(world: World, raises: bool) -> None:
    """Whoever waits in a loop is held up for as long as was asked, whatever the store does."""

    def wait(revision: int, timeout: float) -> bool:
        if raises:
            raise RuntimeError("no wait here")
        return False

    world.store.wait = wait  # type: ignore[method-assign]
    began = time.monotonic()
    assert world.guard()._lease.wait(0.05) is False
    assert time.monotonic() - began >= 0.05


def test_a_wake_up_that_fails_does_not_make_it_spin(world: World) -> None:
    """A store that wakes and then does not answer is asked ten times a second at the most."""
    world.store.wait = lambda revision, timeout: True  # type: ignore[method-assign]
    world.store.down = StoreUnavailable("down")
    began = time.monotonic()
    with world.guard() as guard:
        comes_true(lambda: guard.stats().failures >= 3)
        failures = guard.stats().failures
        assert failures <= (time.monotonic() - began) / 0.1 + 2


def test_it_outlives_an_outage_and_tells_once(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """An outage is one line, its end another, and the guard is ready again by itself."""
    caplog.set_level(logging.WARNING, "ipguard")
    world.store.down = StoreUnavailable("down")
    with world.guard(max_staleness=0.03) as guard:
        comes_true(lambda: guard.stats().failures >= 5)
        world.store.down = None
        comes_true(lambda: guard.stats().ready)
        comes_true(lambda: len(told(caplog)) == 2)
    assert [record.levelname for record in told(caplog)] == ["WARNING", "WARNING"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_died_is_started_again_by_the_next_slow_call(world: World) -> None:
    """Whatever ended the thread, the guard goes on, and brings it back."""

    def wait(revision: int, timeout: float) -> bool:
        raise SystemExit

    world.store.wait = wait  # type: ignore[method-assign]
    with world.guard() as guard:
        comes_true(lambda: guard.stats().woken_by == "callers")
        del world.store.wait
        assert guard.check("jsmith", HOME)
        assert guard.stats().woken_by == "refresher"


def test_sync_starts_it_again_too(world: World) -> None:
    """A forked child that only syncs has its refresher back as well."""
    with world.guard() as guard:
        guard._refresher.stop()
        guard._refresher.wanted = True
        guard.sync()
        assert guard.stats().woken_by == "refresher"


def test_closing_from_within_the_thread_does_not_wait_for_itself(world: World) -> None:
    """A store's wait may close the guard: the thread then ends, and nobody hangs."""
    guard = world.guard()
    threads: list[threading.Thread] = []

    def wait(revision: int, timeout: float) -> bool:
        if not threads:
            threads.append(threading.current_thread())
            guard.close()
        return False

    world.store.wait = wait  # type: ignore[method-assign]
    guard.start()
    comes_true(lambda: threads)
    threads[0].join(PATIENCE)
    assert not threads[0].is_alive()
    assert guard.stats().woken_by == "callers"


def test_close_does_not_wait_for_a_store_that_hangs(world: World) -> None:
    """The thread is a daemon: closing gives it a second, then leaves it to the store's deadline."""
    hanging, done = threading.Event(), threading.Event()

    def wait(revision: int, timeout: float) -> bool:
        hanging.set()
        return done.wait(PATIENCE)

    world.store.wait = wait  # type: ignore[method-assign]
    guard = world.guard()
    guard.start()
    thread = thread_of(guard)
    assert hanging.wait(PATIENCE)
    began = time.monotonic()
    guard.close()
    assert 0.9 <= time.monotonic() - began < 5
    assert thread.is_alive()
    done.set()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_a_guard_that_nobody_holds_takes_its_thread_with_it(world: World) -> None:
    """The thread does not keep a forgotten guard alive, nor poll the store for ever."""
    guard = world.guard()
    guard.start()
    thread = thread_of(guard)
    guard.is_allowed("jsmith", HOME)
    del guard
    gc.collect()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_the_bound_question_keeps_the_guard_and_its_thread(world: World) -> None:
    """Who holds `guard.is_allowed` alone holds the guard."""
    guard = world.guard()
    guard.start()
    thread, ask = thread_of(guard), guard.is_allowed
    del guard
    gc.collect()
    world.restrict("jsmith", OFFICE)
    comes_true(lambda: len(world.store.syncs) > 0)
    comes_true(partial(refuses, ask))
    assert thread.is_alive()
    del ask
    gc.collect()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_a_check_while_the_guard_closes_does_not_restart_the_refresher(world: World) -> None:
    """A thread that waits for the lock to start the refresher sees that it was stopped."""
    with world.guard() as guard:
        guard._refresher.stop()
        guard._refresher.wanted = True
        with guard._refresher._lock:
            revived = Call(guard._refresher.revive)
            comes_true(lambda: revived.running)
            guard._refresher.wanted = False
        revived.result()
        assert refreshers() == []


def test_two_who_start_it_at_once_start_one(world: World) -> None:
    """A thread that waits for the lock to start the refresher finds it running."""
    guard = world.guard()
    with guard._refresher._lock:
        calls = [Call(guard.start) for _ in range(4)]
        comes_true(lambda: guard._refresher.wanted)
    for call in calls:
        call.result()
    assert len(refreshers()) == 1
    guard.close()


def test_without_a_thread_to_be_had_answers_go_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`start` says so; a check does not need the thread, and tries again later."""
    guard = world.guard()
    with monkeypatch.context() as patch:

        def refuse(*args: Any, **settings: Any) -> None:
            raise RuntimeError("can't start new thread")

        patch.setattr("ipguard.guard._refresher.threading.Thread", refuse)
        with pytest.raises(RuntimeError):
            guard.start()
        assert guard.check("jsmith", HOME)
        assert guard.sync() == 0
        assert guard.stats().woken_by == "callers"
    guard.check("jsmith", HOME)
    assert guard.stats().woken_by == "refresher"
    guard.close()


def test_many_guards_share_one_store(world: World) -> None:
    """A change reaches each of many guards on one store."""
    guards = [world.guard(max_staleness=3600) for _ in range(8)]
    for guard in guards:
        guard.start()
        assert guard.is_allowed("jsmith", HOME)
    revision = world.restrict("jsmith", OFFICE)
    for guard in guards:
        comes_true(partial(is_at, guard, revision))
        assert not guard.is_allowed("jsmith", HOME)
        guard.close()
    assert refreshers() == []


def test_a_store_closed_under_it_does_no_harm(world: World) -> None:
    """A store that is closed first is an outage like any other."""
    with world.guard(max_staleness=0.03) as guard:
        guard.check("jsmith", HOME)
        world.inner.close()
        comes_true(lambda: guard.stats().failures >= 2)
        world.pass_time(5)
        assert not guard.is_allowed("jsmith", HOME)
