"""Mails of the workflow: resending, failures and notices."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import attrs
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
from tests.flows import ADAM, ALICE, BOSS, HOME, KEY, OFFICE, Desk


def _fail_to_request(desk: Desk) -> str:
    """Make a request whose mail fails, and return its id."""
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


def test_mails_show_the_username_as_the_host_spells_it(desk: Desk) -> None:
    """The number's mail has the spelling, a resent one too; the request stays canonical."""
    desk.store.put_users([ipguard.User(username="Anne.O", full_name="Anne", account_id="U1")])
    request = desk.flow.request(ALICE, "anne.o", HOME)
    desk.wait(seconds=30)
    desk.flow.resend(ALICE, request.id)
    sent = [message.request for message in desk.outbox.messages if message.request is not None]
    assert [(each.username, each.spelling) for each in sent] == [("anne.o", "Anne.O")] * 2
    with desk.store.transaction() as tx:
        stored = tx.request(request.id)
        assert stored is not None
        assert stored.request == attrs.evolve(sent[1], spelling="anne.o")


# -- resending ---------------------------------------------------------------------------------


def test_resending_waits_for_the_interval(desk: Desk) -> None:
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


def test_resending_goes_to_the_address_recorded_at_the_request(desk: Desk) -> None:
    """A session with a changed e-mail address does not get the number."""
    request = desk.ask()
    thief = Actor(username="alice", email="thief@evil.example", manages=ALICE.manages)
    desk.wait(seconds=30)
    desk.flow.resend(thief, request.id)
    mail = desk.outbox.messages[-1]
    assert mail.actor is not None
    assert (mail.to, mail.actor.email) == (("alice@firm.example",), "alice@firm.example")


def test_a_resent_number_has_its_own_lifetime(desk: Desk) -> None:
    """The new number is valid for ten minutes from now, the request no longer than before."""
    request = desk.ask()
    desk.wait(minutes=15)
    again = desk.flow.resend(ALICE, request.id)
    assert again.number_expires_at == desk.clock() + timedelta(minutes=10)
    assert again.expires_at == request.expires_at
    assert desk.outbox.messages[-1].request == again


# -- the mail that fails -----------------------------------------------------------------------


def test_the_first_mail_fails(desk: Desk) -> None:
    """The request is pending and audited, and a new number can be sent at once."""
    request_id = _fail_to_request(desk)
    (line,) = desk.flow.overview(ALICE, search="jsmith")
    assert [(r.id, r.state) for r in line.pending] == [(request_id, RequestState.PENDING)]
    assert [row.action for row in desk.rows()[:2]] == [Action.DELIVERY_FAILED, Action.REQUEST]
    request = desk.flow.resend(ALICE, request_id)
    desk.confirm(request)
    assert desk.held() == [OFFICE]


def test_the_first_mail_fails_without_resends(desk: Desk) -> None:
    desk.use(resends_per_request=0)
    request = desk.flow.resend(ALICE, _fail_to_request(desk))
    desk.wait(minutes=1)
    with pytest.raises(TooManyRequests):
        desk.flow.resend(ALICE, request.id)
    desk.confirm(request)


def test_failed_mails_do_not_count_as_resends(desk: Desk) -> None:
    request_id = _fail_to_request(desk)
    for _ in range(6):
        for _ in range(3):
            _fail_to_resend(desk, request_id)
        desk.flow.resend(ALICE, request_id)
        desk.wait(seconds=30)
    with pytest.raises(TooManyRequests):
        desk.flow.resend(ALICE, request_id)
    assert len(desk.outbox.messages) == 6


def test_a_dead_mail_server_is_not_flooded(desk: Desk) -> None:
    """After as many failures in a row as there are resends, the interval applies."""
    request_id = _fail_to_request(desk)
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


def test_a_failed_resend_can_be_repeated_at_once(desk: Desk) -> None:
    """The interval is between sent mails; the old number is replaced anyway."""
    request = desk.ask()
    old = desk.number(request)
    desk.wait(seconds=30)
    _fail_to_resend(desk, request.id)
    with pytest.raises(ipguard.WrongNumber):
        desk.flow.confirm(ALICE, request.id, old)
    desk.flow.resend(ALICE, request.id)
    desk.confirm(request)


def test_a_mail_that_arrives_although_it_failed(desk: Desk) -> None:
    """If the server accepted the mail and then failed, the number works."""

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


def test_the_reason_of_a_delivery_error(desk: Desk) -> None:
    """DeliveryError shows a notifier's own reason; of other exceptions only the type."""

    class Failing(Outbox):
        error: Exception

        def number_issued(self, request, number, actor) -> None:
            raise self.error

    notifier = Failing()
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


def test_a_concurrent_resend_counts(desk: Desk) -> None:
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


def test_the_user_is_removed_while_the_mail_fails(desk: Desk) -> None:
    """The mail's failure is raised even if it cannot be recorded."""
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


def test_the_store_fails_after_the_mail(desk: Desk) -> None:
    """If the store fails as well, DeliveryError is raised and the mail counts as sent."""
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
    """The error is StoreUnavailable; a second call shows that the change went through."""
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
    """Failed notices of every kind of change are logged and counted; the change holds."""
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


def test_a_user_without_an_address_gets_no_notice(desk: Desk) -> None:
    desk.confirm(desk.ask(username="mary"))
    assert desk.outbox.messages[-1].to == ("alice@firm.example",)
    assert desk.flow.notices_failed == 0


def test_requests_send_no_notices(desk: Desk) -> None:
    request = desk.ask()
    desk.guess(request, times=1)
    desk.flow.cancel(ALICE, request.id)
    assert {mail.kind for mail in desk.outbox.messages} == {"number_issued"}


def _told(desk: Desk) -> list[tuple[str, str]]:
    """Return who was mailed about what, and forget it."""
    found = [
        (to, message.kind if message.change is None else str(message.change.action))
        for message in desk.outbox.messages
        for to in message.to
    ]
    desk.outbox.clear()
    return sorted(found)


APPROVED = ipguard.Demand(number=True, approvals=1)
ALICE_MAIL, ADAM_MAIL, USER_MAIL = ALICE.email, ADAM.email, "jsmith@firm.example"


def test_a_request_that_needs_approval_tells_each_person_once(desk: Desk) -> None:
    """The user is told at once; an accepted number sends no mail."""
    desk.use(add=APPROVED)
    request = desk.ask()
    number = desk.number(request)
    assert _told(desk) == [(ALICE_MAIL, "number_issued"), (USER_MAIL, "request")]
    assert isinstance(desk.flow.confirm(ALICE, request.id, number), ipguard.PendingRequest)
    assert _told(desk) == []
    desk.flow.approve(ADAM, request.id)
    assert _told(desk) == [(each, "confirm") for each in (ADAM_MAIL, ALICE_MAIL, USER_MAIL)]


def test_an_approval_that_completes_nothing(desk: Desk) -> None:
    desk.use(add=APPROVED)
    request = desk.ask()
    number = desk.number(request)
    desk.outbox.clear()
    desk.flow.approve(ADAM, request.id)
    approval = desk.outbox.messages[0].change
    assert approval is not None
    afterwards = "Today from anywhere; then only from 203.0.113.7."
    assert approval.detail["afterwards"] == afterwards
    assert _told(desk) == [(ADAM_MAIL, "approve"), (ALICE_MAIL, "approve")]
    desk.flow.confirm(ALICE, request.id, number)
    assert _told(desk) == [(ALICE_MAIL, "confirm"), (USER_MAIL, "confirm")]


def test_a_request_that_waits_tells_the_user(desk: Desk) -> None:
    """A requester who is the user concerned knows; each is mailed once."""
    desk.use(add=ipguard.Demand(wait=timedelta(hours=1)))
    request = desk.ask()
    (mail,) = desk.outbox.messages
    assert mail.change is not None
    assert mail.change.detail["ready_at"] == request.ready_at.isoformat()
    assert mail.change.detail["afterwards"] == "Today from anywhere; then only from 203.0.113.7."
    assert _told(desk) == [(USER_MAIL, "request")]
    desk.ask(username="alice")
    desk.ask(username="mary")  # without an address
    assert _told(desk) == []
    desk.wait(hours=1)
    desk.flow.confirm(ALICE, request.id)
    assert _told(desk) == [(ALICE_MAIL, "confirm"), (USER_MAIL, "confirm")]


def test_a_request_of_several_users_tells_each_once(desk: Desk) -> None:
    """The actor gets one notice of all, which says what holds for whom, as the number's mail."""
    desk.add(HOME)
    desk.outbox.clear()
    names = ["jsmith", "mary", "zed", "alice"]
    first, *_ = desk.flow.request_many(BOSS, names, OFFICE, allow_lockout=True)
    (mail,) = desk.outbox.messages
    assert mail.request is not None
    assert mail.request.impact is not None
    afterwards = (
        "jsmith: Then also from 203.0.113.7."
        " mary, zed, alice: Today from anywhere; then only from 203.0.113.7."
    )
    assert mail.request.impact.summary == afterwards
    assert mail.request.impact.direction is ipguard.Direction.LOOSENS, "the worst"
    assert mail.request.also_for == ("mary", "zed", "alice")
    assert first.impact is not None
    assert first.impact.summary == "Then also from 203.0.113.7."
    number = desk.number(first)
    desk.outbox.clear()
    applied = desk.flow.confirm(BOSS, first.id, number)
    assert isinstance(applied, ipguard.Applied)
    assert applied.impact is not None
    assert applied.impact.direction is ipguard.Direction.LOOSENS
    assert applied.impact.summary.startswith("jsmith: Then also from 203.0.113.7. ")
    (notice,) = [each for each in desk.outbox.messages if each.to == (BOSS.email,)]
    assert notice.change is not None
    assert notice.change.detail["direction"] == "loosens"
    assert set(notice.change.detail["users"].split(", ")) == set(names)
    assert notice.change.detail["afterwards"].startswith("jsmith: Then also from 203.0.113.7. ")
    users = (ALICE_MAIL, BOSS.email, USER_MAIL, "zed@other.example")
    assert _told(desk) == [(each, "confirm") for each in users]


def test_an_approved_request_of_several_users(desk: Desk) -> None:
    """The requester and the approver get one notice of all."""
    desk.use(add=APPROVED)
    first, _ = desk.flow.request_many(ALICE, ["jsmith", "mary"], HOME)
    number = desk.number(first)
    assert _told(desk) == [(ALICE_MAIL, "number_issued"), (USER_MAIL, "request")]
    desk.flow.approve(ADAM, first.id)
    assert _told(desk) == [(ADAM_MAIL, "approve"), (ALICE_MAIL, "approve")]
    desk.flow.confirm(ALICE, first.id, number)
    assert _told(desk) == [(ALICE_MAIL, "confirm"), (USER_MAIL, "confirm")]


def test_a_change_at_once_tells_actor_and_user(desk: Desk) -> None:
    desk.use(add=ipguard.Demand())
    desk.ask()
    assert _told(desk) == [(ALICE_MAIL, "confirm"), (USER_MAIL, "confirm")]
