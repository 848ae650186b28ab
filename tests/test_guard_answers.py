"""Tests of the guard's decisions, settings, `wait_for`, figures and `explain`."""

from __future__ import annotations

import inspect
import ipaddress
import logging
import re
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipguard import guard as guard_module
from ipguard.addresses import parse_address
from ipguard.errors import AddressError, InvalidValue, StoreUnavailable
from ipguard.guard import Guard
from ipguard.guard._lease import time_asleep
from ipguard.model import Decision, Outcome, Policy, Reason
from ipguard.stores.memory import MemoryStore
from tests.guards import (
    ELSEWHERE,
    HOME,
    OFFICE,
    PATIENCE,
    Call,
    World,
    comes_true,
    during,
    gate,
    new_world,
    reasons,
    text_of,
    told,
)


@pytest.fixture
def world() -> World:
    return new_world()


def named(case: object) -> str:
    """Return an id for a test case: letters, digits and dots, the same in every process."""
    text = ascii(case)[:40] if isinstance(case, (str, bytes, dict)) else type(case).__name__
    return re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_") or "nothing"


# ---------------------------------------------------------------------------------- parameters


NO_NUMBERS: list[Any] = [float("nan"), float("inf"), True, "5", timedelta(seconds=5), None, 10**400]
INVALID: dict[str, list[Any]] = {
    "max_staleness": [0, -1.0, *NO_NUMBERS],
    "outage_grace": [-0.1, *NO_NUMBERS],
    "capacity": [0, -1, 1.0, True, None],
    "report_only": ["false", 0, None],
    "preload": ["false", 1],
    "observer": [5],
    "monotonic": [5.0],
    "unknown_users": ["maybe", "", None, []],
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_setting_is_refused(world: World, name: str) -> None:
    """The constructor raises an error that names the setting."""
    for value in INVALID[name]:
        with pytest.raises(InvalidValue) as caught:
            world.guard(**{name: value})
        assert caught.value.name == name


def test_default_settings(world: World) -> None:
    parameters = inspect.signature(Guard).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    assert defaults == {
        "max_staleness": 5.0,
        "outage_grace": 0.0,
        "capacity": 100_000,
        "preload": False,
        "unknown_users": "allow",
        "report_only": False,
        "observer": None,
        "monotonic": None,
    }
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in defaults)


def test_default_clocks(world: World) -> None:
    """The lease follows the monotonic clock of the machine, and sleep its boot time."""
    guard = Guard(world.store)
    began = time.monotonic()
    assert guard.check("jsmith", HOME)
    assert began + 5 <= guard._table.deadline <= time.monotonic() + 5
    assert guard._lease._asleep is time_asleep
    assert world.guard()._lease._asleep() == 0


def test_time_asleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the boot clock minus the monotonic clock, which is read first."""
    read: list[int] = []

    def clock_gettime(clock: int) -> float:
        read.append(clock)
        return {7: 100.0, 1: 60.0}[clock]

    monkeypatch.setattr("ipguard.guard._lease.time.CLOCK_BOOTTIME", 7, raising=False)
    monkeypatch.setattr("ipguard.guard._lease.time.CLOCK_MONOTONIC", 1, raising=False)
    monkeypatch.setattr("ipguard.guard._lease.time.clock_gettime", clock_gettime, raising=False)
    assert time_asleep() == 40.0
    assert read == [1, 7]
    monkeypatch.delattr("ipguard.guard._lease.time.CLOCK_BOOTTIME")
    assert time_asleep() == 0.0


# --------------------------------------------------------------------- what a client may send


class HostileText(str):
    """A str that equals everything and fails in all other methods."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    def __hash__(self) -> int:
        return hash(HOME)

    def _fail(self, *args: object) -> Any:
        raise RuntimeError("hostile")

    __str__ = __repr__ = __len__ = __getitem__ = __iter__ = __contains__ = _fail
    __format__ = __add__ = __mod__ = _fail
    encode = lower = strip = isascii = _fail  # type: ignore[assignment]


class Interrupting:
    """An object whose hash and comparison raise a BaseException."""

    def __hash__(self) -> int:
        raise KeyboardInterrupt

    def __eq__(self, other: object) -> bool:
        raise KeyboardInterrupt


class Impersonator:
    """An object whose class cannot be read."""

    __slots__ = ()

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise LookupError("no class")


NO_TEXT: list[Any] = [
    None, True, 0, 3405803783, 2.5, b"203.0.113.7", bytearray(b"203.0.113.7"),
    memoryview(b"203.0.113.7"), ["203.0.113.7"], {"203.0.113.7"}, {}, ("203.0.113.7",), object(),
    type, ipaddress.ip_address(HOME), parse_address(HOME), Interrupting(),
]  # fmt: skip
NO_ADDRESS = ["", " ", "x" * 1_000_000, "\ud800", "1.2.3.4\n", "203.0.113.7\0", "010.8.8.8", "é"]


@pytest.mark.parametrize("settings", [{}, {"report_only": True}, {"observer": print}], ids=named)
@pytest.mark.parametrize("sent", [*NO_TEXT, *NO_ADDRESS], ids=named)
def test_invalid_address_is_denied_without_raising(
    world: World, sent: Any, settings: dict[str, Any]
) -> None:
    guard = world.guard(**settings)
    for warm in (False, True):
        decision = guard.check("jsmith", sent)
        assert decision.reason is Reason.BAD_ADDRESS
        assert guard.is_allowed("jsmith", sent) is bool(settings.get("report_only"))
        if not warm:
            guard.is_allowed("jsmith", HOME)
            guard.is_allowed("jsmith", HOME)


@pytest.mark.parametrize("settings", [{}, {"report_only": True}, {"observer": print}], ids=named)
@pytest.mark.parametrize(
    "sent",
    [*NO_TEXT, "", " jsmith", "x" * 1_000_000, "\ud800", "j\0", "a\u200bb", "x" * 257],
    ids=named,
)
def test_invalid_username_is_denied_without_raising(
    world: World, sent: Any, settings: dict[str, Any]
) -> None:
    guard = world.guard(**settings)
    guard.is_allowed("jsmith", HOME)
    assert guard.check(sent, HOME).reason is Reason.BAD_USERNAME
    assert guard.is_allowed(sent, HOME) is bool(settings.get("report_only"))


@pytest.mark.parametrize("settings", [{}, {"report_only": True}, {"observer": print}], ids=named)
def test_hostile_str_is_judged_by_its_characters(world: World, settings: dict[str, Any]) -> None:
    world.restrict("jsmith", HOME)
    guard = world.guard(**settings)
    assert guard.is_allowed("jsmith", HOME)
    assert guard.is_allowed("jsmith", HOME)
    for sent, reason in ((ELSEWHERE, Reason.NOT_LISTED), (HOME, Reason.LISTED)):
        assert guard.check("jsmith", HostileText(sent)).reason is reason
        if not settings:
            assert guard.is_allowed("jsmith", HostileText(sent)) is (sent == HOME)
    assert guard.check(HostileText("adoe"), OFFICE).reason is Reason.UNRESTRICTED
    assert guard.check(HostileText("JSmith"), OFFICE).reason is Reason.NOT_LISTED
    assert not any(type(spelling) is not str for spelling in guard._table.rows)
    if not settings:
        assert guard.is_allowed(HostileText("jsmith"), OFFICE) is False
        assert guard.is_allowed(HostileText("jsmith"), HOME) is True


@pytest.mark.parametrize("settings", [{}, {"report_only": True}], ids=named)
def test_object_without_readable_class_is_denied(world: World, settings: dict[str, Any]) -> None:
    guard = world.guard(**settings)
    sent: Any = Impersonator()
    assert guard.check("jsmith", sent).reason is not Reason.UNRESTRICTED
    assert guard.check(sent, HOME).reason is not Reason.UNRESTRICTED
    assert guard.is_allowed(sent, sent) is bool(settings)


class Name(str):
    """A subclass of str, as some libraries have."""

    __slots__ = ()


def test_subclass_of_str_is_answered_and_not_stored(world: World) -> None:
    guard = world.guard()
    assert guard.is_allowed(Name("JSmith"), Name(HOME))
    assert text_of(guard) is None
    for _ in range(2):
        assert guard.is_allowed(Name("JSmith"), HOME)
        assert guard.is_allowed("jsmith", Name(HOME))
    assert [type(kept) for kept in guard._table.rows] == [str]
    assert type(text_of(guard)) is str


ANYTHING = st.one_of(
    st.text(),
    st.text(st.sampled_from("0123456789abcdef.:/%- "), max_size=50),
    st.binary(),
    st.integers(),
    st.floats(),
    st.none(),
    st.booleans(),
    st.lists(st.integers()),
    st.builds(HostileText, st.text(max_size=20)),
    st.characters(categories=["Cs"]),
)


@given(ANYTHING, ANYTHING)
def test_any_pair_of_objects_is_answered(username: Any, address: Any) -> None:
    """Only a valid address can be allowed."""
    world = new_world()
    guard = world.guard()
    guard.is_allowed("jsmith", HOME)
    try:
        parse_address(address)
        valid = True
    except AddressError:
        valid = False
    for _ in range(2):
        allowed = guard.is_allowed(username, address)
        assert type(allowed) is bool
        decision = guard.check(username, address)
        assert decision.allowed is allowed
        assert not (allowed and not valid)
        assert decision.reason is not Reason.STORE_UNAVAILABLE


@pytest.mark.parametrize(("username", "address"), [("jsmith", b"203.0.113.7"), (b"jsmith", HOME)])
def test_bytes_are_never_compared_with_str(world: World, username: Any, address: Any) -> None:
    """`python -bb` makes such a comparison raise."""
    code = (
        "import ipguard; guard = ipguard.Guard(ipguard.open_store('memory://'))\n"
        "for _ in range(2): assert guard.is_allowed('jsmith', '203.0.113.7')\n"
        f"assert not guard.is_allowed({username!r}, {address!r})\n"
        f"assert not guard.check({username!r}, {address!r})\n"
    )
    import subprocess

    subprocess.run([sys.executable, "-bb", "-W", "error", "-c", code], check=True)


# ----------------------------------------------------------------------------- never by mistake


class Odd(Exception):
    """An error that no store should raise."""


@pytest.mark.parametrize("error", [Odd("odd"), MemoryError(), RecursionError(), StopIteration()])
@pytest.mark.parametrize("where", ["load", "sync", "now"])
def test_exception_never_becomes_an_allow(
    world: World, error: Exception, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise error

    for name in ("jsmith", "adoe"):
        world.restrict(name, HOME, expires_in=60)  # so that the store's time is asked for
    guard = world.guard()
    if where != "sync":
        guard.sync()
    if where != "now":
        world.store.down = error
    else:
        world.store.at_now.append(fail)
    assert guard.check("jsmith", HOME).reason is Reason.STORE_UNAVAILABLE
    # A failing read is an outage and logged as one; any other exception is a defect.
    assert ("a check failed" in caplog.text) is (where == "now")
    if where == "now":
        assert guard.stats().denials == {Reason.STORE_UNAVAILABLE: 1}
        world.store.at_now.append(fail)
    assert guard.is_allowed("adoe", HOME) is False
    world.store.down = None
    world.pass_time(1)
    assert guard.is_allowed("jsmith", HOME)
    assert guard.is_allowed("adoe", HOME)


@pytest.mark.parametrize("where", ["load", "sync", "now"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_interrupt_propagates_and_releases_all_locks(
    world: World, where: str, error: type[BaseException]
) -> None:
    world.restrict("jsmith", HOME, expires_in=60)  # so that the store's time is asked for
    guard = world.guard()
    if where != "sync":
        guard.sync()

    def interrupt() -> None:
        raise error

    step = {"load": "before_load", "sync": "before_sync", "now": "at_now"}[where]
    getattr(world.store, step).append(interrupt)
    with pytest.raises(error):
        guard.is_allowed("jsmith", HOME)
    assert not guard._table.lock.locked()
    assert not guard._lease._turn.locked()
    assert not guard._loads._in_flight
    assert Call(lambda: guard.is_allowed("jsmith", HOME)).result()


def test_waiter_of_an_interrupted_load_is_denied(world: World) -> None:
    guard = world.guard()
    guard.sync()
    interrupted = threading.Event()

    def interrupt() -> None:
        comes_true(interrupted.is_set)
        raise KeyboardInterrupt

    world.store.before_load.append(interrupt)
    first = Call(lambda: guard.check("jsmith", HOME))
    comes_true(lambda: guard._loads._in_flight)
    second = Call(lambda: guard.check("jsmith", HOME))
    interrupted.set()
    with pytest.raises(KeyboardInterrupt):
        first.result()
    assert second.result().reason in (Reason.STORE_UNAVAILABLE, Reason.UNRESTRICTED)
    assert guard.check("jsmith", HOME)


def policy(**fields: Any) -> Policy:
    return Policy(**({"revision": 0, "restrictions": (), "known": True} | fields))


@pytest.mark.parametrize(
    "garbage",
    [
        None,
        (),
        "policy",
        policy(revision=None),
        policy(restrictions=None),
        policy(restrictions=(None,)),
    ],
    ids=named,
)
def test_malformed_policy_is_denied_and_not_remembered(world: World, garbage: Any) -> None:
    guard = world.guard()
    world.store.policy = lambda real: garbage
    for _ in range(2):
        assert guard.check("jsmith", HOME).reason is Reason.STORE_UNAVAILABLE
        assert guard.is_allowed("jsmith", HOME) is False
        world.pass_time(1)
    assert guard.stats().users == 0
    world.store.policy = lambda real: real
    world.pass_time(1)
    assert guard.is_allowed("jsmith", HOME)


@pytest.mark.parametrize(
    "garbage", [None, (), (1,), ("1", "t", frozenset()), (None, None, None), (0, "t", None)]
)
def test_malformed_changes_do_not_renew_the_lease(world: World, garbage: Any) -> None:
    guard = world.guard()
    world.store.changes = lambda real: garbage
    assert guard.check("jsmith", HOME).reason is Reason.STORE_UNAVAILABLE
    assert (guard.stats().ready, guard.stats().failures) == (False, 1)


def test_permanent_restrictions_need_no_clock_of_the_store(world: World) -> None:
    world.restrict("jsmith", HOME)
    guard = world.guard()
    guard.sync()

    def fail() -> None:
        raise StoreUnavailable("no clock")

    world.store.at_now.extend([fail, fail])
    assert guard.check("jsmith", HOME)
    assert guard.check("jsmith", OFFICE).reason is Reason.NOT_LISTED
    assert len(world.store.at_now) == 2


def test_failing_clock_is_denied(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """The clock raises on the fast path and then on the slow path."""
    failing: list[int] = []

    def monotonic() -> float:
        if failing:
            failing.pop()
            raise Odd("no time")
        return world.clock.monotonic()

    caplog.set_level(logging.DEBUG, "ipguard")
    guard = world.guard(monotonic=monotonic)
    guard.is_allowed("jsmith", HOME)
    guard.is_allowed("jsmith", HOME)
    for address in (HOME, ELSEWHERE):  # known by its text, and seen for the first time
        failing.extend([1, 1])
        assert guard.is_allowed("jsmith", address) is False
    assert "the fast path gave up" in caplog.text
    assert "a check failed" in caplog.text
    failing.append(1)
    assert guard.is_allowed("jsmith", HOME) is True


# ---------------------------------------------------------------------------------- the answers


def test_each_reason(world: World) -> None:
    revision = world.restrict("jsmith", HOME)
    guard = world.guard()
    listed = guard.check("JSmith", HOME)
    assert listed == Decision(
        allowed=True, reason=Reason.LISTED, revision=revision, restriction_id="r1"
    )
    assert guard.check("jsmith", ELSEWHERE) == Decision(
        allowed=False, reason=Reason.NOT_LISTED, revision=revision
    )
    assert guard.check("adoe", ELSEWHERE) == Decision(
        allowed=True, reason=Reason.UNRESTRICTED, revision=revision
    )
    assert guard.check("jsmith", "") == Decision(
        allowed=False, reason=Reason.BAD_ADDRESS, revision=revision
    )
    assert guard.check("", HOME) == Decision(
        allowed=False, reason=Reason.BAD_USERNAME, revision=revision
    )


def test_decision_has_the_later_revision(world: World) -> None:
    """A remembered policy has the guard's revision; one just read may be ahead of it."""
    guard = world.guard()
    guard.check("jsmith", HOME)
    other = world.restrict("adoe")
    assert guard.check("jsmith", HOME).revision == 0
    assert guard.check("third", HOME).revision == other
    guard.sync()
    assert guard.check("jsmith", HOME).revision == other
    world.store.down = StoreUnavailable("down")
    assert guard.check("new", HOME).revision == other


def test_ip_versions_are_never_mixed_up(world: World) -> None:
    """`::203.0.113.7` is the same number as 203.0.113.7, but another address."""
    world.restrict("four", HOME)
    world.restrict("six", f"::{HOME}")
    world.restrict("all four", "0.0.0.0/0")
    world.restrict("all six", "::/0")
    guard = world.guard()
    for _ in range(3):
        assert guard.is_allowed("four", HOME)
        assert not guard.is_allowed("four", f"::{HOME}")
        assert guard.is_allowed("six", f"::{HOME}")
        assert not guard.is_allowed("six", HOME)
        assert guard.is_allowed("all four", HOME)
        assert not guard.is_allowed("all four", "2001:db8::1")
        assert guard.is_allowed("all six", "2001:db8::1")
        assert not guard.is_allowed("all six", f"::ffff:{HOME}")


def test_unknown_users(world: World) -> None:
    world.restrict("jsmith", HOME)
    world.restrict("gone", HOME)
    world.inner.remove_users(["gone"])
    world.register("adoe")
    guard = world.guard(unknown_users="deny")
    for _ in range(2):
        assert reasons(
            guard.check("jsmith", HOME),
            guard.check("adoe", HOME),
            guard.check("gone", HOME),
            guard.check("stranger", HOME),
            guard.check("stranger", ""),
        ) == ["listed", "unrestricted", "unknown_user", "unknown_user", "bad_address"]
        asked = ("jsmith", "adoe", "gone", "stranger")
        assert [guard.is_allowed(name, HOME) for name in asked] == [True, True, False, False]
    world.register("stranger")
    guard.sync()
    assert guard.is_allowed("stranger", HOME)
    world.inner.remove_users(["stranger", "jsmith"])
    guard.sync()
    assert not guard.is_allowed("stranger", HOME)
    assert not guard.is_allowed("jsmith", HOME)


# -------------------------------------------------------------------- report only, the observer


def test_report_only(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Each answer allows; the reason, log, observer and figures show the real decision."""
    seen: list[tuple[object, object, Decision]] = []
    world.restrict("jsmith", HOME)
    guard = world.guard(report_only=True, observer=lambda *told: seen.append(told))
    caplog.set_level(logging.INFO, "ipguard")
    assert guard.is_allowed("jsmith", ELSEWHERE)
    decision = guard.check("jsmith", ELSEWHERE)
    assert (decision.allowed, decision.reason) == (True, Reason.NOT_LISTED)
    assert guard.check("jsmith", HOME).reason is Reason.LISTED
    assert [told[2].reason for told in seen] == [
        Reason.NOT_LISTED,
        Reason.NOT_LISTED,
        Reason.LISTED,
    ]
    assert seen[1] == ("jsmith", ELSEWHERE, decision)
    assert [record.getMessage() for record in told(caplog)] == [
        f"report only: 'jsmith' would not be allowed from '{ELSEWHERE}': not_listed"
    ] * 2
    assert [record.levelname for record in told(caplog)] == ["WARNING"] * 2
    assert guard.stats().denials == {Reason.NOT_LISTED: 2}


def test_report_quotes_and_truncates_client_input(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    guard = world.guard(report_only=True)
    guard.check("jsmith\nroot", "1.2.3.4\n" + "x" * 1000)
    assert "\n" not in told(caplog)[0].getMessage()
    assert len(told(caplog)[0].getMessage()) < 250


def test_observer_sees_hits_and_misses_on_the_callers_thread(world: World) -> None:
    seen: list[Any] = []
    guard = world.guard(observer=lambda *told: seen.append((*told, threading.get_ident())))
    for _ in range(3):
        assert guard.is_allowed("jsmith", HOME)
    assert [told[:2] for told in seen] == [("jsmith", HOME)] * 3
    assert {told[3] for told in seen} == {threading.get_ident()}
    assert len(world.store.loads) == 1


def test_observer_exception_is_logged_and_changes_nothing(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    def observer(username: object, address: object, decision: Decision) -> None:
        raise Odd("observer")

    world.restrict("jsmith", HOME)
    guard = world.guard(observer=observer)
    assert guard.is_allowed("jsmith", HOME)
    assert not guard.is_allowed("jsmith", OFFICE)
    assert caplog.text.count("the observer failed") == 2


def test_observer_interrupt_propagates(world: World) -> None:
    def observer(username: object, address: object, decision: Decision) -> None:
        raise KeyboardInterrupt

    guard = world.guard(observer=observer)
    with pytest.raises(KeyboardInterrupt):
        guard.check("jsmith", HOME)
    assert guard.stats().users == 1


def test_observer_may_call_the_guard(world: World) -> None:
    """It is called without a lock held."""
    seen: list[Any] = []

    def observer(username: object, address: object, decision: Decision) -> None:
        seen.append(guard.stats())
        seen.append(guard.sync())

    guard = world.guard(observer=observer)
    assert Call(lambda: guard.check("jsmith", "")).result().reason is Reason.BAD_ADDRESS
    assert len(seen) == 2


def test_subclass_may_override_is_allowed(world: World) -> None:
    class Stricter(Guard):
        def is_allowed(self, username: str, address: str) -> bool:
            return username != "root" and super().is_allowed(username, address)

    guard = Stricter(world.store, monotonic=world.clock.monotonic)
    assert guard.is_allowed("jsmith", HOME)
    assert not guard.is_allowed("root", HOME)


# ------------------------------------------------------------------------------------- outages


def test_store_down_after_the_lease(world: World) -> None:
    """Users are denied as `STORE_UNAVAILABLE`; bad input keeps its own reason."""
    guard = world.guard()
    guard.check("jsmith", HOME)
    world.store.down = StoreUnavailable("down")
    world.pass_time(5)
    assert reasons(
        guard.check("jsmith", HOME),
        guard.check("adoe", HOME),
        guard.check("jsmith", "x"),
        guard.check("", HOME),
    ) == ["store_unavailable", "store_unavailable", "bad_address", "bad_username"]
    assert len(world.store.syncs) == 2


@pytest.mark.parametrize(("passed", "allowed"), [(5, True), (14.999, True), (15, False)])
def test_outage_grace_is_exactly_bounded(world: World, passed: float, allowed: bool) -> None:
    """Remembered users get stale answers for `outage_grace` seconds after the deadline."""
    revision = world.restrict("jsmith", HOME)
    guard = world.guard(outage_grace=10)
    fresh = guard.check("jsmith", HOME)
    assert not fresh.stale
    guard.check("adoe", HOME)
    revision = world.wrong_guess()
    guard.sync()
    world.store.down = StoreUnavailable("down")
    world.pass_time(passed)
    decision = guard.check("jsmith", HOME)
    assert decision.allowed is allowed
    assert guard.is_allowed("jsmith", HOME) is allowed
    assert guard.is_allowed("jsmith", OFFICE) is False
    if allowed:
        assert decision == Decision(
            allowed=True,
            reason=Reason.LISTED,
            revision=revision,
            restriction_id="r1",
            stale=True,
        )
        assert guard.check("jsmith", OFFICE).reason is Reason.NOT_LISTED
        assert guard.check("adoe", HOME).stale
    else:
        assert decision == Decision(
            allowed=False, reason=Reason.STORE_UNAVAILABLE, revision=revision
        )
    assert guard.check("stranger", HOME).reason is Reason.STORE_UNAVAILABLE


def test_temporary_restriction_ends_during_an_outage(world: World) -> None:
    world.restrict("jsmith", HOME, expires_in=7)
    guard = world.guard(outage_grace=10, unknown_users="deny")
    guard.check("jsmith", HOME)
    guard.check("stranger", HOME)
    world.store.down = StoreUnavailable("down")
    world.pass_time(6)
    assert guard.check("jsmith", HOME).stale
    world.pass_time(1)
    assert guard.check("jsmith", HOME).reason is Reason.NOT_LISTED
    assert guard.check("stranger", HOME).reason is Reason.UNKNOWN_USER


def test_answer_is_not_stale_if_another_thread_renews_the_lease(world: World) -> None:
    guard = world.guard(max_staleness=0.2, outage_grace=10)
    guard.check("jsmith", HOME)
    world.pass_time(0.2)
    with during(world.store.before_sync, lambda: guard.check("jsmith", HOME)) as hanging:
        hold = guard._lease.ensure

        def renewed_meanwhile(revision: int) -> bool:
            held_it = hold(revision)
            guard._lease.sync()
            return held_it

        guard._lease.ensure = renewed_meanwhile  # type: ignore[method-assign]
        decision = guard.check("jsmith", HOME)
        guard._lease.ensure = hold  # type: ignore[method-assign]
    assert hanging.result()
    assert (decision.allowed, decision.stale) == (True, False)


# ---------------------------------------------------------------- at_least, wait_for, sync, figures


def test_at_least_syncs_once_if_the_guard_is_behind(world: World) -> None:
    guard = world.guard()
    assert guard.check("jsmith", HOME)
    revision = world.restrict("jsmith")
    assert guard.check("jsmith", HOME)
    decision = guard.check("jsmith", HOME, at_least=revision)
    assert (decision.reason, decision.revision) == (Reason.NOT_LISTED, revision)
    assert len(world.store.syncs) == 2
    assert guard.check("jsmith", OFFICE, at_least=revision)
    assert guard.check("jsmith", OFFICE, at_least=0)
    assert len(world.store.syncs) == 2


def test_at_least_beyond_the_store_is_unavailable(world: World) -> None:
    """An uncommitted revision costs one sync and is denied, also within `outage_grace`."""
    guard = world.guard(outage_grace=60)
    assert guard.check("jsmith", HOME)
    decision = guard.check("jsmith", HOME, at_least=1)
    assert (decision.allowed, decision.reason) == (False, Reason.STORE_UNAVAILABLE)
    assert len(world.store.syncs) == 2
    world.store.down = StoreUnavailable("down")
    world.pass_time(5)
    assert guard.check("jsmith", HOME, at_least=0).stale
    assert not guard.check("jsmith", HOME, at_least=1)


def test_at_least_when_another_history_is_adopted_meanwhile(world: World) -> None:
    world.touch("adoe")
    guard = world.guard()
    guard.check("jsmith", HOME)
    hold = guard._lease.ensure

    def taken_over_meanwhile(revision: int) -> bool:
        held = hold(revision)
        world.store.store = MemoryStore(clock=world.clock)
        guard.sync()
        return held

    guard._lease.ensure = taken_over_meanwhile  # type: ignore[method-assign]
    assert guard.check("adoe", HOME, at_least=1).reason is Reason.STORE_UNAVAILABLE


def test_at_least_of_a_wrong_type_is_denied(world: World) -> None:
    nonsense: Any = "1"
    assert not world.guard().check("jsmith", HOME, at_least=nonsense)


def test_sync_returns_the_revision(world: World) -> None:
    guard = world.guard()
    assert guard.revision == 0
    revision = world.restrict("jsmith")
    assert guard.sync() == revision == guard.revision
    world.store.down = Odd("odd")
    with pytest.raises(StoreUnavailable, match="odd") as caught:
        guard.sync()
    assert isinstance(caught.value.__cause__, Odd)
    assert guard.revision == revision


def test_sync_ignores_and_closes_the_circuit_breaker(world: World) -> None:
    world.store.down = StoreUnavailable("down")
    guard = world.guard()
    assert not guard.check("jsmith", HOME)
    world.store.down = None
    assert guard.sync() == 0
    assert guard.check("jsmith", HOME)


def test_wait_for_a_reached_revision_reads_nothing(world: World) -> None:
    revision = world.restrict("jsmith")
    guard = world.guard()
    guard.sync()
    world.store.down = StoreUnavailable("down")
    assert guard.wait_for(revision, 0)
    assert guard.wait_for(0, -1)
    assert len(world.store.syncs) == 1


@pytest.mark.parametrize("timeout", [float("nan"), float("inf"), None, timedelta(1), True], ids=str)
def test_wait_for_invalid_timeout(world: World, timeout: Any) -> None:
    with pytest.raises(InvalidValue, match="timeout: must be a finite number of seconds"):
        world.guard().wait_for(1, timeout)


@pytest.mark.parametrize("store", [None, "memory://", object()], ids=named)
def test_guard_without_a_store(store: Any) -> None:
    with pytest.raises(
        InvalidValue, match="store: is not a restriction store; open_store opens one"
    ):
        Guard(store)


def test_wait_for_syncs_before_it_waits(world: World) -> None:
    waits: list[float] = []

    def wait(revision: int, timeout: float) -> bool:
        waits.append(timeout)
        return False

    world.store.wait = wait  # type: ignore[method-assign]
    guard = world.guard()
    for address in (OFFICE, HOME):
        assert guard.wait_for(world.restrict("jsmith", address), PATIENCE)
    assert (len(world.store.syncs), waits) == (2, [])


@pytest.mark.parametrize("timeout", [-1, 0, 0.01])
def test_wait_for_keeps_its_timeout_while_the_store_hangs(world: World, timeout: float) -> None:
    """Only one sync is started."""
    guard = world.guard()
    with gate(world.store.before_sync) as hanging:
        for _ in range(3):
            assert Call(lambda: guard.wait_for(1, timeout)).result() is False
        hanging.reached()
        assert len(world.store.syncs) == 1
        revision = world.restrict("jsmith")
    assert guard.wait_for(revision, PATIENCE)


def test_wait_for_without_a_free_thread(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait ends at its timeout, and the next one can succeed."""
    guard = world.guard()
    revision = world.restrict("jsmith")

    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        assert guard.wait_for(revision, 0.05) is False
    assert guard.wait_for(revision, PATIENCE)


@pytest.mark.parametrize("touches", [True, False])
def test_wait_for_is_woken_by_a_commit(world: World, touches: bool) -> None:
    """Also by one that touches no policy."""
    guard = world.guard()
    guard.check("jsmith", HOME)
    waiting = Call(lambda: guard.wait_for(2 if touches else 1, PATIENCE * 10))
    comes_true(lambda: len(world.store.syncs) >= 2)
    world.restrict("jsmith") if touches else world.wrong_guess()
    assert waiting.result() is True
    assert guard.is_allowed("jsmith", HOME) is not touches


@pytest.mark.parametrize("down", [False, True])
def test_wait_for_returns_false_at_the_timeout(world: World, down: bool) -> None:
    guard = world.guard()
    if down:
        world.store.down = StoreUnavailable("down")
    began = time.monotonic()
    assert guard.wait_for(1, 0.25) is False
    assert 0.25 <= time.monotonic() - began < 5
    assert guard.wait_for(1, 0) is False
    assert guard.wait_for(1, -1) is False


def test_wait_for_does_not_spin(world: World) -> None:
    """The store wakes it at once each time, but has no change."""
    waits: list[float] = []

    def wait(revision: int, timeout: float) -> bool:
        waits.append(timeout)
        return True

    world.store.wait = wait  # type: ignore[method-assign]
    guard = world.guard()
    assert guard.wait_for(1, 0.3) is False
    assert 4 <= len(world.store.syncs) <= 35
    assert max(waits) == 0.1


def test_wait_for_respects_the_circuit_breaker(world: World) -> None:
    world.store.down = StoreUnavailable("down")
    guard = world.guard()
    assert guard.wait_for(1, 0.2) is False
    assert len(world.store.syncs) == 1


def test_stats_of_a_new_guard(world: World) -> None:
    assert world.guard().stats() == guard_module.GuardStats(
        revision=0,
        lease_remaining=0.0,
        last_sync_age=None,
        error=None,
        failures=0,
        woken_by="callers",
        users=0,
        preloaded=None,
        loads=0,
        store_errors=0,
        evictions=0,
        denials={},
        decisions={
            (Outcome.REFUSE, Reason.NOT_LISTED): 0,
            (Outcome.REFUSE, Reason.BAD_ADDRESS): 0,
            (Outcome.REFUSE, Reason.BAD_USERNAME): 0,
            (Outcome.REFUSE, Reason.UNKNOWN_USER): 0,
            (Outcome.RETRY, Reason.STORE_UNAVAILABLE): 0,
        },
        ready=False,
        sightings_written=0,
        sightings_lost=0,
        sightings_waiting=0,
    )


def test_stats(world: World) -> None:
    new = world.guard().stats()
    revision = world.restrict("jsmith", HOME)
    guard = world.guard(capacity=2, max_staleness=8)
    guard.check("jsmith", HOME)
    guard.check("jsmith", OFFICE)
    guard.check("jsmith", "x")
    guard.check("jsmith", "y")
    guard.check("", HOME)
    guard.check("adoe", HOME)
    guard.check("third", HOME)
    world.pass_time(3)
    stats = guard.stats()
    assert stats == attrs.evolve(
        new,
        revision=revision,
        lease_remaining=5.0,
        last_sync_age=3.0,
        users=2,
        loads=3,
        evictions=1,
        denials={Reason.NOT_LISTED: 1, Reason.BAD_ADDRESS: 2, Reason.BAD_USERNAME: 1},
        decisions={
            **new.decisions,
            (Outcome.REFUSE, Reason.NOT_LISTED): 1,
            (Outcome.REFUSE, Reason.BAD_ADDRESS): 2,
            (Outcome.REFUSE, Reason.BAD_USERNAME): 1,
        },
        ready=True,
    )
    world.pass_time(5)
    assert (guard.stats().ready, guard.stats().lease_remaining) == (False, 0.0)
    guard.check("", HOME)
    assert stats.denials[Reason.BAD_USERNAME] == 1


def test_stats_are_consistent(world: World) -> None:
    """They are read under the table's lock."""
    guard = world.guard()
    with guard._table.lock:
        asked = Call(guard.stats)
        asked.thread.join(0.05)
        assert asked.running
    asked.result()


# ------------------------------------------------------------------------------------- explain


def test_explain_always_reads_the_store(world: World) -> None:
    """It also leaves the remembered users and the figures alone."""
    world.register("jsmith")
    guard = world.guard(report_only=True)
    assert guard.check("jsmith", HOME)
    revision = world.restrict("jsmith", OFFICE)
    explained = guard.explain("JSmith", f"::ffff:{HOME}")
    assert explained.username == "jsmith"
    assert explained.address == HOME
    assert explained.decision == Decision(
        allowed=False, reason=Reason.NOT_LISTED, revision=revision
    )
    assert [str(r.addresses) for r in explained.restrictions] == [OFFICE]
    assert explained.known
    assert explained.at == world.clock()
    assert explained.summary == (
        f"jsmith from {HOME}: not allowed (not_listed). Registered; restricted to: {OFFICE}."
    )
    assert guard.stats().denials == {}


def test_explain_of_an_allow_and_of_bad_input(world: World) -> None:
    guard = world.guard(unknown_users="deny")
    world.register("jsmith")
    allowed = guard.explain("jsmith", HOME)
    assert allowed.decision.reason is Reason.UNRESTRICTED
    assert allowed.summary == (
        f"jsmith from {HOME}: allowed (unrestricted). Registered; restricted to: No restrictions."
    )
    unknown = guard.explain("stranger", HOME)
    assert unknown.decision.reason is Reason.UNKNOWN_USER
    assert not unknown.known
    assert unknown.summary == (
        f"stranger from {HOME}: not allowed (unknown_user). Not registered; restricted to: "
        "No restrictions."
    )
    bad = guard.explain("jsmith", "010.1.1.1")
    assert (bad.address, bad.decision.reason) == (None, Reason.BAD_ADDRESS)
    assert bad.summary.startswith("jsmith from '010.1.1.1': not allowed (bad_address).")
    for address, read in ((HOME, HOME), ("x", None)):
        nameless = guard.explain("a\nb", address)
        assert nameless.decision.reason is Reason.BAD_USERNAME
        assert nameless.username == r"'a\nb'"
        assert nameless.address == read
        assert (nameless.restrictions, nameless.known) == ((), False)
        assert nameless.at == world.clock()
        assert nameless.summary.startswith(r"'a\nb' is not a username")


@pytest.mark.parametrize("error", [StoreUnavailable("down"), Odd("odd")])
def test_explain_while_the_store_is_down(world: World, error: Exception) -> None:
    world.store.down = error
    with pytest.raises(StoreUnavailable, match=str(error)) as caught:
        world.guard().explain("jsmith", HOME)
    assert caught.value is error or caught.value.__cause__ is error
