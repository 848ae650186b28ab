"""Wrong numbers: how they are counted, and the order of the checks of `confirm`."""

from __future__ import annotations

import pytest

import ipguard
from ipguard import (
    Action,
    Actor,
    DuplicateRestriction,
    NumberExpired,
    NumberFormatError,
    RequestClosed,
    RequestState,
    TooManyAttempts,
    UnknownRequest,
    User,
    WrongNumber,
)
from tests.flows import ADAM, ALICE, BOSS, CAROL, HOME, Desk


def test_wrong_numbers_count_down_to_0_and_lock(desk: Desk) -> None:
    """The fifth wrong number leaves 0 attempts, and the request is locked permanently."""
    request = desk.ask()
    assert desk.guess(request, times=5) == [4, 3, 2, 1, 0]
    assert desk.request(request).state is RequestState.LOCKED
    for _ in range(2):
        for number in (desk.number(request), desk.wrong(request), ""):
            with desk.unchanged(), pytest.raises(TooManyAttempts):
                desk.flow.confirm(ALICE, request.id, number)
        for call in (desk.flow.resend, desk.flow.cancel):
            with desk.unchanged(), pytest.raises(RequestClosed) as caught:
                call(ALICE, request.id)
            assert caught.value.state == "locked"
        desk.wait(days=3)
    assert desk.held() == []


def test_the_settings_say_how_many_attempts(desk: Desk) -> None:
    """With one attempt, the first wrong number locks."""
    desk.use(attempts_per_number=1)
    request = desk.ask()
    assert request.attempts_left == 1
    assert desk.guess(request) == [0]
    with pytest.raises(TooManyAttempts):
        desk.confirm(request)


def test_wrong_numbers_are_audited_and_touch_no_policy(desk: Desk) -> None:
    """A wrong number is committed although an error is raised, and wakes no guard."""
    request = desk.ask()
    head, token, _ = desk.store.changes_since(None)
    desk.guess(request, times=5)
    assert desk.store.changes_since((head, token)).usernames == frozenset()
    rows = desk.rows()[:5]
    assert {row.action for row in rows} == {Action.WRONG_NUMBER}
    assert [row.revision for row in rows] == [head + n for n in (5, 4, 3, 2, 1)]
    assert (rows[0].detail["attempts_left"], rows[0].detail["locked"]) == ("0", "true")
    assert rows[4].detail["attempts_left"] == "4"
    assert "locked" not in rows[4].detail
    assert {(row.actor, row.username, row.account_id) for row in rows} == {
        ("alice", "jsmith", "U1")
    }


def test_a_refused_right_number_counts_nothing_and_stays_usable(desk: Desk) -> None:
    """If a rule refuses the change, attempts and failures stay as they were."""
    request = desk.ask()
    desk.guess(request, times=2)
    restriction = desk.add()
    for _ in range(7):
        with desk.unchanged(), pytest.raises(DuplicateRestriction):
            desk.confirm(request)
    assert (desk.request(request).attempts_left, desk.failures()) == (3, 2)
    assert desk.guess(request) == [2]
    desk.flow.lift(BOSS, restriction.id, reason="so that it is free")
    desk.confirm(request)
    assert desk.failures() == 0


def test_failures_are_counted_in_a_row_over_all_requests(desk: Desk) -> None:
    """At the cap no number is evaluated, on any request of the actor."""
    desk.use(failures_per_actor=7)
    one, other, third = (desk.ask(f"203.0.113.{n}") for n in range(3))
    desk.guess(one, times=4)
    desk.guess(other, times=3)
    for request in (one, other, third):
        for number in (desk.number(request), desk.wrong(request)):
            with desk.unchanged(), pytest.raises(TooManyAttempts):
                desk.flow.confirm(ALICE, request.id, number)
    desk.wait(minutes=1)
    desk.flow.resend(ALICE, third.id)
    with pytest.raises(TooManyAttempts):
        desk.confirm(third)
    desk.confirm(desk.ask(HOME, actor=ADAM), ADAM)


def test_a_success_resets_the_failures(desk: Desk) -> None:
    desk.use(failures_per_actor=3)
    for n in range(4):
        request = desk.ask(f"203.0.113.{n}")
        desk.guess(request, times=2)
        desk.confirm(request)
        assert desk.failures() == 0


def test_neither_time_nor_resending_resets_the_failures(desk: Desk) -> None:
    desk.use(failures_per_actor=6, resends_per_request=100)
    request = desk.ask()
    for _ in range(2):
        desk.guess(request, times=3)
        desk.wait(minutes=1)
        desk.flow.resend(ALICE, request.id)
    desk.wait(hours=20)
    desk.flow.resend(ALICE, request.id)
    with pytest.raises(TooManyAttempts):
        desk.confirm(request)
    desk.wait(days=400)
    request = desk.ask(HOME)
    with pytest.raises(TooManyAttempts):
        desk.confirm(request)


def test_unlock_lets_the_actor_try_again(desk: Desk) -> None:
    """`unlock` resets the failures; locked requests stay locked, and others go on."""
    desk.use(failures_per_actor=7)
    locked, request = desk.ask(), desk.ask(HOME)
    desk.guess(locked, times=5)
    desk.guess(request, times=2)
    desk.flow.unlock(BOSS, "ALICE", reason="identified by phone")
    with pytest.raises(TooManyAttempts):
        desk.confirm(locked)
    desk.confirm(request)


def test_resending_restores_the_attempts_and_replaces_the_number(desk: Desk) -> None:
    request = desk.ask()
    desk.guess(request, times=4)
    old = desk.number(request)
    desk.wait(seconds=30)
    again = desk.flow.resend(ALICE, request.id)
    assert (again.attempts_left, again.state) == (5, RequestState.PENDING)
    assert desk.number(request) != old
    with pytest.raises(WrongNumber) as caught:
        desk.flow.confirm(ALICE, request.id, old)
    assert caught.value.attempts_left == 4
    desk.confirm(request)


# -- typing errors -----------------------------------------------------------------------------


@pytest.mark.parametrize("digits", [6, 10, 18])
def test_a_typing_error_costs_no_attempt(desk: Desk, digits: int) -> None:
    """Text that cannot be a number is not counted, and the number stays valid."""
    desk.use(number_digits=digits, attempts_per_number=1)
    request = desk.ask()
    number = desk.number(request).replace("-", "")
    head = desk.store.changes_since(None).head
    for text in ("", number[:5], number[:-1] + "O", number + number, f"{number}."):
        with desk.unchanged(), pytest.raises(NumberFormatError) as caught:
            desk.flow.confirm(ALICE, request.id, text)
        assert caught.value.digits == digits
    assert desk.store.changes_since(None).head == head
    assert desk.failures() == 0
    desk.confirm(request)


def test_numbers_of_a_former_length(desk: Desk) -> None:
    """A number of the former length is refused and not counted; a new one can be sent."""
    request = desk.ask()
    desk.use(number_digits=8)
    with desk.unchanged(), pytest.raises(NumberFormatError):
        desk.confirm(request)
    desk.wait(seconds=30)
    desk.flow.resend(ALICE, request.id)
    desk.confirm(request)


# -- the order of the checks ---------------------------------------------------------------------
#
# Each obstacle makes one check of the contract's list fail. With all from one on in place, the
# first decides the error, and only a wrong number is counted.

_EXPECTED = [
    ("unknown", UnknownRequest),
    ("not the requester", UnknownRequest),
    ("closed", RequestClosed),
    ("number expired", NumberExpired),
    ("the actor's cap", TooManyAttempts),
    ("the number", WrongNumber),
    ("the rules", DuplicateRestriction),
]


@pytest.mark.parametrize("first", range(len(_EXPECTED)))
def test_the_order_of_the_checks(desk: Desk, first: int) -> None:
    names = [name for name, _ in _EXPECTED[first:]]
    desk.use(failures_per_actor=3)
    request = desk.ask()
    number = desk.wrong(request) if "the number" in names else desk.number(request)
    if "the rules" in names:
        desk.add()
    if "the actor's cap" in names:
        desk.guess(desk.ask(HOME), times=3)
    if "number expired" in names:
        desk.wait(minutes=10)
    if "closed" in names:
        desk.flow.cancel(ADAM, request.id)
    actor = ADAM if "not the requester" in names else ALICE
    name, error = _EXPECTED[first]
    request_id = "0" * 16 if name == "unknown" else request.id
    before = desk.dump()
    with pytest.raises(error):
        desk.flow.confirm(actor, request_id, number)
    assert (desk.dump() == before) is (error is not WrongNumber)


@pytest.mark.parametrize("actor", [ADAM, CAROL, BOSS])
def test_only_the_requester_confirms_and_resends(desk: Desk, actor: Actor) -> None:
    """For all other actors, operators included, the request does not exist."""
    request = desk.ask()
    desk.wait(seconds=30)
    for call in (
        lambda: desk.confirm(request, actor),
        lambda: desk.flow.confirm(actor, request.id, desk.wrong(request)),
        lambda: desk.flow.resend(actor, request.id),
    ):
        with desk.unchanged(), pytest.raises(UnknownRequest):
            call()


def test_the_actor_is_the_requester_in_any_spelling(desk: Desk) -> None:
    """`Alice` and `ALICE` are one requester, with one count of failures."""
    spelt = ipguard.Actor(username="ALICE", email="new@firm.example", manages={"U1"})
    request = desk.ask()
    desk.guess(request, spelt)
    assert desk.failures() == 1
    desk.confirm(request, spelt)


# -- the user's present account ----------------------------------------------------------------


def _move(desk: Desk, account: str) -> None:
    desk.store.put_users([User(username="jsmith", full_name="John", account_id=account)])


def test_the_present_account_decides(desk: Desk) -> None:
    """If the user moved to another account, nothing of it exists for the actor."""
    restriction = desk.add(HOME)
    request = desk.ask()
    desk.wait(minutes=1)
    _move(desk, "U2")
    for call in (
        lambda: desk.confirm(request),
        lambda: desk.flow.confirm(ALICE, request.id, desk.wrong(request)),
        lambda: desk.flow.resend(ALICE, request.id),
        lambda: desk.flow.cancel(ALICE, request.id),
    ):
        with desk.unchanged(), pytest.raises(UnknownRequest):
            call()
    with desk.unchanged(), pytest.raises(ipguard.UnknownUser):
        desk.ask("203.0.113.99")
    with desk.unchanged(), pytest.raises(ipguard.UnknownRestriction):
        desk.flow.delete(ALICE, restriction.id)
    desk.flow.cancel(CAROL, request.id)
    desk.flow.delete(CAROL, restriction.id)


def test_an_actor_who_lost_the_account_loses_the_request(desk: Desk) -> None:
    request = desk.ask()
    demoted = ipguard.Actor(username="alice", email="alice@firm.example", manages=frozenset())
    with desk.unchanged(), pytest.raises(UnknownRequest):
        desk.confirm(request, demoted)


def test_removing_the_user_closes_its_requests(desk: Desk) -> None:
    """The account sees no request; actors of every account see it cancelled."""
    request, by_boss = desk.ask(), desk.ask(HOME, actor=BOSS)
    desk.store.remove_users(["jsmith"])
    for call in (
        lambda: desk.confirm(request),
        lambda: desk.flow.resend(ALICE, request.id),
        lambda: desk.flow.cancel(ALICE, request.id),
    ):
        with desk.unchanged(), pytest.raises(UnknownRequest):
            call()
    with desk.unchanged(), pytest.raises(RequestClosed) as caught:
        desk.confirm(by_boss, BOSS)
    assert caught.value.state == "cancelled"


def test_registering_a_name_again_keeps_requests_cancelled(desk: Desk) -> None:
    request = desk.ask()
    desk.store.remove_users(["jsmith"])
    _move(desk, "U1")
    desk.refuses(request, "cancelled")
    desk.confirm(desk.ask())
