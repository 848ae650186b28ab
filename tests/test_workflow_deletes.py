"""Deleting: at once, or by a number where the settings ask for one."""

from __future__ import annotations

from datetime import timedelta

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
    User,
)
from tests.flows import ADAM, ALICE, BOSS, CAROL, HOME, JSMITH, OFFICE, Desk


def test_deletes_need_no_number_by_default(desk: Desk) -> None:
    """As on the original page: it holds at once, and both are told."""
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


def test_deleting_the_last_opens_the_user_and_says_so(desk: Desk) -> None:
    """`unrestricted` is True, on the trail as well, and the guard lets anybody in."""
    applied = desk.delete(desk.add())
    assert applied.unrestricted is True
    assert desk.rows()[0].detail["unrestricted"] == "true"
    guard = ipguard.Guard(desk.store)
    assert guard.check("jsmith", HOME, at_least=applied.revision).reason == "unrestricted"


@pytest.mark.parametrize("how", ["delete", "lift", "confirm"])
def test_who_does_not_accept_an_opening_leaves_the_last(desk: Desk, how: str) -> None:
    """One of two goes, the last stays, with nothing written; accepted, it goes as well."""
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
        for _ in range(7):  # more often than a number may be guessed: none of them is a guess
            with desk.unchanged(), pytest.raises(OpeningRisk):
                desk.confirm(request, allow_opening=False)
        assert desk.confirm(request, allow_opening=True).unrestricted is True
        return
    with desk.unchanged(), pytest.raises(OpeningRisk) as refused:
        end(second, allow_opening=False)
    assert refused.value.username == "jsmith"
    assert desk.held() == [HOME]
    assert end(second, allow_opening=True).unrestricted is True


def test_a_deletion_by_number_is_asked_for_whatever_it_opens(desk: Desk) -> None:
    """A request opens nobody: where the last needs a number, that is still what `delete` makes."""
    desk.use(confirm_deletes="last")
    outcome = desk.flow.delete(ALICE, desk.add(OFFICE).id, allow_opening=False)
    assert isinstance(outcome, ipguard.PendingRequest)
    assert desk.held() == [OFFICE]


def test_an_expired_restriction_counts_for_unrestricted(desk: Desk) -> None:
    """Left with one that has expired, the user is restricted to nothing, and the trail says so."""
    desk.add(HOME, expires_at=desk.later(hours=1))
    office = desk.add()
    desk.wait(hours=1)
    applied = desk.delete(office)
    assert applied.unrestricted is False
    assert desk.rows()[0].detail["restricted_to_nothing"] == "true"
    guard = ipguard.Guard(desk.store)
    assert not guard.check("jsmith", HOME, at_least=applied.revision)


def test_deleting_the_expired_one_opens_the_user(desk: Desk) -> None:
    """Time never lifts a restriction; a person's act does."""
    expired = desk.add(expires_at=desk.later(hours=1))
    desk.wait(hours=1)
    assert desk.delete(expired).unrestricted is True


def test_what_is_gone_is_unknown(desk: Desk) -> None:
    """Deleting twice, or what never was, or another account's: no such restriction."""
    gone, zeds = desk.add(), desk.add(HOME, "zed")
    desk.delete(gone)
    for restriction_id in (gone.id, zeds.id, "0" * 16, "", "\ud800"):
        with desk.unchanged(), pytest.raises(UnknownRestriction):
            desk.flow.delete(ALICE, restriction_id)


@pytest.mark.parametrize("setting", ["last", True])
def test_the_last_one_needs_a_number(desk: Desk, setting) -> None:
    """Nothing changes until the number comes back; the request shows what it is about."""
    desk.use(confirm_deletes=setting)
    restriction = desk.add(label="office")
    request = desk.ask_to_delete(restriction, reason="moved out")
    assert (request.kind, request.addresses, request.label, request.restriction_id) == (
        RequestKind.DELETE,
        restriction.addresses,
        "office",
        restriction.id,
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


def test_last_means_the_last(desk: Desk) -> None:
    """With two, the first goes at once and the other needs a number; expired ones are counted."""
    desk.use(confirm_deletes="last")
    office, home = desk.add(), desk.add(HOME, expires_at=desk.later(hours=1))
    desk.wait(hours=2)
    assert desk.delete(office).unrestricted is False
    desk.ask_to_delete(home)


def test_always_means_always(desk: Desk) -> None:
    """`True` asks for a number whatever is left."""
    desk.use(confirm_deletes=True)
    office, _ = desk.add(), desk.add(HOME)
    assert desk.confirm(desk.ask_to_delete(office)).unrestricted is False


def test_the_settings_of_now_decide(desk: Desk) -> None:
    """A number that was asked for goes on working where deletes need none any more."""
    desk.use(confirm_deletes=True)
    request = desk.ask_to_delete(desk.add())
    desk.use()
    assert desk.confirm(request).unrestricted is True


def test_a_deletion_is_asked_for_once(desk: Desk) -> None:
    """Whoever asks again while it is pending is told; after it is cancelled, it can be asked."""
    desk.use(confirm_deletes=True)
    restriction = desk.add()
    request = desk.ask_to_delete(restriction)
    for actor in (ALICE, ADAM, BOSS):
        with desk.unchanged(), pytest.raises(DuplicateRestriction):
            desk.flow.delete(actor, restriction.id)
    desk.ask_to_delete(desk.add(HOME))
    desk.flow.cancel(ADAM, request.id)
    desk.ask_to_delete(restriction)


def test_deleting_at_once_cancels_pending_deletions(desk: Desk) -> None:
    """The restriction is gone, so its number has nothing to do; requests to add stay."""
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


def test_an_old_deletion_that_expired_is_left_as_it_is(desk: Desk) -> None:
    """What has expired is not cancelled any more."""
    desk.use(confirm_deletes=True)
    restriction = desk.add()
    request = desk.ask_to_delete(restriction)
    desk.wait(hours=24)
    desk.flow.lift(BOSS, restriction.id, reason="now")
    with pytest.raises(RequestClosed) as caught:
        desk.confirm(request)
    assert caught.value.state == "expired"


def test_replacing_an_expired_restriction_cancels_its_deletion(desk: Desk) -> None:
    """The old one is gone; the new one, to the same addresses, can be deleted anew."""
    desk.use(confirm_deletes=True)
    old = desk.add(expires_at=desk.later(hours=1))
    desk.wait(hours=1)
    stale = desk.ask_to_delete(old)
    new = desk.confirm(desk.ask()).restriction
    assert new is not None
    with pytest.raises(RequestClosed) as caught:
        desk.confirm(stale)
    assert caught.value.state == "cancelled"
    desk.confirm(desk.ask_to_delete(new))


def test_a_bulk_replacement_leaves_no_deletion_in_the_way(desk: Desk) -> None:
    """The request to delete the expired one is cancelled; the new one can be deleted."""
    desk.use(confirm_deletes=True)
    old = desk.add(expires_at=desk.later(hours=1))
    desk.wait(hours=1)
    stale = desk.ask_to_delete(old)
    desk.flow.impose_many(BOSS, [("jsmith", OFFICE)], reason="anew")
    with desk.unchanged(), pytest.raises(RequestClosed):
        desk.confirm(stale)
    (new,) = desk.store.load_policy("jsmith").restrictions
    desk.confirm(desk.ask_to_delete(new))


def test_a_deletion_is_judged_again_on_confirming(desk: Desk) -> None:
    """The user changed hands meanwhile: the number deletes nothing."""
    desk.use(confirm_deletes=True)
    request = desk.ask_to_delete(desk.add())
    desk.store.put_users([User(username="jsmith", full_name="J", account_id="U2")])
    with desk.unchanged(), pytest.raises(ipguard.UnknownRequest):
        desk.confirm(request)


def test_a_removed_users_restrictions_are_for_actors_of_every_account(desk: Desk) -> None:
    """They go on holding; who manages the old account alone does not see them, the boss deletes."""
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
    assert desk.flow.lift(BOSS, other.id, reason="he left").unrestricted
    assert desk.flow.overview(BOSS, search="jsmith").items == ()


def test_a_removed_users_restriction_is_deleted_by_number(desk: Desk) -> None:
    """Where deletes need a number, the boss gets one for a removed user as well."""
    desk.use(confirm_deletes=True)
    restriction = desk.add()
    desk.store.remove_users(["jsmith"])
    request = desk.ask_to_delete(restriction, BOSS)
    desk.wait(minutes=1)
    desk.flow.resend(BOSS, request.id)
    assert desk.confirm(request, BOSS).unrestricted


def test_the_name_registered_again_inherits_its_restrictions(desk: Desk) -> None:
    """Removing a user and registering it again opens no door."""
    restriction = desk.add()
    desk.store.remove_users(["jsmith"])
    desk.store.put_users([JSMITH])
    assert desk.held() == [OFFICE]
    desk.delete(restriction)


def test_a_removed_user_gets_no_new_restriction(desk: Desk) -> None:
    """A restriction needs a registered user, whoever asks."""
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


def test_a_deletion_waits_as_long_as_any_request(desk: Desk) -> None:
    """Its number and the request itself expire like those of an addition."""
    desk.use(confirm_deletes=True, number_lifetime=timedelta(minutes=1))
    request = desk.ask_to_delete(desk.add())
    desk.wait(minutes=1)
    with desk.unchanged(), pytest.raises(ipguard.NumberExpired):
        desk.confirm(request)
    desk.confirm(desk.flow.resend(ALICE, request.id))
