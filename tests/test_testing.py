"""Tests of `ipguard.testing`: the clock, the outbox, and the suite for stores."""

import functools
import sys
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import attrs
import pytest

from ipguard.addresses import AddressRange
from ipguard.errors import InvalidValue
from ipguard.model import (
    Action,
    Actor,
    Change,
    PendingRequest,
    RequestKind,
    RequestState,
    Sighting,
    User,
)
from ipguard.stores.memory import MemoryStore
from ipguard.testing import FakeClock, Message, Outbox, StoreConformance
from ipguard.testing._case import StoreCase, together

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
ACTOR = Actor(username="boss", email="boss@example.com", manages=["U1"])
USER = User(username="jsmith", full_name="", account_id="U1", email="j@example.com")
REFUSED = Sighting(username="jsmith", address="203.0.113.7", first_at=NOW, last_at=NOW, refused=1)
CHANGE = Change(
    revision=1,
    at=NOW,
    actor="boss",
    actor_address=None,
    action=Action.CONFIRM,
    username="jsmith",
    detail={},
)


def request(name: str) -> PendingRequest:
    return PendingRequest(
        id=name,
        username="jsmith",
        kind=RequestKind.ADD,
        adds=(AddressRange.parse("203.0.113.7"),),
        label="",
        requested_by="boss",
        requested_at=NOW,
        expires_at=NOW,
        number_expires_at=NOW,
        attempts_left=5,
        state=RequestState.PENDING,
    )


class TestFakeClock:
    def test_time_passes_only_when_moved(self):
        clock = FakeClock()
        before = clock(), clock.monotonic()
        assert (clock(), clock.monotonic()) == before
        assert clock() == NOW
        assert clock().tzinfo is UTC

    def test_start(self):
        """The clock shows UTC, whatever the time zone of its start."""
        start = datetime(2031, 1, 1, tzinfo=timezone(timedelta(hours=2)))
        clock = FakeClock(start)
        assert clock() == start
        assert clock().tzinfo is UTC
        with pytest.raises(InvalidValue):
            FakeClock(start.replace(tzinfo=None))

    def test_advances_both_clocks(self):
        """`advance` moves the time of day and `monotonic` together, to the microsecond."""
        clock = FakeClock()
        seconds = clock.monotonic()
        clock.advance(timedelta(minutes=10, microseconds=1))
        assert clock() == NOW + timedelta(minutes=10, microseconds=1)
        assert clock.monotonic() - seconds == pytest.approx(600.000001, abs=1e-9)
        clock.advance(timedelta())
        assert clock() == NOW + timedelta(minutes=10, microseconds=1)

    def test_advance_refuses_to_go_back(self):
        clock = FakeClock()
        with pytest.raises(ValueError, match="negative"):
            clock.advance(timedelta(microseconds=-1))
        assert clock() == NOW

    def test_set_moves_the_time_of_day_alone(self):
        """`set` moves the time of day in either direction and leaves `monotonic` alone."""
        clock = FakeClock()
        seconds = clock.monotonic()
        for moment in (NOW - timedelta(days=1), NOW + timedelta(days=1)):
            clock.set(moment)
            assert clock() == moment
        assert clock.monotonic() == seconds
        with pytest.raises(InvalidValue):
            clock.set(NOW.replace(tzinfo=None))

    def test_is_thread_safe(self):
        clock = FakeClock()

        def step() -> None:
            for _ in range(500):
                clock.advance(timedelta(seconds=1))

        together([step] * 8)
        assert clock() == NOW + timedelta(seconds=4000)


class TestOutbox:
    def test_keeps_numbers_and_notices(self):
        outbox = Outbox()
        outbox.number_issued(request("q1"), "12345-67890", ACTOR)
        outbox.change_applied(CHANGE, ACTOR, USER)
        assert outbox.messages == (
            Message(
                kind="number_issued",
                to=("boss@example.com",),
                actor=ACTOR,
                request=request("q1"),
                number="12345-67890",
            ),
            Message(
                kind="change_applied",
                to=("boss@example.com", "j@example.com"),
                actor=ACTOR,
                change=CHANGE,
                user=USER,
            ),
        )
        assert repr(outbox) == "<Outbox of 2>"
        outbox.clear()
        assert len(outbox.messages) == 0

    def test_keeps_notices_of_refused_logins(self):
        """A user without an e-mail address gets a message without recipients."""
        outbox = Outbox()
        for user in (USER, attrs.evolve(USER, email=None)):
            outbox.login_refused(REFUSED, user)
        assert [(each.kind, each.to, each.user) for each in outbox.messages] == [
            ("login_refused", ("j@example.com",), USER),
            ("login_refused", (), attrs.evolve(USER, email=None)),
        ]
        assert outbox.messages[0].sighting == REFUSED

    @pytest.mark.parametrize(
        ("user", "to"),
        [
            (None, ("boss@example.com",)),
            (attrs.evolve(USER, email=None), ("boss@example.com",)),
            (attrs.evolve(USER, email="boss@example.com"), ("boss@example.com",)),
        ],
    )
    def test_a_notice_goes_to_each_address_once(self, user, to):
        """A user without an address, or with the actor's, adds no recipient."""
        outbox = Outbox()
        outbox.change_applied(CHANGE, ACTOR, user)
        assert outbox.messages[0].to == to
        assert outbox.messages[0].user == user

    def test_number_for_returns_the_newest_number(self):
        outbox = Outbox()
        for name, number in (("q1", "1"), ("q2", "2"), ("q1", "3")):
            outbox.number_issued(request(name), number, ACTOR)
        outbox.change_applied(CHANGE, ACTOR, None)
        assert outbox.number_for("q1") == "3"
        assert outbox.number_for("q2") == "2"
        with pytest.raises(KeyError):
            outbox.number_for("q3")

    def test_fail(self):
        """While `fail` is set every call raises and keeps nothing."""
        outbox = Outbox()
        outbox.fail = True
        with pytest.raises(OSError, match="fail is set"):
            outbox.number_issued(request("q1"), "12345-67890", ACTOR)
        with pytest.raises(OSError, match="fail is set"):
            outbox.change_applied(CHANGE, ACTOR, USER)
        assert outbox.messages == ()
        outbox.fail = False
        outbox.number_issued(request("q1"), "12345-67890", ACTOR)
        assert outbox.number_for("q1") == "12345-67890"

    def test_numbers_are_not_in_a_repr(self):
        outbox = Outbox()
        outbox.number_issued(request("q1"), "12345-67890", ACTOR)
        for text in (repr(outbox), repr(outbox.messages), str(outbox.messages[0])):
            assert "12345" not in text

    def test_is_thread_safe(self):
        outbox = Outbox()

        def send(name: str) -> None:
            for number in range(200):
                outbox.number_issued(request(name), str(number), ACTOR)

        together(functools.partial(send, f"q{n}") for n in range(8))
        assert len(outbox.messages) == 1600
        assert {outbox.number_for(f"q{n}") for n in range(8)} == {"199"}


class TestPackage:
    def test_every_conformance_test_has_a_docstring(self):
        for name, test in suite().items():
            text = test.__doc__
            assert text, name
            assert text.endswith("."), name
            assert "\n\n" not in text, name

    def test_no_conformance_test_hides_another(self):
        """The suite is one class with several bases, so names must be unique."""
        seen: dict[str, str] = {}
        for part in StoreConformance.__mro__:
            if part in StoreCase.__mro__:
                continue
            for name in vars(part):
                if not name.startswith("__"):
                    assert seen.setdefault(name, part.__name__) == part.__name__
        assert len(suite()) > 60

    def test_pytest_rewrites_the_asserts(self):
        part = sys.modules["ipguard.testing._transactions"]
        assert type(part.__loader__).__name__ == "AssertionRewritingHook"

    def test_open_store_must_be_overridden(self):
        """A subclass without `open_store` fails at once."""
        case = StoreConformance()
        case.setup_method()
        with pytest.raises(NotImplementedError):
            _ = case.store


def suite() -> dict[str, Any]:
    return {
        name: getattr(StoreConformance, name)
        for name in dir(StoreConformance)
        if name.startswith("test_")
    }


class LostChanges(MemoryStore):
    def changes_since(self, cursor: Any) -> Any:
        return super().changes_since(cursor)._replace(usernames=frozenset())


class NoRollback(MemoryStore):
    @contextmanager
    def transaction(self, **options: Any) -> Any:
        error = None
        with super().transaction(**options) as tx:
            try:
                yield tx
            except BaseException as exc:
                error = exc
        if error is not None:
            raise error


class TestSuite:
    """The suite fails for a store that breaks a promise; docs/mutation.md has systematic tests."""

    @pytest.mark.parametrize(
        ("store", "name"),
        [
            (LostChanges, "test_changes_after_the_cursor_are_named"),
            (NoRollback, "test_an_exception_undoes_everything"),
        ],
    )
    def test_a_broken_promise_fails(self, store: type[MemoryStore], name: str):
        class Case(StoreConformance):
            def open_store(self, clock: FakeClock) -> MemoryStore:
                return store(clock=clock)

        case = Case()
        case.setup_method()
        with pytest.raises(AssertionError):
            getattr(case, name)()
        case.teardown_method()
