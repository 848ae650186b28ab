"""Tests of the fast path, and of the count of denials."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipguard.guard import Guard
from ipguard.guard._fast_path import Tally
from ipguard.model import Decision, Reason
from tests.guards import ELSEWHERE, HOME, OFFICE, Call, World, new_world, text_of

SLOW = "slow"


@pytest.fixture
def world() -> World:
    return new_world()


def alone(guard: Guard) -> Any:
    """Return the fast path, which returns SLOW if it cannot decide."""
    return guard._fast_path(lambda username, address: SLOW)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        (OFFICE, Reason.NOT_LISTED),
        (f"::ffff:{OFFICE}", Reason.NOT_LISTED),
        ("2001:db9::1", Reason.NOT_LISTED),
        ("", Reason.BAD_ADDRESS),
        ("203.0.113.07", Reason.BAD_ADDRESS),
        ("2001:db8::1%eth0", Reason.BAD_ADDRESS),
        (f"{HOME}/32", Reason.BAD_ADDRESS),
        ("\ud800", Reason.BAD_ADDRESS),
        ("1" * 100_000, Reason.BAD_ADDRESS),
    ],
)
def test_denial_of_a_remembered_user_is_counted(world: World, address: str, reason: Reason) -> None:
    world.restrict("jsmith", HOME)
    world.restrict("jsmith", "2001:db8::/32")
    guard = world.guard()
    assert not guard.check("jsmith", ELSEWHERE)
    assert guard.check("jsmith", address).reason is reason
    assert guard.stats().denials[reason] == 1 + (reason is Reason.NOT_LISTED)
    assert alone(guard)("jsmith", address) is False
    assert guard.is_allowed("jsmith", address) is False
    assert guard.stats().denials[reason] == 3 + (reason is Reason.NOT_LISTED)
    assert text_of(guard) is None


def test_defect_in_a_preloaded_row_becomes_no_allow(world: World) -> None:
    world.restrict("jsmith", HOME)
    guard = world.guard(preload=True)
    guard.sync()
    assert guard.is_allowed("jsmith", HOME)
    rows: Any = guard._table.rows
    rows["jsmith"] = 5
    assert alone(guard)("jsmith", HOME) == SLOW
    assert not guard.is_allowed("jsmith", HOME)
    assert guard.check("jsmith", HOME).reason is Reason.STORE_UNAVAILABLE


def test_last_allowed_text_is_remembered(world: World) -> None:
    """IPv4, IPv6 and IPv4-mapped addresses; the second time they are only compared."""
    world.restrict("jsmith", HOME)
    world.restrict("jsmith", "2001:db8::/32")
    guard = world.guard()
    guard.check("jsmith", OFFICE)
    texts = [HOME, f"::ffff:{HOME}", "2001:db8::1", "2001:DB8::1"]
    for text in texts:
        for _ in range(2):
            assert alone(guard)("jsmith", text) is True
            assert text_of(guard) == text
    assert alone(guard)("jsmith", ELSEWHERE) is False
    assert text_of(guard) == texts[-1]
    assert guard.stats().denials == {Reason.NOT_LISTED: 2}


def test_other_spelling_is_decided_from_the_same_row(world: World) -> None:
    world.restrict("jsmith", HOME)
    guard = world.guard()
    assert alone(guard)("JSmith", HOME) == SLOW
    guard.check("jsmith", HOME)
    assert alone(guard)("JSmith", HOME) is True
    assert alone(guard)("JSmith", OFFICE) is False
    assert alone(guard)("JSmith ", HOME) == SLOW
    assert guard.check("JSmith ", HOME).reason is Reason.BAD_USERNAME


def test_unregistered_user_is_denied_as_unknown(world: World) -> None:
    guard = world.guard(unknown_users="deny")
    assert guard.check("jsmith", HOME).reason is Reason.UNKNOWN_USER
    assert alone(guard)("jsmith", HOME) is False
    assert guard.stats().denials == {Reason.UNKNOWN_USER: 2}


@pytest.mark.parametrize("expires_in", [5.0, -5.0])
def test_temporary_restriction_is_left_to_the_slow_path(world: World, expires_in: float) -> None:
    world.restrict("temp", HOME, expires_in=expires_in)
    world.restrict("temp", OFFICE)
    guard = world.guard()
    guard.check("temp", HOME)
    assert alone(guard)("temp", HOME) == SLOW
    assert alone(guard)("temp", ELSEWHERE) == SLOW
    assert alone(guard)("temp", OFFICE) is True
    assert guard.is_allowed("temp", HOME) is (expires_in > 0)


class Text(str):
    """A subclass of str."""

    __slots__ = ()


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("stranger", HOME),
        (Text("jsmith"), HOME),
        ("jsmith", Text(HOME)),
        (None, HOME),
        ("jsmith", None),
        (b"jsmith", b"1.2.3.4"),
        (["jsmith"], HOME),
    ],
)
def test_unknown_user_or_odd_type_is_left_to_the_slow_path(
    world: World, name: Any, address: Any
) -> None:
    world.restrict("jsmith", HOME)
    guard = world.guard()
    guard.check("jsmith", HOME)
    assert alone(guard)(name, address) == SLOW
    assert guard.is_allowed(name, address) is guard.check(name, address).allowed


def test_odd_type_about_a_preloaded_user_is_left_to_the_slow_path(world: World) -> None:
    world.restrict("jsmith", HOME)
    guard = world.guard(preload=True)
    guard.sync()
    assert alone(guard)("jsmith", HOME) is True
    assert alone(guard)(Text("jsmith"), HOME) == SLOW
    assert alone(guard)("jsmith", Text(HOME)) == SLOW
    assert guard.is_allowed(Text("jsmith"), HOME)
    assert guard.is_allowed("jsmith", Text(HOME))
    assert not guard.is_allowed("jsmith", Text(OFFICE))


@pytest.mark.parametrize("preload", [False, True])
@pytest.mark.parametrize("name", ["jsmith", "JSmith"])
@pytest.mark.parametrize("address", [HOME, OFFICE, ELSEWHERE])
def test_no_decision_after_the_lease(world: World, name: str, address: str, preload: bool) -> None:
    """It ends to the instant, for any spelling, preloaded or not, listed or not."""
    world.restrict("jsmith", HOME)
    world.restrict("jsmith", OFFICE)
    guard = world.guard(preload=preload)
    guard.sync()
    guard.check("jsmith", HOME)
    guard.is_allowed("jsmith", HOME)
    world.pass_time(4.999)
    assert alone(guard)(name, OFFICE) is True
    assert alone(guard)("jsmith", HOME) is True
    world.pass_time(0.001)
    assert alone(guard)(name, address) == SLOW
    assert guard.stats().denials == {}
    assert preload or text_of(guard) == HOME


class Watching(Guard):
    """A guard of an adopter that records every decision."""

    def check(self, username: str, address: str, at_least: int | None = None) -> Decision:
        decision = super().check(username, address, at_least)
        self.__dict__.setdefault("seen", []).append(decision.reason)
        return decision


def test_overridden_check_is_called_each_time(world: World) -> None:
    world.restrict("jsmith", HOME)
    guard = Watching(world.store, monotonic=world.clock.monotonic)
    for address in (HOME, HOME, OFFICE, "nonsense"):
        guard.is_allowed("jsmith", address)
    assert guard.__dict__["seen"] == [
        Reason.LISTED,
        Reason.LISTED,
        Reason.NOT_LISTED,
        Reason.BAD_ADDRESS,
    ]
    assert guard._fast_path(lambda username, address: None) is None


def test_no_fast_path_with_observer_or_report_only(world: World) -> None:
    for settings in ({"report_only": True}, {"observer": print}):
        guard = world.guard(**settings)
        assert guard._fast_path(lambda username, address: None) is None
        assert "is_allowed" not in vars(guard)
    assert world.guard().is_allowed.__doc__ == Guard.is_allowed.__doc__


@given(
    texts=st.lists(
        st.sampled_from([HOME, OFFICE, ELSEWHERE, "2001:db8::1", f"::ffff:{HOME}", "x", ""]),
        max_size=12,
    ),
    listed=st.lists(st.sampled_from([HOME, "2001:db8::/32", "0.0.0.0/0", "::/0"]), max_size=3),
    lasts=st.sampled_from([None, 3.0]),
    preload=st.booleans(),
)
def test_same_decisions_and_counts_as_the_slow_path(
    texts: list[str], listed: list[str], lasts: float | None, preload: bool
) -> None:
    world = new_world()
    for text in listed:
        world.restrict("jsmith", text, expires_in=lasts)
    fast, slow = world.guard(preload=preload), world.guard()
    fast.sync()
    for text in texts:
        assert fast.is_allowed("jsmith", text) is slow.check("jsmith", text).allowed
        world.pass_time(0.5)
    assert fast.stats().denials == slow.stats().denials


# --------------------------------------------------------------------------------------- counting


def test_concurrent_denials_are_counted_once(rounds: Any) -> None:
    tally, each = Tally(), rounds(5_000, 200_000)
    stop = threading.Event()

    def count() -> None:
        for _ in range(each):
            tally.add(Reason.NOT_LISTED)
            tally.add(Reason.BAD_ADDRESS)

    def look() -> int:
        last = 0
        while not stop.is_set():
            found = tally.counts().get(Reason.NOT_LISTED, 0)
            assert found >= last
            last = found
        return last

    looking = Call(look)
    counting = [Call(count) for _ in range(4)]
    for call in counting:
        call.result()
    stop.set()
    assert looking.result() <= 4 * each
    assert tally.counts() == {Reason.NOT_LISTED: 4 * each, Reason.BAD_ADDRESS: 4 * each}


def test_uncounted_denials_are_bounded() -> None:
    tally = Tally()
    for _ in range(10_000):
        tally.add(Reason.BAD_ADDRESS)
        assert len(tally._uncounted[Reason.BAD_ADDRESS]) < 1_000
    assert tally.counts() == {Reason.BAD_ADDRESS: 10_000}
    assert tally.counts() == {Reason.BAD_ADDRESS: 10_000}


def test_denial_during_counting_is_counted_later() -> None:
    class Meanwhile(list[None]):
        def __len__(self) -> int:
            count = super().__len__()
            if count == 1:
                self.append(None)
            return count

    tally = Tally()
    tally._uncounted[Reason.NOT_LISTED] = Meanwhile([None])
    assert tally.counts() == {Reason.NOT_LISTED: 1}
    assert tally.counts()[Reason.NOT_LISTED] >= 2


def test_counting_again_in_the_middle_of_it_counts_nothing_twice() -> None:
    """A signal handler may count after a count was added, before it was taken off the list."""
    tally = Tally()

    class Interrupted(Counter[Reason]):
        def __setitem__(self, reason: Reason, count: int) -> None:
            super().__setitem__(reason, count)
            tally.counts()

    tally._counts = Interrupted()
    tally._uncounted[Reason.NOT_LISTED].extend([None] * 3)
    assert tally.counts() == {Reason.NOT_LISTED: 3}
    assert tally.counts() == {Reason.NOT_LISTED: 3}
