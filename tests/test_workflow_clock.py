"""Clocks that are set back, and times at the ends of the calendar."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import ipguard
from ipguard import NumberExpired, TooManyRequests
from tests.flows import ALICE, BOSS, HOME, OFFICE, Desk
from tests.postgres import fresh_schema

DAY, HOUR = timedelta(days=1), timedelta(hours=1)


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
    """The age of such a number is unknown, so it is refused; `resend` issues one that works."""
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
