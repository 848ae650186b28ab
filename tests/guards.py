"""Shared by the guard's tests: a store whose steps can be held, and a world around it."""

from __future__ import annotations

import itertools
import logging
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytest
from hypothesis import settings

from ipguard.addresses import AddressRange
from ipguard.guard import Guard
from ipguard.guard._table import Entry
from ipguard.model import (
    EVERYBODY,
    Action,
    Changes,
    Decision,
    Policy,
    Restriction,
    Sighting,
    Touched,
    User,
)
from ipguard.store import RestrictionStore
from ipguard.stores import open_store
from ipguard.stores.memory import MemoryStore
from ipguard.testing import FakeClock

T = TypeVar("T")
Hook = Callable[[], object]

PATIENCE = 5.0 if settings.get_current_profile_name() == "mutation" else 60.0
"""For how many seconds a test waits for another thread before it fails."""

HOME, OFFICE, ELSEWHERE = "203.0.113.7", "198.51.100.9", "192.0.2.66"


class Gate:
    """A step that holds each thread that reaches it, until it is opened."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._open = threading.Event()

    def __call__(self) -> None:
        self._reached.set()
        assert self._open.wait(PATIENCE), "this step was never opened"

    def reached(self) -> None:
        """Wait until a thread is held here."""
        assert self._reached.wait(PATIENCE), "no thread reached this step"

    def let_go(self) -> None:
        self._open.set()


class Call(Generic[T]):
    """A function that runs on its own thread from now on."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._result: list[T] = []
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._result.append(self._function())
        except BaseException as error:
            self._error = error

    @property
    def running(self) -> bool:
        return self.thread.is_alive()

    def result(self) -> T:
        """Wait for the function to return, and return or raise what it did."""
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), "the call did not return"
        if self._error is not None:
            raise self._error
        return self._result[0]


def comes_true(condition: Callable[[], object]) -> None:
    """Wait for a condition that another thread brings about."""
    never = threading.Event()
    for _ in range(int(PATIENCE * 1000)):
        if condition():
            return
        never.wait(0.001)
    raise AssertionError("the condition did not come true")


class Held:
    """A store around a store: its reads can be held, failed or replaced, and are counted.

    One call uses up one hook of `before_load`, `after_load`, `before_sync`, `after_sync`,
    `before_stream` (before a snapshot is opened), `in_stream` (before its first user),
    `after_stream` (after its last) or `at_record`.
    """

    def __init__(self, store: RestrictionStore) -> None:
        self.store = store
        self.before_load: deque[Hook] = deque()
        self.after_load: deque[Hook] = deque()
        self.before_sync: deque[Hook] = deque()
        self.after_sync: deque[Hook] = deque()
        self.before_stream: deque[Hook] = deque()
        self.in_stream: deque[Hook] = deque()
        self.after_stream: deque[Hook] = deque()
        self.at_now: deque[Hook] = deque()
        self.at_record: deque[Hook] = deque()
        self.batches: list[tuple[Sighting, ...]] = []
        self.down: BaseException | None = None
        self.loads: list[str] = []
        self.syncs: list[tuple[int, str] | None] = []
        self.streams: list[int] = []
        self.snapshot: Callable[[int], Any] = lambda revision: revision
        self.policy: Callable[[Policy], Any] = lambda policy: policy
        self.changes: Callable[[Changes], Any] = lambda changes: changes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def now(self) -> datetime:
        _use(self.at_now)
        return self.store.now()

    def load_policy(self, username: str) -> Policy:
        self.loads.append(username)
        _use(self.before_load)
        self._fail()
        policy: Policy = self.policy(self.store.load_policy(username))
        _use(self.after_load)
        return policy

    def load_all_policies(self) -> tuple[int, Iterator[tuple[str, Policy]]]:
        _use(self.before_stream)
        self._fail()
        revision, policies = self.store.load_all_policies()
        self.streams.append(revision)
        return self.snapshot(revision), self._streamed(policies)

    def _streamed(self, policies: Any) -> Iterator[Any]:
        stream = self._stream(policies)
        next(stream)  # start the generator, so that closing it closes `policies`
        return stream

    def _stream(self, policies: Any) -> Iterator[Any]:
        with closing(policies):
            yield None
            _use(self.in_stream)
            yield from policies
            _use(self.after_stream)

    def changes_since(self, cursor: tuple[int, str] | None) -> Changes:
        self.syncs.append(cursor)
        _use(self.before_sync)
        self._fail()
        changes: Changes = self.changes(self.store.changes_since(cursor))
        _use(self.after_sync)
        return changes

    def record_sightings(self, seen: Sequence[Sighting]) -> tuple[Sighting, ...]:
        self.batches.append(tuple(seen))
        _use(self.at_record)
        self._fail()
        return self.store.record_sightings(seen)

    def wait(self, revision: int, timeout: float) -> bool:
        self._fail()
        return self.store.wait(revision, timeout)

    def _fail(self) -> None:
        if self.down is not None:
            raise self.down


def _use(hooks: deque[Hook]) -> None:
    try:
        hook = hooks.popleft()
    except IndexError:
        return
    hook()


class World:
    """A store, its clock, and what administrators do."""

    def __init__(self, store: RestrictionStore, clock: FakeClock) -> None:
        self.clock = clock
        self.store = Held(store)
        self._numbers = itertools.count(1)

    @property
    def inner(self) -> RestrictionStore:
        return self.store.store

    def guard(self, **settings: Any) -> Guard:
        settings.setdefault("monotonic", self.clock.monotonic)
        return Guard(self.store, **settings)

    def pass_time(self, seconds: float) -> None:
        self.clock.advance(timedelta(seconds=seconds))

    def register(self, *names: str) -> int:
        return self.inner.put_users(
            User(username=name, full_name="Some One", account_id="A1") for name in names
        )

    def restrict(
        self, name: str, addresses: str = OFFICE, *, expires_in: float | None = None
    ) -> int:
        """Add a restriction, and return its revision."""
        now = self.inner.now()
        restriction = Restriction(
            id=f"r{next(self._numbers)}",
            username=name,
            addresses=AddressRange.parse(addresses),
            label="",
            created_at=now,
            created_by="admin",
            expires_at=None if expires_in is None else now + timedelta(seconds=expires_in),
        )
        self.register(name)
        with self.inner.transaction() as turn:
            turn.add_restriction(restriction)
            return turn.append(
                Action.CONFIRM, actor="admin", username=name, touches=frozenset({name})
            ).revision

    def lift_all(self, name: str) -> int:
        """Remove a user's restrictions, and return the revision of that change."""
        with self.inner.transaction() as turn:
            for restriction in turn.restrictions(name):
                turn.remove_restriction(restriction.id)
            return turn.append(
                Action.DELETE, actor="admin", username=name, touches=frozenset({name})
            ).revision

    def touch(self, *names: str) -> int:
        """Append a change that touches these users, or all users if none is given."""
        touches: frozenset[str] | Touched = frozenset(names) if names else EVERYBODY
        with self.inner.transaction() as turn:
            return turn.append(Action.IMPOSE_MANY, actor="admin", touches=touches).revision

    def wrong_guess(self) -> int:
        """Append a change that touches no policy."""
        with self.inner.transaction() as turn:
            return turn.append(Action.WRONG_NUMBER, actor="admin").revision


class Restorable(World):
    """A world whose store can be restored from a backup."""

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / "live.db"
        clock = FakeClock()
        super().__init__(self._open(clock), clock)

    def _open(self, clock: FakeClock) -> Any:
        if self.path is None:
            return MemoryStore(clock=clock)
        return open_store(f"sqlite:///{self.path}", clock=clock)

    def back_up(self) -> Callable[[], None]:
        """Return a function that restores the present state."""
        if self.path is None:
            inner: Any = self.inner
            state, entries = inner._state, list(inner._entries)

            def restore() -> None:
                copy = MemoryStore(clock=self.clock)
                copy._state, copy._entries, copy._origin = state, list(entries), inner._origin
                self.store.store = copy

            return restore
        self.inner.close()
        backup = self.path.with_suffix(".bak")
        shutil.copy(self.path, backup)
        self.store.store = self._open(self.clock)

        def restore_file() -> None:
            assert self.path is not None
            self.inner.close()
            for name in ("live.db", "live.db-wal", "live.db-shm"):
                self.path.with_name(name).unlink(missing_ok=True)
            shutil.copy(backup, self.path)
            self.store.store = self._open(self.clock)

        return restore_file


def new_world() -> World:
    """Return a world in memory."""
    clock = FakeClock()
    return World(MemoryStore(clock=clock), clock)


@pytest.fixture
def memory() -> World:
    return new_world()


@pytest.fixture(params=["memory", "sqlite"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    clock = FakeClock()
    url = "memory://" if request.param == "memory" else f"sqlite:///{tmp_path / 'guard.db'}"
    with open_store(url, clock=clock) as store:
        yield World(store, clock)


@pytest.fixture(params=["memory", "sqlite"])
def restorable(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Restorable]:
    world = Restorable(None if request.param == "memory" else tmp_path)
    yield world
    world.inner.close()


def told(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Return the guard's log records above INFO."""
    return [r for r in caplog.records if r.name == "ipguard.guard" and r.levelno > logging.INFO]


def text_of(guard: Guard, name: str = "jsmith") -> str | None:
    """Return the address that is remembered with a user."""
    entry = guard._table.rows[name]
    assert type(entry) is Entry
    return entry.text


def reasons(*decisions: Decision) -> list[str]:
    return [str(decision.reason) for decision in decisions]


@contextmanager
def gate(*steps: deque[Hook]) -> Iterator[Gate]:
    """Hold the next thread that reaches a step; open the gate at the end, whatever happens."""
    held = Gate()
    for step in steps:
        step.append(held)
    try:
        yield held
    finally:
        held.let_go()


@contextmanager
def during(step: deque[Hook], function: Callable[[], T]) -> Iterator[Call[T]]:
    """Call a function on a thread, and run the block while the call is held at a step."""
    with gate(step) as held:
        call = Call(function)
        held.reached()
        yield call
