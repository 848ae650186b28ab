"""Restrictions change in two phases: a request, whose number is mailed, and its confirmation.

Each call is one transaction, then one mail. Code inside the transaction (`_transaction.py`) is
plain and sequential, because it holds the writer's lock: it reads, asks `ipguard.rules`, writes,
and appends an audit entry. Mails are sent after the commit, never inside the transaction.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import attrs

from ipguard import confirmation, errors, rules
from ipguard._checks import check_text, check_time, check_whole
from ipguard.addresses import AddressRange
from ipguard.audit import log_change
from ipguard.model import (
    EVERYBODY,
    LABEL_LIMIT,
    REASON_LIMIT,
    Action,
    Actor,
    Applied,
    Change,
    Page,
    PendingRequest,
    RequestKind,
    RequestState,
    Restriction,
    StoredRequest,
    User,
    UserOverview,
)
from ipguard.notify import Notifier
from ipguard.store import NAMED_AT_MOST, Closing, RestrictionStore
from ipguard.usernames import canonical_username
from ipguard.workflow._transaction import (
    ActorTransaction,
    ActorView,
    Consent,
    check_new,
    increasing_ids,
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
_REVISION_LIMIT: Final = 2**63 - 1  # the largest integer that the databases can hold
_LAST_CHARACTER: Final = "\U0010ffff"  # a noncharacter, which no username contains
_UNSET: Final = datetime.min.replace(tzinfo=UTC)


class _Issued(NamedTuple):
    stored: StoredRequest
    number: str


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
        addresses: str | AddressRange,
        *,
        label: str = "",
        expires_at: datetime | None = None,
        allow_lockout: bool = False,
    ) -> PendingRequest:
        """Request a restriction, and mail its confirmation number to the actor.

        Args:
            actor: The requester.
            username: The user to restrict.
            addresses: An address, a network or a `first-last` range. Surrounding blanks are
                ignored.
            label: A name for it, up to 100 characters.
            expires_at: When it stops allowing its addresses, or None. The user stays restricted
                afterwards.
            allow_lockout: Accept that the actor itself may no longer be able to log in.

        Returns:
            The pending request, for `confirm`.

        Raises:
            AddressError: The addresses cannot be parsed or used.
            AddressTooBroad: They are wider than the settings allow.
            UsernameError: The username has no canonical form.
            InvalidValue: The label or the time is not valid.
            UnknownUser: The user does not exist for this actor.
            DuplicateRestriction: The user has these addresses, or a request for them is pending,
                whatever the label and the expiry: the error says what exists and how it differs.
            TooManyRestrictions: The user has as many as are allowed.
            LockoutRisk: The actor could no longer log in from its present address.
            TooManyRequests: The actor made too many requests within the last hour.
            DeliveryError: The mail could not be sent; the request is pending, and `resend` works.
        """
        wanted = self._restriction(actor, username, addresses, label, expires_at)
        with self._transaction(actor) as tx:
            wanted = attrs.evolve(wanted, created_at=tx.now)
            user = tx.registered_user(wanted.username)
            left, _ = tx.check_addition(wanted)
            tx.check_not_pending(wanted)
            tx.check_lockout(user.username, left, allowed=allow_lockout)
            issued = self._issue(tx, user, RequestKind.ADD, wanted)
        return self._deliver(actor, issued)

    def confirm(
        self,
        actor: Actor,
        request_id: str,
        number: str,
        *,
        allow_lockout: bool = False,
        allow_opening: bool = True,
    ) -> Applied:
        """Apply a request, given its number.

        Args:
            actor: The requester.
            request_id: The request.
            number: As it was mailed. Spaces, dashes and invisible characters are ignored, and
                decimal digits of any script are read.
            allow_lockout: Accept that the actor itself may no longer be able to log in.
            allow_opening: Accept that a deletion may remove the user's last restriction.

        Returns:
            The applied change and its revision.

        Raises:
            UnknownRequest: The actor has made no such request.
            RequestClosed: It was confirmed, cancelled or has expired.
            NumberExpired: The number is too old; no attempt is counted.
            TooManyAttempts: The request is locked, or the actor failed too often.
            NumberFormatError: The text cannot be a number; no attempt is counted.
            WrongNumber: The number is wrong. The attempt is counted.
            IPGuardError: As `request` and `delete` raise, by the rules as things are now: no
                attempt is counted, and the number stays usable.
            StoreUnavailable: The outcome is unknown. A second call raises
                `RequestClosed("confirmed")` if the change went through.
        """
        if not isinstance(number, str):
            raise errors.InvalidValue("number", f"must be text, not {type(number).__name__}")
        with self._transaction(actor) as tx:
            stored, user = tx.request(request_id, own=True)
            failures = self._check_confirmable(tx, stored)
            digits = confirmation.parse_number(number, self.settings.number_digits)
            result: Applied | int
            if self._keys.matches(stored.key_id, stored.digest, digits, _subject(stored.request)):
                result = tx.apply(stored, user, Consent(allow_lockout, allow_opening))
            else:
                result = tx.count_guess(stored, user, failures)
        if not isinstance(result, Applied):
            # Raised only now that the count is committed: an error inside would have undone it.
            raise errors.WrongNumber(result)
        self._announce(tx, user)
        return result

    def _check_confirmable(self, tx: ActorTransaction, stored: StoredRequest) -> int:
        """Refuse a request that no number can confirm; return the actor's failures."""
        state = rules.state_at(stored.request, tx.now)
        if state is RequestState.LOCKED:
            raise errors.TooManyAttempts
        rules.after(state, rules.Step.CONFIRM)
        if rules.number_expired(stored, tx.now):
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

    def resend(self, actor: Actor, request_id: str) -> PendingRequest:
        """Mail a new number to the address of the first one; the old number stops working.

        The attempts are restored.

        Returns:
            The request as it is now.

        Raises:
            UnknownRequest: The actor has made no such request.
            RequestClosed: Its state is not `pending`.
            TooManyRequests: The last mail is too recent, or all resends are used up.
            DeliveryError: The mail could not be sent; it does not count.
            StoreUnavailable: The store failed; the old number may still be the valid one.
        """
        with self._transaction(actor) as tx:
            stored, user = tx.request(request_id, own=True)
            request, failed = stored.request, stored.mails_failed
            rules.after(rules.state_at(request, tx.now), rules.Step.RESEND)
            # A failed mail does not count, and its replacement need not wait. After as many
            # failures in a row as there are resends it has to wait again, so that requests do not
            # flood a dead mail server.
            limit = self.settings.resends_per_request
            resends = stored.resends + (failed == 0)
            if resends > limit:
                raise errors.TooManyRequests(
                    min(request.expires_at - tx.now, self.settings.request_lifetime)
                )
            if not 0 < failed <= max(1, limit) and stored.sent_at is not None:
                interval = self.settings.resend_interval
                wait = rules.wait_left([stored.sent_at], 1, interval, tx.now)
                if wait:
                    raise errors.TooManyRequests(wait)
            if request.requested_at > tx.now:  # by a clock that ran ahead
                expires_at = rules.shifted(tx.now, self.settings.request_lifetime)
                request = attrs.evolve(request, requested_at=tx.now, expires_at=expires_at)
            request = attrs.evolve(request, spelling=user.spelling)
            issued = self._numbered(tx, request, stored.email, resends)
            tx.append_about(request, Action.RESEND, user)
        return self._deliver(actor, issued, failed)

    def cancel(self, actor: Actor, request_id: str) -> PendingRequest:
        """Cancel a request, on behalf of any actor who manages the user, and return it.

        Raises:
            UnknownRequest: The request does not exist for this actor.
            RequestClosed: Its state is not `pending`.
        """
        with self._transaction(actor) as tx:
            stored, user = tx.request(request_id, own=False)
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
        """Delete a restriction: at once, or by a number if `confirm_deletes` says so.

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
            OpeningRisk: It is the user's last, no number is needed, and `allow_opening` is False.
            DuplicateRestriction: A request to delete it is pending.
            TooManyRequests: The actor made too many requests within the last hour.
            DeliveryError: The mail could not be sent; the request is pending, and `resend` works.
        """
        check_text("reason", reason, REASON_LIMIT)
        with self._transaction(actor) as tx:
            restriction, user = tx.restriction(restriction_id)
            consent = Consent(allow_lockout, allow_opening)
            remainder = tx.check_removal(restriction, consent)
            outcome: _Issued | Applied
            if self.settings.deletion_needs_number(last=remainder.opens):
                tx.check_not_pending(restriction, deletes=restriction.id)
                outcome = self._issue(tx, user, RequestKind.DELETE, restriction, reason)
            else:
                outcome = tx.remove(user, restriction, Action.DELETE, consent, reason=reason)
        if isinstance(outcome, _Issued):
            return self._deliver(actor, outcome)
        self._announce(tx, user)
        return outcome

    # ------------------------------------------------------------- operators: no number

    def impose(
        self,
        actor: Actor,
        username: str,
        addresses: str | AddressRange,
        *,
        reason: str,
        label: str = "",
        expires_at: datetime | None = None,
    ) -> Applied:
        """Add a restriction at once; only for actors of every account.

        Arguments and errors are as for `request`, apart from the `reason`: required, and up to 500
        characters.

        Returns:
            The applied change.

        Raises:
            IPGuardError: As `request` raises by its rules.
            UnknownUser: Also: the actor is not of every account.
            InvalidValue: Also: the reason is missing.
        """
        check_text("reason", reason, REASON_LIMIT, required=True)
        wanted = self._restriction(actor, username, addresses, label, expires_at)
        _check_operator(actor, errors.UnknownUser(wanted.username))
        with self._transaction(actor) as tx:
            user = tx.registered_user(wanted.username)
            new = attrs.evolve(wanted, created_at=tx.now)
            consent = Consent(lockout=True, opening=False)
            applied = tx.add(user, new, Action.IMPOSE, consent, reason=reason)
        self._announce(tx, user)
        return applied

    def impose_many(self, actor: Actor, rows: Iterable[Row], *, reason: str) -> Applied:
        """Add any number of restrictions, all or none, as one revision.

        All rows are read before the writer's lock is taken. Up to 100 affected users get a notice;
        if there are more, only the actor does.

        Args:
            actor: The operator.
            rows: Each is `(username, addresses[, label[, expires_at]])`, or a mapping with the keys
                `username`, `addresses`, `label`, `expires_at`.
            reason: Why; required, up to 500 characters.

        Returns:
            The revision; `restriction` is None.

        Raises:
            IPGuardError: As `request` raises, for the first row that is refused; a note on the
                error names the row. Errors that only the store finds (an unknown user, a duplicate,
                too many restrictions) name the user instead. Nothing is changed.
            InvalidValue: Also: the reason is missing, or `rows` is empty.
        """
        check_text("reason", reason, REASON_LIMIT, required=True)
        _check_operator(actor, errors.UnknownUser("(any)"))
        names: set[str] = set()
        with self._transaction(actor, self._staged(actor, rows, names)) as tx:
            count = tx.add_staged()
            if not count:
                raise errors.InvalidValue("rows", "must not be empty")
            change = tx.append(
                Action.IMPOSE_MANY, touches=EVERYBODY, restrictions=count, reason=reason
            )
            users = [] if len(names) > NAMED_AT_MOST else [tx.user(name) for name in sorted(names)]
        self._announce(tx, None)
        for stored in users:
            if stored is not None and stored.user.email is not None:
                # To the user alone: the actor has had one notice for all of them.
                self._notify(change, attrs.evolve(actor, email=stored.user.email), stored.user)
        return Applied(revision=change.revision, restriction=None, unrestricted=False)

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
            consent = Consent(lockout=True, opening=allow_opening)
            applied = tx.remove(user, restriction, Action.LIFT, consent, reason=reason)
        self._announce(tx, user)
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
        self._announce(tx, user)

    # ---------------------------------------------------------------------- look-ups

    def now(self) -> datetime:
        """Return the store's time, by which expiry is judged; without I/O."""
        return self._store.now()

    def overview(
        self, actor: Actor, *, search: str = "", after: str | None = None, limit: int = 50
    ) -> Page[UserOverview]:
        """List the users of the actor's accounts with their restrictions and pending requests.

        Args:
            actor: The viewer.
            search: The start of a username, an account ID or any word of the name, or of several
                words in any order. An address finds the users with a restriction that contains
                it, a network or a range those with exactly that restriction. Empty: all users.
            after: The `next` of the previous page.
            limit: The largest number of users, 1 to 1,000.

        Raises:
            InvalidValue: The search, `after` or the limit is not valid.
        """
        check_text("search", search, _SEARCH_LIMIT)
        if after is not None and not isinstance(after, str):
            raise errors.InvalidValue("after", f"must be text, not {type(after).__name__}")
        return self._store.overview(
            actor.manages,
            search=search.strip(),
            after=after,
            limit=check_whole("limit", limit, 1, _PAGE_LIMIT),
        )

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
        try:
            name = canonical_username(username)
        except errors.UsernameError:
            raise errors.UnknownUser(username) from None
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
        """Return a request that the actor made, in its present state, which may be closed.

        Raises:
            UnknownRequest: The actor has made no such request.
        """
        with self._view(actor) as view:
            stored, _ = view.request(request_id, own=True)
            state = rules.state_at(stored.request, view.now)
        return attrs.evolve(stored.request, state=state)

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
        # Stores written for an older protocol have no snapshots: read in a transaction there.
        open_snapshot: Any = getattr(self._store, "snapshot", self._store.transaction)
        with open_snapshot() as snapshot:
            yield ActorView(snapshot, actor)

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

    def _issue(
        self,
        tx: ActorTransaction,
        user: User,
        kind: RequestKind,
        wanted: Restriction,
        reason: str = "",
    ) -> _Issued:
        tx.check_rate()
        request = PendingRequest(
            id=new_id(),
            username=user.username,
            kind=kind,
            addresses=wanted.addresses,
            label=wanted.label,
            requested_by=tx.actor.username,
            requested_at=tx.now,
            expires_at=rules.shifted(tx.now, self.settings.request_lifetime),
            number_expires_at=tx.now,
            attempts_left=0,
            state=RequestState.PENDING,
            restriction_id=wanted.id if kind is RequestKind.DELETE else None,
            restriction_expires_at=wanted.expires_at,
            reason=reason,
            spelling=user.spelling,
        )
        issued = self._numbered(tx, request, tx.actor.email)
        tx.append(
            Action.REQUEST,
            user,
            kind=kind,
            addresses=request.addresses,
            label=request.label,
            expires_at=request.restriction_expires_at,
            request=request.id,
            reason=reason,
        )
        return issued

    def _numbered(
        self, tx: ActorTransaction, request: PendingRequest, email: str, resends: int = 0
    ) -> _Issued:
        """Save a request with a new number, which replaces the old one, and all its attempts."""
        number = confirmation.mint(self.settings.number_digits)
        request = attrs.evolve(
            request,
            number_expires_at=min(
                rules.shifted(tx.now, self.settings.number_lifetime), request.expires_at
            ),
            attempts_left=self.settings.attempts_per_number,
        )
        stored = StoredRequest(
            request=request,
            email=email,
            key_id=self._keys.minting,
            digest=self._keys.digest(self._keys.minting, number, _subject(request)),
            resends=resends,
            sent_at=tx.now,
        )
        tx.save(stored)
        return _Issued(stored, number)

    def _deliver(self, actor: Actor, issued: _Issued, failed: int = 0) -> PendingRequest:
        """Mail a number to the address recorded at the request; return the request.

        `failed` counts the mails of this request that have failed in a row.
        """
        stored = issued.stored
        try:
            self._notifier.number_issued(
                stored.request,
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
        return stored.request

    def _record_failed_mail(self, sent: StoredRequest, actor: Actor, failed: int) -> None:
        """Record that a mail failed, so that `resend` works at once and costs nothing."""
        with self._transaction(actor) as tx:
            stored, user = tx.request(sent.request.id, own=True)
            if stored.digest != sent.digest:
                return
            tx.save(attrs.evolve(stored, mails_failed=failed))
            tx.append_about(stored.request, Action.DELIVERY_FAILED, user)

    def _announce(self, tx: ActorTransaction, user: User | None) -> None:
        for change in tx.changes:
            self._notify(change, tx.actor, user)

    def _notify(self, change: Change, actor: Actor, user: User | None) -> None:
        try:
            self._notifier.change_applied(change, actor, user)
        except Exception:
            # The change holds with or without its notice.
            self.notices_failed += 1
            _log.exception("could not send the notice of revision %d", change.revision)


def _subject(request: PendingRequest) -> tuple[str, ...]:
    """Return the fields that a number confirms; a change of any of them invalidates the number."""
    expires_at = request.restriction_expires_at
    return (
        request.id,
        request.username,
        request.kind,
        str(request.addresses),
        request.label,
        request.requested_by,
        request.restriction_id or "",
        "" if expires_at is None else expires_at.isoformat(),
    )


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
