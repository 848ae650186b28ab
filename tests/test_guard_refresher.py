"""Tests of the refresher thread."""

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
    guard = world.guard()
    guard.check("jsmith", HOME)
    guard.sync()
    assert refreshers() == []
    assert guard.stats().woken_by == "callers"
    guard.close()


def test_one_daemon_thread_from_start_to_close(world: World) -> None:
    """Both may be called twice."""
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


def test_with_block_starts_and_closes(world: World) -> None:
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


def test_lease_is_renewed_without_wake_ups(world: World) -> None:
    world.store.wait = lambda revision, timeout: False  # type: ignore[method-assign]
    with world.guard(max_staleness=0.3):
        comes_true(lambda: len(world.store.syncs) >= 4)


def test_sync_interval(world: World) -> None:
    for staleness, interval, piece in ((60, 1.0, 0.1), (1.5, 0.5, 0.1), (0.15, 0.05, 0.05)):
        with world.guard(max_staleness=staleness) as guard:
            assert guard._refresher._interval == pytest.approx(interval)
            assert guard._refresher._slice == pytest.approx(piece)


def test_no_sync_before_the_interval_is_over(world: World) -> None:
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
def test_wait_that_returns_at_once_does_not_make_it_spin(world: World, behaviour: str) -> None:
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
    # The first wake-up is followed by the first sync, which moves the position.
    assert len(waits) <= took / 0.1 + 3
    assert len(world.store.syncs) <= took / 0.1 + 3


@pytest.mark.parametrize("raises", [False, True])
def test_failed_wait_takes_the_full_time(world: World, raises: bool) -> None:
    def wait(revision: int, timeout: float) -> bool:
        if raises:
            raise RuntimeError("no wait here")
        return False

    world.store.wait = wait  # type: ignore[method-assign]
    began = time.monotonic()
    assert world.guard()._lease.wait(0.05) is False
    assert time.monotonic() - began >= 0.05


def test_failed_syncs_do_not_make_it_spin(world: World) -> None:
    world.store.wait = lambda revision, timeout: True  # type: ignore[method-assign]
    world.store.down = StoreUnavailable("down")
    began = time.monotonic()
    with world.guard() as guard:
        comes_true(lambda: guard.stats().failures >= 3)
        failures = guard.stats().failures
        assert failures <= (time.monotonic() - began) / 0.1 + 2


def test_refresher_survives_an_outage(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged once, and so is its end."""
    caplog.set_level(logging.WARNING, "ipguard")
    world.store.down = StoreUnavailable("down")
    with world.guard(max_staleness=0.03) as guard:
        comes_true(lambda: guard.stats().failures >= 5)
        world.store.down = None
        comes_true(lambda: guard.stats().ready)
        comes_true(lambda: len(told(caplog)) == 2)
    assert [record.levelname for record in told(caplog)] == ["WARNING", "WARNING"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_check_restarts_a_thread_that_died(world: World) -> None:
    def wait(revision: int, timeout: float) -> bool:
        raise SystemExit

    world.store.wait = wait  # type: ignore[method-assign]
    with world.guard() as guard:
        comes_true(lambda: guard.stats().woken_by == "callers")
        del world.store.wait
        assert guard.check("jsmith", HOME)
        assert guard.stats().woken_by == "refresher"


def test_sync_restarts_the_thread(world: World) -> None:
    with world.guard() as guard:
        guard._refresher.stop()
        guard._refresher.wanted = True
        guard.sync()
        assert guard.stats().woken_by == "refresher"


def test_close_from_within_the_thread(world: World) -> None:
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


def test_close_while_the_store_hangs(world: World) -> None:
    """It waits for one second only."""
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


def test_thread_ends_when_the_guard_is_garbage_collected(world: World) -> None:
    guard = world.guard()
    guard.start()
    thread = thread_of(guard)
    guard.is_allowed("jsmith", HOME)
    del guard
    gc.collect()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_bound_method_keeps_the_guard_alive(world: World) -> None:
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


def test_check_while_the_guard_closes_does_not_restart_the_thread(world: World) -> None:
    with world.guard() as guard:
        guard._refresher.stop()
        guard._refresher.wanted = True
        with guard._refresher._lock:
            revived = Call(guard._refresher.revive)
            comes_true(lambda: revived.running)
            guard._refresher.wanted = False
        revived.result()
        assert refreshers() == []


def test_concurrent_starts_start_one_thread(world: World) -> None:
    guard = world.guard()
    with guard._refresher._lock:
        calls = [Call(guard.start) for _ in range(4)]
        comes_true(lambda: guard._refresher.wanted)
    for call in calls:
        call.result()
    assert len(refreshers()) == 1
    guard.close()


def test_thread_cannot_be_started(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """`start` raises; checks need no thread, and try again later."""
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
    guard.check("adoe", HOME)
    assert guard.stats().woken_by == "refresher"
    guard.close()


def test_many_guards_on_one_store(world: World) -> None:
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
