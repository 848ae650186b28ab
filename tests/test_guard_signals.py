"""Tests of signal handlers that raise, or call the guard, while a lock is held."""

from __future__ import annotations

import dis
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

import ipguard
from ipguard import Guard, Reason, StoreUnavailable
from ipguard.aio._executor import Executor
from ipguard.stores import open_store
from ipguard.testing import Outbox
from tests.guards import HOME, OFFICE, new_world
from tests.postgres import Given, Server, fresh_schema
from tests.tracing import traced

BOSS = ipguard.Actor(username="boss", email="b@example.com", manages=ipguard.Actor.EVERY_ACCOUNT)
WRITERS = "^(_?write(_bulk)?|_locked|begun|end|transaction)$"
"""The functions that acquire and release what a write transaction holds."""
CHECKED = ("CALL", "JUMP_BACKWARD", "RESUME")
SOURCE = str(Path(ipguard.__file__).parent)


class Late(BaseException):
    """The exception of a signal handler."""


@contextmanager
def at_step(number: int, act: Callable[[], object], within: str = "") -> Iterator[list[int]]:
    """Call `act` at one of the places in ipguard's code where CPython checks for signals.

    These are after a call, at a backward jump and at the beginning of a function. `within` is a
    pattern that the function's name must match.

    CPython raises at the call itself, a trace function at the instruction after it. The two differ
    at the end of a `try`, so such steps are left out.
    """
    steps = [0]
    last: dict[FrameType, int] = {}

    def trace(frame: FrameType, event: str, _: object) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(SOURCE) or not re.search(within, code.co_name):
            return None
        if code.co_name == "<genexpr>":
            return None  # CPython ignores what is raised while it closes a generator
        frame.f_trace_opcodes = True
        if event == "opcode":
            before, last[frame] = last.get(frame, 0), frame.f_lasti
            checked = dis.opname[code.co_code[before]].startswith(CHECKED)
            if checked and _handler(code, before) == _handler(code, frame.f_lasti):
                steps[0] += 1
                if steps[0] == number:
                    sys.settrace(None)
                    act()
        elif event == "return":
            last.pop(frame, None)
        return trace

    try:
        with traced(trace):
            yield steps
    finally:
        last.clear()


def _handler(code: CodeType, offset: int) -> int | None:
    """Return where an exception that is raised at an instruction is handled."""
    for entry in dis._parse_exception_table(code):  # type: ignore[attr-defined]
        if entry.start <= offset < entry.end:
            target: int = entry.target
            return target
    return None


def raise_late() -> None:
    raise Late


def user(name: str) -> ipguard.User:
    return ipguard.User(username=name, full_name="", account_id="A1")


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def store(
    request: pytest.FixtureRequest, tmp_path: Path, postgres: Server | Given
) -> Iterator[Any]:
    url = {
        "memory": "memory://",
        "sqlite": f"sqlite:///{tmp_path / 's.db'}?timeout=5",
        "postgres": postgres.url(schema=fresh_schema(), listen="off", pool_size=2),
    }[request.param]
    with open_store(url) as opened:
        opened.put_users([user("jsmith"), user("mlee")])
        flow(opened).impose(BOSS, "jsmith", HOME, reason="a test")
        yield opened


def flow(store: Any) -> ipguard.Workflow:
    settings = ipguard.WorkflowSettings(requests_per_hour=10**6)
    return ipguard.Workflow(store, Outbox(), key=bytes(32), settings=settings)


def at_each_step(
    call: Callable[[], object],
    act: Callable[[], object],
    then: Callable[[], object],
    stride: int,
    within: str = "",
) -> int:
    """Repeat a call and act one step later each time; return the number of its steps."""
    number = 1
    while True:
        with at_step(number, act, within) as steps, suppress(Late, ipguard.IPGuardError):
            call()
        if steps[0] < number:
            break
        then()
        number += stride
    return steps[0]


def test_handler_that_raises_in_the_guard(store: Any, rounds: Any) -> None:
    """At each step of a check that syncs, loads and evicts: the next check is right."""
    guard = Guard(store, capacity=1)

    def call() -> None:
        guard._table.deadline = float("-inf")
        guard.check("mlee", OFFICE)
        guard.check("jsmith", OFFICE)

    def sound() -> None:
        assert not guard._table.lock.locked()
        assert not guard._lease._turn.locked()
        call()
        assert guard.check("jsmith", HOME).reason is Reason.LISTED
        assert guard.check("mlee", HOME).reason is Reason.UNRESTRICTED
        assert guard.stats().users <= 1

    call()
    assert at_each_step(call, raise_late, sound, rounds(23, 1)) > 30


@pytest.mark.parametrize("what", ["named", "everybody", "loads"])
def test_interrupted_at_any_step(what: str) -> None:
    """No change is lost that a sync was about to apply, or had applied in part."""
    number, interrupted = 0, True
    while interrupted:
        number += 1
        world = new_world()
        world.register("jsmith", "adoe")
        guard = world.guard(capacity=3)
        for name in ("jsmith", "JSmith", "adoe"):
            guard.is_allowed(name, HOME)
        world.restrict("jsmith", OFFICE)
        if what == "everybody":
            world.touch()
        with at_step(number, raise_late) as steps, suppress(Late):
            if what == "loads":
                world.pass_time(6)
                for name in ("New", "Newer", "ADOE"):
                    guard.check(name, HOME)
            else:
                guard.sync()
        interrupted = steps[0] >= number
        assert not guard._table.lock.locked()
        world.pass_time(6)
        guard.sync()
        for _ in range(2):
            assert not guard.is_allowed("jsmith", HOME)
            assert not guard.is_allowed("JSmith", HOME)
            assert guard.is_allowed("jsmith", OFFICE)
            assert guard.is_allowed("adoe", HOME)
            assert guard.is_allowed("new", HOME)
        world.lift_all("jsmith")
        guard.sync()
        assert guard.is_allowed("JSmith", HOME)
        assert guard.stats().users <= 3
    assert number > 30


@pytest.mark.parametrize("within", ["", WRITERS], ids=["anywhere", "writers"])
def test_handler_that_raises_in_the_workflow(store: Any, rounds: Any, within: str) -> None:
    """At each step of two changes: the next changes succeed, and no connection is lost."""
    changes = flow(store)

    def call() -> None:
        for restriction in store.load_policy("mlee").restrictions:
            changes.lift(BOSS, restriction.id, reason="a test")
        changes.impose(BOSS, "mlee", HOME, reason="a test")

    call()
    assert at_each_step(call, raise_late, call, 1 if within else rounds(197, 7), within) > 10


def test_handler_that_calls_the_guard(store: Any, rounds: Any) -> None:
    """It gets an answer at once, and never a wrong allow."""
    guard = Guard(store, capacity=1)
    answers: list[ipguard.Decision] = []

    def call() -> None:
        guard._table.deadline = float("-inf")
        guard.check("mlee", OFFICE)
        guard.check("jsmith", OFFICE)

    def ask() -> None:
        answers.append(guard.check("jsmith", OFFICE))
        guard.stats()

    def sound() -> None:
        assert guard.check("jsmith", HOME).reason is Reason.LISTED

    call()
    assert at_each_step(call, ask, sound, rounds(23, 1)) > 30
    assert {answer.reason for answer in answers} <= {Reason.NOT_LISTED, Reason.STORE_UNAVAILABLE}


def test_nested_call_does_not_write_the_table(caplog: pytest.LogCaptureFixture) -> None:
    """Remembered users are answered; a sync or a load is refused at once."""
    with open_store("memory://") as store:
        store.put_users([user("jsmith"), user("mlee")])
        flow(store).impose(BOSS, "jsmith", HOME, reason="a test")
        guard = Guard(store, preload=True)
        guard.sync()
        assert guard.check("jsmith", OFFICE).reason is Reason.NOT_LISTED
        guard._refresher.wanted = True
        with guard._table.lock:
            assert guard.check("jsmith", OFFICE).reason is Reason.NOT_LISTED
            assert guard.check("JSMITH", OFFICE).reason is Reason.NOT_LISTED
            assert guard.check("mlee", OFFICE).reason is Reason.UNRESTRICTED
            assert guard._slow_path.recall("mlee", OFFICE, None, refuse=True) is not None
            guard._table.deadline = float("-inf")
            assert guard.check("jsmith", OFFICE).reason is Reason.STORE_UNAVAILABLE
            with pytest.raises(StoreUnavailable, match="again"):
                guard.sync()
            with guard._tally._lock:
                guard.stats()
        assert guard.stats().woken_by == "callers"
        guard._refresher.wanted = False
        assert guard.stats().denials[Reason.NOT_LISTED] == 3
        guard._lease._turn_owner = threading.get_ident()
        assert guard.check("jsmith", OFFICE).reason is Reason.STORE_UNAVAILABLE
        guard._lease._turn_owner = None
        assert guard.check("jsmith", OFFICE).reason is Reason.NOT_LISTED
    assert "a check failed" not in caplog.text


def test_nested_call_in_an_outage_keeps_at_least() -> None:
    """Within the grace period too, a nested call gets no answer older than it asks for."""
    with open_store("memory://") as store:
        store.put_users([user("jsmith")])
        flow(store).impose(BOSS, "jsmith", HOME, reason="a test")
        guard = Guard(store, outage_grace=60)
        revision = guard.check("jsmith", HOME).revision
        with guard._table.lock:
            guard._table.deadline = guard._monotonic()
            assert guard.check("jsmith", HOME, at_least=revision).stale
            later = guard.check("jsmith", HOME, at_least=revision + 1)
            assert later.reason is Reason.STORE_UNAVAILABLE


@pytest.mark.parametrize("method", ["pop", "__setitem__"])
def test_rows_are_cleared_if_cachetools_was_interrupted(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cachetools is written in Python, so a handler that raises inside leaves it inconsistent."""
    with open_store("memory://") as store:
        store.put_users([user("jsmith"), user("mlee")])
        guard = Guard(store, capacity=1)
        guard.check("jsmith", HOME)
        kind = type(guard._table._users)

        def late(*_: object) -> None:
            monkeypatch.undo()
            raise Late

        monkeypatch.setattr(kind, method, late)
        with pytest.raises(Late):
            guard.check("mlee", HOME)
        assert not guard._table.rows
        assert not guard._table._users
        assert guard.check("mlee", HOME)


def test_interrupted_start_of_an_aio_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = Executor(1, 1)

    def late(_: object) -> None:
        monkeypatch.undo()
        raise Late

    monkeypatch.setattr(threading.Thread, "start", late)
    with pytest.raises(Late):
        executor._submit(lambda: 1)
    assert executor._submit(lambda: 2).result(10) == 2
