"""Where users log in from, as the workflow shows it: to whom, and what a change would refuse."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from ipguard import Action, Actor, Guard, Sighting, UnknownUser, UsernameError, Workflow
from tests.flows import ADAM, ALICE, BOSS, CAROL, HOME, KEY, OFFICE, Desk
from tests.guards import comes_true

ELSEWHERE = "192.0.2.66"
SIX = "2001:db8::7"


# -- who sees them -----------------------------------------------------------------------------


def test_sightings_are_listed_newest_first(desk: Desk) -> None:
    """By any spelling of the username."""
    first = desk.log_in(HOME)
    desk.wait(hours=1)
    second = desk.log_in(OFFICE, 2, 1)
    assert desk.flow.sightings(ALICE, "JSmith") == (second, first)
    assert desk.flow.sightings(BOSS, "jsmith") == (second, first)
    assert desk.flow.sightings(ALICE, "mary") == ()


@pytest.mark.parametrize("look", [Workflow.sightings, Workflow.suggest])
def test_sightings_of_other_accounts_do_not_exist(
    desk: Desk, look: Callable[[Workflow, Actor, str], object]
) -> None:
    desk.log_in(HOME, username="zed")
    for actor, name in ((ALICE, "zed"), (CAROL, "jsmith"), (BOSS, "nobody"), (BOSS, "no\0name")):
        with pytest.raises(UnknownUser):
            look(desk.flow, actor, name)
    assert look(desk.flow, CAROL, "zed")


def test_suggestions_follow_the_settings_and_the_restrictions(desk: Desk) -> None:
    for address in (HOME, OFFICE, SIX):
        desk.log_in(address)
    desk.log_in(ELSEWHERE, 0, 9)
    desk.add(OFFICE)
    assert [str(each) for each in desk.flow.suggest(ALICE, "jsmith")] == [HOME, "2001:db8::/64"]
    desk.use(widest_ipv6=120)
    assert str(desk.flow.suggest(ALICE, "jsmith")[1]) == "2001:db8::/120"
    for each in desk.flow.suggest(ALICE, "jsmith"):
        desk.ask(str(each))


# -- what a change would have refused ----------------------------------------------------------


def test_a_preview_shows_the_sightings_that_it_would_refuse(desk: Desk) -> None:
    home, office = desk.log_in(HOME, 3), desk.log_in(OFFICE, 5, 1)
    preview = desk.flow.preview(ALICE, "jsmith", OFFICE)
    assert preview.seen_lost == (home,)
    assert preview.lost, "everything else"
    held = desk.add(OFFICE)
    assert preview.seen_summary == "This would have refused 3 of 8 recent logins."
    assert desk.flow.preview(ALICE, "jsmith", HOME).seen_lost == ()
    assert desk.flow.preview(ALICE, "jsmith", HOME).seen_summary == ""
    assert desk.flow.preview(ALICE, "jsmith", HOME, [held.id]).seen_lost == (office,)
    assert desk.flow.preview(BOSS, "jsmith", HOME, only=True).seen_lost == (office,)


def test_a_preview_of_a_request_shows_them_as_things_are_now(desk: Desk) -> None:
    request = desk.ask(OFFICE)
    assert request.impact is not None
    assert request.impact.seen_lost == ()
    home = desk.log_in(HOME)
    assert desk.flow.preview_request(ALICE, request.id).seen_lost == (home,)


def test_a_store_without_sightings_is_no_hindrance(desk: Desk) -> None:
    """Stores written for an older protocol go on working."""

    class Old:
        def __init__(self, store: Any) -> None:
            self.now, self.snapshot = store.now, store.snapshot
            self.transaction = store.transaction

    desk.log_in(HOME)
    flow = desk.workflow(Old(desk.store))  # type: ignore[arg-type]
    preview = flow.preview(ALICE, "jsmith", OFFICE)
    assert preview == desk.flow.preview(ALICE, "jsmith", OFFICE)
    assert preview.seen_lost == ()
    assert flow.sightings(ALICE, "jsmith") == ()
    assert flow.suggest(ALICE, "jsmith") == ()


# -- refused logins ----------------------------------------------------------------------------


def test_refusals_are_those_that_would_still_be_refused(desk: Desk) -> None:
    """A user without restrictions is refused nowhere; an expired restriction allows nothing."""
    old = desk.log_in(HOME, 2, 3)
    desk.wait(hours=1)
    new = desk.log_in(ELSEWHERE, 0, 1)
    desk.log_in(OFFICE, 5)
    assert desk.flow.refusals(ALICE, "jsmith") == ()
    desk.add(OFFICE)
    found = desk.flow.refusals(ALICE, "JSmith")
    assert [(each.address, each.last_at, each.times) for each in found] == [
        (ELSEWHERE, new.last_at, 1),
        (HOME, old.last_at, 3),
    ]
    desk.add(HOME, expires_at=desk.later(hours=1))
    assert [each.address for each in desk.flow.refusals(ALICE, "jsmith")] == [ELSEWHERE]
    desk.wait(hours=1)
    assert len(desk.flow.refusals(ALICE, "jsmith")) == 2
    with pytest.raises(UnknownUser):
        desk.flow.refusals(CAROL, "jsmith")


# -- erasure -----------------------------------------------------------------------------------


def test_sightings_are_forgotten_by_operators_only(desk: Desk) -> None:
    """The audit log has the operator and how many addresses there were, but none of them."""
    desk.log_in(HOME)
    desk.log_in(OFFICE)
    for actor in (ALICE, CAROL):
        with pytest.raises(UnknownUser):
            desk.flow.forget_sightings(actor, "jsmith")
    with pytest.raises(UsernameError):
        desk.flow.forget_sightings(BOSS, "")
    assert desk.flow.forget_sightings(BOSS, "JSmith") == 2
    assert desk.flow.sightings(ALICE, "jsmith") == ()
    entry = desk.rows()[0]
    assert (entry.action, entry.username, entry.actor, entry.actor_address) == (
        Action.FORGET_SIGHTINGS,
        "jsmith",
        BOSS.username,
        BOSS.address,
    )
    assert HOME not in str(entry.detail)
    assert desk.flow.forget_sightings(BOSS, "jsmith") == 0
    assert desk.rows()[0] == entry


# -- the notice --------------------------------------------------------------------------------


def test_a_refused_login_is_told_to_its_user(desk: Desk) -> None:
    (refused,) = desk.store.record_sightings([desk.log_in(HOME, 0, 0), refusal(desk)])
    desk.flow.tell_refused(refused)
    (mail,) = desk.outbox.messages
    assert (mail.kind, mail.to) == ("login_refused", ("jsmith@firm.example",))
    assert mail.sighting == refused
    assert mail.user is not None
    assert mail.user.username == "jsmith"


def refusal(desk: Desk, address: str = ELSEWHERE, username: str = "jsmith") -> Sighting:
    now = desk.clock()
    return Sighting(username=username, address=address, first_at=now, last_at=now, refused=1)


def test_a_guard_and_a_workflow_mail_the_user_together(desk: Desk) -> None:
    """A login that is refused on a server ends in a mail; one that is allowed does not."""
    desk.add(OFFICE)
    desk.outbox.clear()
    with Guard(desk.store, monotonic=desk.clock.monotonic) as guard:
        guard.follow_refusals(desk.flow.tell_refused)
        for address in (OFFICE, ELSEWHERE):
            guard.saw("JSmith", address, guard.check("JSmith", address))
        comes_true(lambda: desk.outbox.messages)
    (mail,) = desk.outbox.messages
    assert mail.sighting is not None
    assert (mail.to, mail.sighting.address) == (("jsmith@firm.example",), ELSEWHERE)
    assert [each.address for each in desk.flow.refusals(ALICE, "jsmith")] == [ELSEWHERE]


def test_users_that_cannot_be_reached_get_no_notice(desk: Desk) -> None:
    """Users without an e-mail address, removed ones and unknown ones."""
    desk.store.remove_users(["jsmith"])
    for name in ("mary", "jsmith", "nobody"):
        desk.flow.tell_refused(refusal(desk, username=name))
    assert desk.outbox.messages == ()
    assert desk.flow.notices_failed == 0


def test_notices_about_many_addresses_are_limited(desk: Desk) -> None:
    for n in range(1, 13):
        for each in desk.store.record_sightings([refusal(desk, f"203.0.113.{n}")]):
            desk.flow.tell_refused(each)
    assert len(desk.outbox.messages) == 10
    desk.clock.advance(timedelta(days=1))
    for each in desk.store.record_sightings([refusal(desk, "203.0.113.1")]):
        desk.flow.tell_refused(each)
    assert len(desk.outbox.messages) == 11


def test_many_addresses_at_once_do_not_prevent_all_notices(desk: Desk) -> None:
    """A flood from many addresses ends in one mail a day, not in none."""
    every = [refusal(desk, f"203.0.113.{n}") for n in range(1, 33)]
    for days in (1, 2):
        for each in desk.store.record_sightings(every):
            desk.flow.tell_refused(each)
        assert len(desk.outbox.messages) == days
        desk.clock.advance(timedelta(days=1))
        every = [refusal(desk, f"203.0.113.{n}") for n in range(100, 132)]


def test_few_users_are_remembered_as_told(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a user who is forgotten, one mail more is sent."""
    monkeypatch.setattr("ipguard.workflow._TOLD_REMEMBERED", 1)
    every = [refusal(desk, f"203.0.113.{n}") for n in range(1, 33)]
    first, second, *_ = desk.store.record_sightings(every)
    for each in (first, refusal(desk, username="zed"), second):
        desk.flow.tell_refused(each)
    assert len(desk.outbox.messages) == 3


def test_a_notice_that_fails_is_logged_and_counted(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is raised, whether the mail or the store fails."""
    desk.outbox.fail = True
    with caplog.at_level(logging.ERROR, "ipguard.workflow"):
        desk.flow.tell_refused(refusal(desk))
    desk.outbox.fail = False
    desk.store.close()
    with caplog.at_level(logging.ERROR, "ipguard.workflow"):
        desk.flow.tell_refused(refusal(desk))
    assert desk.flow.notices_failed == len(caplog.records) == 2
    assert desk.outbox.messages == ()


def test_a_notifier_without_the_method_sends_none(desk: Desk) -> None:
    """Notifiers that hosts wrote earlier go on working."""

    class Earlier:
        number_issued = change_applied = None

    flow = Workflow(desk.store, Earlier(), key=KEY)  # type: ignore[arg-type]
    flow.tell_refused(refusal(desk))
    assert flow.notices_failed == 0


def test_the_user_of_another_account_is_told_as_well(desk: Desk) -> None:
    """The notice belongs to the user, whoever manages it."""
    desk.flow.tell_refused(refusal(desk, username="zed"))
    assert desk.outbox.messages[0].to == ("zed@other.example",)
    assert ADAM.manages == ALICE.manages
