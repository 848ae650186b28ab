"""What is shipped for tests is itself tested: the clock, the mailbox, the suite's teeth."""

import functools
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import attrs
import pytest

from ipguard import testing
from ipguard.addresses import AddressRange
from ipguard.errors import InvalidValue
from ipguard.model import (
    Action,
    Actor,
    Change,
    PendingRequest,
    RequestKind,
    RequestState,
    User,
)
from ipguard.notify import Notifier
from ipguard.testing import FakeClock, Message, Outbox, StoreConformance, _base
from ipguard.testing._base import together
from tests.broken_stores import BREAKAGES, forget, store_class

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
ACTOR = Actor(username="boss", email="boss@example.com", manages=["U1"])
USER = User(username="jsmith", full_name="", account_id="U1", email="j@example.com")
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
        addresses=AddressRange.parse("203.0.113.7"),
        label="",
        requested_by="boss",
        requested_at=NOW,
        expires_at=NOW,
        number_expires_at=NOW,
        attempts_left=5,
        state=RequestState.PENDING,
    )


class TestFakeClock:
    def test_stands_still(self):
        """Time passes when it is told to, and only then."""
        clock = FakeClock()
        before = clock(), clock.monotonic()
        assert (clock(), clock.monotonic()) == before
        assert clock() == NOW
        assert clock().tzinfo is UTC

    def test_begins_where_it_is_told(self):
        """It shows UTC whatever the zone of its start."""
        start = datetime(2031, 1, 1, tzinfo=timezone(timedelta(hours=2)))
        clock = FakeClock(start)
        assert clock() == start
        assert clock().tzinfo is UTC
        with pytest.raises(InvalidValue):
            FakeClock(start.replace(tzinfo=None))

    def test_advances_both_clocks(self):
        """The time of day and the monotonic reading move together, to the microsecond."""
        clock = FakeClock()
        seconds = clock.monotonic()
        clock.advance(timedelta(minutes=10, microseconds=1))
        assert clock() == NOW + timedelta(minutes=10, microseconds=1)
        assert clock.monotonic() - seconds == pytest.approx(600.000001, abs=1e-9)
        clock.advance(timedelta())
        assert clock() == NOW + timedelta(minutes=10, microseconds=1)

    def test_does_not_go_back(self):
        """A negative step would move the monotonic clock back, which none does."""
        clock = FakeClock()
        with pytest.raises(ValueError, match="does not go back"):
            clock.advance(timedelta(microseconds=-1))
        assert clock() == NOW

    def test_is_set_like_a_wall_clock(self):
        """The time of day jumps either way; the monotonic clock does not notice."""
        clock = FakeClock()
        seconds = clock.monotonic()
        for moment in (NOW - timedelta(days=1), NOW + timedelta(days=1)):
            clock.set(moment)
            assert clock() == moment
        assert clock.monotonic() == seconds
        with pytest.raises(InvalidValue):
            clock.set(NOW.replace(tzinfo=None))

    def test_its_monotonic_zero_means_nothing(self):
        """The reading is above 0 from the start, in seconds as a float."""
        assert isinstance(FakeClock().monotonic(), float)
        assert FakeClock().monotonic() > 0

    def test_is_thread_safe(self):
        """Steps of many threads all count."""
        clock = FakeClock()

        def step() -> None:
            for _ in range(500):
                clock.advance(timedelta(seconds=1))

        together([step] * 8)
        assert clock() == NOW + timedelta(seconds=4000)

    def test_tells_its_time(self):
        """Its repr says what it shows."""
        assert repr(FakeClock()) == "<FakeClock 2030-01-01T12:00:00+00:00>"


class TestOutbox:
    def test_is_a_notifier(self):
        """It can be given to a workflow."""
        outbox: Notifier = Outbox()
        assert repr(outbox) == "<Outbox of 0>"

    def test_keeps_numbers_and_notices(self):
        """Every message is kept as it was sent, the oldest first."""
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

    @pytest.mark.parametrize(
        ("user", "to"),
        [
            (None, ("boss@example.com",)),
            (attrs.evolve(USER, email=None), ("boss@example.com",)),
            (attrs.evolve(USER, email="boss@example.com"), ("boss@example.com",)),
        ],
    )
    def test_a_notice_goes_to_each_address_once(self, user, to):
        """Whoever has no address, or the actor's own, gets no second mail."""
        outbox = Outbox()
        outbox.change_applied(CHANGE, ACTOR, user)
        assert outbox.messages[0].to == to
        assert outbox.messages[0].user == user

    def test_tells_the_newest_number(self):
        """Of the numbers sent for a request the last one counts."""
        outbox = Outbox()
        for name, number in (("q1", "1"), ("q2", "2"), ("q1", "3")):
            outbox.number_issued(request(name), number, ACTOR)
        outbox.change_applied(CHANGE, ACTOR, None)
        assert outbox.number_for("q1") == "3"
        assert outbox.number_for("q2") == "2"
        with pytest.raises(KeyError):
            outbox.number_for("q3")

    def test_fails_when_told_to(self):
        """While `fail` is set nothing is kept, and every call raises."""
        outbox = Outbox()
        outbox.fail = True
        with pytest.raises(OSError, match="told to fail"):
            outbox.number_issued(request("q1"), "12345-67890", ACTOR)
        with pytest.raises(OSError, match="told to fail"):
            outbox.change_applied(CHANGE, ACTOR, USER)
        assert outbox.messages == ()
        outbox.fail = False
        outbox.number_issued(request("q1"), "12345-67890", ACTOR)
        assert outbox.number_for("q1") == "12345-67890"

    def test_never_shows_a_number(self):
        """Neither a message's repr nor the outbox's has the number in it."""
        outbox = Outbox()
        outbox.number_issued(request("q1"), "12345-67890", ACTOR)
        for text in (repr(outbox), repr(outbox.messages), str(outbox.messages[0])):
            assert "12345" not in text

    def test_is_thread_safe(self):
        """Messages of many threads are all kept."""
        outbox = Outbox()

        def send(name: str) -> None:
            for number in range(200):
                outbox.number_issued(request(name), str(number), ACTOR)

        together(functools.partial(send, f"q{n}") for n in range(8))
        assert len(outbox.messages) == 1600
        assert {outbox.number_for(f"q{n}") for n in range(8)} == {"199"}


class TestPackage:
    def test_needs_no_pytest(self):
        """An adopter's tests may be written with anything."""
        code = (
            "import sys; sys.modules['pytest'] = None; import ipguard.testing as t; "
            "t.StoreConformance; t.Outbox(); t.FakeClock()"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

    def test_every_test_says_what_is_promised(self):
        """Each test of the suite has a docstring of one sentence."""
        for name, test in suite().items():
            text = test.__doc__
            assert text, name
            assert text.endswith("."), name
            assert "\n\n" not in text, name

    def test_no_part_of_the_suite_hides_another(self):
        """The parts are mixed into one class: a name is used by one of them."""
        seen: dict[str, str] = {}
        for part in StoreConformance.__mro__:
            if part in _base.Hooks.__mro__:
                continue
            for name in vars(part):
                if not name.startswith("__"):
                    assert seen.setdefault(name, part.__name__) == part.__name__
        assert len(suite()) > 100

    def test_the_suite_explains_its_failures(self):
        """Its asserts are rewritten by pytest: what was compared is told."""
        part = sys.modules["ipguard.testing._turns"]
        assert type(part.__loader__).__name__ == "AssertionRewritingHook"

    def test_exports(self):
        """What is public is what the contract names."""
        assert testing.__all__ == sorted(testing.__all__)
        assert set(testing.__all__) == {"FakeClock", "Message", "Outbox", "StoreConformance"}

    def test_a_store_has_to_be_opened(self):
        """A subclass that does not say how to open its store finds out at once."""
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


# ------------------------------------------------------------------------------- the suite's teeth


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_base, "PATIENCE", 0.5)
    yield
    forget()


def run(store: Any, *names: str) -> None:
    """Run tests of the suite over a class of stores, as pytest would."""

    class Case(StoreConformance):
        def open_store(self, clock: FakeClock) -> Any:
            return store(clock=clock, timeout=0.5)

    for name in names:
        case = Case()
        case.setup_method()
        try:
            getattr(case, name)()
        finally:
            case.teardown_method()


# On a busy machine a broken store may get through a race by luck, but not this often.
TRIES = 20


@pytest.mark.usefixtures("impatient")
class TestTeeth:
    def test_the_reference_keeps_every_promise(self, monkeypatch):
        """Made from its source in the way of the broken ones, the reference passes every test."""
        monkeypatch.setattr(_base, "PATIENCE", 20.0)
        whole = store_class()
        run(whole, *suite())

    @pytest.mark.parametrize(("old", "new", "test"), BREAKAGES, ids=range(len(BREAKAGES)))
    def test_a_broken_promise_is_found_out(self, old, new, test):
        """A store that breaks one promise fails the test of that promise."""
        broken = store_class(old, new)
        with pytest.raises(Exception):  # noqa: B017 - by an assertion, or by what the store raises
            run(broken, *[f"test_{test}"] * TRIES)
