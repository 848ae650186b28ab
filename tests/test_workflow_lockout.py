"""The lock-out check: a change after which its own actor could not log in."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ipguard
from ipguard import Actor, LockoutRisk, Restriction
from tests.flows import ALICE, BOSS, HOME, OFFICE, Desk


def _alices(desk: Desk, addresses: str, **more: Any) -> Restriction:
    return desk.add(addresses, "alice", **more)


def test_the_first_restriction_must_let_the_actor_in(desk: Desk) -> None:
    with desk.unchanged(), pytest.raises(LockoutRisk) as caught:
        desk.ask(HOME, "alice")
    assert caught.value.address == OFFICE
    desk.ask("203.0.113.0/29", "alice")


def test_the_check_is_repeated_on_confirming(desk: Desk) -> None:
    """The check is repeated on confirming; the number stays usable, and the actor may accept."""
    at_home = attrs.evolve(ALICE, address=HOME)
    request = desk.ask(HOME, "alice", at_home)
    with desk.unchanged(), pytest.raises(LockoutRisk):
        desk.confirm(request)
    desk.confirm(request, allow_lockout=True)
    assert desk.held("alice") == [HOME]


@pytest.mark.parametrize("setting", [False, "last", True])
def test_deleting_ones_own_way_in(desk: Desk, setting: Any) -> None:
    """A deletion is checked when requested and confirmed; deleting the last is allowed."""
    desk.use(confirm_deletes=setting)
    office, home = _alices(desk, OFFICE), _alices(desk, HOME)
    with desk.unchanged(), pytest.raises(LockoutRisk):
        desk.flow.delete(ALICE, office.id)
    outcome = desk.flow.delete(ALICE, office.id, allow_lockout=True)
    if isinstance(outcome, ipguard.PendingRequest):
        with desk.unchanged(), pytest.raises(LockoutRisk):
            desk.confirm(outcome)
        desk.confirm(outcome, allow_lockout=True)
    assert desk.held("alice") == [HOME]
    last = desk.flow.delete(ALICE, home.id)  # she is outside already
    if isinstance(last, ipguard.PendingRequest):
        desk.confirm(last)
    assert desk.held("alice") == []


def test_other_users_are_not_checked(desk: Desk) -> None:
    desk.confirm(desk.ask(HOME, "jsmith"))


def test_the_actors_own_name_in_any_spelling(desk: Desk) -> None:
    with pytest.raises(LockoutRisk):
        desk.ask(HOME, "Alice", Actor(**{**attrs.asdict(ALICE), "username": "ALICE"}))


def test_a_mapped_address_is_the_same_address(desk: Desk) -> None:
    desk.ask(OFFICE, "alice", attrs.evolve(ALICE, address=f"::ffff:{OFFICE}"))
    with pytest.raises(LockoutRisk):
        desk.ask(HOME, "alice", attrs.evolve(ALICE, address=f"::ffff:{OFFICE}"))


def test_operators_are_checked(desk: Desk) -> None:
    desk.store.put_users([ipguard.User(username="boss", full_name="B", account_id="B")])
    with pytest.raises(LockoutRisk):
        desk.ask(HOME, "boss", BOSS)


# -- the rule against a model -------------------------------------------------------------------
#
# Four addresses, and restrictions of them as (first, last, hours to live or None if permanent).
# The model looks at single addresses and moments.

_POOL = [ip_address("203.0.113.1") + n for n in range(4)]
_SPANS = st.tuples(st.integers(0, 3), st.integers(0, 3)).map(sorted).map(tuple)
_HELD = st.dictionaries(_SPANS, st.sampled_from([None, 1, 3]), max_size=4)


def _gets_in(held: dict[Any, int | None], address: int, hour: float) -> bool:
    if not held:
        return True
    return any(
        first <= address <= last and (hours is None or hour < hours)
        for (first, last), hours in held.items()
    )


def _would_be_out(before: dict[Any, Any], after: dict[Any, Any], address: int, hour: float) -> bool:
    """Return whether the address is allowed now, but not at some later time."""
    return _gets_in(before, address, hour) and not all(
        _gets_in(after, address, later) for later in (hour, 0.5, 2, 100) if later >= hour
    )


def _text(span: Any) -> str:
    return f"{_POOL[span[0]]}-{_POOL[span[1]]}"


def _outcome(call: Callable[[], object]) -> bool:
    try:
        call()
    except LockoutRisk:
        return True
    return False


@given(
    held=_HELD,
    span=_SPANS,
    hours=st.sampled_from([None, 4]),
    at=st.integers(0, 3),
    hour=st.sampled_from([0, 2]),
    deleting=st.booleans(),
)
def test_lockout_against_a_model(
    held: dict[Any, int | None],
    span: Any,
    hours: int | None,
    at: int,
    hour: int,
    deleting: bool,
) -> None:
    """`LockoutRisk` is raised exactly if a walk through time finds the actor out later."""
    desk = Desk()
    with desk.store:
        actor = attrs.evolve(ALICE, address=str(_POOL[at]))
        ids = {
            key: _alices(desk, _text(key), expires_at=value and desk.later(hours=value)).id
            for key, value in held.items()
        }
        desk.clock.advance(timedelta(hours=hour))
        after = dict(held)
        if deleting:
            if span not in held:
                return
            del after[span]
            risk = _outcome(lambda: desk.flow.delete(actor, ids[span]))
        else:
            value = held.get(span, 0)
            if span in held and (value is None or value > hour):
                return  # a duplicate
            after[span] = hours
            expires = None if hours is None else desk.later(hours=hours - hour)
            risk = _outcome(lambda: desk.ask(_text(span), "alice", actor, expires_at=expires))
        assert risk is _would_be_out(held, after, at, hour)
