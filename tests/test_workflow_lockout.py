"""Locking oneself out: when it is told of, when not, and how to do it all the same."""

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

NOWHERE = attrs.evolve(ALICE, address=None)


def _alices(desk: Desk, addresses: str, **more: Any) -> Restriction:
    return desk.add(addresses, "alice", **more)


def test_the_first_restriction_must_let_the_actor_in(desk: Desk) -> None:
    """Alice at the office, restricted to her home, could not come back: told on requesting."""
    with desk.unchanged(), pytest.raises(LockoutRisk) as caught:
        desk.ask(HOME, "alice")
    assert caught.value.address == OFFICE
    desk.ask("203.0.113.0/29", "alice")


def test_it_is_told_on_confirming_too(desk: Desk) -> None:
    """She asked at home and confirms at the office: the number stays usable, and she may insist."""
    at_home = attrs.evolve(ALICE, address=HOME)
    request = desk.ask(HOME, "alice", at_home)
    with desk.unchanged(), pytest.raises(LockoutRisk):
        desk.confirm(request)
    desk.confirm(request, allow_lockout=True)
    assert desk.held("alice") == [HOME]


def test_who_insists_on_requesting_insists_on_confirming(desk: Desk) -> None:
    """Each step is asked for itself."""
    request = desk.ask(HOME, "alice", allow_lockout=True)
    with desk.unchanged(), pytest.raises(LockoutRisk):
        desk.confirm(request)
    desk.confirm(request, allow_lockout=True)


@pytest.mark.parametrize("setting", [False, "last", True])
def test_deleting_ones_own_way_in(desk: Desk, setting: Any) -> None:
    """Told at once and when it is to be confirmed; the last one opens, and so is no risk."""
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


def test_deleting_the_last_is_no_lockout(desk: Desk) -> None:
    """It opens the user to every address, her own among them."""
    assert desk.delete(_alices(desk, OFFICE)).unrestricted


def test_temporary_ones_do_not_count(desk: Desk) -> None:
    """Let in only for a time, she would be out once it ends."""
    with desk.unchanged(), pytest.raises(LockoutRisk):
        desk.ask(OFFICE, "alice", expires_at=desk.later(days=365))
    _alices(desk, OFFICE, expires_at=desk.later(days=365))
    lasting = _alices(desk, "203.0.113.0/24")
    with desk.unchanged(), pytest.raises(LockoutRisk):
        desk.flow.delete(ALICE, lasting.id)
    desk.ask("192.0.2.9", "alice", expires_at=desk.later(days=1))


def test_expired_ones_do_not_count(desk: Desk) -> None:
    """Neither before nor after: one that has expired lets nobody in and keeps nobody in."""
    _alices(desk, OFFICE, expires_at=desk.later(hours=1))
    desk.wait(hours=1)
    desk.ask(HOME, "alice")  # she is out already, so nothing is lost
    lasting = _alices(desk, "203.0.113.0/24")
    with desk.unchanged(), pytest.raises(LockoutRisk):
        desk.flow.delete(ALICE, lasting.id)


def test_none_where_the_address_is_not_told(desk: Desk) -> None:
    """A host that does not say where its actors come from gets no warning."""
    desk.confirm(desk.ask(HOME, "alice", NOWHERE), NOWHERE)


def test_none_where_the_actor_is_outside_already(desk: Desk) -> None:
    """She manages from an address from which she could not log in now: no change makes it worse."""
    home = _alices(desk, HOME)
    desk.ask("192.0.2.9", "alice")
    _alices(desk, "192.0.2.10")
    desk.delete(home)


def test_none_for_other_users(desk: Desk) -> None:
    """It is about the actor's own way in."""
    desk.confirm(desk.ask(HOME, "jsmith"))


def test_the_actors_own_name_in_any_spelling(desk: Desk) -> None:
    """`ALICE` who restricts `Alice` restricts herself."""
    with pytest.raises(LockoutRisk):
        desk.ask(HOME, "Alice", Actor(**{**attrs.asdict(ALICE), "username": "ALICE"}))


def test_a_mapped_address_is_the_same_address(desk: Desk) -> None:
    """Behind a dual-stack socket the actor comes from `::ffff:203.0.113.7`."""
    desk.ask(OFFICE, "alice", attrs.evolve(ALICE, address=f"::ffff:{OFFICE}"))
    with pytest.raises(LockoutRisk):
        desk.ask(HOME, "alice", attrs.evolve(ALICE, address=f"::ffff:{OFFICE}"))


def test_an_operators_own_requests_are_asked_as_well(desk: Desk) -> None:
    """Actors of every account lock themselves out like anybody."""
    desk.store.put_users([ipguard.User(username="boss", full_name="B", account_id="B")])
    with pytest.raises(LockoutRisk):
        desk.ask(HOME, "boss", BOSS)


# -- the rule once more, restated --------------------------------------------------------------
#
# Four addresses, and restrictions over them as (first, last, hours to live or None for ever).
# The restatement speaks of single addresses and of moments: it walks through time.

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
    """In now, and some time from now on not any more."""
    return _gets_in(before, address, hour) and not all(
        _gets_in(after, address, later) for later in (hour, 0.5, 2, 100) if later >= hour
    )


def _written(span: Any) -> str:
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
def test_lockout_is_told_exactly_where_it_is_one(
    held: dict[Any, int | None],
    span: Any,
    hours: int | None,
    at: int,
    hour: int,
    deleting: bool,
) -> None:
    """`LockoutRisk` exactly where a walk through time finds the actor out who is in now."""
    desk = Desk()
    with desk.store:
        actor = attrs.evolve(ALICE, address=str(_POOL[at]))
        ids = {
            key: _alices(desk, _written(key), expires_at=value and desk.later(hours=value)).id
            for key, value in held.items()
        }
        desk.clock.advance(timedelta(hours=hour))
        after = dict(held)
        if deleting:
            if span not in held:
                return
            del after[span]
            told = _outcome(lambda: desk.flow.delete(actor, ids[span]))
        else:
            value = held.get(span, 0)
            if span in held and (value is None or value > hour):
                return  # a duplicate
            after[span] = hours
            expires = None if hours is None else desk.later(hours=hours - hour)
            told = _outcome(lambda: desk.ask(_written(span), "alice", actor, expires_at=expires))
        assert told is _would_be_out(held, after, at, hour)
