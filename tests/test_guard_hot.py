"""The hot path: what it answers by itself, as the slow path would, and what it leaves alone."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipguard.guard import Guard
from ipguard.guard._fast_path import Tally
from ipguard.model import Decision, Reason
from tests.guards import ELSEWHERE, HOME, OFFICE, Call, World, new_world

SLOW = "slow"


@pytest.fixture
def world() -> World:
    return new_world()


def alone(guard: Guard) -> Any:
    """Return the hot path, which tells instead of going on where it does not answer."""
    return guard._fast_path(lambda username, address: SLOW)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        (OFFICE, Reason.NOT_LISTED),
        (f"::ffff:{OFFICE}", Reason.NOT_LISTED),
        ("2001:db9::1", Reason.NOT_LISTED),
        ("", Reason.BAD_ADDRESS),
        ("203.0.113.07", Reason.BAD_ADDRESS),
        ("::ffff:203.0.113.07", Reason.BAD_ADDRESS),
        ("2001:db8::1%eth0", Reason.BAD_ADDRESS),
        (f"{HOME}/32", Reason.BAD_ADDRESS),
        (f"{HOME}\0", Reason.BAD_ADDRESS),
        ("\ud800", Reason.BAD_ADDRESS),
        ("\uff11.2.3.4", Reason.BAD_ADDRESS),
        ("1" * 100_000, Reason.BAD_ADDRESS),
    ],
)
def test_a_denial_of_a_remembered_user_is_decided_and_counted(
    world: World, address: str, reason: Reason
) -> None:
    """Without the slow path, and told by reason as that tells it."""
    world.restrict("jsmith", HOME)
    world.restrict("jsmith", "2001:db8::/32")
    guard = world.guard()
    assert guard.check("jsmith", HOME)
    assert guard.check("jsmith", address).reason is reason
    assert guard.stats().denials == {reason: 1}
    assert alone(guard)("jsmith", address) is False
    assert guard.is_allowed("jsmith", address) is False
    assert guard.stats().denials == {reason: 3}
    assert guard._table.rows["jsmith"] == set()


def test_an_allow_is_remembered_in_its_own_family(world: World) -> None:
    """IPv4, IPv6, and IPv4 in IPv6's clothes; the second time it is only looked up."""
    world.restrict("jsmith", HOME)
    world.restrict("jsmith", "2001:db8::/32")
    guard = world.guard()
    guard.check("jsmith", OFFICE)
    texts = [HOME, f"::ffff:{HOME}", "2001:db8::1", "2001:DB8::1"]
    for text in texts:
        assert alone(guard)("jsmith", text) is True
    assert guard._table.rows["jsmith"] == set(texts)
    assert all(alone(guard)("jsmith", text) is True for text in texts)
    assert guard.stats().denials == {Reason.NOT_LISTED: 1}


def test_who_nobody_registered_is_denied_for_that(world: World) -> None:
    """Where unknown users are denied, the reason is not that an address is missing."""
    guard = world.guard(unknown_users="deny")
    assert guard.check("jsmith", HOME).reason is Reason.UNKNOWN_USER
    assert alone(guard)("jsmith", HOME) is False
    assert guard.stats().denials == {Reason.UNKNOWN_USER: 2}


@pytest.mark.parametrize("expires_in", [5.0, -5.0])
def test_what_time_can_change_is_left_to_the_slow_path(world: World, expires_in: float) -> None:
    """A temporary restriction is judged by the store's time, whether it has ended or not."""
    world.restrict("temp", HOME, expires_in=expires_in)
    world.restrict("temp", OFFICE)
    guard = world.guard()
    guard.check("temp", HOME)
    assert alone(guard)("temp", HOME) == SLOW
    assert alone(guard)("temp", ELSEWHERE) == SLOW
    assert alone(guard)("temp", OFFICE) is True
    assert guard.is_allowed("temp", HOME) is (expires_in > 0)


class Text(str):
    """Text of a class of its own."""

    __slots__ = ()


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("nobody", HOME),
        ("nobody", "nonsense"),
        (Text("jsmith"), HOME),
        ("jsmith", Text(HOME)),
        (Text("jsmith"), Text(HOME)),
        (None, HOME),
        ("jsmith", None),
        (b"jsmith", b"1.2.3.4"),
        (["jsmith"], HOME),
    ],
)
def test_what_is_not_remembered_is_left_to_the_slow_path(
    world: World, name: Any, address: Any
) -> None:
    """And what is no plain text."""
    world.restrict("jsmith", HOME)
    guard = world.guard()
    guard.check("jsmith", HOME)
    assert alone(guard)(name, address) == SLOW
    assert guard.is_allowed(name, address) is guard.check(name, address).allowed


@pytest.mark.parametrize("address", [HOME, OFFICE, ELSEWHERE])
def test_past_the_lease_it_neither_allows_nor_denies(world: World, address: str) -> None:
    """Remembered, seen for the first time, or not listed: the slow path renews the lease."""
    world.restrict("jsmith", HOME)
    world.restrict("jsmith", OFFICE)
    guard = world.guard()
    guard.check("jsmith", HOME)
    guard.is_allowed("jsmith", HOME)
    world.pass_time(5)
    assert alone(guard)("jsmith", address) == SLOW
    assert guard.stats().denials == {}
    assert guard._table.rows["jsmith"] == {HOME}


def test_a_denial_ends_with_the_test_of_the_clock(world: World) -> None:
    """A user whose restrictions are lifted meanwhile is not denied by the old ones."""
    world.restrict("jsmith", HOME)
    acts: list[Any] = []

    def monotonic() -> float:
        if acts:
            acts.pop()()
        return world.clock.monotonic()

    guard = world.guard(monotonic=monotonic)
    guard.check("jsmith", HOME)

    def lift() -> None:
        world.pass_time(5)
        world.lift_all("jsmith")
        guard.sync()

    acts.append(lift)
    assert guard.is_allowed("jsmith", OFFICE)
    assert guard.stats().denials == {}


class Watching(Guard):
    """An adopter's guard that wants to see every decision."""

    def check(self, username: str, address: str, at_least: int | None = None) -> Decision:
        decision = super().check(username, address, at_least)
        self.__dict__.setdefault("seen", []).append(decision.reason)
        return decision


def test_an_overridden_check_is_not_passed_over(world: World) -> None:
    """It is called for each question, as `is_allowed` says of itself."""
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


def test_with_an_observer_or_report_only_there_is_no_hot_path(world: World) -> None:
    """Every decision is told, and only who asked for that pays for it."""
    for settings in ({"report_only": True}, {"observer": print}):
        assert world.guard(**settings)._fast_path(lambda username, address: None) is None


@given(
    texts=st.lists(
        st.sampled_from([HOME, OFFICE, ELSEWHERE, "2001:db8::1", f"::ffff:{HOME}", "x", ""]),
        max_size=12,
    ),
    listed=st.lists(st.sampled_from([HOME, "2001:db8::/32", "0.0.0.0/0", "::/0"]), max_size=3),
    lasts=st.sampled_from([None, 3.0]),
)
def test_it_answers_and_counts_as_the_slow_path(
    texts: list[str], listed: list[str], lasts: float | None
) -> None:
    """`is_allowed` again and again, and `check`, give one answer and one count."""
    world = new_world()
    for text in listed:
        world.restrict("jsmith", text, expires_in=lasts)
    fast, slow = world.guard(), world.guard()
    for text in texts:
        assert fast.is_allowed("jsmith", text) is slow.check("jsmith", text).allowed
        world.pass_time(0.5)
    assert fast.stats().denials == slow.stats().denials


# --------------------------------------------------------------------------------------- counting


def test_none_is_counted_twice_or_lost(rounds: Any) -> None:
    """However many threads count, and whoever looks meanwhile."""
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


def test_what_is_uncounted_is_bounded() -> None:
    """A flood of denials fills no memory, though nobody looks at the figures."""
    tally = Tally()
    for _ in range(10_000):
        tally.add(Reason.BAD_ADDRESS)
        assert len(tally._uncounted[Reason.BAD_ADDRESS]) < 1_000
    assert tally.counts() == {Reason.BAD_ADDRESS: 10_000}
    assert tally.counts() == {Reason.BAD_ADDRESS: 10_000}


def test_a_denial_that_comes_while_others_are_folded_is_counted_later() -> None:
    """What is appended between the count and the taking off stays behind."""

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
