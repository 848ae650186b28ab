"""The requests that wait for an actor: its own, and those of others that it can approve."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import attrs
import pytest

from ipguard import Actor, Demand, InvalidValue, PendingRequest, User
from tests.flows import ADAM, ALICE, BOSS, CAROL, HOME, OFFICE, Desk

MARY = Actor(username="mary", email="mary@firm.example", manages=frozenset({"U1"}))


def ids(found: tuple[PendingRequest, ...]) -> list[str]:
    return [request.id for request in found]


@pytest.fixture
def strict(desk: Desk) -> Desk:
    """Requests to add need an approval, and those that open two."""
    desk.use(add=Demand(number=True, approvals=1), opens=Demand(number=True, approvals=2))
    return desk


def test_own_requests_come_first(strict: Desk) -> None:
    """Then those of others; each newest first, and none of accounts of others."""
    own, theirs = [], []
    for number in range(3):
        strict.wait(seconds=1)
        own.append(strict.ask(f"10.0.0.{number}").id)
        theirs.append(strict.ask(f"10.0.1.{number}", actor=ADAM).id)
    foreign = strict.ask(username="zed", actor=CAROL).id
    assert ids(strict.flow.waiting(ALICE)) == [*own[::-1], *theirs[::-1]]
    assert ids(strict.flow.waiting(ALICE, limit=4)) == [*own[::-1], theirs[-1]]
    assert ids(strict.flow.waiting(CAROL)) == [foreign]
    assert set(ids(strict.flow.waiting(BOSS))) == {*own, *theirs, foreign}
    strict.wait(days=2)
    assert strict.flow.waiting(BOSS) == ()


def test_approvals_that_are_not_needed_are_left_out(strict: Desk) -> None:
    """Those of the actor, those that others have given, and what the actor must not approve."""
    strict.store.put_users([User(username="MARY", full_name="M", account_id="U1")])
    strict.add(OFFICE, "mary")
    request = strict.ask(HOME, "mary", actor=ADAM)
    assert [each.spelling for each in strict.flow.waiting(ALICE)] == ["MARY"]
    assert strict.flow.waiting(MARY) == ()  # it concerns her, and needs one approval
    same = attrs.evolve(ALICE, email=ADAM.email)
    assert strict.flow.waiting(same) == ()
    strict.flow.approve(ALICE, request.id)
    assert strict.flow.waiting(ALICE) == strict.flow.waiting(BOSS) == ()
    assert ids(strict.flow.waiting(ADAM)) == [request.id]
    (held,) = strict.store.load_policy("mary").restrictions
    opening: Any = strict.flow.delete(ADAM, held.id)
    for actor in (ALICE, MARY):
        assert ids(strict.flow.waiting(actor)) == [opening.id]
        strict.flow.approve(actor, opening.id)
        assert strict.flow.waiting(actor) == ()
    assert strict.flow.waiting(BOSS) == ()


def test_requests_that_share_a_number_wait_together(strict: Desk) -> None:
    """Each is listed; if the actor must not approve one of them, it is shown none."""
    strict.store.put_users([User(username="adele", full_name="A", account_id="U1")])
    members = strict.flow.request_many(ADAM, ["jsmith", "mary", "adele"], OFFICE)
    assert set(ids(strict.flow.waiting(ALICE))) == {each.id for each in members}
    assert strict.flow.waiting(MARY) == ()
    strict.flow.approve(ALICE, members[0].id)
    assert strict.flow.waiting(ALICE) == strict.flow.waiting(BOSS) == ()
    assert len(strict.flow.waiting(ADAM)) == 3


def test_many_that_were_approved_hide_no_other(strict: Desk) -> None:
    """The list is filled with older requests."""
    strict.use(add=Demand(approvals=2))
    oldest = strict.ask("10.0.2.1", actor=ADAM).id
    strict.wait(seconds=1)
    for number in range(9):
        strict.flow.approve(ALICE, strict.ask(f"10.0.1.{number}", actor=ADAM).id)
    assert ids(strict.flow.waiting(ALICE, limit=1)) == [oldest]


def test_requests_without_approvals_wait_for_their_requesters_alone(desk: Desk) -> None:
    request = desk.ask()
    assert ids(desk.flow.waiting(ALICE)) == [request.id]
    assert desk.flow.waiting(ADAM) == desk.flow.waiting(BOSS) == ()
    desk.use(add=Demand(wait=timedelta(hours=1)))
    assert ids(desk.flow.waiting(ALICE)) == [request.id]
    desk.flow.cancel(ALICE, request.id)
    assert desk.flow.waiting(ALICE) == ()


@pytest.mark.parametrize("limit", [0, 1001, "1"])
def test_the_limit_is_checked(desk: Desk, limit: Any) -> None:
    with pytest.raises(InvalidValue):
        desk.flow.waiting(ALICE, limit=limit)
