"""Tests of guards across `os.fork()`."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ipguard import _fork
from ipguard.model import Reason
from ipguard.stores import open_store
from ipguard.testing import FakeClock
from tests.guards import HOME, OFFICE, PATIENCE, Call, Gate, World, comes_true, gate
from tests.guards import memory as memory  # noqa: PLC0414

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
    # Newer Pythons warn about forks with threads.
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


def in_child(function: Callable[[], Any], fork: Callable[[], int] = os.fork) -> Any:
    """Return what a function returns in a forked child, through JSON."""
    receive, send = os.pipe()
    child = fork()
    if child == 0:
        signal.alarm(int(PATIENCE))  # a child that hangs ends, and its silence fails the test
        status = 1
        try:
            os.write(send, json.dumps(function()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(send)
    with os.fdopen(receive) as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return json.loads(text)


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[World]:
    clock = FakeClock()
    with open_store(f"sqlite:///{tmp_path / 'fork.db'}", clock=clock) as store:
        yield World(store, clock)


def test_child_answers_from_memory_until_the_lease_is_over(memory: World) -> None:
    """The child has no memory store."""
    memory.restrict("jsmith", HOME)
    guard = memory.guard()
    guard.check("jsmith", HOME)

    def child() -> list[object]:
        answers: list[object] = [guard.is_allowed("jsmith", HOME), guard.is_allowed("adoe", HOME)]
        memory.pass_time(5)
        answers += [guard.is_allowed("jsmith", HOME), guard.check("jsmith", HOME).reason]
        return answers

    assert in_child(child) == [True, False, False, "store_unavailable"]
    assert guard.is_allowed("jsmith", HOME)
    memory.pass_time(5)
    assert guard.is_allowed("jsmith", HOME)


def test_fork_waits_for_a_thread_that_writes_the_table(sqlite: World) -> None:
    guard = sqlite.guard()
    guard.check("jsmith", HOME)
    step = Gate()

    def write() -> None:
        with guard._table.lock:
            step()

    writer = Call(write)
    step.reached()
    forked = threading.Event()

    def fork() -> Any:
        answer = in_child(lambda: guard.is_allowed("jsmith", HOME) and bool(guard.sync() + 1))
        forked.set()
        return answer

    forking = Call(fork)
    comes_true(_fork._forking.locked)
    assert not forked.wait(0.05)
    step.let_go()
    writer.result()
    assert forking.result() is True
    assert guard.sync() == 0


def test_child_of_a_process_whose_threads_hang(sqlite: World) -> None:
    guard = sqlite.guard()
    guard.check("jsmith", HOME)
    sqlite.restrict("adoe", OFFICE)
    with gate(sqlite.store.before_load) as loading:
        loads = Call(lambda: guard.check("adoe", OFFICE))
        loading.reached()
        sqlite.pass_time(5)
        with gate(sqlite.store.before_sync) as syncing:
            syncs = Call(lambda: guard.check("jsmith", HOME))
            syncing.reached()
            assert guard._lease._turn.locked()
            with guard._lease.breaker._lock:
                answers = in_child(
                    lambda: [
                        guard.check("adoe", HOME).reason,
                        guard.check("jsmith", HOME).reason,
                        guard.stats().users,
                    ]
                )
            # One after the other: callers do not wait for a sync that has lasted too long.
            syncing.let_go()
            assert syncs.result()
            loading.let_go()
            assert loads.result()
    assert answers == ["not_listed", "unrestricted", 2]


def test_refresher_starts_with_the_childs_first_slow_check(sqlite: World) -> None:
    with sqlite.guard() as guard:
        guard.check("jsmith", HOME)

        def child() -> list[object]:
            before = guard.stats().woken_by
            hit = guard.is_allowed("jsmith", HOME)
            between = guard.stats().woken_by
            guard.check("adoe", HOME)
            after = guard.stats().woken_by
            revision = sqlite.restrict("jsmith", OFFICE)
            comes_true(lambda: guard.revision == revision)
            return [before, hit, between, after, guard.is_allowed("jsmith", HOME)]

        assert in_child(child) == ["callers", True, "callers", "refresher", False]
        assert guard.stats().woken_by == "refresher"
        comes_true(lambda: guard.revision == 2)
        assert not guard.is_allowed("jsmith", HOME)


def test_child_inherits_the_preloaded_users(sqlite: World) -> None:
    sqlite.restrict("jsmith", HOME)
    guard = sqlite.guard(preload=True)
    guard.sync()

    def child() -> list[object]:
        answers: list[object] = [guard.is_allowed("jsmith", OFFICE), guard.is_allowed("adoe", HOME)]
        sqlite.restrict("adoe", OFFICE)
        guard.sync()
        return [*answers, guard.is_allowed("adoe", HOME), guard.stats().loads, guard.revision]

    assert in_child(child) == [False, True, False, 1, 4]
    assert guard.is_allowed("adoe", HOME)
    guard.sync()
    assert not guard.is_allowed("adoe", HOME)
    assert len(sqlite.store.streams) == 1


def test_child_reads_its_own_snapshot(sqlite: World) -> None:
    sqlite.restrict("jsmith", HOME)
    with gate(sqlite.store.before_stream) as held, sqlite.guard(preload=True) as guard:
        held.reached()

        def child() -> list[object]:
            first = guard.stats().preloaded
            guard.sync()  # starts the refresher, which reads a snapshot
            comes_true(lambda: guard.stats().preloaded == 1)
            return [first, guard.is_allowed("jsmith", OFFICE), guard.stats().loads]

        assert in_child(child) == [None, False, 0]
        held.let_go()
        comes_true(lambda: guard.stats().preloaded == 1)
        assert len(sqlite.store.streams) == 1


def test_fork_ends_a_snapshot_of_sqlite(sqlite: World, caplog: pytest.LogCaptureFixture) -> None:
    """SQLite's locks are not inherited, so no connection may be open.

    That is no failure, and nothing is logged while forking: the child would inherit the lock of the
    log's stream.
    """
    sqlite.restrict("jsmith", HOME)
    inner: Any = sqlite.inner
    with gate(sqlite.store.in_stream) as held, sqlite.guard(preload=True) as guard:
        held.reached()

        def child() -> list[object]:
            guard.sync()
            comes_true(lambda: guard.stats().preloaded == 1)
            return [guard.is_allowed("jsmith", OFFICE), guard.stats().loads]

        forking = Call(lambda: in_child(child))
        comes_true(lambda: inner._pool._paused)
        held.let_go()
        assert forking.result() == [False, 0]
        comes_true(lambda: guard.stats().preloaded == 1)
        assert len(sqlite.store.streams) == 2
    assert "preloading failed" not in caplog.text


def test_child_of_a_child(sqlite: World) -> None:
    guard = sqlite.guard()
    guard.check("jsmith", HOME)
    assert in_child(lambda: in_child(lambda: guard.sync() + 1)) == 1
    assert in_child(lambda: guard.check("jsmith", HOME).reason) == Reason.UNRESTRICTED


def test_many_guards_fork_together(sqlite: World) -> None:
    guards = [sqlite.guard() for _ in range(20)]
    assert in_child(lambda: [guard.sync() for guard in guards]) == [0] * 20
    assert [guard.sync() for guard in guards] == [0] * 20


def test_weak_set_is_looked_through_while_others_change_it(rounds: Any) -> None:
    """A thread that opens or closes a connection must not fail the others."""

    class Thing:
        pass

    things: weakref.WeakKeyDictionary[Thing, None] = weakref.WeakKeyDictionary()
    kept = [Thing() for _ in range(50)]
    things.update(dict.fromkeys(kept))
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            more = [Thing() for _ in range(100)]
            things.update(dict.fromkeys(more))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    changing = [Call(change) for _ in range(2)]
    try:
        for _ in range(rounds(2_000, 100_000)):
            assert set(_fork.alive(things)) >= set(kept)
    finally:
        stop.set()
        sys.setswitchinterval(before)
        for call in changing:
            call.result()


def test_collected_object_is_not_called(memory: World) -> None:
    called: list[str] = []

    class Forkable(_fork.Forkable):
        def _before_fork(self) -> None:
            called.append("before")

        def _after_fork_in_parent(self) -> None:
            called.append("parent")

        def _after_fork_in_child(self) -> None:
            called.append("child")

    kept, gone = Forkable(), Forkable()
    _fork.register(kept)
    _fork.register(gone)
    del gone
    assert in_child(lambda: called) == ["before", "child"]
    assert called == ["before", "parent"]


def test_interrupted_preparation_of_a_fork(memory: World, monkeypatch: Any) -> None:
    """The fork continues, and both processes are repaired."""
    called: list[str] = []

    class Interrupted(_fork.Forkable):
        def _before_fork(self) -> None:
            raise KeyboardInterrupt

        def _after_fork_in_parent(self) -> None:
            called.append("parent")

        def _after_fork_in_child(self) -> None:
            called.append("child")

    interrupted = Interrupted()
    _fork.register(interrupted)
    reported: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda raised: reported.append(raised.exc_type))
    guard = memory.guard()
    assert in_child(lambda: [*called, guard.stats().users]) == ["child", 0]
    assert called == ["parent"]
    assert not guard._table.lock.locked()
    assert not _fork._forking.locked()
    assert reported == [KeyboardInterrupt]
    _fork._objects.pop(interrupted)


def test_module_loads_without_fork(monkeypatch: Any) -> None:
    source = Path(_fork.__file__)
    monkeypatch.delattr(os, "register_at_fork")
    code = compile(source.read_text(), str(source), "exec")
    names: dict[str, Any] = {"__name__": "ipguard._without_fork"}
    exec(code, names)
    assert callable(names["register"])
