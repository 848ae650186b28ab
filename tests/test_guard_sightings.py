"""Tests of what a guard records about logins with the right password."""

from __future__ import annotations

import gc
import os
import threading
import time
import tracemalloc
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ipguard.errors import InvalidValue, StoreUnavailable
from ipguard.guard import Guard, _sightings
from ipguard.guard._sightings import Recorder, _Logins
from ipguard.model import Decision, Outcome, Reason, Sighting, User
from ipguard.stores import open_store
from ipguard.testing import FakeClock
from tests.conftest import rounds
from tests.guards import (
    ELSEWHERE,
    HOME,
    OFFICE,
    PATIENCE,
    Call,
    Gate,
    World,
    comes_true,
    new_world,
    told,
)
from tests.postgres import Given, Server, fresh_schema
from tests.test_guard_fork import in_child

HOUR = 3600.0


@pytest.fixture
def world() -> World:
    found = new_world()
    found.register("jsmith", "adoe")
    return found


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the thread write without pauses, and `close` wait for it even on a busy machine."""
    monkeypatch.setattr(_sightings, "_FLUSH", PATIENCE)
    monkeypatch.setattr(_sightings, "_PAUSE", 0.0)
    monkeypatch.setattr(_sightings, "_PAUSE_AFTER_FAILURE", 0.0)


pytestmark = pytest.mark.usefixtures("hasty")


def recorders() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "ipguard-sightings"]


def written(guard: Guard, count: int) -> None:
    """Wait until so many logins were given to the store."""
    comes_true(lambda: guard.stats().sightings_written == count)


def has_lost(guard: Guard, count: int) -> bool:
    return guard.stats().sightings_lost == count


def has_gathered(recorder: Recorder, count: int) -> bool:
    """Return whether so many logins are added up until their hour is over."""
    return recorder._gathered == count


def counts(world: World, username: str = "jsmith") -> dict[str, tuple[int, int]]:
    """Return how often a user was allowed and refused, by address."""
    found = world.inner.sightings(username)
    return {each.address: (each.allowed, each.refused) for each in found}


def figures(guard: Guard) -> tuple[int, int, int]:
    stats = guard.stats()
    return stats.sightings_written, stats.sightings_lost, stats.sightings_waiting


# -- what is recorded


def test_a_login_is_written_at_once(world: World) -> None:
    guard = world.guard()
    assert recorders() == []
    guard.saw("JSmith", f"::ffff:{HOME}", guard.check("JSmith", HOME))
    written(guard, 1)
    (found,) = world.inner.sightings("jsmith")
    assert found == Sighting(
        username="jsmith",
        address=HOME,
        first_at=world.clock(),
        last_at=world.clock(),
        allowed=1,
        refused=0,
    )
    (thread,) = recorders()
    assert thread.daemon
    guard.close()
    assert recorders() == []


@pytest.mark.parametrize("decision", [True, 1, "yes", object()])
def test_whatever_is_true_was_allowed(world: World, decision: object) -> None:
    with world.guard() as guard:
        guard.saw("jsmith", HOME, decision)
    assert counts(world) == {HOME: (1, 0)}


@pytest.mark.parametrize("decision", [False, None, 0])
def test_anything_else_was_refused(world: World, decision: object) -> None:
    with world.guard() as guard:
        guard.saw("jsmith", HOME, decision)
    assert counts(world) == {HOME: (0, 1)}


def test_what_the_store_could_not_decide_is_not_recorded(world: World) -> None:
    down = Decision(allowed=False, reason=Reason.STORE_UNAVAILABLE, revision=0)
    with world.guard() as guard:
        guard.saw("jsmith", HOME, down)
        guard.saw("jsmith", HOME, Outcome.RETRY)
        guard.saw("jsmith", OFFICE, True)
    assert counts(world) == {OFFICE: (1, 0)}
    assert figures(guard) == (1, 0, 0)


class Broken:
    def __bool__(self) -> bool:
        raise ZeroDivisionError

    def __len__(self) -> int:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    "login",
    [
        ("", HOME, True),
        ("jsmith\n", HOME, True),
        ("x" * 10_000_000, HOME, True),
        (b"jsmith", HOME, True),
        (None, HOME, True),
        (Broken(), HOME, True),
        (["jsmith"], HOME, True),
        ("jsmith", "", True),
        ("jsmith", "203.0.113.0/24", True),
        ("jsmith", "x" * 10_000_000, True),
        ("jsmith", None, True),
        ("jsmith", ["x"], True),
        ("jsmith", HOME, Broken()),
    ],
    ids=[
        "no username",
        "control character",
        "long username",
        "username of bytes",
        "username None",
        "broken username",
        "list as username",
        "no address",
        "network",
        "long address",
        "address None",
        "list as address",
        "broken decision",
    ],
)
def test_what_is_malformed_is_ignored(world: World, login: Any) -> None:
    with world.guard() as guard:
        guard.saw(*login)
        guard.saw("adoe", HOME, True)
    assert counts(world) == {}
    assert counts(world, "adoe") == {HOME: (1, 0)}
    assert figures(guard) == (1, 0, 0)


def test_long_texts_are_not_queued(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "_start", lambda _: None)
    guard = world.guard()  # a recorder is told when its guard is gone
    recorder = guard._sightings
    recorder.add("x" * 257, HOME, decision=True)
    recorder.add("jsmith", "x" * 257, decision=True)
    assert recorder.waiting() == 0
    recorder.add("x" * 256, "x" * 256, decision=True)
    assert recorder.waiting() == 1


def test_unregistered_users_are_left_out_by_the_store(world: World) -> None:
    with world.guard() as guard:
        guard.saw("stranger", HOME, True)
    assert world.inner.sightings("stranger") == ()


# -- when it is written


def test_later_logins_are_added_up_for_an_hour(world: World) -> None:
    guard = world.guard()
    guard.saw("jsmith", HOME, True)
    written(guard, 1)
    for _ in range(3):
        guard.saw("jsmith", HOME, True)
    comes_true(partial(has_gathered, guard._sightings, 3))
    began = world.clock()
    world.pass_time(HOUR - 1)
    guard.saw("adoe", HOME, True)
    written(guard, 2)
    assert counts(world) == {HOME: (1, 0)}
    assert figures(guard) == (2, 0, 3)
    world.pass_time(1)
    guard.saw("adoe", OFFICE, True)
    written(guard, 6)
    assert counts(world) == {HOME: (4, 0)}
    assert world.inner.sightings("jsmith")[0].last_at == began
    world.pass_time(HOUR)
    guard.saw("jsmith", HOME, True)
    written(guard, 7)
    assert counts(world) == {HOME: (5, 0)}
    guard.close()


def test_added_logins_keep_the_first_and_the_last_moment() -> None:
    first = FakeClock()()
    last = first + timedelta(minutes=1)
    logins = _Logins(first - timedelta(hours=1))
    logins.add(first, allowed=1, refused=0)
    logins.add(last, allowed=0, refused=1)
    assert (logins.first_at, logins.last_at, logins.count) == (first, last, 2)


def test_logins_added_up_survive_a_batch_with_the_other_outcome(world: World) -> None:
    """The batch has both outcomes; logins of one of them are being added up already."""
    guard = world.guard()
    recorder, at = guard._sightings, world.clock()

    def note(*outcomes: bool) -> None:
        for outcome in outcomes:
            recorder._note(("jsmith", HOME, outcome), at)

    note(True)
    recorder._write()
    note(True, False, True)
    recorder._write()
    assert counts(world) == {HOME: (2, 1)}
    assert recorder.waiting() == 1
    recorder._release(everything=True)
    recorder._write()
    assert counts(world) == {HOME: (3, 1)}
    assert recorder.waiting() == 0


def test_another_outcome_is_written_at_once(world: World) -> None:
    """It is told to the user, and must not wait for an hour."""
    guard = world.guard()
    for number, outcome in enumerate((True, False), 1):
        guard.saw("jsmith", HOME, outcome)
        written(guard, number)
    assert counts(world) == {HOME: (1, 1)}
    for outcome in (True, False, False):
        guard.saw("jsmith", HOME, outcome)
    comes_true(partial(has_gathered, guard._sightings, 3))
    assert len(world.store.batches) == 2
    guard.close()
    assert counts(world) == {HOME: (2, 3)}
    assert len(world.store.batches) == 3


def test_the_thread_looks_for_what_is_due_without_other_work(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sightings, "_LOOK", 0.001)
    guard = world.guard()
    guard.saw("jsmith", HOME, True)
    written(guard, 1)
    guard.saw("jsmith", HOME, True)
    comes_true(partial(has_gathered, guard._sightings, 1))
    world.pass_time(HOUR)
    written(guard, 2)
    guard.close()
    assert told(caplog) == []


def test_logins_while_the_store_writes_go_into_the_next_batch(world: World) -> None:
    guard, gate = world.guard(), Gate()
    world.store.at_record.append(gate)
    guard.saw("jsmith", HOME, True)
    gate.reached()
    for _ in range(3):
        guard.saw("jsmith", OFFICE, True)
        guard.saw("jsmith", HOME, True)
        guard.saw("adoe", HOME, False)
    assert figures(guard) == (0, 0, 10)
    gate.let_go()
    guard.close()
    assert counts(world) == {HOME: (4, 0), OFFICE: (3, 0)}
    assert counts(world, "adoe") == {HOME: (0, 3)}
    assert len(world.store.batches[0]) == 1
    assert len(world.store.batches) <= 3
    assert figures(guard) == (10, 0, 0)


def test_a_batch_is_written_at_most_every_half_second(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one does not come before the pause is over, and `close` ends the pause."""
    monkeypatch.setattr(_sightings, "_PAUSE", 3600.0)
    guard = world.guard()
    guard.saw("jsmith", HOME, True)
    written(guard, 1)
    assert guard._sightings._write_at - time.monotonic() > 1800
    guard.saw("jsmith", OFFICE, True)
    assert figures(guard) == (1, 0, 1)
    guard.close()
    assert figures(guard) == (2, 0, 0)


def test_the_next_batch_waits_longer_after_a_failure(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sightings, "_PAUSE_AFTER_FAILURE", 3600.0)
    guard = world.guard()
    world.store.down = StoreUnavailable("no disk")
    guard.saw("jsmith", HOME, True)
    comes_true(lambda: figures(guard) == (0, 1, 0))
    assert guard._sightings._write_at - time.monotonic() > 1800
    world.store.down = None
    guard.saw("jsmith", OFFICE, True)
    assert figures(guard) == (0, 1, 1)
    guard.close()
    assert figures(guard) == (1, 1, 0)


def test_a_batch_has_at_most_1000_sightings(world: World) -> None:
    guard, gate = world.guard(), Gate()
    names = [f"user{number}" for number in range(2500)]
    world.register(*names)
    world.store.at_record.append(gate)
    guard.saw("jsmith", HOME, True)
    gate.reached()
    for name in names:
        guard.saw(name, HOME, True)
    gate.let_go()
    written(guard, 2501)
    guard.close()
    assert sum(len(batch) for batch in world.store.batches) == 2501
    assert max(len(batch) for batch in world.store.batches) <= 1000
    assert all(counts(world, name) == {HOME: (1, 0)} for name in names)


def test_close_writes_every_batch(world: World) -> None:
    guard, gate = world.guard(), Gate()
    names = [f"user{number}" for number in range(3500)]
    world.register(*names)
    world.store.at_record.append(gate)
    guard.saw("jsmith", HOME, True)
    gate.reached()
    for name in names:
        guard.saw(name, HOME, True)
    closing = Call(guard.close)
    comes_true(guard._sightings._stopping.is_set)
    gate.let_go()
    closing.result()
    assert figures(guard) == (3501, 0, 0)
    assert all(counts(world, name) == {HOME: (1, 0)} for name in names)


# -- failures


def test_a_store_that_fails_loses_the_batch_and_no_login(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = world.guard()
    guard.check("jsmith", HOME)
    world.store.down = StoreUnavailable("no disk")
    for number in range(1, 4):
        guard.saw("jsmith", HOME, True)
        comes_true(partial(has_lost, guard, number))
        assert guard.is_allowed("jsmith", HOME)
    (record,) = told(caplog)
    assert record.getMessage() == (
        "the store does not take sightings, and some are lost: StoreUnavailable: no disk"
    )
    assert figures(guard) == (0, 3, 0)
    assert guard.stats().store_errors == 0, "the lease is not concerned"
    monkeypatch.setattr(_sightings, "_LOGGED_EVERY", 0.0)
    guard.saw("jsmith", HOME, True)
    comes_true(lambda: len(told(caplog)) == 2)
    world.store.down = None
    guard.saw("jsmith", HOME, True)
    written(guard, 1)
    guard.close()


def test_a_store_without_sightings_loses_them(world: World) -> None:
    """Such as an adopter's that was written for an older version."""

    def fail() -> None:
        raise AttributeError("record_sightings")

    world.store.at_record.append(fail)
    with world.guard() as guard:
        guard.saw("jsmith", HOME, True)
    assert figures(guard) == (0, 1, 0)


def test_a_store_whose_clock_fails_loses_them(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise StoreUnavailable("no clock")

    guard = world.guard()
    world.store.at_now.append(fail)
    guard.saw("jsmith", HOME, True)
    comes_true(lambda: figures(guard) == (0, 1, 0))
    guard.saw("jsmith", HOME, True)
    written(guard, 1)
    world.store.at_now.append(fail)
    guard.close()
    assert recorders() == []
    (record,) = told(caplog)
    assert record.getMessage().endswith("some are lost: StoreUnavailable: no clock")


def test_a_defect_does_not_end_the_thread(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = world.guard()
    release = guard._sightings._release
    calls = iter([True])

    def fail(*, everything: bool = False) -> None:
        if next(calls, False):
            raise ZeroDivisionError
        release(everything=everything)

    monkeypatch.setattr(guard._sightings, "_release", fail)
    guard.saw("jsmith", HOME, True)
    written(guard, 1)
    guard.close()
    assert [record.getMessage() for record in told(caplog)] == ["recording logins failed"]


def test_a_lasting_defect_does_not_keep_the_thread_from_ending(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sightings, "_PAUSE", 0.01)
    guard = world.guard()

    def fail(*, everything: bool = False) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(guard._sightings, "_release", fail)
    guard.saw("jsmith", HOME, True)
    guard.close()
    assert recorders() == []
    assert told(caplog)[0].getMessage() == "recording logins failed"


def test_a_store_that_hangs_delays_neither_logins_nor_close(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sightings, "_FLUSH", 0.01)
    guard, gate = world.guard(), Gate()
    world.store.at_record.append(gate)
    guard.saw("jsmith", HOME, True)
    gate.reached()
    guard.saw("adoe", HOME, True)
    assert guard.is_allowed("jsmith", HOME)
    guard.close()
    assert figures(guard)[:2] == (0, 0)
    gate.let_go()
    written(guard, 2)
    comes_true(lambda: recorders() == [])


def test_without_a_thread_logins_wait_for_the_next_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = world.guard()

    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        guard.saw("jsmith", HOME, True)
    assert figures(guard) == (0, 0, 1)
    guard.saw("jsmith", HOME, True)
    written(guard, 2)
    guard.close()


def test_a_signal_handler_during_the_start_starts_no_second_thread(world: World) -> None:
    guard = world.guard()
    with guard._sightings._lock:
        guard.saw("jsmith", HOME, True)
    assert recorders() == []
    guard.saw("jsmith", HOME, True)
    written(guard, 2)
    guard.close()


def test_two_first_logins_start_one_thread(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second caller that waited for the lock finds the thread of the first."""
    guard = world.guard()
    recorder = guard._sightings
    guard.saw("jsmith", HOME, True)
    written(guard, 1)
    (thread,) = recorders()
    recorder._start()
    assert recorders() == [thread]
    guard.close()


# -- room


def test_a_full_queue_loses_logins_those_of_strangers_first(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sightings, "_QUEUED", 8)
    monkeypatch.setattr(_sightings, "_ADMITTED", 2)
    world.register("other", "third")
    guard, gate = world.guard(), Gate()
    for name in ("jsmith", "adoe", "other", "third"):
        guard.check(name, HOME)
    world.store.at_record.append(gate)
    guard.saw("adoe", HOME, True)
    gate.reached()
    for number in range(6):
        guard.saw(f"stranger{number}", HOME, True)
    assert figures(guard) == (0, 2, 5)
    guard.saw("\n", HOME, True)
    assert figures(guard) == (0, 3, 5)
    for _ in range(3):
        guard.saw("JSmith", HOME, True)
    assert figures(guard) == (0, 4, 7)
    for name in ("adoe", "other", "third"):
        guard.saw(name, HOME, True)
    assert figures(guard) == (0, 5, 9)
    gate.let_go()
    guard.close()
    assert counts(world) == {HOME: (2, 0)}
    assert figures(guard) == (9, 5, 0)


def test_what_waits_to_be_written_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sightings, "_WAITING", 20)
    guard, gate = world.guard(), Gate()
    known = [f"user{number}" for number in range(15)]
    world.register(*known)
    for name in known:
        guard.check(name, HOME)
    world.store.at_record.append(gate)
    guard.saw("adoe", HOME, True)
    gate.reached()
    for number in range(30):
        guard.saw(f"stranger{number}", HOME, True)
    for name in known:
        guard.saw(name, HOME, True)
    gate.let_go()
    guard.close()
    assert figures(guard) == (21, 25, 0)
    assert sum(counts(world, name) == {HOME: (1, 0)} for name in known) == 10


def test_one_user_cannot_fill_the_room_with_addresses(world: World) -> None:
    guard, gate = world.guard(), Gate()
    world.store.at_record.append(gate)
    guard.saw("adoe", HOME, True)
    gate.reached()
    for number in range(100):
        guard.saw("jsmith", f"10.0.0.{number}", False)
    guard.saw("adoe", OFFICE, True)
    gate.let_go()
    comes_true(lambda: figures(guard) == (34, 68, 0))
    assert len(counts(world)) == 32
    assert OFFICE in counts(world, "adoe")
    # What is written makes room, for as many.
    world.store.at_record.append(second := Gate())
    guard.saw("adoe", ELSEWHERE, True)
    second.reached()
    for number in range(100):
        guard.saw("jsmith", f"10.0.1.{number}", False)
    second.let_go()
    guard.close()
    assert figures(guard) == (67, 136, 0)
    assert not guard._sightings._addresses, "it would grow with the number of users"


def test_what_is_remembered_is_bounded_and_written_early(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sightings, "_REMEMBERED", 2)
    guard = world.guard()
    guard.saw("jsmith", HOME, True)
    written(guard, 1)
    guard.saw("jsmith", HOME, True)
    comes_true(partial(has_gathered, guard._sightings, 1))
    for number in range(3):
        guard.saw("adoe", f"10.0.0.{number}", True)
    written(guard, 5)
    guard.close()
    assert counts(world) == {HOME: (2, 0)}


def test_a_flood_of_strangers_and_addresses(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory stays flat, writes are bounded, and the sightings of real users are kept."""
    for name, value in {"_QUEUED": 2_000, "_WAITING": 1_000, "_REMEMBERED": 2_000}.items():
        monkeypatch.setattr(_sightings, name, value)
    monkeypatch.setattr(_sightings, "_PAUSE", 0.5)
    real = [f"user{number}" for number in range(100)]
    world.register(*real)
    guard = world.guard()
    for name in real:
        guard.check(name, HOME)
    total = rounds(50_000, 1_000_000)
    tracemalloc.start()
    try:
        peaks = []
        for part in range(5):
            for number in range(part * total // 5, (part + 1) * total // 5):
                address = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
                guard.saw(f"stranger{number}", address, True)
                guard.saw(f"{real[number % 3]}", address, False)
                if number % (total // 500) == 0:
                    guard.saw(real[number // (total // 500) % 100], HOME, True)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.reset_peak()
    finally:
        tracemalloc.stop()
    batches = len(world.store.batches)
    guard.close()
    seen, lost, waiting = figures(guard)
    assert waiting == 0
    assert seen + lost == 2 * total + 500
    assert all(len(batch) <= 1_000 for batch in world.store.batches)
    assert sum(map(len, world.store.batches[:batches])) <= 1_000 * batches
    assert max(peaks) < 20_000_000
    # Three users were themselves seen at more than 32 later addresses.
    assert all(HOME in counts(world, name) for name in real[3:])
    assert all(len(counts(world, name)) <= 32 for name in real)


# -- refusals


def test_followers_get_refused_logins(world: World, caplog: pytest.LogCaptureFixture) -> None:
    guard = world.guard()
    found: list[Sighting] = []

    def fail(_: Sighting) -> None:
        raise ZeroDivisionError

    guard.follow_refusals(fail)
    end = guard.follow_refusals(found.append)
    guard.saw("jsmith", HOME, True)
    guard.saw("jsmith", OFFICE, False)
    written(guard, 2)
    comes_true(lambda: len(found) == 1)
    assert (found[0].username, found[0].address, found[0].refused) == ("jsmith", OFFICE, 1)
    comes_true(lambda: told(caplog))
    assert told(caplog)[0].getMessage() == "a callback of follow_refusals failed"
    end()
    end()
    guard.saw("jsmith", ELSEWHERE, False)
    written(guard, 3)
    guard.close()
    assert len(found) == 1
    with pytest.raises(InvalidValue, match=r"^callback: must be callable"):
        guard.follow_refusals(None)  # type: ignore[arg-type]


def test_without_followers_no_refusal_is_kept_for_them(world: World) -> None:
    guard = world.guard()
    guard.saw("jsmith", HOME, False)
    written(guard, 1)
    guard.close()
    found: list[Sighting] = []
    guard.follow_refusals(found.append)
    guard.saw("adoe", HOME, True)
    written(guard, 2)
    guard.close()
    assert found == []


def test_waiting_notices_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sightings, "_NOTICES", 3)
    guard = world.guard()
    found: list[str] = []
    guard.follow_refusals(lambda sighting: found.append(sighting.address))
    gate = Gate()
    world.store.at_record.append(gate)
    guard.saw("adoe", HOME, True)
    gate.reached()
    for number in range(6):
        guard.saw("jsmith", f"10.0.0.{number}", False)
    gate.let_go()
    guard.close()
    assert len(found) == 3
    assert len(counts(world)) == 6


def test_logins_are_written_between_slow_notices(world: World) -> None:
    guard, gates = world.guard(), [Gate(), Gate(), Gate()]
    steps = iter(gates)
    guard.follow_refusals(lambda _: next(steps)())
    guard.saw("jsmith", HOME, False)
    gates[0].reached()
    guard.saw("jsmith", OFFICE, False)
    guard.saw("jsmith", ELSEWHERE, False)
    gates[0].let_go()
    gates[1].reached()
    assert figures(guard) == (3, 0, 0)
    guard.saw("adoe", HOME, True)
    gates[1].let_go()
    gates[2].reached()
    assert figures(guard) == (4, 0, 0)
    gates[2].let_go()
    guard.close()
    assert counts(world, "adoe") == {HOME: (1, 0)}


def test_a_callback_may_close_the_guard(world: World) -> None:
    guard = world.guard()
    guard.follow_refusals(lambda _: guard.close())
    guard.saw("jsmith", HOME, False)
    comes_true(lambda: guard.stats().sightings_written == 1 and recorders() == [])


# -- the life of the thread


def test_close_without_logins(world: World) -> None:
    guard = world.guard()
    guard.close()
    guard.close()
    assert figures(guard) == (0, 0, 0)


def test_logins_after_close_are_recorded(world: World) -> None:
    guard = world.guard()
    for number in range(3):
        guard.saw("jsmith", f"10.0.0.{number}", True)
        guard.close()
    assert len(counts(world)) == 3
    assert recorders() == []


def test_the_thread_ends_with_its_guard(world: World) -> None:
    """Waiting logins are written first; a callback that refers to the guard does not keep it."""
    guard = world.guard()
    guard.follow_refusals(partial(print, guard))
    guard.saw("jsmith", HOME, True)
    written(guard, 1)
    guard.saw("jsmith", HOME, True)
    comes_true(partial(has_gathered, guard._sightings, 1))
    del guard
    gc.collect()
    comes_true(lambda: recorders() == [])
    assert counts(world) == {HOME: (2, 0)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("hooks", [True, False])
def test_a_forked_child_writes_its_own_logins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hooks: bool
) -> None:
    """The parent's are not written twice, whether or not the fork ran the hooks."""
    clock = FakeClock()
    with open_store(f"sqlite:///{tmp_path / 'fork.db'}", clock=clock) as store:
        world = World(store, clock)
        world.register("jsmith", "adoe")
        guard = world.guard()
        guard.saw("jsmith", HOME, True)
        written(guard, 1)
        guard.saw("jsmith", HOME, True)
        comes_true(partial(has_gathered, guard._sightings, 1))

        def child() -> list[int]:
            if not hooks:
                for each in (guard, store._pool):  # type: ignore[attr-defined]
                    each._after_fork_in_child()
            guard.saw("adoe", HOME, False)
            guard.close()
            return list(figures(guard))

        assert in_child(child) == [2, 0, 0]
        guard.close()
        assert figures(guard) == (2, 0, 0)
        assert counts(world) == {HOME: (2, 0)}
        assert counts(world, "adoe") == {HOME: (0, 1)}


# -- real stores


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgres":
        server: Server | Given = request.getfixturevalue("postgres")
        return server.url(schema=fresh_schema(), timeout=20)
    return "memory://" if request.param == "memory" else f"sqlite:///{tmp_path / 'ipguard.db'}"


@pytest.fixture
def servers(url: str) -> Iterator[list[Any]]:
    """Two stores on one database; of a memory store, the same."""
    first = open_store(url)
    second = first if url == "memory://" else open_store(url)
    yield [first, second]
    second.close()
    first.close()


def test_two_servers_record_the_same_users(servers: list[Any]) -> None:
    names = [f"user{number}" for number in range(30)]
    servers[0].put_users([User(username=n, full_name="A", account_id="A1") for n in names])
    found: list[Sighting] = []
    guards = [Guard(store) for store in servers]
    for guard in guards:
        guard.follow_refusals(found.append)

    def run(guard: Guard, order: list[str]) -> None:
        for _ in range(3):
            for name in order:
                for address in (HOME, "2001:db8::1"):
                    guard.saw(name, address, address == HOME)

    calls = [Call(partial(run, g, o)) for g, o in zip(guards, (names, names[::-1]), strict=True)]
    for call in calls:
        call.result()
    for guard in guards:
        guard.close()
        assert figures(guard) == (180, 0, 0)
    for name in names:
        seen = {each.address: (each.allowed, each.refused) for each in servers[1].sightings(name)}
        assert seen == {HOME: (6, 0), "2001:db8::1": (0, 6)}
    told_about = [each.username for each in found]
    assert sorted(told_about) == sorted(names), "each user is told by one server"


def test_sightings_follow_a_rename_between_servers(servers: list[Any]) -> None:
    servers[0].put_users([User(username="jsmith", full_name="John Smith", account_id="A1")])
    guards = [Guard(store) for store in servers]
    guards[0].saw("jsmith", HOME, True)
    guards[0].close()
    servers[1].rename_user("jsmith", "john.smith")
    guards[1].saw("john.smith", HOME, True)
    guards[0].saw("jsmith", HOME, True)  # a session that still has the old username
    for guard in guards:
        guard.close()
    (found,) = servers[0].sightings("john.smith")
    assert found.allowed == 2
    assert servers[0].sightings("jsmith") == ()


def test_a_store_that_is_closed_loses_sightings_alone(servers: list[Any]) -> None:
    servers[0].put_users([User(username="jsmith", full_name="John Smith", account_id="A1")])
    guard = Guard(servers[0])
    assert guard.is_allowed("jsmith", HOME)
    servers[0].close()
    guard.saw("jsmith", HOME, True)
    comes_true(partial(has_lost, guard, 1))
    assert guard.is_allowed("jsmith", HOME)
    guard.close()


# -- explanations


def test_an_explanation_lists_refused_logins_with_hints(world: World) -> None:
    world.restrict("jsmith", "203.0.113.0/29")
    guard = world.guard()
    for address in ("2001:db8::1", "203.0.113.99", "10.0.0.1", OFFICE):
        guard.saw("jsmith", address, False)
        guard.close()
        world.clock.advance(timedelta(minutes=1))
    guard.saw("jsmith", HOME, True)
    guard.close()
    found = guard.explain("jsmith", HOME).refused
    assert [(each.address, each.times) for each in found] == [
        (OFFICE, 1),
        ("10.0.0.1", 1),
        ("203.0.113.99", 1),
        ("2001:db8::1", 1),
    ]
    assert [each.hint for each in found] == [
        "",
        (
            "It is a private address, which the internet never sees: the proxy settings of the"
            " login server may be wrong."
        ),
        "It is in 203.0.113.0/24, as is 203.0.113.0/29, which is listed.",
        "It comes over IPv6, and only IPv4 is listed.",
    ]
    assert guard.explain("adoe", HOME).refused == ()


def test_an_explanation_hints_at_an_expired_restriction(world: World) -> None:
    world.restrict("adoe", OFFICE, expires_in=60)
    world.restrict("adoe", HOME)
    guard = world.guard()
    guard.saw("adoe", OFFICE, False)
    guard.close()
    (early,) = guard.explain("adoe", OFFICE).refused
    assert early.hint == ""
    world.clock.advance(timedelta(minutes=1))
    (late,) = guard.explain("adoe", OFFICE).refused
    assert late.hint == "A restriction that has expired listed it."


def test_an_explanation_does_without_sightings(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as of an adopter's store that has no method for them."""

    def fail(_: str) -> None:
        raise AttributeError("sightings")

    monkeypatch.setattr(world.store, "sightings", fail, raising=False)
    explanation = world.guard().explain("jsmith", HOME)
    assert explanation.decision.allowed
    assert explanation.refused == ()
    assert caplog.records == []
