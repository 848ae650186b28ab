"""The real guard, with its steps announced to the explorer, and the promise that it is held to.

`instrumented` replaces the parts of a guard by subclasses that announce each access to what threads
share, and its locks and clocks by those of the explorer. The code of the guard itself runs as it
is. Reads by the thread that holds the table's lock are no steps, because all writes take that lock,
which is checked.

A call into a store is one step, when it reads: nothing that is shared happens between its return
and the next step of the caller.
"""

from __future__ import annotations

import inspect
import logging
import math
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import pytest

from ipguard import _fork
from ipguard import guard as guard_room
from ipguard.addresses import parse_address
from ipguard.errors import StoreUnavailable
from ipguard.guard import (
    _backlog,
    _denials,
    _fast_path,
    _lease,
    _preload,
    _refresher,
    _slow_path,
    _table,
)
from ipguard.model import Changes, Decision, Policy, Reason
from ipguard.rules import decide
from tests import explorer
from tests.explorer import Scenario, step
from tests.guards import HOME, OFFICE, Held, Restorable

MAX_STALENESS = 5.0

# ---------------------------------------------------------------------- the parts, with their steps


def shared(name: str) -> Any:
    """Make a property whose reads without the table's lock, and writes with it, are steps."""
    slot, key = f"_{name}_", (name,)
    reads, writes = f"reads {name}", f"writes {name}"

    def get(table: Any) -> Any:
        if not table.written_by_this_thread():
            step(reads, reads=key)
        return table.__dict__[slot]

    def put(table: Any, value: Any) -> None:
        run = explorer.running()
        if run is not None and slot in table.__dict__:
            if not table.written_by_this_thread() and not run.forked:
                explorer.fail(f"{name} is written without the lock")
            step(writes, writes=key)
        table.__dict__[slot] = value

    return property(get, put)


class Rows(dict[str, Any]):
    """Rows whose look-ups and writes are steps, once they are in a table."""

    __slots__ = ("table",)

    def __init__(self) -> None:
        self.table: Table | None = None
        super().__init__()

    def _look(self, name: object, clock: bool = False) -> None:
        table = self.table
        if table is not None and not table.written_by_this_thread():
            key = ("row", name)
            step("looks a row up", reads=(key, ("clock",)) if clock else (key,))

    def _write(self, what: str, *names: object) -> None:
        if self.table is not None:
            step(what, writes=tuple(("row", name) for name in names))

    def __getitem__(self, name: str) -> Any:
        self._look(name, clock=True)
        consulted()
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self._look(name)
        return super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self._look(name, clock=True)
        consulted()
        return super().get(name, default)

    def __setitem__(self, name: str, row: Any) -> None:
        self._write("puts a row", name)
        super().__setitem__(name, row)

    def pop(self, name: str, *default: Any) -> Any:  # type: ignore[override]
        self._write("drops a row", name)
        return super().pop(name, *default)

    def popitem(self) -> Any:
        self._write("empties a discarded table", *self)
        return super().popitem()

    def clear(self) -> None:
        self._write("empties a table", *self)
        super().clear()


class Ahead(dict[str, int]):
    """The rows that are ahead of the position."""

    __slots__ = ()

    def get(self, name: str, default: Any = None) -> Any:
        step("reads ahead", reads=(("ahead", name),))
        return super().get(name, default)

    def __setitem__(self, name: str, revision: int) -> None:
        step("writes ahead", writes=(("ahead", name),))
        super().__setitem__(name, revision)

    def pop(self, name: str, *default: Any) -> Any:  # type: ignore[override]
        if name in self:
            step("writes ahead", writes=(("ahead", name),))
        return super().pop(name, *default)


class Table(_table.Table):
    """A table whose fields announce their accesses."""

    complete = shared("complete")
    deadline = shared("deadline")
    position = shared("position")
    snapshot = shared("snapshot")

    def written_by_this_thread(self) -> bool:
        lock = self.__dict__.get("_lock")
        return lock is None or lock.owned()

    @property  # type: ignore[override]
    def rows(self) -> Rows:
        if not self.written_by_this_thread():
            step("reads rows", reads=(("rows",),))
        return self.__dict__["_rows_"]  # type: ignore[no-any-return]

    @rows.setter
    def rows(self, value: Rows) -> None:
        if "_rows_" in self.__dict__:
            step("writes rows", writes=(("rows",),))
        value.table = self
        self.__dict__["_rows_"] = value

    @property
    def _ahead(self) -> Ahead:
        return self.__dict__["_ahead_"]  # type: ignore[no-any-return]

    @_ahead.setter
    def _ahead(self, value: dict[str, int]) -> None:
        self.__dict__["_ahead_"] = Ahead(value)

    def note(self, name: str, row: Any, address: str) -> None:
        notes = _notes()
        notes["decided"] = True
        try:
            super().note(name, row, address)
        finally:
            notes["decided"] = False


class Entry(_table.Entry):  # type: ignore[misc]
    """An entry that announces the accesses to its text."""

    __slots__ = ("_key", "_text")

    @property  # type: ignore[override]
    def text(self) -> str | None:
        step("reads text", reads=(("text",),))
        return self._text

    @text.setter
    def text(self, value: str | None) -> None:
        if hasattr(self, "_text"):
            step("writes text", writes=(("text",),))
        self._text = value


class Backlog(_backlog.Backlog):
    """A backlog whose accesses are steps, if anybody follows."""

    def add(self, usernames: Any, revision: int) -> None:
        if self.readers:
            step("adds to the backlog", writes=(("backlog",),))
        super().add(usernames, revision)

    def first(self) -> Any:
        if self.readers:
            step("reads the backlog", reads=(("backlog",),))
        return super().first()


class Load(_slow_path._Load):
    """A read in progress that announces the accesses to its result."""

    __slots__ = ("_row",)

    @property  # type: ignore[override]
    def row(self) -> Any:
        step("reads the result", reads=(("result",),))
        return self._row

    @row.setter
    def row(self, value: Any) -> None:
        if value is not None:
            step("writes the result", writes=(("result",),))
        self._row = value


def _breaker_field(name: str) -> Any:
    slot = f"_{name}_"

    def get(breaker: Any) -> Any:
        step(f"reads {name}", reads=((name,),))
        return breaker.__dict__[slot]

    def put(breaker: Any, value: Any) -> None:
        if slot in breaker.__dict__:
            step(f"writes {name}", writes=((name,),))
        breaker.__dict__[slot] = value

    return property(get, put)


class CircuitBreaker(_lease.CircuitBreaker):
    """A breaker that announces the accesses to its state."""

    _retry_at = _breaker_field("retry_at")
    error = _breaker_field("error")


class Complaints:
    """A logger for which an exception is a broken promise."""

    def _fail(self, message: str, *args: object, **kwargs: object) -> None:
        explorer.fail(f"{message}: {traceback.format_exc()}")

    exception = debug = _fail

    def _ignore(self, *args: object) -> None: ...

    info = warning = error = isEnabledFor = _ignore  # noqa: N815 - as in logging


@contextmanager
def instrumented(*mutations: Callable[[pytest.MonkeyPatch], None]) -> Iterator[None]:
    """Let guards that are made in this block announce their steps; apply mutations before."""
    locks = SimpleNamespace(
        Lock=explorer.Lock,
        Thread=explorer.Thread,
        Event=threading.Event,
        get_ident=threading.get_ident,
    )
    # Only waits are measured by this clock, and they are the explorer's choice.
    clock = SimpleNamespace(monotonic=lambda: 0.0)
    with pytest.MonkeyPatch.context() as patch:
        for mutation in mutations:
            mutation(patch)
        for module in (_slow_path, _lease, _preload, _refresher):
            patch.setattr(module, "threading", locks)
            patch.setattr(module, "time", clock)
        for room in (guard_room, _denials, _fast_path, _table, _lease, _preload, _refresher):
            patch.setattr(room, "_log", Complaints())
        # A schedule takes a millisecond; pytest would keep each record of the audit log.
        patch.setattr(logging.getLogger("ipguard.audit"), "disabled", True)
        for owner in (_fork, _lease, _refresher):
            patch.setattr(owner, "ReentrantLock", explorer.ReentrantLock)
        patch.setattr(guard_room, "Table", Table)
        for room in (_table, _preload):
            patch.setattr(room, "Rows", Rows)
        for room in (_table, _fast_path):
            patch.setattr(room, "Entry", Entry)
        patch.setattr(_table, "Backlog", Backlog)
        patch.setattr(_slow_path, "_Load", Load)
        patch.setattr(_lease, "CircuitBreaker", CircuitBreaker)
        yield


def _notes() -> dict[str, Any]:
    run = explorer.running()
    return {} if run is None else run.current.notes


# ------------------------------------------------------------------------------------- the store


class Store(Held):
    """A store whose reads are steps."""

    def load_policy(self, username: str) -> Policy:
        step("reads a policy", reads=(("store",), ("clock",)))
        consulted()
        return super().load_policy(username)

    def load_all_policies(self) -> Any:
        step("reads a snapshot", reads=(("store",),))
        return super().load_all_policies()

    def changes_since(self, cursor: tuple[int, str] | None) -> Changes:
        step("reads the changes", reads=(("store",),))
        return super().changes_since(cursor)

    def now(self) -> datetime:
        step("reads the store's clock", reads=(("clock",),))
        now = super().now()
        _notes()["now"] = now
        consulted()
        return now


_world: list[Explored] = []


def consulted() -> None:
    """Note when the current call last used anything that its answer may rest on."""
    notes = _notes()
    if not notes.get("decided"):
        notes["at"] = _world[-1].clock.monotonic()
        notes["compared"] = False


class State(NamedTuple):
    """What a store said, from a moment on."""

    since: float
    revision: int
    policies: dict[str, Policy]


class Explored(Restorable, Scenario):
    """A scenario: a store, a guard that has synced, and threads; the promise checks each answer.

    Attributes:
        settings: Arguments of the guard.
        lossy: Whether commits are lost, so that revisions go back.
        users: The users whose policies are recorded.
        asked: The addresses that are asked for when all threads have ended.
    """

    settings: ClassVar[dict[str, Any]] = {}
    lossy = False
    users: ClassVar[tuple[str, ...]] = ("jsmith",)
    asked: ClassVar[tuple[str, ...]] = (HOME, OFFICE)

    def __init__(self) -> None:
        super().__init__(None)
        self.store = Store(self.store.store)
        _world[:] = [self]
        self.states: list[State] = []
        self.prepare()
        self._record()
        self.guarded = self.guard(
            max_staleness=MAX_STALENESS, monotonic=self.monotonic, **self.settings
        )
        # A schedule that is broken off may leave locks that a later fork would wait for.
        _fork._objects.pop(self.guarded)
        self.warm()

    def prepare(self) -> None:
        """Fill the store."""
        self.restrict("jsmith", OFFICE)

    def warm(self) -> None:
        """Bring the guard into its state when the threads start."""
        self.guarded.sync()

    def monotonic(self) -> float:
        step("reads the clock", reads=(("clock",),))
        now = self.clock.monotonic()
        notes = _notes()
        if not notes.get("compared") and not notes.get("decided"):
            notes["at"], notes["compared"] = now, True
        return now

    # ---------------------------------------------------------------------------- what happens

    def _record(self) -> None:
        inner = self.inner
        policies = {name: inner.load_policy(name) for name in self.users}
        head = inner.changes_since(None).head
        self.states.append(State(self.clock.monotonic(), head, policies))

    def commit(self, change: Callable[[], object]) -> None:
        """Change the store; one step."""
        step("commits", reads=(("clock",),), writes=(("store",),))
        change()
        self._record()

    def tick(self, seconds: float) -> None:
        """Let time pass; one step."""
        step(f"waits {seconds:g} s", writes=(("clock",),))
        self.pass_time(seconds)

    def fail_store(self, error: BaseException | None) -> None:
        """Begin or end an outage; one step."""
        step("goes down" if error else "is up again", writes=(("store",),))
        self.store.down = error

    def try_sync(self) -> None:
        """Sync, as the refresher does: a failure is left to the breaker."""
        with suppress(StoreUnavailable):
            self.guarded.sync()

    # ---------------------------------------------------------------------------- the promise

    def ask(self, username: str = "jsmith", address: str = HOME) -> bool:
        """Ask as a login does, and check the answer."""
        self._begin()
        allowed = self.guarded.is_allowed(username, address)
        step("has its answer", reads=(("store",),))
        notes = _notes()
        grace = self.settings.get("outage_grace", 0.0)
        if allowed and not any(
            decision.allowed for decision in self._justified(username, address, grace, 0)
        ):
            explorer.fail(f"{username} is allowed from {address} at {notes['at']:g}")
        return bool(allowed)

    def check(
        self, username: str = "jsmith", address: str = HOME, at_least: int | None = None
    ) -> Decision:
        """Ask for a decision, and check it with its reason and revision."""
        self._begin()
        if at_least is not None:  # in the present history
            _notes()["since"] = max(
                index for index, each in enumerate(self.states) if each.revision == at_least
            )
        decision = self.guarded.check(username, address, at_least)
        step("has its answer", reads=(("store",),))
        notes = _notes()
        if decision.reason is Reason.STORE_UNAVAILABLE:
            return decision
        if not self.lossy:
            least = max(notes.get("revision", 0), at_least or 0)
            if decision.revision < least:
                explorer.fail(f"revision {decision.revision} after {least}")
            notes["revision"] = max(decision.revision, least)
        elif decision.revision < (at_least or 0):
            explorer.fail(f"revision {decision.revision} is below {at_least}")
        grace = self.settings.get("outage_grace", 0.0) if decision.stale else 0.0
        reasons = {each.reason for each in self._justified(username, address, grace, at_least or 0)}
        if decision.reason not in reasons:
            explorer.fail(
                f"{username} from {address} at {notes['at']:g}: {decision}, not {reasons}"
            )
        return decision

    def _begin(self) -> None:
        notes = _notes()
        notes.update(decided=False, compared=False, at=math.inf, now=None, since=0)

    def _justified(
        self, username: str, address: str, grace: float, at_least: int
    ) -> Iterator[Decision]:
        """Yield the decisions by each state of the store that an answer may rest on."""
        notes = _notes()
        oldest = notes["at"] - MAX_STALENESS - grace
        ends = [state.since for state in self.states[1:]] + [math.inf]
        least = 0 if self.lossy else max(notes.get("revision", 0), at_least)
        for state, end in list(zip(self.states, ends, strict=True))[notes["since"] :]:
            if end > oldest and state.revision >= least:
                yield self._decide(state, username, address, notes["now"])

    def _decide(self, state: State, username: str, address: str, now: datetime | None) -> Decision:
        return decide(
            state.policies[username.lower()],
            parse_address(address),
            self.clock() if now is None else now,
            deny_unknown=self.settings.get("unknown_users") == "deny",
        )

    def finish(self) -> None:
        """After all threads: no lock is held, and after one sync the guard answers rightly."""
        guard = self.guarded
        self.store.down = None
        locks = [guard._table._lock, guard._lease._turn, guard._lease._helper_lock]
        locks += [guard._lease.breaker._lock, guard._followers._turn]
        locks += [] if guard._preload is None else [guard._preload._reading]
        assert not any(lock.locked() for lock in locks), "a lock was left locked"  # type: ignore[attr-defined]
        assert not guard._loads._in_flight, "a read is in flight for ever"
        guard.sync()
        for name in self.users:
            for address in self.asked:
                expected = self._decide(self.states[-1], name, address, None)
                for _ in range(2):
                    assert guard.is_allowed(name, address) == expected.allowed, (name, address)
                    found = guard.check(name, address)
                    assert found.reason == expected.reason, (name, address, found)


# ----------------------------------------------------------------------------------- mutations


def mutate(function: Any, *replacements: tuple[str, str]) -> Callable[[pytest.MonkeyPatch], None]:
    """Return a mutation: the function with a fragment of its source replaced, in its place.

    The fragment must be there exactly once, so that a mutation cannot become void unnoticed.
    """
    source = inspect.getsource(function)
    for old, new in replacements:
        assert source.count(old) == 1, f"{function.__qualname__} has no single {old!r}"
        source = source.replace(old, new)

    def apply(patch: pytest.MonkeyPatch) -> None:
        namespace: dict[str, Any] = {}
        head = "from __future__ import annotations\nif True:\n"
        indented = source if source[0] == " " else textwrap.indent(source, "    ")
        code = compile(head + indented, f"<{function.__name__}>", "exec")
        exec(code, function.__globals__, namespace)
        mutant = namespace[function.__name__]
        module = inspect.getmodule(function)
        *owners, name = function.__qualname__.split(".")
        if owners:
            owner: Any = module
            for each in owners:
                owner = getattr(owner, each)
            patch.setattr(owner, name, mutant)
        else:
            for room in (module, guard_room):
                if hasattr(room, name):
                    patch.setattr(room, name, mutant)

    return apply
