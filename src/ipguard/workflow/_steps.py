"""What the workflow does inside a transaction: plain sequential code, one writer at a time."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import Final

import attrs

from ipguard import audit, rules
from ipguard.addresses import parse_address
from ipguard.errors import (
    DuplicateRestriction,
    InvalidValue,
    OpeningRisk,
    TooManyRequests,
    UnknownRequest,
    UnknownRestriction,
    UnknownUser,
)
from ipguard.model import (
    Action,
    Actor,
    Applied,
    Change,
    PendingRequest,
    Policy,
    RequestState,
    Restriction,
    StoredRequest,
    StoredUser,
    User,
)
from ipguard.store import Transaction
from ipguard.workflow._settings import WorkflowSettings

_HOUR: Final = timedelta(hours=1)


def new_id() -> str:
    """Make an id that says nothing and that nobody can guess: 64 random bits in hexadecimal."""
    return secrets.token_hex(8)


def increasing_ids() -> Iterator[str]:
    """Yield ids for one import, in increasing order: its rows are then listed in their order.

    Stores list restrictions by `created_at`, then `id`, and an import has one `created_at`.
    """
    value = secrets.randbits(63)
    while True:
        yield f"{value:016x}"
        value += 1 + secrets.randbits(30)


def user_within_reach(tx: Transaction, actor: Actor, username: str) -> StoredUser | None:
    """Return a user as far as it exists for this actor: what it does not manage, does not exist.

    A user that the host removed exists only for actors of every account.
    """
    stored = tx.user(username)
    if stored is None or stored.user.account_id not in actor.manages:
        return None
    if stored.removed and actor.manages is not Actor.EVERY_ACCOUNT:
        return None
    return stored


def registered_user(tx: Transaction, actor: Actor, username: str) -> User:
    """Return a user who may be given a restriction by this actor."""
    stored = user_within_reach(tx, actor, username)
    if stored is None or stored.removed:
        raise UnknownUser(username)
    return stored.user


def request_and_user(
    tx: Transaction, actor: Actor, request_id: str, *, own: bool
) -> tuple[StoredRequest, User]:
    """Return a request that exists for this actor; with `own`, only one that it made itself."""
    # An id may be whatever a page's client sent: what is no text names nothing, in any store.
    stored = tx.request(request_id) if isinstance(request_id, str) else None
    user = None if stored is None else user_within_reach(tx, actor, stored.request.username)
    if stored is None or user is None or (own and stored.request.requested_by != actor.username):
        raise UnknownRequest(request_id)
    return stored, user.user


def restriction_and_user(
    tx: Transaction, actor: Actor, restriction_id: str
) -> tuple[Restriction, User]:
    """Return a restriction that exists for this actor, and whose it is."""
    restriction = tx.restriction(restriction_id) if isinstance(restriction_id, str) else None
    user = None if restriction is None else user_within_reach(tx, actor, restriction.username)
    if restriction is None or user is None:
        raise UnknownRestriction(restriction_id)
    return restriction, user.user


def advance(stored: StoredRequest, step: rules.Step, now: datetime) -> StoredRequest:
    """Return the request after a step of the table, or raise `RequestClosed`."""
    state = rules.after(rules.state_at(stored.request, now), step)
    return attrs.evolve(stored, request=attrs.evolve(stored.request, state=state))


def check_pace(tx: Transaction, actor: Actor, settings: WorkflowSettings) -> None:
    """Refuse another request of an actor who has made too many within the hour."""
    times = tx.request_times(actor.username, rules.shifted(tx.now, -_HOUR))
    wait = rules.wait_left(times, settings.requests_per_hour, _HOUR, tx.now)
    if wait:
        raise TooManyRequests(wait)


def check_not_pending(tx: Transaction, wanted: Restriction, *, deletes: str | None = None) -> None:
    """Refuse to add a restriction, or to delete it, if a request for the same is pending."""
    for pending in tx.pending_requests(wanted.username):
        live = rules.state_at(pending, tx.now) is RequestState.PENDING
        if live and pending.addresses == wanted.addresses and pending.restriction_id == deletes:
            if deletes is None:
                raise rules.duplicate(pending, wanted)
            raise DuplicateRestriction(wanted.username, str(wanted.addresses), "deletion")


def check_lockout(
    tx: Transaction, actor: Actor, username: str, left: Iterable[Restriction], *, allowed: bool
) -> None:
    """Refuse a change by which actors would keep themselves out, unless they said that they may."""
    if allowed or actor.username != username or actor.address is None:
        return
    before = Policy(revision=0, restrictions=tx.restrictions(username), known=True)
    rules.check_lockout(parse_address(actor.address), before, left, tx.now)


def check_removal(
    tx: Transaction, actor: Actor, restriction: Restriction, *, allow_lockout: bool
) -> None:
    """Refuse to take a restriction away where that locks out the actor itself."""
    left = (r for r in tx.restrictions(restriction.username) if r.id != restriction.id)
    check_lockout(tx, actor, restriction.username, left, allowed=allow_lockout)


def with_added(
    tx: Transaction, settings: WorkflowSettings, new: Restriction
) -> tuple[tuple[Restriction, ...], list[Restriction]]:
    """Judge a new restriction by the rules as things are now.

    Returns:
        The user's restrictions as they would be with it, and the expired ones that it replaces.
    """
    rules.check_width(
        new.addresses, widest_ipv4=settings.widest_ipv4, widest_ipv6=settings.widest_ipv6
    )
    if new.expires_at is not None and new.expires_at <= tx.now:
        raise InvalidValue("expires_at", "must be in the future")
    present = tx.restrictions(new.username)
    replaced, refused = rules.judge_additions(
        new.username, present, [new], per_user=settings.restrictions_per_user, now=tx.now
    )
    for _, error in refused:
        raise error
    return (*(r for r in present if r not in replaced), new), replaced


def add(
    tx: Transaction,
    settings: WorkflowSettings,
    actor: Actor,
    user: User,
    new: Restriction,
    action: Action,
    *,
    allow_lockout: bool,
    **more: object,
) -> tuple[Applied, Change]:
    """Let a restriction hold."""
    left, replaced = with_added(tx, settings, new)
    check_lockout(tx, actor, new.username, left, allowed=allow_lockout)
    for old in replaced:
        _take_away(tx, old)
    tx.add_restriction(new)
    change = append(
        tx,
        action,
        actor,
        user,
        audit.detail(
            addresses=new.addresses,
            label=new.label,
            expires_at=new.expires_at,
            restriction=new.id,
            replaces=replaced[0].id if replaced else None,
            **more,
        ),
        touches=True,
    )
    return Applied(revision=change.revision, restriction=new, unrestricted=False), change


def remove(
    tx: Transaction,
    actor: Actor,
    user: User,
    restriction: Restriction,
    action: Action,
    *,
    allow_opening: bool,
    **more: object,
) -> tuple[Applied, Change]:
    """End a restriction."""
    _take_away(tx, restriction)
    left = tx.restrictions(user.username)
    if not (left or allow_opening):
        raise OpeningRisk(user.username)
    change = append(
        tx,
        action,
        actor,
        user,
        audit.detail(
            addresses=restriction.addresses,
            label=restriction.label,
            restriction=restriction.id,
            unrestricted=not left,
            restricted_to_nothing=bool(left) and all(r.expired(tx.now) for r in left),
            **more,
        ),
        touches=True,
    )
    return (
        Applied(revision=change.revision, restriction=restriction, unrestricted=not left),
        change,
    )


def _take_away(tx: Transaction, restriction: Restriction) -> None:
    tx.remove_restriction(restriction.id)
    pending = tx.pending_requests(restriction.username)
    cancel_deletions(tx, (each for each in pending if each.restriction_id == restriction.id))


def cancel_deletions(tx: Transaction, requests: Iterable[PendingRequest]) -> None:
    """Cancel requests to delete restrictions that are gone: no number could confirm them."""
    for pending in requests:
        stored = tx.request(pending.id)
        if stored is not None and rules.state_at(pending, tx.now) is RequestState.PENDING:
            tx.save_request(advance(stored, rules.Step.CANCEL, tx.now))


def append(
    tx: Transaction,
    action: Action,
    actor: Actor,
    user: User | None,
    detail: Mapping[str, str],
    *,
    touches: bool = False,
    username: str | None = None,
) -> Change:
    """Append a change of one user to the trail, under the account that the user has now."""
    named = user.username if user is not None else username
    return tx.append(
        action,
        actor=actor.username,
        actor_address=actor.address,
        username=named,
        account_id=None if user is None else user.account_id,
        detail={**detail, **audit.detail(via=actor.via)},
        touches=frozenset({named}) if touches and named is not None else frozenset(),
    )
