"""Deletions: at once, or by a number if the settings say so."""

from __future__ import annotations

import pytest

import ipguard
from ipguard import (
    Action,
    Applied,
    DuplicateRestriction,
    OpeningRisk,
    RequestClosed,
    RequestKind,
    RequestState,
    UnknownRestriction,
)
from tests.flows import ADAM, ALICE, BOSS, CAROL, HOME, JSMITH, OFFICE, Desk


def test_deletes_need_no_number_by_default(desk: Desk) -> None:
    """By default a deletion holds at once, and both get a notice."""
    office, home = desk.add(OFFICE), desk.add(HOME)
    applied = desk.flow.delete(ALICE, office.id, "moved out")
    assert applied == Applied(
        revision=desk.rows()[0].revision, restriction=office, unrestricted=False
    )
    assert desk.held() == [HOME]
    mail = desk.outbox.messages[-1]
    assert (mail.kind, mail.to) == (
        "change_applied",
        ("alice@firm.example", "jsmith@firm.example"),
    )
    assert mail.change == desk.rows()[0]
    assert desk.rows()[0].detail["reason"] == "moved out"
    assert desk.delete(home).unrestricted


@pytest.mark.parametrize("how", ["delete", "lift", "confirm"])
def test_allow_opening(desk: Desk, how: str) -> None:
    """Without `allow_opening` the last restriction stays; with it, it is deleted."""
    if how == "confirm":
        desk.use(confirm_deletes=True)

    def end(restriction: ipguard.Restriction, **more: bool) -> Applied:
        if how == "lift":
            return desk.flow.lift(BOSS, restriction.id, reason="x", **more)
        outcome = desk.flow.delete(ALICE, restriction.id, **({} if how == "confirm" else more))
        if isinstance(outcome, Applied):
            return outcome
        return desk.confirm(outcome, **more)

    first, second = desk.add(OFFICE), desk.add(HOME)
    assert end(first, allow_opening=False).unrestricted is False
    if how == "confirm":
        request = desk.ask_to_delete(second)
        for _ in range(7):  # more than the attempts: they are not counted
            with desk.unchanged(), pytest.raises(OpeningRisk):
                desk.confirm(request, allow_opening=False)
        assert desk.confirm(request, allow_opening=True).unrestricted is True
        return
    with desk.unchanged(), pytest.raises(OpeningRisk) as refused:
        end(second, allow_opening=False)
    assert refused.value.username == "jsmith"
    assert desk.held() == [HOME]
    assert end(second, allow_opening=True).unrestricted is True


def test_a_request_to_delete_does_not_need_allow_opening(desk: Desk) -> None:
    desk.use(confirm_deletes="last")
    outcome = desk.flow.delete(ALICE, desk.add(OFFICE).id, allow_opening=False)
    assert isinstance(outcome, ipguard.PendingRequest)
    assert desk.held() == [OFFICE]


def test_an_expired_restriction_counts_for_unrestricted(desk: Desk) -> None:
    """A user with only expired restrictions left is restricted, and the audit log says so."""
    desk.add(HOME, expires_at=desk.later(hours=1))
    office = desk.add()
    desk.wait(hours=1)
    applied = desk.delete(office)
    assert applied.unrestricted is False
    assert desk.rows()[0].detail["restricted_to_nothing"] == "true"


@pytest.mark.parametrize("setting", ["last", True])
def test_the_last_one_needs_a_number(desk: Desk, setting) -> None:
    """Nothing changes until the number is confirmed; the request shows the restriction."""
    desk.use(confirm_deletes=setting)
    restriction = desk.add(label="office")
    request = desk.ask_to_delete(restriction, reason="moved out")
    assert (request.kind, request.adds, request.removed, request.label, request.removes) == (
        RequestKind.DELETE,
        (),
        (restriction.addresses,),
        "office",
        (restriction.id,),
    )
    assert request.reason == "moved out"
    assert desk.held() == [OFFICE]
    assert desk.outbox.messages[-1].kind == "number_issued"
    assert desk.guess(request) == [4]
    applied = desk.confirm(request)
    assert applied == Applied(
        revision=desk.rows()[0].revision, restriction=restriction, unrestricted=True
    )
    row = desk.rows()[0]
    assert row.action is Action.CONFIRM
    assert (
        row.detail.items()
        >= {
            "kind": "delete",
            "reason": "moved out",
            "unrestricted": "true",
            "request": request.id,
        }.items()
    )
    assert desk.held() == []


def test_the_setting_last(desk: Desk) -> None:
    """With `last`, only the last restriction needs a number; expired ones count."""
    desk.use(confirm_deletes="last")
    office, home = desk.add(), desk.add(HOME, expires_at=desk.later(hours=1))
    desk.wait(hours=2)
    assert desk.delete(office).unrestricted is False
    desk.ask_to_delete(home)


def test_the_present_settings_decide(desk: Desk) -> None:
    """A pending deletion can be confirmed after deletions stopped needing numbers."""
    desk.use(confirm_deletes=True)
    request = desk.ask_to_delete(desk.add())
    desk.use()
    assert desk.confirm(request).unrestricted is True


def test_a_deletion_is_requested_once(desk: Desk) -> None:
    """A second request is a duplicate while the first is pending."""
    desk.use(confirm_deletes=True)
    restriction = desk.add()
    request = desk.ask_to_delete(restriction)
    for actor in (ALICE, ADAM, BOSS):
        with desk.unchanged(), pytest.raises(DuplicateRestriction) as caught:
            desk.flow.delete(actor, restriction.id)
        assert str(caught.value) == f"a request to delete {OFFICE} of jsmith is already pending"
    desk.ask_to_delete(desk.add(HOME))
    desk.flow.cancel(ADAM, request.id)
    desk.ask_to_delete(restriction)


def test_deleting_at_once_cancels_pending_deletions(desk: Desk) -> None:
    desk.use(confirm_deletes=True)
    restriction, other = desk.add(), desk.add(HOME)
    request, kept, added = (
        desk.ask_to_delete(restriction),
        desk.ask_to_delete(other),
        desk.ask("203.0.113.99"),
    )
    desk.flow.lift(BOSS, restriction.id, reason="now")
    assert desk.request(request).state is RequestState.CANCELLED
    with desk.unchanged(), pytest.raises(RequestClosed) as caught:
        desk.confirm(request)
    assert caught.value.state == "cancelled"
    desk.confirm(added)
    desk.confirm(kept)
    assert desk.held() == ["203.0.113.99"]


def test_an_expired_deletion_is_not_cancelled(desk: Desk) -> None:
    desk.use(confirm_deletes=True)
    restriction = desk.add()
    request = desk.ask_to_delete(restriction)
    desk.wait(hours=24)
    desk.flow.lift(BOSS, restriction.id, reason="now")
    with pytest.raises(RequestClosed) as caught:
        desk.confirm(request)
    assert caught.value.state == "expired"


def test_a_removed_users_restrictions_are_for_actors_of_every_account(desk: Desk) -> None:
    """The restrictions still hold; only actors of every account can see and delete them."""
    restriction, other = desk.add(), desk.add(HOME)
    desk.store.remove_users(["jsmith"])
    assert sorted(desk.held()) == sorted([OFFICE, HOME])
    for actor in (ALICE, CAROL):
        with desk.unchanged(), pytest.raises(UnknownRestriction):
            desk.flow.delete(actor, restriction.id)
        assert desk.flow.overview(actor, search="jsmith").items == ()
    (line,) = desk.flow.overview(BOSS, search="jsmith")
    assert line.removed
    assert set(line.restrictions) == {restriction, other}
    desk.delete(restriction, BOSS)
    assert desk.flow.lift(BOSS, other.id, reason="left").unrestricted
    assert desk.flow.overview(BOSS, search="jsmith").items == ()


def test_a_removed_users_restriction_is_deleted_by_number(desk: Desk) -> None:
    desk.use(confirm_deletes=True)
    restriction = desk.add()
    desk.store.remove_users(["jsmith"])
    request = desk.ask_to_delete(restriction, BOSS)
    desk.wait(minutes=1)
    desk.flow.resend(BOSS, request.id)
    assert desk.confirm(request, BOSS).unrestricted


def test_the_name_registered_again_inherits_its_restrictions(desk: Desk) -> None:
    restriction = desk.add()
    desk.store.remove_users(["jsmith"])
    desk.store.put_users([JSMITH])
    assert desk.held() == [OFFICE]
    desk.delete(restriction)


def test_a_removed_user_gets_no_new_restriction(desk: Desk) -> None:
    desk.add()
    desk.store.remove_users(["jsmith"])
    for call in (
        lambda: desk.ask(HOME),
        lambda: desk.ask(HOME, actor=BOSS),
        lambda: desk.add(HOME),
        lambda: desk.flow.impose_many(BOSS, [("jsmith", HOME)], reason="x"),
    ):
        with desk.unchanged(), pytest.raises(ipguard.UnknownUser):
            call()
