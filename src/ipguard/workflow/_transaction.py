"""The workflow's code inside a transaction: plain and sequential, one writer at a time."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

import attrs

from ipguard import audit, errors, rules
from ipguard.addresses import parse_address
from ipguard.model import (
    Action,
    Actor,
    Applied,
    Change,
    PendingRequest,
    Policy,
    RequestKind,
    RequestState,
    Restriction,
    StoredRequest,
    StoredUser,
    Touched,
    User,
)
from ipguard.store import Snapshot, Transaction
from ipguard.workflow.settings import WorkflowSettings

_HOUR: Final = timedelta(hours=1)


def new_id() -> str:
    """Return a random id: 64 bits in hexadecimal, so that ids cannot be guessed."""
    return secrets.token_hex(8)


def increasing_ids() -> Iterator[str]:
    """Yield random ids in increasing order, for the restrictions of one import.

    They share one `created_at`, and stores list restrictions by `created_at`, then `id`: the rows
    of a file are then listed in their order.
    """
    value = secrets.randbits(63)
    while True:
        yield f"{value:016x}"
        value += 1 + secrets.randbits(30)


def check_new(new: Restriction, settings: WorkflowSettings, now: datetime) -> None:
    """Raise AddressTooBroad or InvalidValue unless the width and the expiry are acceptable."""
    rules.check_width(
        new.addresses, widest_ipv4=settings.widest_ipv4, widest_ipv6=settings.widest_ipv6
    )
    if new.expires_at is not None and new.expires_at <= now:
        raise errors.InvalidValue("expires_at", "must be in the future")


class Consent(NamedTuple):
    """Which risks of a change its caller accepts."""

    lockout: bool
    opening: bool


class ActorView:
    """What exists for one actor in a snapshot of the store: the rule of visibility.

    Users of accounts that the actor does not manage do not exist for it, nor do their requests and
    restrictions. Removed users exist only for actors of every account.
    """

    def __init__(self, snapshot: Snapshot, actor: Actor) -> None:
        self.actor = actor
        self.now = snapshot.now
        self._snapshot = snapshot

    def user(self, username: str) -> StoredUser | None:
        """Return a user, or None if it does not exist for this actor."""
        stored = self._snapshot.user(username)
        if stored is None:
            return None
        visible = rules.is_visible(
            self.actor.manages, stored.user.account_id, removed=stored.removed, restricted=True
        )
        return stored if visible else None

    def registered_user(self, username: str) -> User:
        """Return a user that is not removed, or raise UnknownUser."""
        stored = self.user(username)
        if stored is None or stored.removed:
            raise errors.UnknownUser(username)
        return stored.user

    def request(self, request_id: str, *, own: bool) -> tuple[StoredRequest, User]:
        """Return a request (with `own`, of this actor) and its user, or raise UnknownRequest."""
        # Ids come from outside, and may be anything.
        stored = self._snapshot.request(request_id) if isinstance(request_id, str) else None
        user = None if stored is None else self.user(stored.request.username)
        others = own and stored and stored.request.requested_by != self.actor.username
        if stored is None or user is None or others:
            raise errors.UnknownRequest(request_id)
        return stored, user.user

    def restriction(self, restriction_id: str) -> tuple[Restriction, User]:
        """Return a restriction and its user, or raise UnknownRestriction."""
        known = isinstance(restriction_id, str)
        restriction = self._snapshot.restriction(restriction_id) if known else None
        user = None if restriction is None else self.user(restriction.username)
        if restriction is None or user is None:
            raise errors.UnknownRestriction(restriction_id)
        return restriction, user.user

    def failures(self, username: str) -> int:
        return self._snapshot.failures(username)


class ActorTransaction(ActorView):
    """A write transaction on behalf of one actor; `changes` are its audit entries."""

    def __init__(self, tx: Transaction, actor: Actor, settings: WorkflowSettings) -> None:
        super().__init__(tx, actor)
        self.changes: list[Change] = []
        self._tx = tx
        self._settings = settings

    def advance(self, stored: StoredRequest, step: rules.Step, **changes: Any) -> StoredRequest:
        """Move a request by a step of the state table and save it, or raise RequestClosed."""
        state = rules.after(rules.state_at(stored.request, self.now), step)
        request = attrs.evolve(stored.request, state=state, **changes)
        stored = attrs.evolve(stored, request=request)
        self.save(stored)
        return stored

    def save(self, stored: StoredRequest) -> None:
        self._tx.save_request(stored)

    def check_rate(self) -> None:
        """Raise TooManyRequests if the actor made too many within the last hour."""
        times = self._tx.request_times(self.actor.username, rules.shifted(self.now, -_HOUR))
        wait = rules.wait_left(times, self._settings.requests_per_hour, _HOUR, self.now)
        if wait:
            raise errors.TooManyRequests(wait)

    def check_not_pending(self, wanted: Restriction, *, deletes: str | None = None) -> None:
        """Raise DuplicateRestriction if the same request to add or delete is pending."""
        for pending in self._tx.pending_requests(wanted.username):
            live = rules.state_at(pending, self.now) is RequestState.PENDING
            if live and pending.addresses == wanted.addresses and pending.restriction_id == deletes:
                if deletes is None:
                    raise rules.duplicate(pending, wanted)
                raise errors.DuplicateRestriction(
                    wanted.username, str(wanted.addresses), "deletion"
                )

    def check_addition(self, new: Restriction) -> tuple[tuple[Restriction, ...], list[Restriction]]:
        """Check a new restriction by itself and against the user's present ones.

        Returns:
            The user's restrictions as they would be with it; and the expired ones that it replaces.
        """
        check_new(new, self._settings, self.now)
        present = self._tx.restrictions(new.username)
        replaced, refused = rules.judge_additions(
            new.username,
            present,
            [new],
            per_user=self._settings.restrictions_per_user,
            now=self.now,
        )
        for _, error in refused:
            raise error
        return (*(r for r in present if r not in replaced), new), replaced

    def check_removal(self, restriction: Restriction, consent: Consent) -> rules.Remainder:
        """Return what the removal of a restriction would leave; raise as `check_lockout` does."""
        remainder = rules.without(
            self._tx.restrictions(restriction.username), restriction.id, self.now
        )
        self.check_lockout(restriction.username, remainder.left, allowed=consent.lockout)
        return remainder

    def check_lockout(self, username: str, left: Iterable[Restriction], *, allowed: bool) -> None:
        """Raise LockoutRisk if a change locks out its own actor, unless that is `allowed`."""
        if allowed or self.actor.username != username or self.actor.address is None:
            return
        before = Policy(revision=0, restrictions=self._tx.restrictions(username), known=True)
        rules.check_lockout(parse_address(self.actor.address), before, left, self.now)

    def add(
        self, user: User, new: Restriction, action: Action, consent: Consent, **detail: Any
    ) -> Applied:
        """Add a restriction, or raise as the checks do."""
        left, replaced = self.check_addition(new)
        self.check_lockout(user.username, left, allowed=consent.lockout)
        for old in replaced:
            self._take_away(old)
        self._tx.add_restriction(new)
        change = self.append(
            action,
            user,
            touches=frozenset({user.username}),
            addresses=new.addresses,
            label=new.label,
            expires_at=new.expires_at,
            restriction=new.id,
            replaces=replaced[0].id if replaced else None,
            **detail,
        )
        return Applied(revision=change.revision, restriction=new, unrestricted=False)

    def remove(
        self, user: User, old: Restriction, action: Action, consent: Consent, **detail: Any
    ) -> Applied:
        """Remove a restriction, or raise LockoutRisk or OpeningRisk without consent."""
        remainder = self.check_removal(old, consent)
        if remainder.opens and not consent.opening:
            raise errors.OpeningRisk(user.username)
        self._take_away(old)
        change = self.append(
            action,
            user,
            touches=frozenset({user.username}),
            addresses=old.addresses,
            label=old.label,
            restriction=old.id,
            unrestricted=remainder.opens,
            restricted_to_nothing=remainder.shuts,
            **detail,
        )
        return Applied(revision=change.revision, restriction=old, unrestricted=remainder.opens)

    def apply(self, stored: StoredRequest, user: User, consent: Consent) -> Applied:
        """Confirm a request and make its change, as `add` and `remove` do."""
        request = self.advance(stored, rules.Step.CONFIRM).request
        self._tx.set_failures(self.actor.username, 0)
        if request.kind is RequestKind.ADD:
            new = Restriction(
                id=new_id(),
                username=user.username,
                addresses=request.addresses,
                label=request.label,
                created_at=self.now,
                created_by=self.actor.username,
                expires_at=request.restriction_expires_at,
            )
            return self.add(user, new, Action.CONFIRM, consent, request=request.id)
        restriction, user = self.restriction(request.restriction_id or "")
        return self.remove(
            user,
            restriction,
            Action.CONFIRM,
            consent,
            kind=RequestKind.DELETE,
            request=request.id,
            reason=request.reason,
        )

    def count_guess(self, stored: StoredRequest, user: User, failures: int) -> int:
        """Count a wrong number; return how many attempts the request has left."""
        left = stored.request.attempts_left - 1
        step = rules.Step.GUESS if left else rules.Step.LOCK
        request = self.advance(stored, step, attempts_left=left).request
        self._tx.set_failures(self.actor.username, failures + 1)
        self.append_about(request, Action.WRONG_NUMBER, user, attempts_left=left, locked=not left)
        return left

    def reset_failures(self, username: str, user: User | None, reason: str) -> None:
        failures = self.failures(username)
        self._tx.set_failures(username, 0)
        self.append(Action.UNLOCK, user, username=username, failures=failures, reason=reason)

    def add_staged(self) -> int:
        """Add the staged restrictions, all or none; return how many."""
        count = self._tx.add_staged(per_user=self._settings.restrictions_per_user)
        self._cancel_deletions(self._tx.orphaned_deletions())
        return count

    def _take_away(self, restriction: Restriction) -> None:
        self._tx.remove_restriction(restriction.id)
        pending = self._tx.pending_requests(restriction.username)
        self._cancel_deletions(each for each in pending if each.restriction_id == restriction.id)

    def _cancel_deletions(self, requests: Iterable[PendingRequest]) -> None:
        """Cancel requests to delete restrictions that are gone: no number could confirm them."""
        for pending in requests:
            stored = self._tx.request(pending.id)
            if stored is not None and rules.state_at(pending, self.now) is RequestState.PENDING:
                self.advance(stored, rules.Step.CANCEL)

    def append_about(
        self, request: PendingRequest, action: Action, user: User, kind: str = "", **detail: Any
    ) -> None:
        """Append an audit entry about a request."""
        addresses = request.addresses
        self.append(action, user, kind=kind, addresses=addresses, request=request.id, **detail)

    def append(
        self,
        action: Action,
        user: User | None = None,
        *,
        username: str | None = None,
        touches: frozenset[str] | Touched = frozenset(),
        **detail: Any,
    ) -> Change:
        """Append an audit entry; a user's entry keeps the account that the user has now."""
        change = self._tx.append(
            action,
            actor=self.actor.username,
            actor_address=self.actor.address,
            username=username if user is None else user.username,
            account_id=None if user is None else user.account_id,
            detail=audit.detail(**detail, via=self.actor.via),
            touches=touches,
        )
        self.changes.append(change)
        return change
