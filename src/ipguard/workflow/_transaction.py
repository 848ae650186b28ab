"""The workflow's code inside a transaction: plain and sequential, one writer at a time."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

import attrs

from ipguard import audit, errors, rules
from ipguard.addresses import parse_address
from ipguard.model import (
    Action,
    Actor,
    Applied,
    Approval,
    BulkCounts,
    Change,
    Direction,
    Impact,
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

Member = tuple[StoredRequest, User]
"""A request and its user; several may share a number."""


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


class Plan(NamedTuple):
    """A change of one user's restrictions that the rules allow.

    Attributes:
        username: The user, canonical.
        adds: The restrictions to add.
        removes: The present ones that end.
        expired: Expired ones that end, because one to the same addresses is added.
        left: The restrictions afterwards.
        impact: What it does.
    """

    username: str
    adds: tuple[Restriction, ...]
    removes: tuple[Restriction, ...]
    expired: tuple[Restriction, ...]
    left: tuple[Restriction, ...]
    impact: Impact

    @property
    def kind(self) -> RequestKind:
        """The kind of a request for it."""
        if not self.adds:
            return RequestKind.DELETE
        return RequestKind.REPLACE if self.removes else RequestKind.ADD


class Consent(NamedTuple):
    """Which risks of a change its caller accepts."""

    lockout: bool
    opening: bool


def effect(impact: Impact | None) -> dict[str, Any]:
    """Return for an audit entry what a change does, without the lists of addresses."""
    if impact is None:  # of a request that an older library made
        return {}
    return {"direction": impact.direction.name.lower(), "afterwards": impact.summary}


def joined(items: Iterable[object]) -> str:
    """Return items as one text for an audit entry."""
    return ", ".join(map(str, items))


class ActorView:
    """What exists for one actor in a snapshot of the store: the rule of visibility.

    Users of accounts that the actor does not manage do not exist for it, nor do their requests and
    restrictions. Removed users exist only for actors of every account.
    """

    def __init__(self, snapshot: Snapshot, actor: Actor, settings: WorkflowSettings) -> None:
        self.actor = actor
        self._settings = settings
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

    def request(self, request_id: str, *, own: bool) -> Member:
        """Return a request (with `own`, of this actor) and its user, or raise UnknownRequest."""
        # Ids come from outside, and may be anything.
        stored = self._snapshot.request(request_id) if isinstance(request_id, str) else None
        user = None if stored is None else self.user(stored.request.username)
        others = own and stored and stored.request.requested_by != self.actor.username
        if stored is None or user is None or others:
            raise errors.UnknownRequest(request_id)
        return stored, user.user

    def request_to_cancel(self, request_id: str) -> Member:
        """Return a request; the user concerned may cancel one that it was told about."""
        stored = self._snapshot.request(request_id) if isinstance(request_id, str) else None
        if stored is not None and stored.request.username == self.actor.username:
            user = self._snapshot.user(self.actor.username)
            if stored.request.demand.is_told and user is not None and not user.removed:
                return stored, user.user
        return self.request(request_id, own=False)

    def concerning(self) -> tuple[PendingRequest, ...]:
        """Return the pending requests about the actor that it was told about."""
        user = self._snapshot.user(self.actor.username)
        if user is None or user.removed:
            return ()
        return tuple(
            each
            for each in self._snapshot.pending_requests(self.actor.username)
            if each.demand.is_told and rules.state_at(each, self.now) is RequestState.PENDING
        )

    def restriction(self, restriction_id: str) -> tuple[Restriction, User]:
        """Return a restriction and its user, or raise UnknownRestriction."""
        known = isinstance(restriction_id, str)
        restriction = self._snapshot.restriction(restriction_id) if known else None
        user = None if restriction is None else self.user(restriction.username)
        if restriction is None or user is None:
            raise errors.UnknownRestriction(restriction_id)
        return restriction, user.user

    def user_to_change(
        self, username: str, restriction_ids: Iterable[str], *, adding: bool
    ) -> tuple[User, list[Restriction]]:
        """Return a user, and the restrictions of it with these ids.

        Raises:
            UnknownUser: It does not exist for this actor; or it is removed, and this is `adding`.
            UnknownRestriction: The user has no such restriction.
        """
        stored = self.user(username)
        if stored is None or (stored.removed and adding):
            raise errors.UnknownUser(username)
        ids = tuple(restriction_ids)
        held = {each.id: each for each in self._snapshot.restrictions(username)} if ids else {}
        for each in ids:
            if each not in held:
                raise errors.UnknownRestriction(each)
        return stored.user, [held[each] for each in ids]

    def plan(
        self,
        username: str,
        adds: Sequence[Restriction],
        removes: Sequence[Restriction] = (),
        *,
        only: bool = False,
    ) -> Plan:
        """Judge a change of one user's restrictions by the rules, as things are now.

        Args:
            username: The user, canonical.
            adds: The restrictions to add.
            removes: Present restrictions of the user, which end.
            only: Whether all others end too.

        Raises:
            IPGuardError: As `Workflow.request`.
        """
        adds = [attrs.evolve(new, created_at=self.now) for new in adds]
        for new in adds:
            check_new(new, self._settings, self.now)
        present = self._snapshot.restrictions(username)
        ends = present if only else removes
        gone = {each.id for each in ends}
        kept = [each for each in present if each.id not in gone]
        judged = rules.judge_additions(
            username, kept, adds, per_user=self._settings.restrictions_per_user, now=self.now
        )
        for _, error in judged.refused:
            raise error
        replaced = judged.ends
        gone.update(each.id for each in replaced)
        left = (*(each for each in kept if each.id not in gone), *adds)
        change = rules.impact(present, left, self.now)
        return Plan(username, tuple(adds), tuple(ends), tuple(replaced), left, change)

    def plan_request(self, request: PendingRequest) -> Plan:
        """Judge a request as things are now; restrictions that are gone already are skipped.

        Raises:
            DirectionChanged: It would do worse than what was requested.
            UnknownRestriction: Nothing of it is left to do.
            IPGuardError: As `Workflow.request`.
        """
        ids = increasing_ids()
        adds = [
            Restriction(
                id=next(ids),
                username=request.username,
                addresses=addresses,
                label=request.label,
                created_at=self.now,
                created_by=request.requested_by,
                expires_at=request.restriction_expires_at,
            )
            for addresses in request.adds
        ]
        present = self._snapshot.restrictions(request.username) if request.removes else ()
        ended = set(request.removes)
        removes = [each for each in present if each.id in ended]
        if not (adds or removes):
            raise errors.UnknownRestriction(request.removes[0])
        plan = self.plan(request.username, adds, removes)
        requested = request.impact
        if requested is not None and plan.impact.direction > requested.direction:
            raise errors.DirectionChanged(
                requested.direction, plan.impact.direction, request.username
            )
        return plan

    def batch(self, stored: StoredRequest, user: User) -> list[Member]:
        """Return a pending request, and those that share its number and are pending too.

        Those of users that do not exist for this actor any more are left out; so are those that
        were left out when the number was sent or accepted, even if the users exist again.
        """
        found = [(stored, user)]
        others = () if stored.request.batch is None else self._snapshot.batch(stored.request.batch)
        for other in others:
            request = other.request
            there = self.user(request.username)
            pending = rules.state_at(request, self.now) is RequestState.PENDING
            shares = (other.sent_at, request.numbered) == (stored.sent_at, stored.request.numbered)
            if request.id != stored.request.id and pending and shares and there is not None:
                found.append((other, there.user))
        return found

    def restrictions(self, username: str) -> tuple[Restriction, ...]:
        return self._snapshot.restrictions(username)

    def failures(self, username: str) -> int:
        return self._snapshot.failures(username)


class ActorTransaction(ActorView):
    """A write transaction on behalf of one actor; `changes` are its audit entries."""

    def __init__(self, tx: Transaction, actor: Actor, settings: WorkflowSettings) -> None:
        super().__init__(tx, actor, settings)
        self.changes: list[Change] = []
        self._tx = tx

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

    def check_not_pending(self, wanted: Plan) -> None:
        """Raise DuplicateRestriction if a pending request adds or ends the same already."""
        for pending in self._tx.pending_requests(wanted.username):
            if rules.state_at(pending, self.now) is not RequestState.PENDING:
                continue
            for new in wanted.adds:
                if new.addresses in pending.adds:
                    raise rules.duplicate(pending, new)
            for old in wanted.removes:
                if old.id in pending.removes:
                    raise errors.DuplicateRestriction(
                        wanted.username, str(old.addresses), "deletion"
                    )

    def check_lockout(self, plan: Plan, *, allowed: bool) -> None:
        """Raise LockoutRisk if a change locks out its own actor, unless that is `allowed`."""
        if allowed or self.actor.username != plan.username or self.actor.address is None:
            return
        present = self._tx.restrictions(plan.username)
        before = Policy(revision=0, restrictions=present, known=True)
        rules.check_lockout(parse_address(self.actor.address), before, plan.left, self.now)

    def check_opening(self, plan: Plan, *, allowed: bool) -> None:
        """Raise OpeningRisk if a change opens the user, unless that is `allowed`."""
        if plan.impact.direction is Direction.OPENS and not allowed:
            raise errors.OpeningRisk(plan.username)

    def change(self, user: User, plan: Plan, action: Action, **detail: Any) -> Applied:
        """Make a planned change, as one revision."""
        ends = (*plan.removes, *plan.expired)
        self._take_away(plan.username, ends)
        for new in plan.adds:
            self._tx.add_restriction(new)
        told = plan.adds or plan.removes
        first = told[0] if told else None
        impact, opens = plan.impact, plan.impact.direction is Direction.OPENS
        change = self.append(
            action,
            user,
            touches=frozenset({user.username}),
            addresses=joined(each.addresses for each in told),
            label=None if first is None else first.label,
            expires_at=None if first is None or not plan.adds else first.expires_at,
            restriction=joined(each.id for each in told),
            replaces=joined(each.id for each in ends) if plan.adds else None,
            ends=joined(each.addresses for each in ends) if plan.adds else None,
            unrestricted=opens,
            restricted_to_nothing=rules.all_expired(plan.left, self.now),
            gained=joined(impact.gained),
            lost=joined(impact.lost),
            **effect(impact),
            **detail,
        )
        return Applied(
            revision=change.revision,
            restriction=first,
            unrestricted=opens,
            added=plan.adds,
            removed=ends,
            impact=impact,
        )

    def apply(self, stored: StoredRequest, user: User, plan: Plan) -> Applied:
        """Confirm a request and make its change."""
        request = self.advance(stored, rules.Step.CONFIRM).request
        return self.change(
            user,
            plan,
            Action.CONFIRM,
            kind=None if request.kind is RequestKind.ADD else request.kind,
            request=request.id,
            reason=request.reason,
            requested_by=None
            if request.requested_by == self.actor.username
            else request.requested_by,
        )

    def count_guess(self, members: list[Member], failures: int) -> int:
        """Count a wrong number for requests that share one; return the attempts that are left."""
        left = min(stored.request.attempts_left for stored, _ in members) - 1
        step = rules.Step.GUESS if left else rules.Step.LOCK
        for stored, user in members:
            request = self.advance(stored, step, attempts_left=left).request
            self.append_about(
                request, Action.WRONG_NUMBER, user, attempts_left=left, locked=not left
            )
        self._tx.set_failures(self.actor.username, failures + 1)
        return left

    def set_failures(self, username: str, count: int) -> None:
        self._tx.set_failures(username, count)

    def accept_number(self, members: Iterable[Member]) -> list[Member]:
        """Record that the number was right, because approvals are missing; return the requests."""
        self._tx.set_failures(self.actor.username, 0)
        found = []
        for stored, user in members:
            request = attrs.evolve(stored.request, numbered=True)
            found.append((attrs.evolve(stored, request=request), user))
            self.save(found[-1][0])
            self.append_about(request, Action.NUMBER_ACCEPTED, user)
        return found

    def approve(self, members: Iterable[Member]) -> list[Member]:
        """Record the actor's approval of each, once, and return them as they are now."""
        everywhere = self.actor.manages is Actor.EVERY_ACCOUNT
        return [
            (self._approve(each, user, None if everywhere else user.account_id), user)
            for each, user in members
        ]

    def _approve(self, stored: StoredRequest, user: User, account_id: str | None) -> StoredRequest:
        request = stored.request
        approval = Approval(
            username=self.actor.username,
            email=self.actor.email,
            account_id=account_id,
            subject=rules.subject_digest(request),
        )
        if approval in request.approvals:
            return stored
        self.append_about(
            request, Action.APPROVE, user, kind=request.kind, **effect(request.impact)
        )
        # An earlier one may not count any more, because the user has moved.
        others = (each for each in request.approvals if each.username != approval.username)
        return self.advance(stored, rules.Step.APPROVE, approvals=(*others, approval))

    def reset_failures(self, username: str, user: User | None, reason: str) -> None:
        failures = self.failures(username)
        self._tx.set_failures(username, 0)
        self.append(Action.UNLOCK, user, username=username, failures=failures, reason=reason)

    def add_staged(self, **options: bool) -> BulkCounts:
        """Add the staged restrictions, all or none."""
        return self._tx.add_staged(per_user=self._settings.restrictions_per_user, **options)

    def _take_away(self, username: str, ends: Sequence[Restriction]) -> None:
        """Remove restrictions, and cancel requests that would do nothing but that to one."""
        for old in ends:
            self._tx.remove_restriction(old.id)
        gone = {(old.id,) for old in ends}
        for pending in self._tx.pending_requests(username) if ends else ():
            if pending.ends_alone and pending.removes in gone:
                stored = self._tx.request(pending.id)
                if stored and rules.state_at(pending, self.now) is RequestState.PENDING:
                    self.advance(stored, rules.Step.CANCEL)

    def append_about(
        self, request: PendingRequest, action: Action, user: User, kind: str = "", **detail: Any
    ) -> None:
        """Append an audit entry about a request."""
        addresses = joined(request.adds or request.removed)
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
