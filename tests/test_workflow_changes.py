"""Requests that replace, add several, or concern several users, and their limits."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import attrs
import pytest

import ipguard
from ipguard import (
    Action,
    Actor,
    AddressError,
    Applied,
    Demand,
    Direction,
    DirectionChanged,
    DuplicateRestriction,
    InvalidValue,
    LockoutRisk,
    NumberExpired,
    OpeningRisk,
    PendingRequest,
    RequestClosed,
    RequestState,
    TooManyAttempts,
    TooManyRequests,
    TooManyRestrictions,
    UnknownRequest,
    UnknownRestriction,
    UnknownUser,
    User,
    WrongNumber,
)
from ipguard.addresses import AddressRange
from tests.flows import ADAM, ALICE, BOSS, CAROL, HOME, JSMITH, OFFICE, Desk

BRANCH = "192.0.2.50"
BOTH = Actor(username="both", email="both@bank.example", manages=frozenset({"U1", "U2"}))


def many(
    desk: Desk, *usernames: str, actor: Actor = ALICE, addresses: Any = (OFFICE, HOME), **more: Any
) -> tuple[PendingRequest, ...]:
    """Request the same addresses for several users."""
    return desk.flow.request_many(actor, usernames, addresses, **more)


def forge(desk: Desk, request: PendingRequest, **fields: Any) -> None:
    """Change a stored request, as an intruder in the database could."""
    with desk.store.transaction() as tx:
        stored = tx.request(request.id)
        assert stored is not None
        tx.save_request(attrs.evolve(stored, request=attrs.evolve(stored.request, **fields)))
        tx.append(Action.REQUEST, actor=None)


# -- one request, one number, one revision -----------------------------------------------------


def test_several_addresses_are_one_change(desk: Desk) -> None:
    """They hold from one revision on, with one number, in the order given."""
    request = desk.flow.request(ALICE, "jsmith", [HOME, OFFICE, "2001:db8::/64"], label="new")
    assert request.adds == tuple(map(AddressRange.parse, (HOME, OFFICE, "2001:db8::/64")))
    assert (request.kind, request.removes) == ("add", ())
    applied = desk.confirm(request)
    assert (
        [str(r.addresses) for r in applied.added] == desk.held() == [HOME, OFFICE, "2001:db8::/64"]
    )
    assert {r.label for r in applied.added} == {"new"}
    assert applied.revision == desk.rows()[0].revision
    assert len([row for row in desk.rows() if row.action is Action.CONFIRM]) == 1


def test_one_bad_address_refuses_all(desk: Desk) -> None:
    desk.add(HOME)
    for addresses, error in (
        ([OFFICE, "10.0.0.1/8"], AddressError),
        ([OFFICE, HOME], DuplicateRestriction),
        ([OFFICE, f"::ffff:{OFFICE}"], DuplicateRestriction),
        ([OFFICE, "10.0.0.0/8"], ipguard.AddressTooBroad),
        ([], AddressError),
        (None, AddressError),
        ([OFFICE, 7], AddressError),
        (OFFICE.encode(), AddressError),
    ):
        with desk.unchanged(), pytest.raises(error):
            desk.flow.request(ALICE, "jsmith", addresses)  # type: ignore[arg-type]


def test_a_replacement_is_one_change(desk: Desk) -> None:
    """The old restriction ends in the revision in which the new one begins."""
    old, kept = desk.add(OFFICE), desk.add(HOME)
    request = desk.ask(BRANCH, replaces=[old.id])
    assert (request.kind, request.removes, request.removed) == (
        "replace",
        (old.id,),
        (old.addresses,),
    )
    assert request.impact is not None
    assert request.impact.summary == f"Then also from {BRANCH}; no longer from {OFFICE}."
    assert set(desk.held()) == {OFFICE, HOME}
    applied = desk.confirm(request)
    assert set(desk.held()) == {HOME, BRANCH}
    assert applied.removed == (old,)
    assert applied.impact == request.impact
    assert not applied.unrestricted
    detail = desk.rows()[0].detail
    assert {
        "direction": "loosens",
        "gained": BRANCH,
        "lost": OFFICE,
        "replaces": old.id,
    }.items() <= (detail.items())
    assert kept.id in {r.id for r in desk.store.load_policy("jsmith").restrictions}


def test_editing_the_label_and_the_expiry(desk: Desk) -> None:
    """Replacing by the same addresses edits; making it last longer loosens."""
    old = desk.add(OFFICE, label="old", expires_at=desk.later(hours=1))
    label = desk.ask(OFFICE, replaces=[old.id], label="new", expires_at=old.expires_at)
    assert label.impact is not None
    assert label.impact.direction is Direction.NEUTRAL
    desk.flow.cancel(ALICE, label.id)
    longer = desk.ask(OFFICE, replaces=[old.id], label="new")
    assert longer.impact is not None
    assert longer.impact.direction is Direction.LOOSENS
    (new,) = desk.confirm(longer).added
    assert (new.label, new.expires_at) == ("new", None)
    assert desk.held() == [OFFICE]


def test_replacing_an_expired_restriction(desk: Desk) -> None:
    """It allows nothing, but restricts: replacing it loosens, and never opens."""
    old = desk.add(OFFICE, expires_at=desk.later(hours=1))
    desk.wait(hours=2)
    request = desk.ask(HOME, replaces=[old.id])
    assert request.impact is not None
    assert (request.impact.direction, list(map(str, request.impact.gained))) == (
        Direction.LOOSENS,
        [HOME],
    )
    assert desk.confirm(request).removed == (old,)
    assert desk.held() == [HOME]


def test_deleting_several(desk: Desk) -> None:
    """A request without addresses deletes what it replaces."""
    ids = [desk.add(each).id for each in (OFFICE, HOME, BRANCH)]
    done = desk.flow.request(ALICE, "jsmith", replaces=ids[:2])
    assert (done.state, done.kind, desk.held()) == (RequestState.CONFIRMED, "delete", [BRANCH])
    assert done.revision == desk.rows()[0].revision
    desk.use(opens=Demand(number=True))
    request = desk.flow.request(ALICE, "jsmith", replaces=ids[2:])
    assert request.impact is not None
    assert request.impact.direction is Direction.OPENS
    assert desk.confirm(request).unrestricted


def test_what_a_request_may_replace(desk: Desk) -> None:
    """Restrictions of other users and accounts are not there, and look like no restriction."""
    own, other = desk.add(OFFICE), desk.add(OFFICE, "mary")
    zeds = desk.add(OFFICE, "zed")
    messages = set()
    unknown: list[list[Any]] = [[other.id], [zeds.id], ["none"], [own.id, zeds.id], [b"x"], [[]]]
    for ids in unknown:
        with desk.unchanged(), pytest.raises(UnknownRestriction) as caught:
            desk.ask(HOME, replaces=ids)
        assert caught.value.restriction_id == ids[-1]
        with desk.unchanged(), pytest.raises(UnknownRestriction):
            desk.flow.preview(ALICE, "jsmith", HOME, ids)
        messages.add(str(caught.value).replace(repr(ids[-1]), "…"))
    assert {text for text in messages if "object" not in text} == {"no restriction …"}
    for wrong in (own.id, 7):
        with pytest.raises(InvalidValue):
            desk.ask(HOME, replaces=wrong)
    with desk.unchanged(), pytest.raises(UnknownUser):
        desk.ask(HOME, "zed", replaces=[zeds.id])
    # An id that is named twice ends once.
    assert desk.ask(HOME, replaces=[own.id, own.id]).removes == (own.id,)


def test_a_restriction_that_is_gone_is_skipped(desk: Desk) -> None:
    old, other, _ = desk.add(OFFICE), desk.add(HOME), desk.add("192.0.2.99")
    request = desk.ask(BRANCH, replaces=[old.id, other.id])
    desk.delete(old)
    assert desk.confirm(request).removed == (other,)
    assert set(desk.held()) == {"192.0.2.99", BRANCH}


def test_a_deletion_with_nothing_left_to_delete(desk: Desk) -> None:
    desk.use(confirm_deletes=True)
    first, second, _ = desk.add(OFFICE), desk.add(HOME), desk.add(BRANCH)
    request = desk.flow.request(ALICE, "jsmith", replaces=[first.id, second.id])
    for each in (first, second):
        desk.flow.lift(BOSS, each.id, reason="x")
    with pytest.raises(UnknownRestriction):
        desk.confirm(request)
    assert desk.held() == [BRANCH]


def test_the_limit_counts_what_is_left(desk: Desk) -> None:
    """A user with as many restrictions as are allowed can have one replaced by one."""
    desk.use(restrictions_per_user=2)
    old, _ = desk.add(OFFICE), desk.add(HOME)
    with pytest.raises(TooManyRestrictions):
        desk.ask([BRANCH, "192.0.2.51"], replaces=[old.id])  # type: ignore[arg-type]
    desk.confirm(desk.ask(BRANCH, replaces=[old.id]))
    assert set(desk.held()) == {HOME, BRANCH}


def test_lockout_by_replacing(desk: Desk) -> None:
    """Replacing one's own address by another one is a lockout, at the request and later."""
    mine = desk.add(OFFICE, "alice")
    with desk.unchanged(), pytest.raises(LockoutRisk):
        desk.ask(HOME, "alice", replaces=[mine.id])
    request = desk.ask(HOME, "alice", replaces=[mine.id], allow_lockout=True)
    with pytest.raises(LockoutRisk):
        desk.confirm(request)
    assert desk.held("alice") == [OFFICE]
    desk.confirm(request, allow_lockout=True)
    assert desk.held("alice") == [HOME]


def test_lockout_in_a_batch(desk: Desk) -> None:
    """One of a batch that locks out its requester refuses all of it."""
    with desk.unchanged(), pytest.raises(LockoutRisk):
        many(desk, "jsmith", "alice", addresses=HOME)
    requests = many(desk, "jsmith", "alice", addresses=HOME, allow_lockout=True)
    with pytest.raises(LockoutRisk):
        desk.confirm(requests[0])
    assert desk.held() == desk.held("alice") == []
    desk.confirm(requests[0], allow_lockout=True)
    assert desk.held() == desk.held("alice") == [HOME]


def test_lockout_by_approving(desk: Desk) -> None:
    """An approver is the actor of the change that the approval completes."""
    desk.use(add=Demand(approvals=2))
    request = desk.ask(HOME, "alice", actor=ADAM)
    assert isinstance(desk.flow.approve(BOSS, request.id), PendingRequest)
    with desk.unchanged(), pytest.raises(LockoutRisk):
        desk.flow.approve(ALICE, request.id)
    assert isinstance(desk.flow.approve(ALICE, request.id, allow_lockout=True), Applied)


def test_impose_only(desk: Desk) -> None:
    """All others end in the same change, one to the same addresses included."""
    old, same = desk.add(OFFICE, label="laptop"), desk.add(HOME, label="head office")
    applied = desk.flow.impose(BOSS, "jsmith", HOME, reason="stolen", only=True)
    assert set(applied.removed) == {old, same}
    assert desk.held() == [HOME]
    assert (applied.restriction, applied.impact) != (same, None)
    assert applied.impact is not None
    assert (applied.impact.direction, list(map(str, applied.impact.lost))) == (
        Direction.TIGHTENS,
        [OFFICE],
    )
    again = desk.flow.impose(BOSS, "jsmith", HOME, reason="again", only=True)
    assert again.impact is not None
    assert again.impact.direction is Direction.NEUTRAL
    assert not again.unrestricted
    assert desk.held() == [HOME]
    with desk.unchanged(), pytest.raises(AddressError):
        desk.flow.impose(BOSS, "jsmith", [], reason="x", only=True)


def test_preview_is_what_the_request_does(desk: Desk) -> None:
    old = desk.add(OFFICE)
    with desk.unchanged():
        seen = desk.flow.preview(ALICE, "jsmith", [HOME, BRANCH], [old.id])
        alone = desk.flow.preview(ALICE, "jsmith", HOME, only=True)
        nothing = desk.flow.preview(ALICE, "jsmith", only=True)
        desk.flow.preview(ALICE, "mary", HOME, expires_at=desk.later(hours=1))
        with pytest.raises(DuplicateRestriction):
            desk.flow.preview(ALICE, "jsmith", OFFICE)
        with pytest.raises(AddressError):
            desk.flow.preview(ALICE, "jsmith")
        with pytest.raises(UnknownUser):
            desk.flow.preview(ALICE, "zed", HOME)
    request = desk.flow.request(ALICE, "jsmith", [HOME, BRANCH], replaces=[old.id])
    assert request.impact == seen == desk.flow.preview_request(ALICE, request.id)
    assert (alone.direction, nothing.direction) == (Direction.LOOSENS, Direction.OPENS)
    desk.delete(old)
    with pytest.raises(UnknownRequest):
        desk.flow.preview_request(CAROL, request.id)
    now = desk.flow.preview_request(ALICE, request.id)
    assert now.direction is Direction.TIGHTENS


def test_pending_requests_for_the_same(desk: Desk) -> None:
    """One pending request for each address to add and each restriction to end."""
    old = desk.add(OFFICE)
    desk.flow.request(ALICE, "jsmith", [HOME, BRANCH], replaces=[old.id])
    for ask in (
        lambda: desk.ask(HOME),
        lambda: desk.flow.request(ADAM, "jsmith", ["192.0.2.51", BRANCH]),
        lambda: desk.ask("192.0.2.51", replaces=[old.id]),
        lambda: many(desk, "mary", "jsmith", addresses=HOME),
    ):
        with desk.unchanged(), pytest.raises(DuplicateRestriction):
            ask()


# -- never: more than its mail said ------------------------------------------------------------


def test_a_request_that_would_do_worse_now(desk: Desk) -> None:
    """Of two requests for a free user, the second would loosen once the first holds."""
    first, second = desk.ask(OFFICE), desk.ask(HOME)
    desk.confirm(first)
    with desk.unchanged(), pytest.raises(DirectionChanged) as caught:
        desk.confirm(second)
    assert (caught.value.requested, caught.value.now) == (Direction.TIGHTENS, Direction.LOOSENS)
    with desk.unchanged(), pytest.raises(DirectionChanged):
        desk.flow.preview_request(ALICE, second.id)
    # The number stays usable: it confirms what was requested as soon as it is that again.
    desk.delete(desk.store.load_policy("jsmith").restrictions[0])
    assert desk.confirm(second).impact == second.impact


def test_a_deletion_that_would_open(desk: Desk) -> None:
    """Whatever the caller allows, a request that did not open does not open later."""
    desk.use(confirm_deletes=True)
    one, other = desk.add(OFFICE), desk.add(HOME)
    request = desk.ask_to_delete(one)
    desk.flow.lift(BOSS, other.id, reason="x")
    for allowed in (False, True):
        with desk.unchanged(), pytest.raises(DirectionChanged) as caught:
            desk.confirm(request, allow_opening=allowed)
        assert caught.value.now is Direction.OPENS


@pytest.mark.parametrize("last", ["confirm", "confirm after approvals", "approve", "wait"])
def test_every_way_of_completing_judges_again(desk: Desk, last: str) -> None:
    demand = {
        "confirm": Demand(number=True),
        "confirm after approvals": Demand(number=True, approvals=1),
        "approve": Demand(number=True, approvals=1),
        "wait": Demand(wait=timedelta(hours=1)),
    }[last]
    desk.use(add=demand)
    request = desk.ask(OFFICE)
    if last == "approve":
        assert isinstance(
            desk.flow.confirm(ALICE, request.id, desk.number(request)), PendingRequest
        )
    if last == "confirm after approvals":
        desk.flow.approve(ADAM, request.id)
    desk.add(HOME)
    desk.wait(hours=1, minutes=-55 if last != "wait" else 0)

    def complete() -> object:
        if last == "approve":
            return desk.flow.approve(ADAM, request.id)
        return desk.flow.confirm(ALICE, request.id, "" if last == "wait" else desk.number(request))

    with desk.unchanged(), pytest.raises(DirectionChanged):
        complete()
    assert desk.held() == [HOME]
    desk.flow.lift(BOSS, desk.store.load_policy("jsmith").restrictions[0].id, reason="x")
    assert isinstance(complete(), Applied)
    assert desk.held() == [OFFICE]


def test_one_of_a_batch_that_would_do_worse(desk: Desk) -> None:
    """All or nothing: one user whose change has become worse holds up the others."""
    requests = many(desk, "jsmith", "mary")
    desk.add(BRANCH, "mary")
    with desk.unchanged(), pytest.raises(DirectionChanged) as caught:
        desk.confirm(requests[0])
    assert caught.value.username == "mary"
    desk.flow.cancel(ALICE, requests[1].id)
    desk.confirm(requests[0])
    assert (desk.held(), desk.held("mary")) == ([OFFICE, HOME], [BRANCH])


@pytest.mark.parametrize(
    "forged",
    [
        {"adds": (AddressRange.parse("0.0.0.0/0"),)},
        {"removes": ("x",), "removed": (AddressRange.parse(HOME),)},
        {"username": "mary"},
        {"kind": ipguard.model.RequestKind.ADD},
        {"label": "x"},
        {"restriction_expires_at": None},
    ],
)
def test_a_number_confirms_what_it_was_mailed_for(desk: Desk, forged: dict[str, Any]) -> None:
    """After a change in the database the number is wrong."""
    old = desk.add(OFFICE)
    request = desk.ask(HOME, replaces=[old.id], label="new", expires_at=desk.later(hours=9))
    forge(desk, request, **forged)
    with pytest.raises(WrongNumber):
        desk.confirm(request)
    assert desk.held() == [OFFICE]
    assert desk.held("mary") == []


def test_a_number_of_an_older_library_still_fits(desk: Desk) -> None:
    """The digest of requests that older libraries make stays the same."""
    old = desk.add(OFFICE, label="old", expires_at=desk.later(hours=1))
    desk.use(confirm_deletes=True)
    added, deleted = desk.ask(HOME, label="new"), desk.ask_to_delete(old)
    assert added.subject == (added.id, "jsmith", "add", HOME, "new", "alice", "", "")
    end = desk.later(hours=1).isoformat()
    subject = (deleted.id, "jsmith", "delete", OFFICE, "old", "alice", old.id, end)
    assert deleted.subject == subject


def test_a_number_confirms_only_the_members_that_it_was_mailed_for(desk: Desk) -> None:
    """A member of a batch with another content, or the digest of another number, stays pending."""
    one, two, three = many(desk, "jsmith", "mary", "alice", allow_lockout=True)
    forge(desk, two, adds=(AddressRange.parse(BRANCH),))
    other = desk.ask(BRANCH)
    forge(desk, other, batch=one.batch)
    applied = desk.confirm(one)
    assert {r.username for r in applied.added} == {"jsmith", "alice"}
    states = [desk.request(each).state for each in (one, two, three, other)]
    assert states == ["confirmed", "pending", "confirmed", "pending"]
    assert (desk.held("mary"), desk.held()) == ([], [OFFICE, HOME])


def test_forged_requests_need_their_number_after_the_others_are_approved(desk: Desk) -> None:
    """A member that the number did not fit is not completed by approvals either."""
    desk.use(add=Demand(number=True, approvals=1))
    one, two = many(desk, "jsmith", "mary")
    forge(desk, two, adds=(AddressRange.parse(BRANCH),))
    desk.flow.confirm(ALICE, one.id, desk.number(one))
    assert isinstance(desk.flow.approve(ADAM, one.id), Applied)
    assert isinstance(desk.flow.approve(ADAM, two.id), PendingRequest)
    assert (desk.held(), desk.held("mary")) == ([OFFICE, HOME], [])


# -- never: a moment in which a replaced user is open ------------------------------------------


def test_a_replaced_user_is_never_open(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """No state of the store, committed or not, is without a restriction when a guard can read it.

    The change is one transaction: what fails in its middle leaves the old restrictions.
    """
    old = desk.add(OFFICE)
    request = desk.ask(HOME, replaces=[old.id])
    seen: list[tuple[str, list[str]]] = []

    def watch(kind: str) -> None:
        original = getattr(kinds, kind)

        def method(tx: Any, *args: Any, **more: Any) -> Any:
            result = original(tx, *args, **more)
            seen.append((kind, desk.held()))
            if failing == [kind]:
                raise RuntimeError(kind)
            return result

        monkeypatch.setattr(kinds, kind, method)

    with desk.store.transaction() as tx:
        kinds = type(tx)
        tx.append(Action.REQUEST, actor=None)
    failing: list[str] = []
    for kind in ("remove_restriction", "add_restriction", "save_request", "append"):
        watch(kind)
    for kind in ("remove_restriction", "add_restriction", "append"):
        failing[:] = [kind]
        with pytest.raises(RuntimeError, match=kind):
            desk.confirm(request)
        assert desk.held() == [OFFICE]
    failing.clear()
    desk.confirm(request)
    assert {kind for kind, _ in seen} >= {"remove_restriction", "add_restriction", "append"}
    assert all(held == [OFFICE] for _, held in seen)
    assert desk.held() == [HOME]


def test_a_replacement_never_opens_whatever_is_gone(desk: Desk) -> None:
    """If all that it replaces is gone and the user is free, it restricts."""
    old = desk.add(OFFICE)
    request = desk.ask(HOME, replaces=[old.id])
    desk.delete(old)
    applied = desk.confirm(request, allow_opening=False)
    assert applied.impact is not None
    assert (applied.impact.direction, desk.held()) == (Direction.TIGHTENS, [HOME])


def test_flags_do_not_weaken_a_request(desk: Desk) -> None:
    """`allow_opening` matters only for what opens, and only at the act that completes it."""
    desk.use(opens=Demand(number=True))
    last = desk.add(OFFICE)
    request = desk.ask_to_delete(last, allow_opening=False)
    with desk.unchanged(), pytest.raises(OpeningRisk):
        desk.confirm(request, allow_opening=False)
    assert desk.confirm(request).unrestricted
    desk.use()
    again = desk.add(OFFICE)
    with desk.unchanged(), pytest.raises(OpeningRisk):
        desk.flow.request(ALICE, "jsmith", replaces=[again.id], allow_opening=False)


# -- several users, one number -----------------------------------------------------------------


def test_sixty_users_one_number(desk: Desk) -> None:
    names = [f"trader{n:02}" for n in range(60)]
    desk.store.put_users([User(username=n, full_name=n, account_id="U1") for n in names])
    mails = len(desk.outbox.messages)
    requests = desk.flow.request_many(ALICE, names, [OFFICE, HOME], label="desk")
    assert [each.username for each in requests] == names
    assert {each.batch for each in requests} == {requests[0].id}
    (message,) = desk.outbox.messages[mails:]
    assert message.request is not None
    assert set(message.request.also_for) == set(names[1:])
    applied = desk.confirm(requests[0])
    assert len(applied.added) == 120
    assert all(desk.held(name) == [OFFICE, HOME] for name in names)
    assert {desk.request(each).state for each in requests} == {"confirmed"}


def test_who_may_be_in_a_batch(desk: Desk) -> None:
    desk.store.remove_users(["mary"])
    for names, error in (
        (["jsmith", "zed"], UnknownUser),
        (["jsmith", "mary"], UnknownUser),
        (["jsmith", "nobody"], UnknownUser),
        ([], InvalidValue),
        ([f"u{n}" for n in range(101)], InvalidValue),
    ):
        with desk.unchanged(), pytest.raises(error):
            many(desk, *names)
    for wrong in ("jsmith", b"jsmith", None):
        with desk.unchanged(), pytest.raises(InvalidValue, match="several usernames"):
            desk.flow.request_many(ALICE, wrong, OFFICE)  # type: ignore[arg-type]
    assert len(many(desk, "jsmith", "JSmith", "alice", allow_lockout=True)) == 2


def test_without_a_demand_a_batch_holds_at_once(desk: Desk) -> None:
    desk.use(add=Demand())
    requests = many(desk, "jsmith", "mary")
    assert [each.state for each in requests] == ["confirmed"] * 2
    assert desk.held() == desk.held("mary") == [OFFICE, HOME]
    assert len({each.revision for each in requests}) == 2


def test_any_member_confirms_all(desk: Desk) -> None:
    requests = many(desk, "jsmith", "mary")
    desk.flow.confirm(ALICE, requests[1].id, desk.number(requests[0]))
    assert desk.held() == desk.held("mary") == [OFFICE, HOME]
    for each in requests:
        desk_number = desk.number(requests[0])
        with pytest.raises(RequestClosed):
            desk.flow.confirm(ALICE, each.id, desk_number)


def test_cancelling_one_of_a_batch(desk: Desk) -> None:
    """The others are confirmed without it; even if it was the first."""
    one, two, three = many(desk, "jsmith", "mary", "alice", allow_lockout=True)
    number = desk.number(one)
    desk.flow.cancel(ADAM, one.id)
    with pytest.raises(RequestClosed):
        desk.flow.confirm(ALICE, one.id, number)
    desk.flow.confirm(ALICE, three.id, number)
    assert (desk.held(), desk.held("mary")) == ([], [OFFICE, HOME])
    assert desk.request(two).state == "confirmed"


def test_removing_and_renaming_a_user_of_a_batch(desk: Desk) -> None:
    """Their requests are cancelled; the others are confirmed."""
    one, two, three = many(desk, "jsmith", "mary", "alice", allow_lockout=True)
    desk.store.remove_users(["jsmith"])
    desk.store.rename_user("mary", "maria")
    applied = desk.flow.confirm(ALICE, three.id, desk.number(one))
    assert isinstance(applied, Applied)
    assert {r.username for r in applied.added} == {"alice"}
    assert [desk.request(each).state for each in (one, two, three)] == [
        "cancelled",
        "cancelled",
        "confirmed",
    ]
    assert desk.held("maria") == desk.held("mary") == desk.held() == []


def test_a_batch_gives_no_additional_guesses(desk: Desk) -> None:
    """Its attempts are shared: guesses at any member lock all of them."""
    requests = many(desk, "jsmith", "mary", "alice", allow_lockout=True)
    wrong = desk.wrong(requests[0])
    for n in range(5):
        with pytest.raises(WrongNumber) as caught:
            desk.flow.confirm(ALICE, requests[n % 3].id, wrong)
        assert caught.value.attempts_left == 4 - n
    assert desk.failures() == 5
    for each in requests:
        assert desk.request(each).state == "locked"
        with desk.unchanged(), pytest.raises(TooManyAttempts):
            desk.flow.confirm(ALICE, each.id, desk.number(requests[0]))
        with desk.unchanged(), pytest.raises(RequestClosed):
            desk.flow.resend(ALICE, each.id)
        with desk.unchanged(), pytest.raises(RequestClosed):
            desk.flow.cancel(ALICE, each.id)


def test_resends_of_a_batch_are_shared(desk: Desk) -> None:
    """A new number is one of all pending members, and counts for each of them."""
    desk.use(resends_per_request=2)
    one, two, three = many(desk, "jsmith", "mary", "alice", allow_lockout=True)
    old = desk.number(one)
    desk.flow.cancel(ALICE, one.id)
    desk.wait(seconds=30)
    desk.flow.resend(ALICE, two.id)
    with pytest.raises(TooManyRequests):
        desk.flow.resend(ALICE, three.id)
    desk.wait(seconds=30)
    assert desk.flow.resend(ALICE, three.id).also_for == ("mary",)
    desk.wait(seconds=30)
    for each in (two, three):
        with desk.unchanged(), pytest.raises(TooManyRequests):
            desk.flow.resend(ALICE, each.id)
    with pytest.raises(WrongNumber):
        desk.flow.confirm(ALICE, two.id, old)
    desk.flow.confirm(ALICE, two.id, desk.number(three))
    assert desk.held("mary") == desk.held("alice") == [OFFICE, HOME]


def test_a_failed_mail_of_a_batch_is_resent_by_any_member(desk: Desk) -> None:
    desk.outbox.fail = True
    with pytest.raises(ipguard.DeliveryError) as caught:
        many(desk, "jsmith", "mary")
    desk.outbox.fail = False
    (pending,) = desk.flow.user(ALICE, "mary").pending
    desk.flow.resend(ALICE, pending.id)  # at once
    assert caught.value.request_id is not None
    desk.flow.confirm(ALICE, caught.value.request_id, desk.number(pending))
    assert desk.held() == desk.held("mary") == [OFFICE, HOME]


def test_a_batch_counts_once_for_the_rate(desk: Desk) -> None:
    desk.use(requests_per_hour=2)
    many(desk, "jsmith", "mary")
    desk.ask(BRANCH)
    with desk.unchanged(), pytest.raises(TooManyRequests):
        many(desk, "jsmith", "mary", addresses="192.0.2.51")


def test_a_user_of_a_batch_who_has_moved(desk: Desk) -> None:
    """A user of an account that the requester does not manage is left out, and stays so."""
    one, two = many(desk, "jsmith", "mary", actor=ALICE)
    desk.store.put_users([attrs.evolve(JSMITH, account_id="U2")])
    with desk.unchanged(), pytest.raises(UnknownRequest):
        desk.flow.confirm(ALICE, one.id, desk.number(one))
    desk.wait(seconds=30)
    desk.flow.resend(ALICE, two.id)
    desk.store.put_users([JSMITH])
    # The number of before the move is the one of this request still; the new one is not.
    with pytest.raises(WrongNumber):
        desk.flow.confirm(ALICE, one.id, desk.number(two))
    assert desk.request(two).attempts_left == 5
    desk.flow.confirm(ALICE, two.id, desk.number(two))
    assert (desk.held(), desk.held("mary")) == ([], [OFFICE, HOME])
    desk.flow.confirm(ALICE, one.id, desk.number(one))
    assert desk.held() == [OFFICE, HOME]


def test_a_move_gives_no_additional_guesses(desk: Desk) -> None:
    """Guesses while a user is away count for it as soon as it is back."""
    one, two = many(desk, "jsmith", "mary")
    desk.store.put_users([attrs.evolve(JSMITH, account_id="U2")])
    for left in (4, 3):
        with pytest.raises(WrongNumber) as caught:
            desk.flow.confirm(ALICE, two.id, desk.wrong(one))
        assert caught.value.attempts_left == left
    desk.store.put_users([JSMITH])
    for request, left in ((one, 2), (two, 1), (one, 0)):
        with pytest.raises(WrongNumber) as caught:
            desk.flow.confirm(ALICE, request.id, desk.wrong(one))
        assert caught.value.attempts_left == left


def test_a_member_without_a_number_gives_no_guesses(desk: Desk) -> None:
    """The members that were mailed no number yet have no attempts to share."""
    desk.use(add=Demand(number=True, wait=timedelta(hours=1)))
    one, two = many(desk, "jsmith", "zed", actor=BOTH)
    only = attrs.evolve(BOTH, manages=frozenset({"U1"}))
    desk.wait(hours=1)
    desk.flow.resend(only, one.id)
    for left in (4, 3, 2, 1, 0):
        with pytest.raises(WrongNumber) as caught:
            desk.flow.confirm(BOTH, one.id, desk.wrong(one))
        assert caught.value.attempts_left == left
    assert desk.request(one).state == "locked"
    with desk.unchanged(), pytest.raises(NumberExpired):
        desk.flow.confirm(BOTH, two.id, desk.number(one))
    desk.flow.resend(BOTH, two.id)
    desk.flow.confirm(BOTH, two.id, desk.number(two))
    assert (desk.held(), desk.held("zed")) == ([], [OFFICE, HOME])


def test_addresses_may_come_from_an_iterator(desk: Desk) -> None:
    """It is read once, for all users."""
    both = desk.flow.request_many(ALICE, ["jsmith", "mary"], (each for each in [OFFICE, HOME]))
    assert [each.change for each in both] == [f"add {OFFICE}, {HOME}"] * 2


@pytest.mark.parametrize("only", ["false", 1, None])
def test_only_is_a_switch(desk: Desk, only: Any) -> None:
    """Text is true, "false" too, and would end all other restrictions."""
    desk.add(HOME)
    for call in (
        lambda: desk.flow.impose(BOSS, "jsmith", OFFICE, reason="x", only=only),
        lambda: desk.flow.preview(BOSS, "jsmith", OFFICE, only=only),
    ):
        with desk.unchanged(), pytest.raises(InvalidValue) as caught:
            call()
        assert caught.value.name == "only"


def test_a_replacement_that_holds_at_once_is_recorded_as_one(desk: Desk) -> None:
    desk.use(add=Demand())
    old = desk.add(HOME)
    desk.flow.request(ALICE, "jsmith", OFFICE, replaces=[old.id])
    assert desk.rows()[0].detail["kind"] == "replace"


def test_ending_many_restrictions_cancels_the_requests_to_end_them(desk: Desk) -> None:
    """Only those that would do nothing else, and not those that are over."""
    desk.use(delete=Demand(number=True))
    first, second, third = (desk.add(f"203.0.113.{n}") for n in range(3))
    over = desk.ask_to_delete(first)
    desk.wait(days=2)
    one, two = desk.ask_to_delete(first), desk.ask_to_delete(second)
    both = desk.flow.request(ALICE, "jsmith", HOME, replaces=[third.id])
    desk.flow.impose(BOSS, "jsmith", OFFICE, reason="stolen", only=True)
    states = [str(desk.request(each).state) for each in (over, one, two, both)]
    assert states == ["pending", "cancelled", "cancelled", "pending"]
