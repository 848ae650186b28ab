"""What a request has to meet: numbers, approvals and a wait; and what none of them allows."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import attrs
import pytest

from ipguard import (
    Action,
    Actor,
    Applied,
    Demand,
    Direction,
    NotAnApprover,
    NumberExpired,
    PendingRequest,
    RequestClosed,
    TooManyAttempts,
    TooSoon,
    UnknownRequest,
    User,
    WrongNumber,
)
from ipguard.addresses import AddressRange
from ipguard.model import Approval, RequestKind
from ipguard.rules import subject_digest
from tests.flows import ADAM, ALICE, BOSS, CAROL, HOME, JSMITH, OFFICE, Desk
from tests.test_workflow_changes import forge, many

HOUR = timedelta(hours=1)
BOTH = Actor(username="both", email="both@bank.example", manages=frozenset({"U1", "U2"}))
EVE = Actor(username="eve", email="eve@firm.example", manages=frozenset({"U1"}))
JOHN = Actor(username="jsmith", email="john@firm.example", manages=frozenset({"U1"}))
UNMANAGING = Actor(username="jsmith", email="jsmith@firm.example", manages=frozenset())


def alias(actor: Actor, **fields: Any) -> Actor:
    """Return another account of the same person."""
    return attrs.evolve(actor, **{"username": "other", **fields})


def pending(found: object) -> PendingRequest:
    assert isinstance(found, PendingRequest), found
    return found


def done(found: object) -> Applied:
    assert isinstance(found, Applied), found
    return found


# -- approvals ---------------------------------------------------------------------------------


def test_an_approval_completes(desk: Desk) -> None:
    """Without a number, no mail with one is sent, and the approval is the act that completes."""
    desk.use(add=Demand(approvals=1))
    request = desk.ask()
    assert (request.approved_by, request.numbered) == ((), False)
    assert not [m for m in desk.outbox.messages if m.number]
    assert pending(desk.flow.confirm(ALICE, request.id)).state == "pending"
    applied = done(desk.flow.approve(ADAM, request.id))
    assert applied.restriction is not None
    assert applied.restriction.created_by == "alice"
    confirm, approve = desk.rows()[:2]
    assert (confirm.action, confirm.actor, confirm.detail["requested_by"]) == (
        Action.CONFIRM,
        "adam",
        "alice",
    )
    assert (approve.action, approve.actor) == (Action.APPROVE, "adam")
    assert desk.held() == [OFFICE]
    with desk.unchanged(), pytest.raises(RequestClosed):
        desk.flow.approve(ADAM, request.id)


@pytest.mark.parametrize("first", ["number", "approval"])
def test_a_number_and_an_approval_in_either_order(desk: Desk, first: str) -> None:
    desk.use(add=Demand(number=True, approvals=1))
    request = desk.ask()

    def number() -> object:
        return desk.flow.confirm(ALICE, request.id, desk.number(request))

    def approval() -> object:
        return desk.flow.approve(ADAM, request.id)

    one, other = (number, approval) if first == "number" else (approval, number)
    between = pending(one())
    assert (between.numbered, between.approved_by) == (
        (True, ()) if first == "number" else (False, ("adam",))
    )
    assert desk.held() == []
    done(other())
    assert desk.held() == [OFFICE]


def test_the_number_is_needed_with_every_approval(desk: Desk) -> None:
    desk.use(add=Demand(number=True, approvals=1))
    request = desk.ask()
    pending(desk.flow.approve(ADAM, request.id))
    with pytest.raises(WrongNumber):
        desk.flow.confirm(ALICE, request.id, desk.wrong(request))
    pending(desk.flow.approve(BOSS, request.id))
    assert desk.held() == []


def test_an_accepted_number_is_accepted_once(desk: Desk) -> None:
    """After it nothing is asked for, nor mailed, nor counted, and no success is counted again."""
    desk.use(add=Demand(number=True, approvals=1))
    request = desk.ask()
    pending(desk.flow.confirm(ALICE, request.id, desk.number(request)))
    assert desk.rows()[0].action is Action.NUMBER_ACCEPTED
    with desk.unchanged():
        assert pending(desk.flow.confirm(ALICE, request.id, "junk")).numbered
        assert desk.flow.resend(ALICE, request.id).numbered


def test_only_a_right_number_ends_a_row_of_failures(desk: Desk) -> None:
    """Neither an approval does, nor a call that completes a request whose number was given."""
    desk.use(add=Demand(number=True, approvals=1))
    request, other, third = desk.ask(), desk.ask(HOME, "mary"), desk.ask(HOME, actor=ADAM)
    pending(desk.flow.approve(ADAM, request.id))
    desk.store.put_users([attrs.evolve(JSMITH, account_id="U2")])
    both = attrs.evolve(ALICE, manages=frozenset({"U1", "U2"}))
    assert pending(desk.flow.confirm(both, request.id, desk.number(request))).numbered
    desk.guess(other, times=2)
    # The approval counts again once the user is back.
    desk.store.put_users([JSMITH])
    done(desk.flow.confirm(ALICE, request.id, "junk"))
    assert desk.failures() == 2
    desk.flow.cancel(ADAM, third.id)
    pending(desk.flow.confirm(ALICE, other.id, desk.number(other)))
    fourth = desk.ask(OFFICE, "alice", actor=ADAM)
    desk.guess(fourth, actor=ADAM, times=2)
    done(desk.flow.approve(ADAM, other.id))
    assert desk.failures(ADAM) == 2


def test_nobody_has_two_roles(desk: Desk) -> None:
    """The requester approves by no account, and each approver counts once."""
    desk.use(add=Demand(approvals=2))
    request = desk.ask()
    shouting = ALICE.email.upper()
    for actor, reason in (
        (ALICE, "you made it"),
        (attrs.evolve(ALICE, email="new@firm.example"), "you made it"),
        (alias(ALICE), "its requester"),
        (alias(ALICE, email=shouting), "its requester"),
        (alias(ALICE, email=shouting, manages=Actor.EVERY_ACCOUNT), "its requester"),
    ):
        with desk.unchanged(), pytest.raises(NotAnApprover, match=reason):
            desk.flow.approve(actor, request.id)
    pending(desk.flow.approve(ADAM, request.id))
    with desk.unchanged():
        assert pending(desk.flow.approve(ADAM, request.id)).approved_by == ("adam",)
    moved = attrs.evolve(ADAM, email="adam@new.example")
    assert pending(desk.flow.approve(moved, request.id)).approved_by == ("adam",)
    for email in ("adam@new.example", "ADAM@new.EXAMPLE"):
        with desk.unchanged(), pytest.raises(NotAnApprover, match="somebody with your e-mail"):
            desk.flow.approve(alias(ADAM, email=email), request.id)
    assert desk.held() == []
    done(desk.flow.approve(EVE, request.id))


def test_who_may_approve(desk: Desk) -> None:
    desk.use(add=Demand(approvals=1))
    request = desk.ask()
    for actor in (CAROL, alias(CAROL, manages=frozenset())):
        for call in (desk.flow.approve, desk.flow.cancel):
            with desk.unchanged(), pytest.raises(UnknownRequest):
                call(actor, request.id)
    for bad in ("none", None, b"x"):
        with desk.unchanged(), pytest.raises(UnknownRequest):
            desk.flow.approve(ADAM, bad)  # type: ignore[arg-type]
    desk.use()
    plain = desk.ask(HOME, "mary")
    with desk.unchanged(), pytest.raises(NotAnApprover, match="no approval"):
        desk.flow.approve(ADAM, plain.id)


@pytest.mark.parametrize(
    "actor",
    [JOHN, alias(JOHN, email="jsmith@firm.example"), alias(JOHN, email="JSmith@Firm.Example")],
)
def test_the_user_concerned_is_not_the_only_approver(desk: Desk, actor: Actor) -> None:
    """By no account of theirs; with others, the user counts as others do."""
    desk.use(add=Demand(approvals=1))
    request = desk.ask()
    with desk.unchanged(), pytest.raises(NotAnApprover, match="concerns you"):
        desk.flow.approve(actor, request.id)
    desk.flow.cancel(ALICE, request.id)
    desk.use(add=Demand(approvals=2))
    request = desk.ask()
    pending(desk.flow.approve(actor, request.id))
    done(desk.flow.approve(ADAM, request.id))


def test_one_approval_of_the_user_concerned_is_none(desk: Desk) -> None:
    """If settings were laxer later, the frozen demand counts; the user alone never does."""
    desk.use(add=Demand(approvals=2))
    request = desk.ask()
    pending(desk.flow.approve(JOHN, request.id))
    forge(desk, request, demand=Demand(approvals=1))
    desk.use(add=Demand(approvals=1))
    stored = desk.request(request)
    forge(desk, request, approvals=(self_made(stored, JOHN),))
    assert pending(desk.flow.confirm(ALICE, request.id)).state == "pending"
    assert desk.held() == []


def self_made(request: PendingRequest, actor: Actor, **fields: Any) -> Approval:
    """Return an approval as a forger would write it."""
    given = {
        "username": actor.username,
        "email": actor.email,
        "account_id": "U1",
        "subject": subject_digest(request),
    }
    return Approval(**given | fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("forged", "counts"),
    [
        ({}, True),
        ({"account_id": None}, True),
        ({"account_id": "U2"}, False),
        ({"subject": "another"}, False),
        ({"username": "alice"}, False),
        ({"email": "Alice@Firm.Example"}, False),
        ({"username": "jsmith"}, False),
        ({"email": "JSmith@firm.example"}, False),
    ],
)
def test_approvals_are_judged_at_completion(
    desk: Desk, forged: dict[str, Any], counts: bool
) -> None:
    """Not only when they are given: whatever an approval in the store says, it is judged again."""
    desk.use(add=Demand(approvals=1))
    request = desk.ask()
    forge(desk, request, approvals=(self_made(request, ADAM, **forged),))
    found = desk.flow.confirm(ALICE, request.id)
    assert isinstance(found, Applied) is counts
    assert desk.held() == ([OFFICE] if counts else [])


def test_one_address_is_one_approver_at_completion(desk: Desk) -> None:
    desk.use(add=Demand(approvals=2))
    request = desk.ask()
    twice = [
        self_made(request, ADAM),
        self_made(request, ADAM, username="other", email=ADAM.email.upper()),
    ]
    forge(desk, request, approvals=tuple(twice))
    pending(desk.flow.confirm(ALICE, request.id))
    again = self_made(request, ADAM, email="adam@new.example")
    forge(desk, request, approvals=(twice[0], again))
    pending(desk.flow.confirm(ALICE, request.id))
    forge(desk, request, approvals=(twice[0], self_made(request, EVE)))
    done(desk.flow.confirm(ALICE, request.id))


@pytest.mark.parametrize(
    "changed",
    [
        {"adds": (AddressRange.parse("0.0.0.0/1"),)},
        {"label": "other"},
        {"restriction_expires_at": None},
        {"removes": (), "removed": (), "kind": RequestKind.ADD},
    ],
)
def test_an_approval_does_not_survive_a_changed_request(
    desk: Desk, changed: dict[str, Any]
) -> None:
    """The approver has to approve what the request is now, and can."""
    old = desk.add(OFFICE)
    desk.use(add=Demand(approvals=2), widest_ipv4=0)
    request = desk.ask(HOME, replaces=[old.id], label="new", expires_at=desk.later(hours=9))
    pending(desk.flow.approve(ADAM, request.id))
    forge(desk, request, **changed)
    pending(desk.flow.approve(EVE, request.id))
    assert desk.held() == [OFFICE]
    done(desk.flow.approve(ADAM, request.id))
    assert desk.held() != [OFFICE]


def test_an_approval_is_for_the_account_at_that_time(desk: Desk) -> None:
    """After a move, an approver of the present account is needed; who manages both may renew."""
    desk.use(add=Demand(approvals=1, number=True))
    request = desk.ask(actor=BOTH)
    pending(desk.flow.approve(attrs.evolve(EVE, manages=frozenset({"U1", "U2"})), request.id))
    desk.store.put_users([attrs.evolve(JSMITH, account_id="U2")])
    assert pending(desk.flow.confirm(BOTH, request.id, desk.number(request))).numbered
    with desk.unchanged(), pytest.raises(UnknownRequest):
        desk.flow.approve(EVE, request.id)
    applied = done(
        desk.flow.approve(attrs.evolve(EVE, manages=frozenset({"U1", "U2"})), request.id)
    )
    assert applied.added[0].username == "jsmith"


def test_an_operators_approval_survives_a_move(desk: Desk) -> None:
    desk.use(add=Demand(approvals=1, number=True))
    request = desk.ask(actor=BOTH)
    pending(desk.flow.approve(BOSS, request.id))
    desk.store.put_users([attrs.evolve(JSMITH, account_id="U2")])
    done(desk.flow.confirm(BOTH, request.id, desk.number(request)))


def test_removing_and_renaming_close_a_request(desk: Desk) -> None:
    desk.use(add=Demand(approvals=1))
    first, second = desk.ask(), desk.ask(HOME, "mary")
    desk.store.remove_users(["jsmith"])
    desk.store.rename_user("mary", "maria")
    with desk.unchanged(), pytest.raises(UnknownRequest):
        desk.flow.approve(ADAM, first.id)
    for request in (first, second):
        for actor in (BOSS, ADAM) if request is second else (BOSS,):
            with desk.unchanged(), pytest.raises((RequestClosed, UnknownRequest)):
                desk.flow.approve(actor, request.id)
    desk.store.put_users([JSMITH])
    with desk.unchanged(), pytest.raises(RequestClosed):
        desk.flow.approve(ADAM, first.id)


# -- waiting -----------------------------------------------------------------------------------


def test_a_wait(desk: Desk) -> None:
    """No number before; TooSoon counts nothing; then `resend` mails the first number."""
    desk.use(add=Demand(number=True, wait=HOUR), resends_per_request=1)
    request = desk.ask()
    assert request.ready_at == desk.later(hours=1)
    assert request.expires_at == desk.later(hours=25)
    desk.wait(minutes=59, seconds=59)
    for call in (
        lambda: desk.flow.confirm(ALICE, request.id, "12345-67890"),
        lambda: desk.flow.confirm(ALICE, request.id),
        lambda: desk.flow.resend(ALICE, request.id),
    ):
        with desk.unchanged(), pytest.raises(TooSoon) as caught:
            call()
        assert caught.value.ready_at == request.ready_at
    assert desk.failures() == 0
    desk.wait(seconds=1)
    with desk.unchanged(), pytest.raises(NumberExpired):
        desk.flow.confirm(ALICE, request.id, "12345-67890")
    assert desk.flow.resend(ALICE, request.id).attempts_left == 5
    desk.wait(seconds=30)
    desk.flow.resend(ALICE, request.id)  # the first number was not a resend
    desk.confirm(request)
    assert desk.held() == [OFFICE]


def test_time_completes_nothing(desk: Desk) -> None:
    """When the wait is over the request still needs an act, by its requester."""
    desk.use(add=Demand(wait=HOUR))
    request = desk.ask()
    desk.wait(hours=2)
    with desk.unchanged():
        assert desk.held() == []
        assert desk.flow.user(ALICE, "jsmith").pending
        assert desk.flow.resend(ALICE, request.id).attempts_left == 0  # nothing to mail
        with pytest.raises(UnknownRequest):
            desk.flow.confirm(ADAM, request.id)
        with pytest.raises(NotAnApprover):
            desk.flow.approve(ADAM, request.id)
    done(desk.flow.confirm(ALICE, request.id))
    late = desk.ask(HOME, "mary")
    desk.wait(hours=25)
    with desk.unchanged(), pytest.raises(RequestClosed, match="expired"):
        desk.flow.confirm(ALICE, late.id)
    assert desk.held("mary") == []


def test_approvals_during_a_wait_complete_nothing(desk: Desk) -> None:
    desk.use(add=Demand(wait=HOUR, approvals=1))
    request, other = desk.ask(), desk.ask(HOME, "mary")
    pending(desk.flow.approve(ADAM, request.id))
    desk.wait(hours=1)
    assert desk.held() == []
    done(desk.flow.confirm(ALICE, request.id))
    done(desk.flow.approve(ADAM, other.id))


def test_a_clock_that_runs_backwards(desk: Desk) -> None:
    """It makes a request wait for longer, never for less long."""
    desk.use(add=Demand(wait=HOUR, number=True))
    desk.wait(hours=10)
    request = desk.ask()
    desk.clock.set(desk.later(hours=-5))
    for hours in (0, 1, 4):
        desk.wait(hours=hours)
        with desk.unchanged(), pytest.raises(TooSoon):
            desk.flow.resend(ALICE, request.id)
    desk.wait(hours=1)
    desk.flow.resend(ALICE, request.id)
    desk.clock.set(desk.later(minutes=-30))
    with desk.unchanged(), pytest.raises(TooSoon):
        desk.confirm(request)
    desk.wait(minutes=30)
    desk.confirm(request)


# -- the user concerned ------------------------------------------------------------------------


@pytest.mark.parametrize("demand", [Demand(approvals=1), Demand(wait=HOUR)])
def test_the_user_concerned_is_told_and_may_cancel(desk: Desk, demand: Demand) -> None:
    desk.use(add=demand)
    request = desk.ask()
    message = desk.outbox.messages[-1]
    assert "jsmith@firm.example" in message.to
    with desk.unchanged(), pytest.raises(UnknownRequest):
        desk.flow.cancel(attrs.evolve(UNMANAGING, username="mary"), request.id)
    assert desk.flow.cancel(UNMANAGING, request.id).state == "cancelled"
    assert desk.rows()[0].actor == "jsmith"


def test_the_user_concerned_does_not_cancel_what_it_was_not_told(desk: Desk) -> None:
    request = desk.ask()
    assert all("jsmith@firm.example" not in message.to for message in desk.outbox.messages)
    with desk.unchanged(), pytest.raises(UnknownRequest):
        desk.flow.cancel(UNMANAGING, request.id)
    desk.use(add=Demand(approvals=1))
    told = desk.ask(HOME)
    desk.store.remove_users(["jsmith"])
    with desk.unchanged(), pytest.raises(UnknownRequest):
        desk.flow.cancel(UNMANAGING, told.id)


# -- demands are frozen, and stricter settings apply too ---------------------------------------


def test_laxer_settings_do_not_help_a_request(desk: Desk) -> None:
    desk.use(add=Demand(number=True, approvals=1, wait=HOUR))
    request = desk.ask()
    desk.use(add=Demand())
    with desk.unchanged(), pytest.raises(TooSoon):
        desk.flow.confirm(ALICE, request.id)
    desk.wait(hours=1)
    with desk.unchanged(), pytest.raises(NumberExpired):
        desk.flow.confirm(ALICE, request.id, "12345-67890")
    desk.flow.resend(ALICE, request.id)
    pending(desk.flow.confirm(ALICE, request.id, desk.number(request)))
    done(desk.flow.approve(ADAM, request.id))


def test_stricter_settings_apply(desk: Desk) -> None:
    """Each part of a demand that came later holds up a request of before."""
    request = desk.ask()
    number = desk.number(request)
    desk.use(add=Demand(number=True, wait=HOUR))
    with desk.unchanged(), pytest.raises(TooSoon):
        desk.flow.confirm(ALICE, request.id, number)
    desk.wait(hours=1)
    desk.use(add=Demand(number=True, approvals=1))
    desk.flow.resend(ALICE, request.id)
    pending(desk.flow.confirm(ALICE, request.id, desk.number(request)))
    desk.use()  # it was frozen without the approval
    done(desk.flow.confirm(ALICE, request.id))


def test_a_number_that_is_demanded_later(desk: Desk) -> None:
    desk.use(add=Demand(approvals=1))
    request = desk.ask()
    desk.use(add=Demand(number=True))
    pending(desk.flow.approve(ADAM, request.id))
    with desk.unchanged(), pytest.raises(NumberExpired):
        desk.flow.confirm(ALICE, request.id, "12345-67890")
    desk.flow.resend(ALICE, request.id)
    desk.confirm(request)


def test_stricter_settings_apply_to_every_member_of_a_batch(desk: Desk) -> None:
    """One that loosens is not confirmed through one that does not."""
    desk.add(HOME, "mary")
    one, two = many(desk, "jsmith", "mary", addresses=OFFICE)
    assert [r.impact and r.impact.direction for r in (one, two)] == [
        Direction.TIGHTENS,
        Direction.LOOSENS,
    ]
    desk.use(loosens=Demand(approvals=1))
    pending(desk.flow.confirm(ALICE, one.id, desk.number(one)))
    assert (desk.held(), desk.held("mary")) == ([], [HOME])
    assert desk.flow.own_request(ALICE, one.id).demand.approvals == 1
    done(desk.flow.approve(ADAM, one.id))
    assert desk.held() == [OFFICE]


@pytest.mark.parametrize("kind", ["add", "delete"])
def test_requests_of_older_libraries_are_taken_for_the_worst(desk: Desk, kind: str) -> None:
    """Their direction is unknown, so that what loosens or opens is demanded."""
    old = desk.add(OFFICE)
    desk.use(confirm_deletes=True)
    request = desk.ask(HOME) if kind == "add" else desk.ask_to_delete(old)
    forge(desk, request, impact=None)
    desk.wait(seconds=30)
    assert desk.flow.resend(ALICE, request.id).impact is None
    desk.use(**{"loosens" if kind == "add" else "opens": Demand(approvals=1)})
    pending(desk.flow.confirm(ALICE, request.id, desk.number(request)))
    done(desk.flow.approve(ADAM, request.id))


@pytest.mark.parametrize(
    ("setting", "waits"),
    [("add", "add"), ("delete", "delete"), ("loosens", "replace"), ("opens", "delete")],
)
def test_which_changes_demand_what(desk: Desk, setting: str, waits: str) -> None:
    old = desk.add(OFFICE, "mary")
    desk.use(**{"add": Demand(), setting: Demand(approvals=1)})
    states = {
        "add": desk.flow.request(ALICE, "jsmith", HOME).state,
        "replace": desk.flow.request(ALICE, "mary", HOME, replaces=[old.id]).state,
    }
    last = desk.add(OFFICE, "zed")
    states["delete"] = desk.flow.request(CAROL, "zed", replaces=[last.id]).state
    held_up = {kind for kind, state in states.items() if state == "pending"}
    assert (
        held_up
        == {
            "add": {"add", "replace"},
            "delete": {"delete", "replace"},
            "loosens": {"replace", "delete"},
            "opens": {"delete"},
        }[setting]
    )
    assert waits in held_up


# -- batches and approvals ---------------------------------------------------------------------


def test_an_approval_of_a_batch(desk: Desk) -> None:
    desk.use(add=Demand(number=True, approvals=1))
    one, two = many(desk, "jsmith", "mary")
    assert pending(desk.flow.approve(ADAM, two.id)).approved_by == ("adam",)
    assert desk.request(one).approved_by == ("adam",)
    desk.confirm(one)
    assert desk.held() == desk.held("mary") == [OFFICE, HOME]


def test_the_user_concerned_does_not_approve_a_batch_alone(desk: Desk) -> None:
    """Not through another member either."""
    desk.use(add=Demand(approvals=1))
    one, two = many(desk, "jsmith", "mary")
    for request in (one, two):
        with desk.unchanged(), pytest.raises(NotAnApprover, match="concerns you"):
            desk.flow.approve(JOHN, request.id)
    done(desk.flow.approve(ADAM, two.id))


def test_two_accounts_of_a_person_do_not_approve_a_batch(desk: Desk) -> None:
    """The second is refused although it approves through a member that the first did not see."""
    desk.use(add=Demand(approvals=2))
    one, two = many(desk, "jsmith", "zed", actor=BOTH)
    pending(desk.flow.approve(ADAM, one.id))
    assert desk.request(two).approved_by == ()
    other = alias(BOTH, email=ADAM.email.upper())
    with desk.unchanged(), pytest.raises(NotAnApprover, match="somebody with your e-mail"):
        desk.flow.approve(other, two.id)
    assert desk.held() == desk.held("zed") == []


def test_an_approver_of_one_account_completes_its_users(desk: Desk) -> None:
    """Users of a batch that do not exist for an approver are not changed by the approval."""
    desk.use(add=Demand(approvals=1))
    one, two = many(desk, "jsmith", "zed", actor=BOTH)
    done(desk.flow.approve(ADAM, one.id))
    assert (desk.held(), desk.held("zed")) == ([OFFICE, HOME], [])
    done(desk.flow.approve(CAROL, two.id))
    assert desk.held("zed") == [OFFICE, HOME]


def test_a_batch_of_which_one_was_completed_by_its_approver(desk: Desk) -> None:
    """The rest waits for its own approval, and needs no other number."""
    desk.use(add=Demand(number=True, approvals=1))
    one, two = many(desk, "jsmith", "zed", actor=BOTH)
    number = desk.number(one)
    pending(desk.flow.confirm(BOTH, two.id, number))
    done(desk.flow.approve(ADAM, one.id))
    desk.wait(seconds=30)
    for call in (
        lambda: desk.flow.resend(BOTH, one.id),
        lambda: desk.flow.confirm(BOTH, one.id, number),
        lambda: desk.flow.cancel(BOTH, one.id),
    ):
        with desk.unchanged(), pytest.raises(RequestClosed, match="confirmed"):
            call()
    with desk.unchanged():
        desk.flow.resend(BOTH, two.id)
        pending(desk.flow.confirm(BOTH, two.id, number))
    assert desk.held("zed") == []
    done(desk.flow.approve(CAROL, two.id))
    assert desk.held("zed") == [OFFICE, HOME]


def test_a_locked_request_is_not_approved(desk: Desk) -> None:
    desk.use(add=Demand(number=True, approvals=1))
    request = desk.ask()
    desk.guess(request, times=5)
    with desk.unchanged(), pytest.raises(RequestClosed, match="locked"):
        desk.flow.approve(ADAM, request.id)
    with desk.unchanged(), pytest.raises(TooManyAttempts):
        desk.confirm(request)


def test_guesses_do_not_end_after_an_approval(desk: Desk) -> None:
    """An approval restores no attempts."""
    desk.use(add=Demand(number=True, approvals=1))
    request = desk.ask()
    assert desk.guess(request, times=3) == [4, 3, 2]
    pending(desk.flow.approve(ADAM, request.id))
    assert desk.guess(request, times=2) == [1, 0]
    assert desk.held() == []


def test_a_users_mail_account_is_one_person(desk: Desk) -> None:
    """A user without an e-mail address is told apart by the username alone."""
    desk.store.put_users([User(username="mary", full_name="Mary", account_id="U1")])
    desk.use(add=Demand(approvals=1))
    request = desk.ask(username="mary")
    mary = alias(ADAM, username="mary")
    with desk.unchanged(), pytest.raises(NotAnApprover, match="concerns you"):
        desk.flow.approve(mary, request.id)
    done(desk.flow.approve(ADAM, request.id))


def test_an_approval_that_was_given_before_completes_nothing(desk: Desk) -> None:
    """After the wait the requester completes the request, and not an approver who asks again."""
    desk.use(add=Demand(approvals=1, wait=timedelta(hours=1)))
    request = desk.ask()
    desk.flow.approve(ADAM, request.id)
    desk.wait(hours=2)
    with desk.unchanged():
        assert isinstance(desk.flow.approve(ADAM, request.id), PendingRequest)
    assert isinstance(desk.flow.confirm(ALICE, request.id), Applied)


def test_an_approval_that_counts_no_more_is_not_shown(desk: Desk) -> None:
    """The user has moved since; the approver finds the request again once it manages the user."""
    desk.use(add=Demand(approvals=1, wait=timedelta(hours=1)))
    request = desk.ask()
    desk.flow.approve(ADAM, request.id)
    assert desk.flow.waiting(ADAM) == ()
    desk.store.put_users([attrs.evolve(JSMITH, account_id="U2")])
    alice, adam = (attrs.evolve(each, manages=frozenset({"U1", "U2"})) for each in (ALICE, ADAM))
    assert desk.flow.own_request(alice, request.id).approved_by == ()
    assert [each.id for each in desk.flow.waiting(adam)] == [request.id]
    desk.flow.approve(adam, request.id)
    assert desk.flow.own_request(alice, request.id).approved_by == ("adam",)
