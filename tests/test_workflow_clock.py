"""Clocks that are set back, and times at the ends of the calendar."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path

import pytest

import ipguard
from ipguard import InvalidValue, NumberExpired, TooManyRequests
from ipguard.rules import shifted, wait_left
from tests.flows import ALICE, BOSS, HOME, OFFICE, Desk
from tests.postgres import fresh_schema

DAY, HOUR = timedelta(days=1), timedelta(hours=1)
NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Desk]:
    """A desk over each store."""
    if request.param == "postgres":
        desk = Desk(url=request.getfixturevalue("postgres").url(schema=fresh_schema()))
    else:
        desk = Desk(tmp_path / "desk.db" if request.param == "sqlite" else None)
    with desk.store:
        yield desk


def a_day_ahead(desk: Desk) -> None:
    desk.clock.set(desk.clock() + DAY)


def set_right(desk: Desk) -> None:
    desk.clock.set(desk.clock() - DAY)


def test_requests_from_the_future_are_not_counted(desk: Desk) -> None:
    """Requests stored by a clock that was ahead are not counted."""
    desk.use(requests_per_hour=2)
    a_day_ahead(desk)
    desk.ask("203.0.113.1")
    desk.ask("203.0.113.2")
    with pytest.raises(TooManyRequests):
        desk.ask("203.0.113.3")
    set_right(desk)
    desk.ask("203.0.113.3")
    desk.ask("203.0.113.4")
    with pytest.raises(TooManyRequests) as caught:
        desk.ask("203.0.113.5")
    assert caught.value.retry_after == HOUR


@pytest.mark.parametrize("after", [timedelta(0), timedelta(hours=20)], ids=["at once", "20 h"])
def test_a_number_issued_in_the_future_is_expired(desk: Desk, after: timedelta) -> None:
    """Its age is unknown, so it is refused, and `resend` issues one that works."""
    a_day_ahead(desk)
    request = desk.ask()
    set_right(desk)
    desk.clock.advance(after)
    with pytest.raises(NumberExpired):
        desk.confirm(request)
    assert desk.request(request).attempts_left == 5
    again = desk.flow.resend(ALICE, request.id)
    assert again.number_expires_at == desk.clock() + timedelta(minutes=10)
    desk.confirm(again)
    assert desk.held() == [OFFICE]


def test_a_request_from_the_future_lives_no_longer_once_it_is_resent(desk: Desk) -> None:
    """Resending dates the request by the clock that was set right."""
    a_day_ahead(desk)
    request = desk.ask()
    set_right(desk)
    again = desk.flow.resend(ALICE, request.id)
    assert (again.requested_at, again.expires_at) == (desk.clock(), desk.clock() + DAY)
    assert desk.request(request) == again
    desk.clock.advance(DAY)
    with pytest.raises(ipguard.RequestClosed):
        desk.flow.resend(ALICE, request.id)


def test_the_wait_for_used_up_resends_is_no_longer_than_a_request_lives(desk: Desk) -> None:
    """A request from the future does not report a wait of two days."""
    desk.use(resends_per_request=0)
    a_day_ahead(desk)
    request = desk.ask()
    set_right(desk)
    with pytest.raises(TooManyRequests) as caught:
        desk.flow.resend(ALICE, request.id)
    assert caught.value.retry_after == DAY


@pytest.mark.parametrize(
    "now",
    [datetime(1, 1, 1, 0, 30, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, tzinfo=UTC)],
    ids=["year 1", "year 9999"],
)
def test_the_workflow_at_the_ends_of_the_calendar(desk: Desk, now: datetime) -> None:
    """No call fails at the first or last day of the calendar."""
    desk.clock.set(now)
    request = desk.ask()
    with pytest.raises(TooManyRequests) as caught:
        desk.flow.resend(ALICE, request.id)
    assert caught.value.retry_after == timedelta(seconds=30)
    desk.confirm(request)
    desk.flow.impose(BOSS, "jsmith", HOME, reason="a test")
    assert set(desk.held()) == {OFFICE, HOME}
    assert desk.flow.overview(BOSS).items
    assert desk.flow.history(BOSS).items


@pytest.mark.parametrize(
    ("ages", "most", "wait"),
    [
        ([], 1, 0),
        ([0], 1, 60),
        ([60], 1, 0),
        ([59], 1, 1),
        ([-1], 1, 0),
        ([10, 50, -600, 30], 3, 10),
        ([10, 50, -600, 30], 4, 0),
        ([50, 10, 30], 1, 50),
    ],
)
def test_how_long_to_wait(ages: list[int], most: int, wait: int) -> None:
    """The wait ends when fewer than `most` lie within the period; the future is not counted."""
    times = [NOW - timedelta(minutes=age) for age in ages]
    assert wait_left(times, most, HOUR, NOW) == timedelta(minutes=wait)


def test_times_end_with_the_calendar() -> None:
    """Adding a duration ends at the first and the last possible time."""
    assert shifted(NOW, HOUR) == NOW + HOUR
    assert shifted(NOW, timedelta.max) == datetime.max.replace(tzinfo=UTC)
    assert shifted(NOW, timedelta.min) == datetime.min.replace(tzinfo=UTC)


class Broken(tzinfo):
    """A time zone whose offset cannot be computed."""

    def utcoffset(self, _: datetime | None) -> timedelta:
        raise LookupError("no such zone")

    def dst(self, _: datetime | None) -> None:
        return None

    def tzname(self, _: datetime | None) -> None:
        return None


def test_a_time_zone_that_fails_is_bad_input() -> None:
    """An error of a caller's time zone becomes InvalidValue, with the name of the argument."""
    desk = Desk()
    with pytest.raises(InvalidValue, match="expires_at: has a time zone that fails: LookupError"):
        desk.ask(expires_at=datetime(2031, 1, 1, tzinfo=Broken()))
