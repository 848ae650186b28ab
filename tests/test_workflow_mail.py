"""Mails: where numbers go, what happens when a mail does not get through, and notices."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest

import ipguard
from ipguard import (
    Action,
    Actor,
    DeliveryError,
    RequestState,
    StoreUnavailable,
    TooManyRequests,
    Workflow,
)
from ipguard.testing import Outbox
from tests.flows import ALICE, BOSS, HOME, KEY, OFFICE, Desk


def _fail_to_ask(desk: Desk) -> str:
    """Request while no mail gets through, and return the id."""
    desk.outbox.fail = True
    with pytest.raises(DeliveryError) as caught:
        desk.ask()
    desk.outbox.fail = False
    assert caught.value.request_id is not None
    return caught.value.request_id


def _fail_to_resend(desk: Desk, request_id: str) -> None:
    desk.outbox.fail = True
    with pytest.raises(DeliveryError) as caught:
        desk.flow.resend(ALICE, request_id)
    desk.outbox.fail = False
    assert caught.value.request_id == request_id


# -- resending ---------------------------------------------------------------------------------


def test_resending_waits_for_the_interval(desk: Desk) -> None:
    """Too soon is refused with exactly the time to wait, after the first mail and after each."""
    request = desk.ask()
    for _ in range(2):
        desk.wait(seconds=10)
        with desk.unchanged(), pytest.raises(TooManyRequests) as caught:
            desk.flow.resend(ALICE, request.id)
        assert caught.value.retry_after == timedelta(seconds=20)
        desk.clock.advance(caught.value.retry_after - timedelta(microseconds=1))
        with pytest.raises(TooManyRequests):
            desk.flow.resend(ALICE, request.id)
        desk.clock.advance(timedelta(microseconds=1))
        desk.flow.resend(ALICE, request.id)


def test_resends_are_limited_for_each_request(desk: Desk) -> None:
    """Five more numbers; then the request itself has to end before another can be mailed."""
    request = desk.ask()
    for _ in range(5):
        desk.wait(seconds=30)
        desk.flow.resend(ALICE, request.id)
    desk.wait(hours=1)
    with desk.unchanged(), pytest.raises(TooManyRequests) as caught:
        desk.flow.resend(ALICE, request.id)
    assert caught.value.retry_after == request.expires_at - desk.clock()
    other = desk.ask(HOME)
    desk.wait(seconds=30)
    desk.flow.resend(ALICE, other.id)


def test_no_resends_means_none(desk: Desk) -> None:
    """Where the setting is 0, the first mail is the only one."""
    desk.use(resends_per_request=0)
    request = desk.ask()
    desk.wait(minutes=1)
    with pytest.raises(TooManyRequests):
        desk.flow.resend(ALICE, request.id)
    desk.confirm(request)


def test_resending_goes_to_the_address_recorded_at_the_request(desk: Desk) -> None:
    """Whoever has taken over the session and its e-mail address does not get the number."""
    request = desk.ask()
    thief = Actor(username="alice", email="thief@evil.example", manages=ALICE.manages)
    desk.wait(seconds=30)
    desk.flow.resend(thief, request.id)
    mail = desk.outbox.messages[-1]
    assert (mail.to, mail.actor.email) == (("alice@firm.example",), "alice@firm.example")


def test_resending_starts_the_numbers_time_anew(desk: Desk) -> None:
    """The new number lives ten minutes from now; the request no longer than before."""
    request = desk.ask()
    desk.wait(minutes=15)
    again = desk.flow.resend(ALICE, request.id)
    assert again.number_expires_at == desk.clock() + timedelta(minutes=10)
    assert again.expires_at == request.expires_at
    assert desk.outbox.messages[-1].request == again


def test_resending_is_not_a_request(desk: Desk) -> None:
    """It does not count for the requests of the hour."""
    desk.use(requests_per_hour=2)
    request = desk.ask()
    for _ in range(3):
        desk.wait(seconds=30)
        desk.flow.resend(ALICE, request.id)
    desk.ask(HOME)


# -- the mail that fails -----------------------------------------------------------------------


def test_the_first_mail_fails(desk: Desk) -> None:
    """The request waits, is told of, and a new number can be had at once."""
    request_id = _fail_to_ask(desk)
    (line,) = desk.flow.overview(ALICE, search="jsmith")
    assert [(r.id, r.state) for r in line.pending] == [(request_id, RequestState.PENDING)]
    assert [row.action for row in desk.rows()[:2]] == [Action.DELIVERY_FAILED, Action.REQUEST]
    request = desk.flow.resend(ALICE, request_id)
    desk.confirm(request)
    assert desk.held() == [OFFICE]


def test_the_first_mail_fails_where_nothing_may_be_resent(desk: Desk) -> None:
    """A mail that failed does not count: the first that gets through is the first mail."""
    desk.use(resends_per_request=0)
    request = desk.flow.resend(ALICE, _fail_to_ask(desk))
    desk.wait(minutes=1)
    with pytest.raises(TooManyRequests):
        desk.flow.resend(ALICE, request.id)
    desk.confirm(request)


def test_mails_that_failed_do_not_count_for_the_resends(desk: Desk) -> None:
    """However many failed in between, the first mail and five more get through."""
    request_id = _fail_to_ask(desk)
    for _ in range(6):
        for _ in range(3):
            _fail_to_resend(desk, request_id)
        desk.flow.resend(ALICE, request_id)
        desk.wait(seconds=30)
    with pytest.raises(TooManyRequests):
        desk.flow.resend(ALICE, request_id)
    assert len(desk.outbox.messages) == 6


def test_a_dead_mail_server_is_not_stormed(desk: Desk) -> None:
    """After as many failures in a row as may be resent, the interval holds; nothing is counted."""
    request_id = _fail_to_ask(desk)
    for _ in range(5):
        _fail_to_resend(desk, request_id)
    for _ in range(3):
        with pytest.raises(TooManyRequests) as caught:
            desk.flow.resend(ALICE, request_id)
        assert caught.value.retry_after == timedelta(seconds=30)
        desk.wait(seconds=30)
        _fail_to_resend(desk, request_id)
    desk.wait(seconds=30)
    for _ in range(6):
        desk.flow.resend(ALICE, request_id)
        desk.wait(seconds=30)
    with pytest.raises(TooManyRequests):
        desk.flow.resend(ALICE, request_id)


def test_a_resend_that_fails_can_be_repeated_at_once(desk: Desk) -> None:
    """The interval is between mails that were sent; the old number is dead all the same."""
    request = desk.ask()
    old = desk.number(request)
    desk.wait(seconds=30)
    _fail_to_resend(desk, request.id)
    with pytest.raises(ipguard.WrongNumber):
        desk.flow.confirm(ALICE, request.id, old)
    desk.flow.resend(ALICE, request.id)
    desk.confirm(request)


def test_a_failed_mail_still_is_a_request_of_the_hour(desk: Desk) -> None:
    """The request waits and can be used, so it counts."""
    desk.use(requests_per_hour=1)
    _fail_to_ask(desk)
    with pytest.raises(TooManyRequests):
        desk.ask(HOME)


def test_a_number_whose_mail_only_seemed_to_fail_works(desk: Desk) -> None:
    """A server that took the mail and then broke off: the number arrived, and is the number."""

    class Broken(Outbox):
        def number_issued(self, request, number, actor) -> None:
            super().number_issued(request, number, actor)
            raise OSError("the server broke off")

    outbox = Broken()
    flow = Workflow(desk.store, outbox, key=KEY)
    with pytest.raises(DeliveryError) as caught:
        flow.request(ALICE, "jsmith", OFFICE)
    assert caught.value.request_id is not None
    flow.confirm(ALICE, caught.value.request_id, outbox.number_for(caught.value.request_id))
    assert desk.held() == [OFFICE]


def test_a_deletions_mail_fails(desk: Desk) -> None:
    """A deletion that waits for its number waits in the same way."""
    desk.use(confirm_deletes=True)
    restriction = desk.add()
    desk.outbox.fail = True
    with pytest.raises(DeliveryError) as caught:
        desk.flow.delete(ALICE, restriction.id)
    desk.outbox.fail = False
    assert desk.held() == [OFFICE]
    request = desk.flow.resend(ALICE, caught.value.request_id or "")
    desk.confirm(request)
    assert desk.held() == []


def test_what_a_delivery_error_tells(desk: Desk) -> None:
    """A notifier's own reason is told; of any other exception only the kind, which is no secret."""

    class Telling(Outbox):
        error: Exception

        def number_issued(self, request, number, actor) -> None:
            raise self.error

    notifier = Telling()
    flow = Workflow(desk.store, notifier, key=KEY)
    notifier.error = DeliveryError("no server at mail.example")
    with pytest.raises(DeliveryError) as caught:
        flow.request(ALICE, "jsmith", OFFICE)
    assert caught.value.reason == "no server at mail.example"
    assert caught.value.request_id is not None
    notifier.error = RuntimeError("password=swordfish")
    with pytest.raises(DeliveryError) as caught:
        flow.request(ALICE, "jsmith", HOME)
    assert caught.value.reason == "RuntimeError"
    assert "swordfish" not in str(caught.value)


class Meddling(Outbox):
    """A notifier whose mail fails, after something else has happened."""

    def __init__(self) -> None:
        super().__init__()
        self.first: Any = lambda _: None

    def number_issued(self, request, number, actor) -> None:
        self.first(request)
        raise OSError("no mail gets through")


def test_a_number_sent_meanwhile_counts(desk: Desk) -> None:
    """While a mail hung and failed, another resend got through: its mail stays counted."""
    desk.use(resend_interval=timedelta(), resends_per_request=1)
    meddler = Meddling()
    slow = Workflow(desk.store, meddler, key=KEY, settings=desk.flow.settings)
    meddler.first = lambda request: desk.flow.resend(ALICE, request.id)
    with pytest.raises(DeliveryError):
        slow.request(ALICE, "jsmith", OFFICE)
    request = desk.outbox.messages[-1].request
    assert request is not None
    assert desk.rows()[0].action is Action.RESEND
    with pytest.raises(TooManyRequests):
        desk.flow.resend(ALICE, request.id)
    desk.confirm(request)


def test_the_users_account_changed_while_the_mail_failed(desk: Desk) -> None:
    """What cannot be taken back any more is left; the failure to be told of is the mail's."""
    meddler = Meddling()
    flow = Workflow(desk.store, meddler, key=KEY)
    meddler.first = lambda _: desk.store.remove_users(["jsmith"])
    with pytest.raises(DeliveryError):
        flow.request(ALICE, "jsmith", OFFICE)


class Flaky:
    """A store that fails on demand: before a transaction, or after its commit."""

    def __init__(self, inner: ipguard.RestrictionStore) -> None:
        self._inner = inner
        self.down = False
        self.loses_outcome = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @contextmanager
    def transaction(self, *, staged: Any = None) -> Iterator[ipguard.Transaction]:
        if self.down:
            raise StoreUnavailable("it is down")
        with self._inner.transaction(staged=staged) as turn:
            yield turn
        if self.loses_outcome:
            raise StoreUnavailable("the outcome of the commit is lost")


def test_taking_back_a_failed_mail_may_fail_too(desk: Desk) -> None:
    """The store went down as well: `DeliveryError`, and the mail counts as one that was sent."""
    store: Any = Flaky(desk.store)
    meddler = Meddling()
    meddler.first = lambda _: setattr(store, "down", True)
    flow = Workflow(store, meddler, key=KEY)
    with pytest.raises(DeliveryError) as caught:
        flow.request(ALICE, "jsmith", OFFICE)
    request_id = caught.value.request_id or ""
    with pytest.raises(TooManyRequests):
        desk.flow.resend(ALICE, request_id)
    desk.wait(seconds=30)
    desk.confirm(desk.flow.resend(ALICE, request_id))


def test_a_commit_whose_outcome_is_lost(desk: Desk) -> None:
    """It is `StoreUnavailable`; trying again shows that it went through."""
    request = desk.ask()
    store: Any = Flaky(desk.store)
    flow = desk.workflow(store)
    store.loses_outcome = True
    with pytest.raises(StoreUnavailable):
        flow.confirm(ALICE, request.id, desk.number(request))
    store.loses_outcome = False
    with pytest.raises(ipguard.RequestClosed) as caught:
        flow.confirm(ALICE, request.id, desk.number(request))
    assert caught.value.state == "confirmed"
    assert desk.held() == [OFFICE]


def test_a_store_that_is_down_changes_nothing(desk: Desk) -> None:
    """Every call says `StoreUnavailable`, and no mail goes out for what was not committed."""
    request, restriction = desk.ask(), desk.add(HOME)
    store: Any = Flaky(desk.store)
    store.down = True
    flow = desk.workflow(store)
    for call in (
        lambda: flow.request(ALICE, "mary", OFFICE),
        lambda: flow.confirm(ALICE, request.id, desk.number(request)),
        lambda: flow.cancel(ALICE, request.id),
        lambda: flow.resend(ALICE, request.id),
        lambda: flow.delete(ALICE, restriction.id),
        lambda: flow.impose(BOSS, "mary", OFFICE, reason="x"),
        lambda: flow.impose_many(BOSS, [("mary", OFFICE)], reason="x"),
        lambda: flow.lift(BOSS, restriction.id, reason="x"),
        lambda: flow.unlock(BOSS, "alice", reason="x"),
    ):
        with desk.unchanged(), pytest.raises(StoreUnavailable):
            call()


# -- notices -----------------------------------------------------------------------------------


def test_a_notice_that_cannot_be_sent_never_raises(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    """The change holds; the failure is logged and counted, for every kind of change."""
    first, second = desk.add("203.0.113.1"), desk.add("203.0.113.2")
    request = desk.ask()
    number = desk.number(request)
    desk.outbox.fail = True
    assert desk.flow.notices_failed == 0
    desk.flow.confirm(ALICE, request.id, number)
    desk.flow.delete(ALICE, first.id)
    desk.flow.lift(BOSS, second.id, reason="x")
    desk.flow.impose(BOSS, "mary", HOME, reason="x")
    desk.flow.impose_many(BOSS, [("zed", HOME), ("alice", HOME)], reason="x")
    desk.flow.unlock(BOSS, "jsmith", reason="x")
    # The bulk change has one notice for the actor, and one for each user.
    assert desk.flow.notices_failed == 8
    errors = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 8
    assert "revision" in errors[0].getMessage()
    assert [len(desk.held(n)) for n in ("jsmith", "mary", "zed", "alice")] == [1, 1, 1, 1]


def test_a_user_without_an_address_is_not_told(desk: Desk) -> None:
    """The requester is, and nothing fails."""
    desk.confirm(desk.ask(username="mary"))
    assert desk.outbox.messages[-1].to == ("alice@firm.example",)
    assert desk.flow.notices_failed == 0


def test_asking_cancelling_and_guessing_send_no_notice(desk: Desk) -> None:
    """Notices are of changes that hold."""
    request = desk.ask()
    desk.guess(request, times=1)
    desk.flow.cancel(ALICE, request.id)
    assert {mail.kind for mail in desk.outbox.messages} == {"number_issued"}
