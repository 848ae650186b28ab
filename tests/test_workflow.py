"""The two phases: requests and their confirmation."""

from __future__ import annotations

import logging
import re
import threading
from datetime import timedelta

import attrs
import pytest

import ipguard
from ipguard import (
    Action,
    AddressRange,
    Applied,
    DuplicateRestriction,
    NumberExpired,
    RequestClosed,
    RequestState,
    TooManyRequests,
    TooManyRestrictions,
    Workflow,
)
from ipguard.testing import Outbox
from tests.flows import ADAM, ALICE, BOSS, HOME, KEY, OFFICE, PEOPLE, Desk

# -- the first phase ---------------------------------------------------------------------------


def test_a_request_changes_no_policy(desk: Desk) -> None:
    """A request changes no policy, and shows all its data."""
    expires = desk.later(days=2)
    request = desk.ask("203.0.113.0/29", label="office", expires_at=expires)
    assert desk.held() == []
    now = desk.clock()
    assert request == ipguard.PendingRequest(
        id=request.id,
        username="jsmith",
        kind=ipguard.RequestKind.ADD,
        adds=(AddressRange.parse("203.0.113.0/29"),),
        label="office",
        requested_by="alice",
        requested_at=now,
        expires_at=now + timedelta(hours=24),
        number_expires_at=now + timedelta(minutes=10),
        attempts_left=5,
        state=RequestState.PENDING,
        restriction_expires_at=expires,
        impact=request.impact,
    )
    assert desk.request(request) == request


def test_the_number_goes_only_to_the_actor(desk: Desk) -> None:
    """One mail, to the actor's address only, has a ten-digit number in two groups."""
    request = desk.ask()
    (mail,) = desk.outbox.messages
    assert (mail.kind, mail.to, mail.request) == (
        "number_issued",
        ("alice@firm.example",),
        request,
    )
    assert re.fullmatch(r"\d{5}-\d{5}", mail.number or "")


def test_no_mail_is_sent_inside_the_transaction(desk: Desk) -> None:
    """During a mail, the request is committed and others can write."""
    seen: list[str] = []

    class Slow(Outbox):
        def number_issued(self, request, number, actor) -> None:
            writer = threading.Thread(target=lambda: desk.add(HOME, "mary"))
            writer.start()
            writer.join(10)
            seen.append(desk.request(request).state)
            seen.extend(desk.held("mary"))

    flow = Workflow(desk.store, Slow(), key=KEY)
    flow.request(ALICE, "jsmith", OFFICE)
    assert seen == ["pending", HOME]


def test_ids_are_opaque_and_differ(desk: Desk) -> None:
    """Ids of requests and restrictions cannot be guessed from one another."""
    ids = {desk.ask(f"203.0.113.{n}").id for n in range(5)} | {
        desk.add(f"198.51.100.{n}").id for n in range(5)
    }
    assert len(ids) == 10
    assert all(re.fullmatch(r"[0-9a-f]{16}", i) for i in ids)


def test_white_space_around_addresses_is_ignored(desk: Desk) -> None:
    """Surrounding white space is ignored; a parsed range is accepted as well."""
    assert desk.ask(" 203.0.113.7\n").change == f"add {OFFICE}"
    assert desk.flow.request(ALICE, "jsmith", AddressRange.parse(HOME)).change == f"add {HOME}"


def test_the_username_is_taken_in_any_spelling(desk: Desk) -> None:
    assert desk.ask(username="JSmith").username == "jsmith"
    assert desk.ask(HOME, username="ｊｓｍｉｔｈ").username == "jsmith"  # noqa: RUF001


@pytest.mark.parametrize(
    ("widest", "good", "bad"),
    [
        ({}, "10.1.0.0/16", "10.0.0.0/15"),
        ({}, "2001:db8::/32", "2001:db8::/31"),
        ({"widest_ipv4": 24}, "10.0.0.0/24", "10.0.0.0/23"),
        ({"widest_ipv6": 64}, "2001:db8::/64", "2001:db8::/63"),
    ],
)
def test_the_widest_is_counted_in_addresses(
    desk: Desk, widest: dict[str, int], good: str, bad: str
) -> None:
    """A range is too broad if it has more addresses than the widest prefix."""
    desk.use(**widest)
    with desk.unchanged(), pytest.raises(ipguard.AddressTooBroad):
        desk.ask(bad)
    assert desk.ask(good).change == f"add {good}"


def test_the_width_is_checked_again_on_confirming(desk: Desk) -> None:
    """If the settings became stricter, the right number is refused."""
    request = desk.ask("203.0.113.0/24")
    desk.use(widest_ipv4=32)
    with desk.unchanged(), pytest.raises(ipguard.AddressTooBroad):
        desk.confirm(request)


# -- duplicates --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "asked"),
    [
        ("203.0.113.7", "::ffff:203.0.113.7"),
        ("203.0.113.0/29", "203.0.113.0-203.0.113.7"),
        ("2001:db8::1", "2001:DB8:0:0:0:0:0:1"),
    ],
)
def test_duplicates_in_any_notation(desk: Desk, held: str, asked: str) -> None:
    """The same addresses are a duplicate in any notation, stored or requested."""
    desk.add(held)
    with desk.unchanged(), pytest.raises(DuplicateRestriction) as caught:
        desk.ask(asked)
    assert caught.value.username == "jsmith"
    desk.ask(held, "mary")
    with desk.unchanged(), pytest.raises(DuplicateRestriction):
        desk.ask(asked, "mary", actor=ADAM)


def test_parts_and_other_users_are_not_duplicates(desk: Desk) -> None:
    desk.add("203.0.113.0/29")
    desk.ask("203.0.113.0/30")
    desk.ask("203.0.113.0/28")
    desk.ask("203.0.113.0/29", "mary")


@pytest.mark.parametrize("end", ["cancelled", "locked", "expired"])
def test_a_closed_request_is_not_a_duplicate(desk: Desk, end: str) -> None:
    request = desk.ask()
    if end == "cancelled":
        desk.flow.cancel(ALICE, request.id)
    elif end == "locked":
        desk.guess(request, times=5)
    else:
        desk.wait(hours=24)
    assert desk.ask().id != request.id


def test_a_pending_deletion_is_not_a_duplicate_of_an_addition(desk: Desk) -> None:
    """A pending deletion does not prevent a request to replace an expired restriction."""
    desk.use(confirm_deletes=True)
    restriction = desk.add(expires_at=desk.later(hours=1))
    desk.ask_to_delete(restriction)
    desk.wait(hours=2)
    assert desk.ask().kind is ipguard.RequestKind.ADD


def test_duplicates_are_checked_again_on_confirming(desk: Desk) -> None:
    """Addresses added since the request are not added twice; the number stays usable."""
    request = desk.ask()
    restriction = desk.add()
    with desk.unchanged(), pytest.raises(DuplicateRestriction):
        desk.confirm(request)
    desk.flow.lift(BOSS, restriction.id, reason="so that it is free")
    desk.confirm(request)
    assert desk.held() == [OFFICE]


def test_an_expired_restriction_is_replaced_on_confirming(desk: Desk) -> None:
    old = desk.add(expires_at=desk.later(hours=1))
    desk.wait(hours=1)
    request = desk.ask(label="again")
    assert [r.id for r in desk.store.load_policy("jsmith").restrictions] == [old.id]
    new = desk.confirm(request).restriction
    assert new is not None
    assert desk.store.load_policy("jsmith").restrictions == (new,)
    assert new.id != old.id
    assert desk.rows()[0].detail["replaces"] == old.id


# -- how many ----------------------------------------------------------------------------------


def test_restrictions_per_user_counts_expired_ones(desk: Desk) -> None:
    desk.use(restrictions_per_user=3)
    waiting = desk.ask("203.0.113.9")
    for n in range(3):
        desk.add(f"198.51.100.{n}", expires_at=desk.later(hours=1))
    desk.wait(minutes=5)
    for call in (lambda: desk.ask("203.0.113.10"), lambda: desk.confirm(waiting)):
        with desk.unchanged(), pytest.raises(TooManyRestrictions) as caught:
            call()
        assert (caught.value.username, caught.value.limit) == ("jsmith", 3)
    desk.wait(hours=1)
    with desk.unchanged(), pytest.raises(TooManyRestrictions):
        desk.ask("203.0.113.10")
    desk.confirm(desk.ask("198.51.100.0"))
    assert len(desk.held()) == 3


def test_requests_per_hour_and_exactly_how_long_to_wait(desk: Desk) -> None:
    """The next request is possible when the oldest of the last hour is an hour old."""
    desk.use(requests_per_hour=3)
    desk.ask("203.0.113.1")
    desk.wait(minutes=10)
    desk.ask("203.0.113.2")
    desk.wait(minutes=10)
    desk.ask("203.0.113.3")
    desk.wait(minutes=10)
    with desk.unchanged(), pytest.raises(TooManyRequests) as caught:
        desk.ask("203.0.113.4")
    assert caught.value.retry_after == timedelta(minutes=30)
    desk.clock.advance(caught.value.retry_after - timedelta(microseconds=1))
    with pytest.raises(TooManyRequests) as again:
        desk.ask("203.0.113.4")
    assert again.value.retry_after == timedelta(microseconds=1)
    desk.clock.advance(again.value.retry_after)
    desk.ask("203.0.113.4")
    with pytest.raises(TooManyRequests) as caught:
        desk.ask("203.0.113.5")
    assert caught.value.retry_after == timedelta(minutes=10)


def test_requests_are_counted_per_actor_in_any_state(desk: Desk) -> None:
    desk.use(requests_per_hour=2, confirm_deletes=True)
    restriction = desk.add(HOME)
    desk.flow.cancel(ALICE, desk.ask().id)
    desk.ask_to_delete(restriction)
    with pytest.raises(TooManyRequests):
        desk.ask()
    with pytest.raises(TooManyRequests):
        desk.flow.delete(ALICE, desk.add("192.0.2.77").id)
    desk.ask(actor=ADAM)


# -- the second phase --------------------------------------------------------------------------


def test_the_right_number_adds_the_restriction(desk: Desk) -> None:
    """Confirming adds the requested restriction and returns its revision."""
    request = desk.ask("203.0.113.0/29", label="office")
    desk.wait(minutes=3)
    applied = desk.confirm(request)
    (held,) = desk.store.load_policy("jsmith").restrictions
    assert applied == Applied(
        revision=desk.rows()[0].revision, restriction=held, unrestricted=False
    )
    assert held == ipguard.Restriction(
        id=held.id,
        username="jsmith",
        addresses=request.adds[0],
        label="office",
        created_at=desk.clock(),
        created_by="alice",
    )
    guard = ipguard.Guard(desk.store)
    decision = guard.check("jsmith", "203.0.113.5", at_least=applied.revision)
    assert (decision.allowed, decision.restriction_id) == (True, held.id)
    assert not guard.is_allowed("jsmith", HOME)


def test_confirming_notifies_the_requester_and_the_user(desk: Desk) -> None:
    request = desk.ask()
    desk.confirm(request)
    mail = desk.outbox.messages[-1]
    assert (mail.kind, mail.to) == (
        "change_applied",
        ("alice@firm.example", "jsmith@firm.example"),
    )
    assert mail.change == desk.rows()[0]
    assert mail.user == PEOPLE[0]


def test_a_number_is_bound_to_its_request(desk: Desk) -> None:
    """The number of one request is wrong for another of the same user and actor."""
    one, other = desk.ask(), desk.ask(HOME)
    with pytest.raises(ipguard.WrongNumber):
        desk.flow.confirm(ALICE, other.id, desk.number(one))
    desk.confirm(one)
    assert desk.held() == [OFFICE]


def test_a_number_confirms_exactly_its_request(desk: Desk) -> None:
    """If a stored request is modified, its number stops working."""
    changes = {
        "username": "mary",
        "kind": ipguard.RequestKind.REPLACE,
        "adds": (AddressRange.parse("0.0.0.0/1"),),
        "restriction_expires_at": desk.later(days=900),
        "label": "another",
    }
    for n, (field, value) in enumerate(changes.items()):
        request = desk.ask(f"203.0.113.{n}")
        with desk.store.transaction() as turn:
            stored = turn.request(request.id)
            assert stored is not None
            forged = attrs.evolve(stored, request=attrs.evolve(stored.request, **{field: value}))
            turn.save_request(forged)
            turn.append(Action.REQUEST, actor="a thief")
        with pytest.raises(ipguard.WrongNumber):
            desk.confirm(request)


def test_a_number_is_used_once(desk: Desk) -> None:
    """A confirmed request is closed to every step."""
    request = desk.ask()
    desk.confirm(request)
    desk.refuses(request, "confirmed")
    with desk.unchanged(), pytest.raises(RequestClosed):
        desk.flow.confirm(ALICE, request.id, "a guess")


def test_a_number_lives_as_long_as_the_settings_say(desk: Desk) -> None:
    """A number works to its last microsecond; afterwards nothing is counted."""
    request, late = desk.ask(), desk.ask(HOME, "mary")
    desk.clock.advance(timedelta(minutes=10) - timedelta(microseconds=1))
    desk.confirm(request)
    desk.clock.advance(timedelta(microseconds=1))
    for number in (desk.number(late), desk.wrong(late)):
        with desk.unchanged(), pytest.raises(NumberExpired):
            desk.flow.confirm(ALICE, late.id, number)
    desk.flow.resend(ALICE, late.id)
    desk.confirm(late)


def test_a_request_lives_as_long_as_the_settings_say(desk: Desk) -> None:
    """After a day a request is expired to every step and not listed."""
    request = desk.ask()
    desk.clock.advance(timedelta(hours=24) - timedelta(microseconds=1))
    desk.flow.resend(ALICE, request.id)
    desk.clock.advance(timedelta(microseconds=1))
    desk.refuses(request, "expired")
    (line,) = desk.flow.overview(ALICE, search="jsmith")
    assert line.pending == ()


def test_a_number_never_outlives_its_request(desk: Desk) -> None:
    request = desk.ask()
    desk.wait(hours=23, minutes=55)
    again = desk.flow.resend(ALICE, request.id)
    assert again.number_expires_at == again.expires_at == request.expires_at


def test_an_expiry_that_has_passed_is_refused_on_confirming(desk: Desk) -> None:
    request = desk.ask(expires_at=desk.later(minutes=5))
    desk.wait(minutes=5)
    with desk.unchanged(), pytest.raises(ipguard.InvalidValue):
        desk.confirm(request)


# -- cancelling --------------------------------------------------------------------------------


def test_anyone_who_manages_the_user_cancels(desk: Desk) -> None:
    """Other administrators can cancel; the number stops working, and no mail is sent."""
    request = desk.ask()
    mails = desk.outbox.messages
    cancelled = desk.flow.cancel(ADAM, request.id)
    assert cancelled == attrs.evolve(request, state=RequestState.CANCELLED)
    assert desk.outbox.messages == mails
    desk.refuses(request, "cancelled")


# -- keys --------------------------------------------------------------------------------------


def test_keys_rotate(desk: Desk) -> None:
    """The first key mints, all keys verify."""
    new = bytes(reversed(KEY))
    old_request = desk.ask()
    both = Workflow(desk.store, desk.outbox, key=[new, KEY])
    new_request = both.request(ALICE, "mary", HOME)
    both.confirm(ALICE, old_request.id, desk.number(old_request))
    only_new = Workflow(desk.store, desk.outbox, key=(new,))
    only_new.confirm(ALICE, new_request.id, desk.number(new_request))


def test_a_number_of_an_unknown_key_is_expired_not_wrong(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    """A server without the key logs an error, counts nothing, and can resend."""
    request = desk.ask()
    stranger = Workflow(desk.store, desk.outbox, key=bytes(32))
    for number in (desk.number(request), desk.wrong(request)):
        caplog.clear()
        with desk.unchanged(), pytest.raises(NumberExpired):
            stranger.confirm(ALICE, request.id, number)
        (record,) = (r for r in caplog.records if r.levelno == logging.ERROR)
        assert record.name.startswith("ipguard.")
        assert request.id in record.getMessage()
    assert desk.failures() == 0
    desk.wait(seconds=30)
    stranger.resend(ALICE, request.id)
    stranger.confirm(ALICE, request.id, desk.number(request))


def test_a_workflow_is_a_context_manager(desk: Desk) -> None:
    """Closing it leaves the store open, and may be repeated."""
    with desk.flow as flow:
        assert flow is desk.flow
    flow.close()
    desk.ask()


def test_servers_that_share_keys_derive_the_same(desk: Desk) -> None:
    """Derived keys depend on the purpose and the keys only; time is the store's."""
    assert desk.flow._derived_keys("forms") == desk.workflow()._derived_keys("forms")
    assert desk.flow._derived_keys("forms") != desk.flow._derived_keys("else")
    desk.wait(hours=1)
    assert desk.flow.now() == desk.clock()
