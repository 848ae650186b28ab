"""Restrictions change in two phases: a request, whose number is mailed, and its confirmation.

Each call is one transaction, then one mail. Code inside the transaction (`_transaction.py`) is
plain and sequential, because it holds the writer's lock: it reads, asks `ipguard.rules`, writes,
and appends an audit entry. Mails are sent after the commit, never inside the transaction.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import reduce
from itertools import chain
from operator import or_
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import attrs

from ipguard import confirmation, errors, rules
from ipguard._checks import check_duration, check_switch, check_text, check_time, check_whole
from ipguard.addresses import AddressRange
from ipguard.audit import log_change
from ipguard.model import (
    EVERYBODY,
    LABEL_LIMIT,
    REASON_LIMIT,
    AccessLine,
    Accounts,
    Action,
    Actor,
    Applied,
    Change,
    Demand,
    Direction,
    Impact,
    Page,
    PendingRequest,
    Policy,
    Refusal,
    RequestKind,
    RequestState,
    Restriction,
    Sighting,
    StoredRequest,
    User,
    UserCounts,
    UserFilter,
    UserOverview,
)
from ipguard.notify import Notifier
from ipguard.store import NAMED_AT_MOST, Closing, RestrictionStore, Snapshot
from ipguard.usernames import canonical_username
from ipguard.workflow._transaction import (
    ActorTransaction,
    ActorView,
    Consent,
    Member,
    Plan,
    check_new,
    effect,
    increasing_ids,
    joined,
    new_id,
)
from ipguard.workflow.settings import WorkflowSettings

__all__ = ["Workflow", "WorkflowSettings"]

_log = logging.getLogger("ipguard.workflow")

Row = Sequence[object] | Mapping[str, object]
"""A row of `impose_many`: `(username, addresses[, label[, expires_at]])`, or a mapping of those."""

_COLUMNS: Final = ("username", "addresses", "label", "expires_at")
_SEARCH_LIMIT: Final = 256
_PAGE_LIMIT: Final = 1000
_REQUESTS_READ: Final = 10_000  # of others, to find those that an actor can approve
_REVISION_LIMIT: Final = 2**63 - 1  # the largest integer that the databases can hold
_LAST_CHARACTER: Final = "\U0010ffff"  # a noncharacter, which no username contains
_TOLD: Final = (Action.REQUEST, Action.APPROVE)
_STEPS: Final = (*_TOLD, Action.NUMBER_ACCEPTED)  # after which nothing holds yet
_TOLD_REMEMBERED: Final = 10_000  # users
_UNSET: Final = datetime.min.replace(tzinfo=UTC)


Addresses = str | AddressRange | Iterable[str | AddressRange]
"""Addresses to restrict to: one text or range, or several."""


class _Begun(NamedTuple):
    """Requests that share a number, which is empty if none is mailed now.

    Attributes:
        stored: The requests.
        number: Their number.
        applied: The last change, if they hold already.
        users: The users to tell.
    """

    stored: list[StoredRequest]
    number: str
    applied: Applied | None = None
    users: Mapping[str, User] = MappingProxyType({})


class Workflow(Closing):
    """Changes restrictions on behalf of actors. Thread-safe, survives `fork()`.

    The host authenticates the actor: a number sent by e-mail confirms a change, but is not an
    authenticator (NIST SP 800-63B-4 3.1.3.1). Users, requests and restrictions of accounts
    that the actor does not manage do not exist for it: `UnknownUser`, `UnknownRequest`,
    `UnknownRestriction`. A call that reads or writes the store raises `StoreUnavailable` if the
    store does not answer; a change may then have been made or not.

    Args:
        store: The restriction store.
        notifier: Delivers numbers and notices.
        key: The secret that keys the digests of numbers, at least 32 bytes; or several, of which
            the first mints and all verify. All servers share it; it is never stored.
        settings: Limits and lifetimes.

    Attributes:
        settings: As given.
        notices_failed: How many notices after a change could not be sent.

    Raises:
        InvalidValue: The key is too short or not bytes, or another argument has the wrong type.
    """

    def __init__(
        self,
        store: RestrictionStore,
        notifier: Notifier,
        *,
        key: bytes | Sequence[bytes],
        settings: WorkflowSettings | None = None,
    ) -> None:
        self.settings = WorkflowSettings() if settings is None else settings
        if not isinstance(self.settings, WorkflowSettings):
            raise errors.InvalidValue(
                "settings", f"must be WorkflowSettings, not {type(settings).__name__}"
            )
        self.notices_failed = 0
        self._told: OrderedDict[str, datetime] = OrderedDict()  # of refused logins, by user
        if not hasattr(store, "transaction"):
            raise errors.InvalidValue(
                "store", "must be a restriction store, such as open_store returns"
            )
        if not hasattr(notifier, "number_issued"):
            raise errors.InvalidValue("notifier", "must be a notifier, such as ipguard.mail has")
        self._store = store
        self._notifier = notifier
        self._keys = confirmation.Keyring(key)

    # ------------------------------------------------------------------ the two phases

    def request(
        self,
        actor: Actor,
        username: str,
        addresses: Addresses | None = None,
        *,
        replaces: Iterable[str] = (),
        label: str = "",
        expires_at: datetime | None = None,
        reason: str = "",
        allow_lockout: bool = False,
        allow_opening: bool = True,
    ) -> PendingRequest:
        """Request a change of a user's restrictions, and mail its number to the actor.

        The change is one: all of it holds at once, or nothing. Replacing a restriction by the same
        addresses with another label or expiry edits it. What the request has to meet is what the
        settings demand of its kind and direction.

        Args:
            actor: The requester.
            username: The user to restrict.
            addresses: The addresses to add: an address, a network or a `first-last` range, or
                several of them. Surrounding blanks are ignored. None adds nothing.
            replaces: The ids of restrictions of the user that end in the same change.
            label: A name for the restrictions to add, up to 100 characters.
            expires_at: When they stop allowing their addresses, or None. The user stays restricted
                afterwards.
            reason: Why, up to 500 characters.
            allow_lockout: Accept that the actor itself may no longer be able to log in.
            allow_opening: Accept that no restriction is left afterwards, if that holds at once.

        Returns:
            The pending request, for `confirm`. If the settings demand nothing, the change holds
            already: the state is `confirmed`, there is a `revision`, and no request is stored.

        Raises:
            AddressError: The addresses cannot be parsed or used, or nothing is to be changed.
            AddressTooBroad: They are wider than the settings allow.
            UsernameError: The username has no canonical form.
            InvalidValue: The label or the time is not valid.
            UnknownUser: The user does not exist for this actor.
            UnknownRestriction: The user has no such restriction to replace.
            DuplicateRestriction: The user has these addresses, or a request for them is pending,
                whatever the label and the expiry: the error says what exists and how it differs.
            TooManyRestrictions: The user has as many as are allowed.
            LockoutRisk: The actor could no longer log in from its present address.
            OpeningRisk: The user could log in from anywhere, nothing is demanded, and
                `allow_opening` is False.
            TooManyRequests: The actor made too many requests within the last hour.
            DeliveryError: The mail could not be sent; the request is pending, and `resend` works.
        """
        check_text("reason", reason, REASON_LIMIT)
        name, ids = canonical_username(username), _ids(replaces)
        adds = self._additions(actor, name, addresses, label, expires_at, needed=not ids)
        with self._transaction(actor) as tx:
            user, removes = tx.user_to_change(name, ids, adding=bool(adds))
            plan = tx.plan(name, adds, removes)
            tx.check_lockout(plan, allowed=allow_lockout)
            begun = self._begin(tx, [(user, plan)], reason, allow_opening=allow_opening)
        (request,) = self._deliver(tx, begun)
        return request

    def request_many(
        self,
        actor: Actor,
        usernames: Iterable[str],
        addresses: Addresses,
        *,
        label: str = "",
        expires_at: datetime | None = None,
        reason: str = "",
        allow_lockout: bool = False,
    ) -> tuple[PendingRequest, ...]:
        """Request the same restrictions for up to 100 users, with one number.

        Arguments and errors are as for `request`. Confirming one of the requests confirms all that
        are pending; each can be cancelled by itself.

        Returns:
            The pending requests, one for each user, in the order of the usernames given.
        """
        check_text("reason", reason, REASON_LIMIT)
        if isinstance(usernames, (str, bytes)) or not isinstance(usernames, Iterable):
            raise errors.InvalidValue("usernames", "must be several usernames")
        names = list(dict.fromkeys(canonical_username(name) for name in usernames))
        if not 1 <= len(names) <= NAMED_AT_MOST:
            raise errors.InvalidValue("usernames", f"must be 1 to {NAMED_AT_MOST} users")
        if isinstance(addresses, Iterator):  # it is read once for each user
            addresses = list(addresses)
        wanted = {
            name: self._additions(actor, name, addresses, label, expires_at) for name in names
        }
        with self._transaction(actor) as tx:
            planned = [(tx.registered_user(name), tx.plan(name, wanted[name])) for name in names]
            for _, plan in planned:
                tx.check_lockout(plan, allowed=allow_lockout)
            begun = self._begin(tx, planned, reason)
        return self._deliver(tx, begun)

    def preview(
        self,
        actor: Actor,
        username: str,
        addresses: Addresses | None = None,
        replaces: Iterable[str] = (),
        *,
        expires_at: datetime | None = None,
        only: bool = False,
    ) -> Impact:
        """Return what a change would do, without requesting it.

        Arguments and errors are as for `request`; `only` is as for `impose`. `seen_lost` has the
        sightings from addresses that the change takes away.
        """
        check_switch("only", only)
        name, ids = canonical_username(username), _ids(replaces)
        adds = self._additions(actor, name, addresses, "", expires_at, needed=not (ids or only))
        with self._view(actor) as view:
            _, removes = view.user_to_change(name, ids, adding=bool(adds))
            impact = view.plan(name, adds, removes, only=only).impact
        return self._with_sightings(name, impact)

    def demanded(self, kind: RequestKind, direction: Direction) -> Demand:
        """Return what the settings demand of a request of this kind and direction."""
        now = self.settings
        return rules.demanded(
            kind, direction, add=now.add, delete=now.delete, loosens=now.loosens, opens=now.opens
        )

    def demand_of(self, request: PendingRequest) -> Demand:
        """Return what a request has to meet: its own demand, and what stricter settings demand."""
        # An older library did not note the direction: assume the worst of the kind.
        worst = Direction.OPENS if request.kind is RequestKind.DELETE else Direction.LOOSENS
        direction = worst if request.impact is None else request.impact.direction
        return request.demand | self.demanded(request.kind, direction)

    def preview_request(self, actor: Actor, request_id: str) -> Impact:
        """Return what a pending request would do, as things are now.

        Raises:
            UnknownRequest: The request does not exist for this actor.
            IPGuardError: As `confirm` raises by its rules, such as DirectionChanged.
        """
        with self._view(actor) as view:
            stored, _ = view.request(request_id, own=False)
            impact = view.plan_request(stored.request).impact
        return self._with_sightings(stored.request.username, impact)

    def confirm(
        self,
        actor: Actor,
        request_id: str,
        number: str = "",
        *,
        allow_lockout: bool = False,
        allow_opening: bool = True,
    ) -> Applied | PendingRequest:
        """Complete a request, given its number if it demands one.

        Args:
            actor: The requester.
            request_id: The request.
            number: As it was mailed. Spaces, dashes and invisible characters are ignored, and
                decimal digits of any script are read.
            allow_lockout: Accept that the actor itself may no longer be able to log in.
            allow_opening: Accept that no restriction is left afterwards, if that was requested.

        Returns:
            The applied change and its revision; or the pending request, if the number was right and
            approvals are missing.

        Raises:
            UnknownRequest: The actor has made no such request.
            RequestClosed: It was confirmed, cancelled or has expired.
            TooSoon: It has to wait; no attempt is counted.
            NumberExpired: The number is too old; no attempt is counted.
            TooManyAttempts: The request is locked, or the actor failed too often.
            NumberFormatError: The text cannot be a number; no attempt is counted.
            WrongNumber: The number is wrong. The attempt is counted.
            DirectionChanged: The change would do worse now than what was requested.
            IPGuardError: As `request` raises, by the rules as things are now: no attempt is
                counted, and the number stays usable.
            StoreUnavailable: The outcome is unknown. A second call raises
                `RequestClosed("confirmed")` if the change went through.
        """
        if not isinstance(number, str):
            raise errors.InvalidValue("number", f"must be text, not {type(number).__name__}")
        with self._transaction(actor) as tx:
            stored, user = tx.request(request_id, own=True)
            members = fitting = tx.batch(stored, user)
            demand, failures = self._check_open(members, tx.now), 0
            numbered = demand.number and not stored.request.numbered
            if numbered:
                failures = self._check_usable(tx, stored)
                digits = confirmation.parse_number(number, self.settings.number_digits)
                # Each request has a digest of its own, so a number confirms what it was issued for.
                fitting = [each for each in members if self._fits(each[0], digits)]
            result: Applied | PendingRequest | int
            if fitting and fitting[0][0] is stored:
                consent = Consent(allow_lockout, allow_opening)
                result = self._complete(tx, fitting, demand, consent, numbered=numbered)
            else:
                result = tx.count_guess(members, failures)
        if isinstance(result, int):
            # Raised only now that the count is committed: an error inside would have undone it.
            raise errors.WrongNumber(result)
        self._announce(tx, {each.username: each for _, each in fitting})
        return result

    def _check_open(self, members: list[Member], now: datetime) -> Demand:
        """Refuse to complete a request that is closed or waits; return what it has to meet.

        Args:
            members: The request, and those that share its number.
            now: The store's time.
        """
        request = members[0][0].request
        state = rules.state_at(request, now)
        if state is RequestState.LOCKED:
            raise errors.TooManyAttempts
        rules.after(state, rules.Step.CONFIRM)
        demand = self._demand(members)
        ready_at = rules.ready_at(request, demand)
        if demand.wait and now < ready_at:
            raise errors.TooSoon(ready_at)
        return demand

    def _demand(self, members: list[Member]) -> Demand:
        """Return what requests that share a number have to meet: all that one of them does."""
        return reduce(or_, (self.demand_of(stored.request) for stored, _ in members))

    def _check_usable(self, tx: ActorTransaction, stored: StoredRequest) -> int:
        """Refuse a number that cannot confirm anything; return the actor's failures."""
        if not stored.digest or rules.number_expired(stored, tx.now):
            raise errors.NumberExpired
        if stored.key_id not in self._keys:
            _log.error(
                "the number of request %s was minted under a key that this server does not have; "
                "do all servers share their keys?",
                stored.request.id,
            )
            raise errors.NumberExpired
        failures = tx.failures(tx.actor.username)
        if failures >= self.settings.failures_per_actor:
            raise errors.TooManyAttempts
        return failures

    def _fits(self, stored: StoredRequest, digits: str) -> bool:
        return self._keys.matches(stored.key_id, stored.digest, digits, stored.request.subject)

    def _complete(
        self,
        tx: ActorTransaction,
        members: list[Member],
        demand: Demand,
        consent: Consent,
        *,
        numbered: bool,
    ) -> Applied | PendingRequest:
        """Apply requests that share a number, if nothing else that they demand is missing."""
        plans = [tx.plan_request(stored.request) for stored, _ in members]
        for plan in plans:
            tx.check_lockout(plan, allowed=consent.lockout)
            tx.check_opening(plan, allowed=consent.opening)
        if any(rules.approvals_missing(*member, demand) for member in members):
            if numbered:
                members = tx.accept_number(members)
            return members[0][0].request
        if numbered:
            tx.set_failures(tx.actor.username, 0)
        done = [tx.apply(*member, plan) for member, plan in zip(members, plans, strict=True)]
        return attrs.evolve(
            done[-1],
            restriction=done[0].restriction,
            unrestricted=any(each.unrestricted for each in done),
            added=tuple(chain.from_iterable(each.added for each in done)),
            removed=tuple(chain.from_iterable(each.removed for each in done)),
            impact=_together([user for _, user in members], [plan.impact for plan in plans]),
        )

    def approve(
        self, actor: Actor, request_id: str, *, allow_lockout: bool = False
    ) -> Applied | PendingRequest:
        """Approve a request that somebody else made.

        An actor counts once. The user concerned may approve it, but not as the only one.

        Returns:
            The applied change, if nothing else was missing; else the pending request.

        Raises:
            UnknownRequest: The request does not exist for this actor.
            RequestClosed: Its state is not `pending`.
            NotAnApprover: The actor made it, or has the e-mail address of somebody who did or who
                approved it, or it needs no approval.
            IPGuardError: As `confirm` raises, if this is what was missing last.
        """
        with self._transaction(actor) as tx:
            stored, user = tx.request(request_id, own=False)
            rules.after(rules.state_at(stored.request, tx.now), rules.Step.APPROVE)
            members = tx.batch(stored, user)
            demand = self._demand(members)
            for member in members:
                rules.check_approver(*member, actor, demand)
            members = tx.approve(members)
            result: Applied | PendingRequest = members[0][0].request
            # Time never completes a request, nor does an approval that was given before.
            ready = bool(tx.changes) and tx.now >= rules.ready_at(stored.request, demand)
            missing = any(rules.approvals_missing(*member, demand) for member in members)
            if ready and not missing and (stored.request.numbered or not demand.number):
                consent = Consent(allow_lockout, opening=True)
                result = self._complete(tx, members, demand, consent, numbered=False)
        self._announce(tx, {each.username: each for _, each in members}, stored.email)
        return result

    def resend(self, actor: Actor, request_id: str) -> PendingRequest:
        """Mail a new number to the address of the first one; the old number stops working.

        The attempts are restored. A request that waits gets its first number so. If the request
        needs no number, or no longer, nothing is mailed.

        Returns:
            The request as it is now.

        Raises:
            UnknownRequest: The actor has made no such request.
            RequestClosed: Its state is not `pending`.
            TooSoon: It has to wait.
            TooManyRequests: The last mail is too recent, or all resends are used up.
            DeliveryError: The mail could not be sent; it does not count.
            StoreUnavailable: The store failed; the old number may still be the valid one.
        """
        with self._transaction(actor) as tx:
            stored, user = tx.request(request_id, own=True)
            request, failed = stored.request, stored.mails_failed
            rules.after(rules.state_at(request, tx.now), rules.Step.RESEND)
            sharing = tx.batch(stored, user)
            demand = self._check_open(sharing, tx.now)
            if request.numbered or not demand.number:
                return request
            # A failed mail does not count, and its replacement need not wait. After as many
            # failures in a row as there are resends it has to wait again, so that requests do not
            # flood a dead mail server.
            limit = self.settings.resends_per_request
            resends = stored.resends + (failed == 0 and stored.sent_at is not None)
            if resends > limit:
                raise errors.TooManyRequests(
                    min(request.expires_at - tx.now, self.settings.request_lifetime)
                )
            if not 0 < failed <= max(1, limit) and stored.sent_at is not None:
                interval = self.settings.resend_interval
                wait = rules.wait_left([stored.sent_at], 1, interval, tx.now)
                if wait:
                    raise errors.TooManyRequests(wait)
            members = []
            for each, owner in sharing:
                request = attrs.evolve(each.request, spelling=owner.spelling)
                if request.requested_at > tx.now:  # by a clock that ran ahead
                    expires_at = rules.shifted(tx.now, self.settings.request_lifetime)
                    request = attrs.evolve(request, requested_at=tx.now, expires_at=expires_at)
                members.append(request)
            issued = self._numbered(tx, members, stored.email, resends)
            tx.append_about(members[0], Action.RESEND, user)
        return self._send(actor, issued, failed)[0]

    def cancel(self, actor: Actor, request_id: str) -> PendingRequest:
        """Cancel a request, on behalf of any actor who manages the user, and return it.

        The user concerned may cancel it too, if it waits or needs approval.

        Raises:
            UnknownRequest: The request does not exist for this actor.
            RequestClosed: Its state is not `pending`.
        """
        with self._transaction(actor) as tx:
            stored, user = tx.request_to_cancel(request_id)
            request = tx.advance(stored, rules.Step.CANCEL).request
            tx.append_about(request, Action.CANCEL, user, kind=request.kind)
        return request

    def delete(
        self,
        actor: Actor,
        restriction_id: str,
        reason: str = "",
        *,
        allow_lockout: bool = False,
        allow_opening: bool = True,
    ) -> Applied | PendingRequest:
        """Delete a restriction: at once, or by a request if the settings demand anything.

        Deleting the last restriction opens the user to every address; `Applied.unrestricted` says
        so. Interfaces that ask people first pass `allow_opening=False` unless the person has agreed
        to that: one of two restrictions on the screen may be the last one by now.

        Args:
            actor: The administrator.
            restriction_id: The restriction.
            reason: Why, up to 500 characters.
            allow_lockout: Accept that the actor itself may no longer be able to log in.
            allow_opening: Accept that it is the user's last restriction.

        Returns:
            The applied change; or the pending request, for `confirm`.

        Raises:
            UnknownRestriction: The restriction does not exist for this actor.
            InvalidValue: The reason is not valid.
            LockoutRisk: The actor could no longer log in from its present address.
            OpeningRisk: It is the user's last, nothing is demanded, and `allow_opening` is False.
            DuplicateRestriction: A request to delete it is pending.
            TooManyRequests: The actor made too many requests within the last hour.
            DeliveryError: The mail could not be sent; the request is pending, and `resend` works.
        """
        check_text("reason", reason, REASON_LIMIT)
        with self._transaction(actor) as tx:
            restriction, user = tx.restriction(restriction_id)
            plan = tx.plan(user.username, (), [restriction])
            tx.check_lockout(plan, allowed=allow_lockout)
            begun = self._begin(tx, [(user, plan)], reason, allow_opening=allow_opening)
        (request,) = self._deliver(tx, begun)
        return request if begun.applied is None else begun.applied

    # ------------------------------------------------------------- operators: no number

    def impose(
        self,
        actor: Actor,
        username: str,
        addresses: Addresses,
        *,
        reason: str,
        label: str = "",
        expires_at: datetime | None = None,
        only: bool = False,
    ) -> Applied:
        """Add restrictions at once; only for actors of every account.

        Arguments and errors are as for `request`, apart from the `reason`: required, and up to 500
        characters.

        Args:
            actor: The operator.
            username: The user.
            addresses: The addresses to add, one text or several.
            reason: Why.
            label: A name for the restrictions.
            expires_at: When they stop allowing their addresses, or None.
            only: Whether all other restrictions of the user end in the same change. Without it, a
                restricted user may log in from these addresses too.

        Returns:
            The applied change.

        Raises:
            IPGuardError: As `request` raises by its rules.
            UnknownUser: Also: the actor is not of every account.
            InvalidValue: Also: the reason is missing.
        """
        check_switch("only", only)
        check_text("reason", reason, REASON_LIMIT, required=True)
        name = canonical_username(username)
        adds = self._additions(actor, name, addresses, label, expires_at)
        _check_operator(actor, errors.UnknownUser(name))
        with self._transaction(actor) as tx:
            user = tx.registered_user(name)
            plan = tx.plan(name, adds, only=only)
            applied = tx.change(user, plan, Action.IMPOSE, reason=reason, only=only)
        self._announce(tx, {name: user})
        return applied

    def impose_many(
        self,
        actor: Actor,
        rows: Iterable[Row],
        *,
        reason: str,
        replace: bool = False,
        skip_existing: bool = False,
    ) -> Applied:
        """Add any number of restrictions, all or none, as one revision.

        All rows are read before the writer's lock is taken. Up to 100 affected users get a notice;
        if the rows are about more users, only the actor does.

        Args:
            actor: The operator.
            rows: Each is `(username, addresses[, label[, expires_at]])`, or a mapping with the keys
                `username`, `addresses`, `label`, `expires_at`.
            reason: Why; required, up to 500 characters.
            replace: Whether the rows are the whole list of their users: all other restrictions of
                these users end in the same change. A restriction that has the addresses, label and
                expiry of a row is kept.
            skip_existing: Whether to leave out rows whose addresses the user has already, whatever
                the label and the expiry, instead of refusing them.

        Returns:
            The revision, and in `counts` how many restrictions were added, kept and ended;
            `restriction` is None.

        Raises:
            IPGuardError: As `request` raises, for the first row that is refused; a note on the
                error names the row. Errors that only the store finds (an unknown user, a duplicate,
                too many restrictions) name the user instead. Nothing is changed.
            InvalidValue: Also: the reason is missing, `rows` is empty, or both options are set.
        """
        check_text("reason", reason, REASON_LIMIT, required=True)
        rules.check_bulk_options(replace=replace, skip_existing=skip_existing)
        _check_operator(actor, errors.UnknownUser("(any)"))
        names: set[str] = set()
        with self._transaction(actor, self._staged(actor, rows, names)) as tx:
            few = sorted(names) if len(names) <= NAMED_AT_MOST else []
            compared = few if replace or skip_existing else ()
            before = {name: tx.restrictions(name) for name in compared}
            # Stores written for an older protocol do not have the options.
            options = {"replace": replace, "skip_existing": skip_existing}
            counts = tx.add_staged(**{name: True for name, given in options.items() if given})
            if not any(counts):
                raise errors.InvalidValue("rows", "must not be empty")
            changes = bool(counts.added or counts.ended)
            change = tx.append(
                Action.IMPOSE_MANY,
                touches=EVERYBODY if changes else frozenset(),
                restrictions=counts.added,
                kept=counts.kept or None,
                ended=counts.ended or None,
                replace=replace,
                reason=reason,
            )
            users = [tx.user(name) for name in few if tx.restrictions(name) != before.get(name)]
        self._announce(tx, {})
        for stored in users:
            if stored is not None and stored.user.email is not None:
                # To the user alone: the actor has had one notice for all of them.
                self._notify(change, attrs.evolve(actor, email=stored.user.email), stored.user)
        return Applied(
            revision=change.revision, restriction=None, unrestricted=False, counts=counts
        )

    def _staged(self, actor: Actor, rows: Iterable[Row], names: set[str]) -> Iterator[Restriction]:
        """Yield the restrictions of rows; collect the usernames, up to the limit for notices."""
        now, ids = self._store.now(), increasing_ids()
        for position, row in enumerate(rows, start=1):
            try:
                wanted = self._row_restriction(actor, row, now)
            except errors.IPGuardError as exc:
                exc.add_note(f"row {position}")
                raise
            if len(names) <= NAMED_AT_MOST:
                names.add(wanted.username)
            yield attrs.evolve(wanted, id=next(ids))

    def check_row(self, actor: Actor, row: Row) -> Restriction:
        """Check a row as `impose_many` does, as far as that needs no store.

        Returns:
            The restriction, with an id that `impose_many` will not use.
        """
        return self._row_restriction(actor, row, self._store.now())

    def _row_restriction(self, actor: Actor, row: Row, now: datetime) -> Restriction:
        wanted = attrs.evolve(self._restriction(actor, *_cells(row)), created_at=now)
        check_new(wanted, self.settings, now)
        return wanted

    def lift(
        self, actor: Actor, restriction_id: str, *, reason: str, allow_opening: bool = True
    ) -> Applied:
        """Delete a restriction at once; only for actors of every account.

        Args:
            actor: The operator.
            restriction_id: The restriction.
            reason: Why; required, up to 500 characters.
            allow_opening: Accept that it is the user's last restriction.

        Returns:
            The applied change; `unrestricted` is True if the user may now log in from anywhere.

        Raises:
            UnknownRestriction: It does not exist, or the actor is not of every account.
            InvalidValue: The reason is missing.
            OpeningRisk: It is the user's last, and `allow_opening` is False.
        """
        check_text("reason", reason, REASON_LIMIT, required=True)
        _check_operator(actor, errors.UnknownRestriction(restriction_id))
        with self._transaction(actor) as tx:
            restriction, user = tx.restriction(restriction_id)
            plan = tx.plan(user.username, (), [restriction])
            tx.check_opening(plan, allowed=allow_opening)
            applied = tx.change(user, plan, Action.LIFT, reason=reason)
        self._announce(tx, {user.username: user})
        return applied

    def unlock(self, actor: Actor, username: str, *, reason: str) -> None:
        """Accept numbers again from a person, registered or not, who gave too many wrong ones.

        The `reason` is required, and has up to 500 characters.

        Raises:
            UnknownUser: The actor is not of every account.
            InvalidValue: The reason is missing.
        """
        check_text("reason", reason, REASON_LIMIT, required=True)
        name = canonical_username(username)
        _check_operator(actor, errors.UnknownUser(name))
        with self._transaction(actor) as tx:
            stored = tx.user(name)
            user = None if stored is None else stored.user
            tx.reset_failures(name, user, reason)
        self._announce(tx, {} if user is None else {name: user})

    # ---------------------------------------------------------------------- look-ups

    def now(self) -> datetime:
        """Return the store's time, by which expiry is judged; without I/O."""
        return self._store.now()

    def overview(
        self,
        actor: Actor,
        *,
        search: str = "",
        after: str | None = None,
        limit: int = 50,
        only: UserFilter | None = None,
    ) -> Page[UserOverview]:
        """List the users of the actor's accounts with their restrictions and pending requests.

        Args:
            actor: The viewer.
            search: The start of a username, an account ID or any word of the name, or of several
                words in any order. An address finds the users with a restriction that contains
                it, a network or a range those with exactly that restriction. Empty: all users.
            after: The `next` of the previous page.
            limit: The largest number of users, 1 to 1,000.
            only: Which of these users to list: `restricted`, `unrestricted`, `pending` (with
                pending requests) or `expiring` (with a restriction that expires within seven days).
                None lists all.

        Raises:
            InvalidValue: The search, `after`, the limit or `only` is not valid.
        """
        check_text("search", search, _SEARCH_LIMIT)
        if after is not None and not isinstance(after, str):
            raise errors.InvalidValue("after", f"must be text, not {type(after).__name__}")
        rules.check_filter(only)
        # Stores written for an older protocol do not have the filter.
        limited: dict[str, Any] = {} if only is None else {"only": only}
        return self._store.overview(
            actor.manages,
            search=search.strip(),
            after=after,
            limit=check_whole("limit", limit, 1, _PAGE_LIMIT),
            **limited,
        )

    def counts(self, actor: Actor) -> UserCounts:
        """Count the users of the actor's accounts, and those of each filter of `overview`.

        Beyond 10,000 users the numbers may be lower bounds; `UserCounts.more` says which.
        """
        return self._store.counts(actor.manages)

    def waiting(self, actor: Actor, limit: int = 100) -> tuple[PendingRequest, ...]:
        """List what waits for the actor: its own pending requests, then those it can approve.

        Requests that have the approvals that they need, or this actor's, are left out. Each kind is
        listed newest first, with the username as the host spells it.

        Args:
            actor: The viewer.
            limit: The largest number of requests, 1 to 1,000.

        Raises:
            InvalidValue: The limit is not valid.
        """
        size = asked = check_whole("limit", limit, 1, _PAGE_LIMIT)
        while True:
            found = self._store.open_requests(
                actor.manages, requested_by=actor.username, limit=asked
            )
            with self._view(actor) as view:
                waiting = self._waiting(view, found)
            if len(waiting) >= size or len(found) < asked or asked >= _REQUESTS_READ:
                return tuple(waiting[:size])
            asked *= 4

    def concerning(self, actor: Actor) -> tuple[PendingRequest, ...]:
        """List the pending requests about the actor itself that wait or need approvals.

        The actor was told about them and can cancel them, whatever accounts it manages.
        """
        with self._view(actor) as view:
            return view.concerning()

    def _waiting(self, view: ActorView, found: Iterable[Member]) -> list[PendingRequest]:
        known: dict[object, bool] = {}
        waiting = []
        for stored, user in found:
            request, own = stored.request, stored.request.requested_by == view.actor.username
            # Those that share a number are approved together.
            shared = (request.batch, stored.sent_at, request.numbered)
            key = shared if request.batch else request.id
            if not own and key not in known:
                members = view.batch(stored, user)
                known[key] = self._needs_approval(members, view.actor)
            approvals = rules.counted_approvals(stored, user)
            approved = any(each.username == view.actor.username for each in approvals)
            if own or (known[key] and not approved):
                waiting.append(attrs.evolve(request, spelling=user.spelling, approvals=approvals))
        return waiting

    def _needs_approval(self, members: list[Member], actor: Actor) -> bool:
        demand = self._demand(members)
        with suppress(errors.NotAnApprover):
            for member in members:
                rules.check_approver(*member, actor, demand)
            return any(rules.approvals_missing(*member, demand) for member in members)
        return False

    def history(
        self,
        actor: Actor,
        *,
        username: str | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> Page[Change]:
        """List audit entries, the newest first.

        An entry is visible to actors who manage the account that the user had at that time.

        Args:
            actor: The viewer.
            username: Only entries about this user, or None.
            before: The `next` of the previous page.
            limit: The largest number of entries, 1 to 1,000.

        Raises:
            InvalidValue: `before` or the limit is not valid.
            UsernameError: The username has no canonical form.
        """
        return self._store.history(
            actor.manages,
            username=None if username is None else canonical_username(username),
            before=None if before is None else check_whole("before", before, 1, _REVISION_LIMIT),
            limit=check_whole("limit", limit, 1, _PAGE_LIMIT),
        )

    def user(self, actor: Actor, username: str) -> UserOverview:
        """Return one user, by any spelling of its name, as `overview` lists it.

        Raises:
            UnknownUser: The user does not exist for this actor.
        """
        name = _known_name(username)
        # Usernames are listed by code points: none sorts between this text and the name.
        before = name[:-1] + chr(ord(name[-1]) - 1) + _LAST_CHARACTER
        for found in self._store.overview(actor.manages, after=before, limit=1):
            if found.user.username == name:
                return found
        raise errors.UnknownUser(username)

    def restriction(self, actor: Actor, restriction_id: str) -> Restriction:
        """Return a restriction, expired or not.

        Raises:
            UnknownRestriction: The restriction does not exist for this actor.
        """
        with self._view(actor) as view:
            found, _ = view.restriction(restriction_id)
        return found

    def own_request(self, actor: Actor, request_id: str) -> PendingRequest:
        """Return a request that the actor made, as it is now: its state, and what it has to meet.

        Raises:
            UnknownRequest: The actor has made no such request.
        """
        with self._view(actor) as view:
            stored, user = view.request(request_id, own=True)
            state = rules.state_at(stored.request, view.now)
            demand = self._demand(view.batch(stored, user))
        approvals = rules.counted_approvals(stored, user)
        return attrs.evolve(stored.request, state=state, demand=demand, approvals=approvals)

    def failures(self, actor: Actor, username: str) -> int:
        """Return how many wrong numbers in a row a person, registered or not, has given.

        Raises:
            UnknownUser: The actor is not of every account.
            UsernameError: The username has no canonical form.
        """
        name = canonical_username(username)
        _check_operator(actor, errors.UnknownUser(name))
        with self._view(actor) as view:
            return view.failures(name)

    # --------------------------------------------------- where users log in from

    def sightings(self, actor: Actor, username: str) -> tuple[Sighting, ...]:
        """Return where a user logged in from with the right password, newest first.

        Hosts report logins to `Guard.saw`. They are kept for 90 days, of 32 addresses at most.

        Args:
            actor: The viewer.
            username: The user, in any spelling.

        Raises:
            UnknownUser: The user does not exist for this actor.
        """
        with self._view(actor) as view:
            name = _existing(view, username)
        return self._sightings(name)

    def suggest(self, actor: Actor, username: str) -> tuple[AddressRange, ...]:
        """Return addresses that a user logs in from and has no restriction to, most used first.

        Only allowed logins count. An IPv6 address stands for its /64, or for less if the settings
        allow no restriction as wide as that. `request` accepts each of them.

        Raises:
            UnknownUser: The user does not exist for this actor.
        """
        name, restrictions = self._restricted(actor, username)
        return rules.suggest(
            restrictions,
            self._sightings(name),
            self._store.now(),
            widest_ipv6=self.settings.widest_ipv6,
        )

    def refusals(self, actor: Actor, username: str) -> tuple[Refusal, ...]:
        """Return recent logins with the right password that were refused, newest first.

        Each has a hint why. Those from addresses that are allowed now are left out.

        Raises:
            UnknownUser: The user does not exist for this actor.
        """
        name, restrictions = self._restricted(actor, username)
        now = self._store.now()
        found = rules.still_refused(restrictions, self._sightings(name), now)
        return rules.refusals(found, restrictions, now)

    def forget_sightings(self, actor: Actor, username: str) -> int:
        """Delete a user's sightings; only for actors of every account.

        The audit log records that, and how many addresses there were.

        Args:
            actor: The operator.
            username: The user, in any spelling, registered or not.

        Returns:
            How many addresses were deleted.

        Raises:
            UnknownUser: The actor is not of every account.
            UsernameError: The username has no canonical form.
        """
        name = canonical_username(username)
        _check_operator(actor, errors.UnknownUser(name))
        return self._store.forget_sightings(name, actor=actor)

    def tell_refused(self, sighting: Sighting) -> None:
        """Tell a user that a login with the right password was refused; never raise.

        Pass it to `Guard.follow_refusals`. Nothing is sent if the user is not registered or has no
        e-mail address, or if the notifier has no `login_refused`. If a user was refused from ten
        other new addresses within a day, each workflow sends it one notice a day at most, and one
        in any case. A failure is logged and counted in `notices_failed`.
        """
        tell = getattr(self._notifier, "login_refused", None)
        if tell is None:
            return
        try:
            with self._snapshot() as snapshot:
                stored = snapshot.user(sighting.username)
            if stored is None or stored.removed or not stored.user.email:
                return
            name = sighting.username
            told_at = self._told.get(name)
            if rules.refusal_notice_due(sighting, self._sightings(name), told_at):
                tell(sighting, stored.user)
                # Several threads may be here: each of these is one step.
                self._told.pop(name, None)
                self._told[name] = sighting.last_at
                if len(self._told) > _TOLD_REMEMBERED:
                    self._told.popitem(last=False)
        except Exception:
            self.notices_failed += 1
            _log.exception("could not send the notice of a refused login")

    def _restricted(self, actor: Actor, username: str) -> tuple[str, tuple[Restriction, ...]]:
        """Return the canonical name and the restrictions of a user, or raise UnknownUser."""
        with self._view(actor) as view:
            name = _existing(view, username)
            return name, view.restrictions(name)

    def _sightings(self, username: str) -> tuple[Sighting, ...]:
        # Stores written for an older protocol keep none.
        read: Any = getattr(self._store, "sightings", None)
        return () if read is None else tuple(read(username))

    def _with_sightings(self, username: str, impact: Impact) -> Impact:
        seen = self._sightings(username) if impact.lost else ()
        lost = tuple(each for each in seen if each.address in impact.lost)
        return attrs.evolve(impact, seen_lost=lost, seen_summary=rules.would_refuse(lost, seen))

    # ---------------------------------------------------------------------- the record

    def as_of(
        self,
        actor: Actor,
        username: str,
        *,
        at: datetime | None = None,
        revision: int | None = None,
    ) -> Policy:
        """Return a user's restrictions as they were: which addresses the user could log in from.

        Args:
            actor: The viewer. An actor of every account may ask about any username.
            username: The user, as it was called then.
            at: The time, aware. Temporary restrictions that had expired by then are included.
            revision: Instead of a time, the revision after which.

        Returns:
            The policy; its revision is the one in force then.

        Raises:
            UnknownUser: The user does not exist for this actor, or may have had another name or
                account then, or the username another user: what was before is not the actor's to
                see. So it is before an entry of `put_users` or `remove_users` about several users.
            InvalidValue: Not exactly one of `at` and `revision` is given, the time is in the
                future, or the record does not go back as far.
            UsernameError: The username has no canonical form.
        """
        if (at is None) is (revision is None):
            raise errors.InvalidValue("at", "give either a time or a revision")
        name = canonical_username(username)
        everywhere = actor.manages is Actor.EVERY_ACCOUNT
        if not everywhere:
            with self._view(actor) as view:
                _existing(view, name)
        if at is not None:
            moment = check_time("at", at)
            if moment > self._store.now():
                raise errors.InvalidValue("at", "must not be in the future")
            revision = self._store.revision_at(moment)
        wanted = check_whole("revision", revision, 0, _REVISION_LIMIT)
        policy = self._store.policy_at(name, wanted)
        if not everywhere and (
            self._arrived(actor.manages, name) > wanted or self._store.passed_on(name, wanted)
        ):
            raise errors.UnknownUser(name)
        return policy

    def _arrived(self, accounts: Accounts, username: str) -> int:
        """Return the revision of the last entry about a user of another account.

        That is a rename or a move from another account, or an entry of another account: a user may
        be removed from one and registered in another. 0 if there is none.
        """
        before: int | None = None
        while True:
            page = self._store.history(
                Actor.EVERY_ACCOUNT, username=username, before=before, limit=_PAGE_LIMIT
            )
            for change in page.items:
                accounts_then = {change.account_id}
                if change.action is Action.MOVE_USER:
                    accounts_then.add(change.detail.get("old"))
                foreign = any(each is not None and each not in accounts for each in accounts_then)
                if foreign or change.action is Action.RENAME_USER:
                    return change.revision
            if page.next is None:
                return 0
            before = page.next

    def restrictions_changed(
        self, actor: Actor, revision: int, *, after: str | None = None, limit: int = 100
    ) -> Page[tuple[Restriction, bool]]:
        """List the restrictions that an audit entry added or ended, those of an import included.

        Args:
            actor: The viewer.
            revision: The revision of the entry.
            after: The `next` of the previous page.
            limit: The largest number of restrictions, 1 to 1,000.

        Returns:
            Each restriction, and whether it was added.

        Raises:
            InvalidValue: No entry that is visible to this actor has this revision, or another
                argument is not valid.
        """
        check_whole("revision", revision, 1, _REVISION_LIMIT - 1)
        if after is not None and not isinstance(after, str):
            raise errors.InvalidValue("after", f"must be text, not {type(after).__name__}")
        check_whole("limit", limit, 1, _PAGE_LIMIT)
        found = self._store.history(actor.manages, before=revision + 1, limit=1).items
        if [each.revision for each in found] != [revision]:
            raise errors.InvalidValue("revision", "is not one of an audit entry that you can see")
        return self._store.restrictions_changed(revision, after=after, limit=limit)

    def report(self, actor: Actor, *, unused: timedelta | None = None) -> Iterator[AccessLine]:
        """Return the lines of an access review: each user with each of its restrictions.

        Users are listed by username. A user without restrictions has one line without a
        restriction: it may log in from anywhere.

        Args:
            actor: The viewer. Removed users are listed for actors of every account only, if they
                have restrictions.
            unused: Only restrictions that are at least as old, and have not let their user in for
                as long: up to 90 days, as logins are kept no longer.

        Returns:
            The lines. They are read from the store in pages as the iterator goes on, so they are
            not of one moment.

        Raises:
            InvalidValue: `unused` is not a duration of up to 90 days.
        """
        if unused is not None:
            check_duration("unused", unused)
            if unused > rules.SEEN_FOR:
                raise errors.InvalidValue(
                    "unused", f"must be at most {rules.SEEN_FOR.days} days, as logins are kept"
                )
        return self._report(actor, unused)

    def _report(self, actor: Actor, unused: timedelta | None) -> Iterator[AccessLine]:
        after: str | None = None
        since = None if unused is None else rules.shifted(self._store.now(), -unused)
        while True:
            page = self.overview(actor, after=after, limit=_PAGE_LIMIT)
            changes = self._store.last_changes([each.user.username for each in page])
            for line in page:
                changed = changes.get(line.user.username)
                if changed is not None and changed.account_id not in actor.manages:
                    changed = None
                for each in line.restrictions or (None,):
                    used = None if each is None else line.last_used.get(each.id)
                    if since is None or (each and rules.is_unused(each, used, since)):
                        yield AccessLine(
                            user=line.user,
                            removed=line.removed,
                            restriction=each,
                            last_used=used,
                            changed=changed,
                        )
            if page.next is None:
                return
            after = page.next

    def close(self) -> None:
        """Do nothing: a workflow holds no resources. The store belongs to the host."""

    # ------------------------------------------------------------------ what calls share

    def _derived_keys(self, purpose: str) -> tuple[bytes, ...]:
        """Derive keys for another purpose, such as signing the page's forms."""
        return self._keys.derive(purpose)

    @contextmanager
    def _transaction(
        self, actor: Actor, staged: Iterable[Restriction] | None = None
    ) -> Iterator[ActorTransaction]:
        """Begin a transaction for an actor; log its audit entries once it has committed."""
        with self._store.transaction(staged=staged) as tx:
            transaction = ActorTransaction(tx, actor, self.settings)
            yield transaction
        for change in transaction.changes:
            log_change(change)

    @contextmanager
    def _view(self, actor: Actor) -> Iterator[ActorView]:
        with self._snapshot() as snapshot:
            yield ActorView(snapshot, actor, self.settings)

    def _snapshot(self) -> AbstractContextManager[Snapshot]:
        # Stores written for an older protocol have no snapshots: read in a transaction there.
        open_snapshot: Any = getattr(self._store, "snapshot", self._store.transaction)
        return open_snapshot()  # type: ignore[no-any-return]

    def _additions(
        self,
        actor: Actor,
        username: str,
        addresses: Addresses | None,
        label: str,
        expires_at: datetime | None,
        *,
        needed: bool = True,
    ) -> list[Restriction]:
        """Check addresses as `_restriction` does, one text or several."""
        several: Iterable[object]
        if addresses is None:
            several = ()
        elif isinstance(addresses, (str, bytes, AddressRange)) or not isinstance(
            addresses, Iterable
        ):
            several = (addresses,)
        else:
            several = addresses
        ids = increasing_ids()
        found = [
            attrs.evolve(self._restriction(actor, username, each, label, expires_at), id=next(ids))
            for each in several
        ]
        if needed and not found:
            raise errors.AddressError(addresses, "it names no address to add")
        return found

    def _restriction(
        self,
        actor: Actor,
        username: object,
        addresses: object,
        label: object = "",
        expires_at: object = None,
    ) -> Restriction:
        """Check a person's input as far as that needs no store; `created_at` is set later."""
        return Restriction(
            id=new_id(),
            username=canonical_username(username),  # type: ignore[arg-type]
            # Check a constructed range by its text, so that no other rules apply to it.
            addresses=rules.read_addresses(
                str(addresses) if isinstance(addresses, AddressRange) else addresses,  # type: ignore[arg-type]
                widest_ipv4=self.settings.widest_ipv4,
                widest_ipv6=self.settings.widest_ipv6,
            ),
            label=check_text("label", label, LABEL_LIMIT),
            created_at=_UNSET,
            created_by=actor.username,
            expires_at=None if expires_at is None else check_time("expires_at", expires_at),
        )

    def _begin(
        self,
        tx: ActorTransaction,
        planned: list[tuple[User, Plan]],
        reason: str,
        *,
        allow_opening: bool = True,
    ) -> _Begun:
        """Make requests that share a number; or make the change, if nothing is demanded."""
        demand = Demand()
        for _, plan in planned:
            demand |= self.demanded(plan.kind, plan.impact.direction)
        requests = [self._requested(tx, user, plan, demand, reason) for user, plan in planned]
        if not demand:
            done, applied = [], None
            for (user, plan), request in zip(planned, requests, strict=True):
                tx.check_opening(plan, allowed=allow_opening)
                action = Action.CONFIRM if plan.adds else Action.DELETE
                kind = plan.kind if plan.kind is RequestKind.REPLACE else None
                applied = tx.change(user, plan, action, reason=reason, kind=kind)
                state = RequestState.CONFIRMED
                done.append(attrs.evolve(request, state=state, revision=applied.revision))
            users = {user.username: user for user, _ in planned}
            return _Begun(
                [StoredRequest(request=each, email="") for each in done], "", applied, users
            )
        tx.check_rate()
        for _, plan in planned:
            tx.check_not_pending(plan)
        if len(requests) > 1:
            requests = [attrs.evolve(each, batch=requests[0].id) for each in requests]
        issued = self._numbered(
            tx, requests, tx.actor.email, mint=demand.number and not demand.wait
        )
        for (user, plan), request in zip(planned, requests, strict=True):
            tx.append(
                Action.REQUEST,
                user,
                kind=request.kind,
                addresses=joined(request.adds or request.removed),
                label=request.label,
                expires_at=request.restriction_expires_at,
                request=request.id,
                replaces=joined(request.removes) if request.adds else None,
                ends=joined(request.removed) if request.adds else None,
                **effect(plan.impact),
                reason=reason,
                ready_at=request.ready_at if demand.wait else None,
                approvals=demand.approvals or None,
            )
        if demand.is_told:
            issued = issued._replace(users={user.username: user for user, _ in planned})
        return issued

    def _requested(
        self, tx: ActorTransaction, user: User, plan: Plan, demand: Demand, reason: str
    ) -> PendingRequest:
        first = (*plan.adds, *plan.removes)[0]
        lifetime = demand.wait + self.settings.request_lifetime
        return PendingRequest(
            id=new_id(),
            username=user.username,
            kind=plan.kind,
            adds=tuple(each.addresses for each in plan.adds),
            removes=tuple(each.id for each in plan.removes),
            removed=tuple(each.addresses for each in plan.removes),
            label=first.label,
            requested_by=tx.actor.username,
            requested_at=tx.now,
            expires_at=rules.shifted(tx.now, lifetime),
            number_expires_at=tx.now,
            attempts_left=0,
            state=RequestState.PENDING,
            restriction_expires_at=first.expires_at,
            reason=reason,
            impact=plan.impact,
            demand=demand,
            spelling=user.spelling,
        )

    def _numbered(
        self,
        tx: ActorTransaction,
        requests: list[PendingRequest],
        email: str,
        resends: int = 0,
        *,
        mint: bool = True,
    ) -> _Begun:
        """Save requests, and with `mint` a new number of theirs and all its attempts."""
        number = confirmation.mint(self.settings.number_digits) if mint else ""
        until = rules.shifted(tx.now, self.settings.number_lifetime)
        spellings = tuple(request.spelling for request in requests)
        issued = []
        for each in requests:
            stored = StoredRequest(request=each, email=email)
            if mint:
                request = attrs.evolve(
                    each,
                    number_expires_at=min(until, each.expires_at),
                    attempts_left=self.settings.attempts_per_number,
                    also_for=tuple(other for other in spellings if other != each.spelling),
                )
                key_id = self._keys.minting
                stored = attrs.evolve(
                    stored,
                    request=request,
                    key_id=key_id,
                    digest=self._keys.digest(key_id, number, request.subject),
                    resends=resends,
                    sent_at=tx.now,
                )
            tx.save(stored)
            issued.append(stored)
        return _Begun(issued, number)

    def _deliver(self, tx: ActorTransaction, begun: _Begun) -> tuple[PendingRequest, ...]:
        """Send what follows from a call of `request` or `delete`; return the requests."""
        try:
            return self._send(tx.actor, begun)
        finally:
            if begun.users:
                self._announce(tx, begun.users)

    def _send(self, actor: Actor, issued: _Begun, failed: int = 0) -> tuple[PendingRequest, ...]:
        """Mail a number to the address recorded at the request; return the requests.

        `failed` counts the mails of this request that have failed in a row.
        """
        stored = issued.stored[0]
        request, several = stored.request, [each.request for each in issued.stored]
        impacts = [each.impact for each in several if each.impact is not None]
        if len(impacts) == len(several):
            request = attrs.evolve(request, impact=_together(several, impacts))
        try:
            if issued.number:
                self._notifier.number_issued(
                    request,
                    confirmation.format_number(issued.number),
                    attrs.evolve(actor, email=stored.email),
                )
        except Exception as exc:
            with suppress(errors.IPGuardError):  # the mail's failure is the one to report
                self._record_failed_mail(stored, actor, failed + 1)
            # The text of a notifier's error may hold anything, even the number; only DeliveryError
            # is meant to be shown. Keep others out of the tracebacks that hosts log.
            shown = exc if isinstance(exc, errors.DeliveryError) else None
            reason = shown.reason if shown else type(exc).__name__
            raise errors.DeliveryError(reason, stored.request.id) from shown
        return tuple(several)

    def _record_failed_mail(self, sent: StoredRequest, actor: Actor, failed: int) -> None:
        """Record that a mail failed, so that `resend` works at once and costs nothing."""
        with self._transaction(actor) as tx:
            stored, user = tx.request(sent.request.id, own=True)
            if stored.digest != sent.digest:
                return
            for each, _ in tx.batch(stored, user):
                tx.save(attrs.evolve(each, mails_failed=failed))
            tx.append_about(stored.request, Action.DELIVERY_FAILED, user)

    def _announce(
        self, tx: ActorTransaction, users: Mapping[str, User], requester: str | None = None
    ) -> None:
        """Mail the notices of a call, one to each person.

        A change tells the actor, the user and the `requester` (an e-mail address); if it is of
        several users, the actor gets one notice of all. A request that waits or needs approval
        tells the users alone: its actor gets the number. An approval tells the other two.
        """
        changes = [each for each in tx.changes if each.action not in _STEPS]
        changes = changes or [each for each in tx.changes if each.action in _TOLD]
        if not changes:
            return
        first, several = changes[0], len(changes) > 1
        asked, approved = (first.action is each for each in _TOLD)
        found = [users.get(change.username or "") for change in changes]
        known = {(tx.actor.email if asked else requester or "").casefold()}
        known.add(tx.actor.email.casefold())
        for change, user in zip(changes, found, strict=True) if asked or several else ():
            if user and user.email and user.email.casefold() not in known and not approved:
                self._notify(change, attrs.evolve(tx.actor, email=user.email), user)
        if asked:
            return
        about = found[0]
        if several:
            names = [
                change.username or "" if user is None else user.spelling
                for change, user in zip(changes, found, strict=True)
            ]
            texts = [change.detail.get("afterwards", "") for change in changes]
            shown = {"users": joined(names), "afterwards": _grouped(names, texts)}
            directions = [change.detail.get("direction", "neutral") for change in changes]
            shown["direction"] = max(directions, key=lambda name: Direction[name.upper()])
            first, about = attrs.evolve(first, detail={**first.detail, **shown}), None
        unmailed = None if about is None else attrs.evolve(about, email=None)
        self._notify(first, tx.actor, unmailed if approved else about)
        told = {tx.actor.email.casefold()}
        if about is not None and not approved:
            told.add((about.email or "").casefold())
        if requester is not None and requester.casefold() not in told:
            self._notify(first, attrs.evolve(tx.actor, email=requester), unmailed)

    def _notify(self, change: Change, actor: Actor, user: User | None) -> None:
        try:
            self._notifier.change_applied(change, actor, user)
        except Exception:
            # The change holds with or without its notice.
            self.notices_failed += 1
            _log.exception("could not send the notice of revision %d", change.revision)


def _known_name(username: str) -> str:
    """Return the canonical form of a username; without one, no user can have it."""
    try:
        return canonical_username(username)
    except errors.UsernameError:
        raise errors.UnknownUser(username) from None


def _existing(view: ActorView, username: str) -> str:
    """Return the canonical name of a user, or raise UnknownUser."""
    name = _known_name(username)
    if view.user(name) is None:
        raise errors.UnknownUser(username)
    return name


def _together(users: Sequence[User | PendingRequest], impacts: Sequence[Impact]) -> Impact:
    """Return the impact on the first of several users, with direction and summary of all."""
    worst = max(each.direction for each in impacts)
    texts = [each.summary for each in impacts]
    summary = _grouped([user.spelling for user in users], texts)
    return attrs.evolve(impacts[0], direction=worst, summary=summary)


def _grouped(names: Iterable[str], texts: Sequence[str]) -> str:
    """Return what holds for several users: one text if it is the same, else by user."""
    groups: dict[str, list[str]] = {}
    for name, text in zip(names, texts, strict=True):
        groups.setdefault(text, []).append(name)
    if len(groups) == 1:
        return texts[0]
    return " ".join(f"{joined(each)}: {text}" for text, each in groups.items())


def _ids(replaces: Iterable[str]) -> list[str]:
    if isinstance(replaces, str) or not isinstance(replaces, Iterable):
        raise errors.InvalidValue("replaces", "must be several ids of restrictions")
    ids = list(replaces)
    for each in ids:
        if not isinstance(each, str):
            raise errors.UnknownRestriction(each)
    return list(dict.fromkeys(ids))


def _cells(row: Row) -> tuple[object, ...]:
    if isinstance(row, Mapping):
        if not {"username", "addresses"} <= row.keys() <= set(_COLUMNS):
            raise errors.InvalidValue(
                "rows",
                "a mapping has the keys username and addresses, and optionally label and"
                " expires_at",
            )
        label = row.get("label")
        label = "" if label is None else label
        return (row["username"], row["addresses"], label, row.get("expires_at"))
    if isinstance(row, (str, bytes)) or not isinstance(row, Sequence) or not 2 <= len(row) <= 4:
        raise errors.InvalidValue(
            "rows", "a row is (username, addresses), optionally with label and expires_at"
        )
    return tuple(row)


def _check_operator(actor: Actor, otherwise: errors.IPGuardError) -> None:
    if actor.manages is not Actor.EVERY_ACCOUNT:
        raise otherwise
