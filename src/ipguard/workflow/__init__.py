"""The two phases: a change is requested, its number is mailed, and typed in, the change holds.

Each call is one transaction, then one mail. Inside the transaction stands plain sequential code
(`_steps.py`): it holds the writer's turn, so nothing can come in between. It reads, asks
`ipguard.rules`, writes, and appends to the trail. Nobody is mailed before the commit, and no mail
is waited for inside.
"""

from __future__ import annotations

import logging
from datetime import datetime

import attrs

from ipguard import rules
from ipguard.addresses import AddressRange
from ipguard.errors import (
    InvalidValue,
    NumberExpired,
    TooManyAttempts,
    TooManyRequests,
    WrongNumber,
)
from ipguard.model import (
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
    checked_text,
)
from ipguard.store import Transaction, log_change, particulars
from ipguard.usernames import canonical_username
from ipguard.workflow import _steps
from ipguard.workflow._base import Asked, subject_of, wanted_restriction
from ipguard.workflow._operators import Operators
from ipguard.workflow._settings import WorkflowSettings

__all__ = ["Workflow", "WorkflowSettings"]

_log = logging.getLogger("ipguard.workflow")

_SEARCH_LIMIT = 256
_PAGE_LIMIT = 1000
_REVISION_LIMIT = 2**63 - 1  # what databases hold


class Workflow(Operators):
    """Changes restrictions, and only as the actor may. Thread-safe, survives `fork()`.

    Who the actor is, the host has authenticated: a number sent by e-mail confirms a change, it is
    no authentication (NIST SP 800-63B-4 3.1.3.1). A user, request or restriction of an account that
    the actor does not manage does not exist for it: `UnknownUser`, `UnknownRequest`,
    `UnknownRestriction`.

    Args:
        store: Where everything is kept.
        notifier: How numbers and notices reach people.
        key: The secret that keys the digests of numbers, at least 32 bytes; or several, of which
            the first mints and all verify. All servers share it; it is never stored.
        settings: The figures.

    Attributes:
        settings: As given.
        notices_failed: How many notices after a change could not be sent.

    Raises:
        InvalidValue: The key is too short or not bytes, or the settings are none.
    """

    # -- the first phase -------------------------------------------------------------------------

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
        """Ask for a restriction, and mail its confirmation number to the actor.

        Args:
            actor: Who asks.
            username: Who would be restricted.
            addresses: An address, a network or a `first-last` range; blanks at the ends do not
                matter.
            label: What to call it, up to 100 characters.
            expires_at: When it stops letting the addresses in, or None. The user stays restricted.
            allow_lockout: Accept that the actor itself could not get in any more.

        Returns:
            The request; it waits for `confirm`.

        Raises:
            AddressError: The addresses are not acceptable text.
            AddressTooBroad: They are more than the settings allow.
            UsernameError: The username has no canonical form.
            InvalidValue: The label or the time makes no sense.
            UnknownUser: There is no such user for this actor.
            DuplicateRestriction: The user has this restriction, or it is asked for already.
            TooManyRestrictions: The user has as many as are allowed.
            LockoutRisk: The actor could not get in from where it is.
            TooManyRequests: The actor made too many requests within the hour.
            DeliveryError: The mail could not be sent; the request waits, and `resend` works.
            StoreUnavailable: Nothing is known to have been changed.
        """
        wanted = wanted_restriction(actor, username, addresses, label, expires_at)
        with self._transaction() as tx:
            wanted = attrs.evolve(wanted, created_at=tx.now)
            user = _steps.registered_user(tx, actor, wanted.username)
            left, _ = _steps.with_added(tx, self.settings, wanted)
            _steps.check_not_pending(tx, user.username, wanted.addresses)
            _steps.check_lockout(tx, actor, user.username, left, allowed=allow_lockout)
            asked = self._ask(tx, actor, user, RequestKind.ADD, wanted)
        return self._deliver(actor, *asked)

    def resend(self, actor: Actor, request_id: str) -> PendingRequest:
        """Mail a new number to where the first one went; the old one is dead.

        The attempts are restored.

        Args:
            actor: Who made the request.
            request_id: Its id.

        Returns:
            The request as it is now.

        Raises:
            UnknownRequest: There is no such request of this actor's own.
            RequestClosed: It is not pending any more.
            TooManyRequests: The last mail is too recent, or the new numbers are used up.
            DeliveryError: The mail could not be sent; it does not count.
            StoreUnavailable: Nothing is known to have been changed.
        """
        with self._transaction() as tx:
            stored, user = _steps.request_and_user(tx, actor, request_id, own=True)
            stored = _steps.advance(stored, rules.Step.RESEND, tx.now)
            # A mail that failed does not count: this one takes its place, and at once. But where as
            # many have failed in a row as may be resent, a dead mail server is no longer stormed.
            limit = self.settings.resends_per_request
            resends = stored.resends + (stored.mails_failed == 0)
            if resends > limit:
                raise TooManyRequests(stored.request.expires_at - tx.now)
            at_once = 0 < stored.mails_failed <= max(1, limit)
            if not at_once and stored.sent_at is not None:
                due = stored.sent_at + self.settings.resend_interval
                if tx.now < due:
                    raise TooManyRequests(due - tx.now)
            failed = stored.mails_failed
            stored, number = self._numbered(stored.request, stored.email, tx.now, resends)
            tx.save_request(stored)
            change = _steps.append(
                tx,
                Action.RESEND,
                actor,
                user,
                particulars(addresses=stored.request.addresses, request=request_id),
            )
        return self._deliver(actor, stored, number, change, failed)

    def cancel(self, actor: Actor, request_id: str) -> PendingRequest:
        """Withdraw a request. Any actor who manages the user may.

        Returns:
            The request, cancelled.

        Raises:
            UnknownRequest: There is no such request for this actor.
            RequestClosed: It is not pending any more.
            StoreUnavailable: Nothing is known to have been changed.
        """
        with self._transaction() as tx:
            stored, user = _steps.request_and_user(tx, actor, request_id, own=False)
            stored = _steps.advance(stored, rules.Step.CANCEL, tx.now)
            tx.save_request(stored)
            change = _steps.append(
                tx,
                Action.CANCEL,
                actor,
                user,
                particulars(
                    kind=stored.request.kind, addresses=stored.request.addresses, request=request_id
                ),
            )
        log_change(change)
        return stored.request

    # -- the second phase ------------------------------------------------------------------------

    def confirm(
        self, actor: Actor, request_id: str, number: str, *, allow_lockout: bool = False
    ) -> Applied:
        """Let a request hold, given its number.

        Args:
            actor: Who made the request.
            request_id: Its id.
            number: As it was mailed; spaces and hyphens do not matter.
            allow_lockout: Accept that the actor itself could not get in any more.

        Returns:
            What holds now, and since which revision.

        Raises:
            UnknownRequest: There is no such request of this actor's own.
            RequestClosed: It was confirmed, cancelled or has expired.
            NumberExpired: The number's time is over; nothing is counted.
            TooManyAttempts: The request is locked, or the actor failed too often.
            WrongNumber: It is not the number. The guess is counted.
            IPGuardError: As `request` and `delete` raise, by the rules as things are now: no
                attempt is counted, and the number stays usable.
            StoreUnavailable: The outcome is not known. Trying again shows
                `RequestClosed("confirmed")` if the change went through.
        """
        if not isinstance(number, str):
            raise InvalidValue("number", f"must be text, not {type(number).__name__}")
        with self._transaction() as tx:
            stored, user = _steps.request_and_user(tx, actor, request_id, own=True)
            failures = self._check_open(tx, actor, stored)
            outcome: tuple[Applied | int, Change]
            if self._keys.matches(stored.key_id, stored.digest, number, subject_of(stored.request)):
                outcome = self._apply(tx, actor, user, stored, allow_lockout=allow_lockout)
            else:
                outcome = self._count_guess(tx, actor, user, stored, failures)
        result, change = outcome
        if isinstance(result, Applied):
            self._announce(change, actor, user)
            return result
        # Raised only now that the guess is counted: an error inside would have undone the count.
        log_change(change)
        raise WrongNumber(result)

    def _check_open(self, tx: Transaction, actor: Actor, stored: StoredRequest) -> int:
        """Refuse what no number can confirm, and return how often the actor has failed."""
        state = rules.state_at(stored.request, tx.now)
        if state is RequestState.LOCKED:
            raise TooManyAttempts
        rules.after(state, rules.Step.CONFIRM)
        if stored.request.number_expires_at <= tx.now:
            raise NumberExpired
        if stored.key_id not in self._keys:
            _log.error(
                "request %s has a number minted under a key that is not known here; "
                "do all servers share their keys?",
                stored.request.id,
            )
            raise NumberExpired
        failures = tx.failures(actor.username)
        if failures >= self.settings.failures_per_actor:
            raise TooManyAttempts
        return failures

    def _count_guess(
        self, tx: Transaction, actor: Actor, user: User, stored: StoredRequest, failures: int
    ) -> tuple[int, Change]:
        left = stored.request.attempts_left - 1
        stored = _steps.advance(stored, rules.Step.GUESS if left else rules.Step.LOCK, tx.now)
        request = attrs.evolve(stored.request, attempts_left=left)
        tx.save_request(attrs.evolve(stored, request=request))
        tx.set_failures(actor.username, failures + 1)
        change = _steps.append(
            tx,
            Action.WRONG_NUMBER,
            actor,
            user,
            particulars(
                addresses=request.addresses,
                request=request.id,
                attempts_left=left,
                locked=not left,
            ),
        )
        return left, change

    def _apply(
        self,
        tx: Transaction,
        actor: Actor,
        user: User,
        stored: StoredRequest,
        *,
        allow_lockout: bool,
    ) -> tuple[Applied, Change]:
        request = stored.request
        tx.save_request(_steps.advance(stored, rules.Step.CONFIRM, tx.now))
        tx.set_failures(actor.username, 0)
        if request.kind is RequestKind.ADD:
            new = Restriction(
                id=_steps.new_id(),
                username=user.username,
                addresses=request.addresses,
                label=request.label,
                created_at=tx.now,
                created_by=actor.username,
                expires_at=request.restriction_expires_at,
            )
            return _steps.add(
                tx,
                self.settings,
                actor,
                user,
                new,
                Action.CONFIRM,
                allow_lockout=allow_lockout,
                request=request.id,
            )
        restriction, user = _steps.restriction_and_user(tx, actor, request.restriction_id or "")
        self._check_removal(tx, actor, restriction, allow_lockout=allow_lockout)
        return _steps.remove(
            tx,
            actor,
            user,
            restriction,
            Action.CONFIRM,
            kind=RequestKind.DELETE,
            request=request.id,
            reason=request.reason,
        )

    # -- deleting --------------------------------------------------------------------------------

    def delete(
        self, actor: Actor, restriction_id: str, reason: str = "", *, allow_lockout: bool = False
    ) -> Applied | PendingRequest:
        """End a restriction: at once, or by a number where `confirm_deletes` asks for one.

        Deleting the last restriction opens the user to every address; `Applied.unrestricted` says
        so.

        Args:
            actor: Who deletes.
            restriction_id: The restriction.
            reason: Why, up to 500 characters.
            allow_lockout: Accept that the actor itself could not get in any more.

        Returns:
            What was applied; or the request that waits for its number.

        Raises:
            UnknownRestriction: There is no such restriction for this actor.
            InvalidValue: The reason makes no sense.
            LockoutRisk: The actor could not get in from where it is.
            DuplicateRestriction: Its deletion is asked for already.
            TooManyRequests: The actor made too many requests within the hour.
            DeliveryError: The mail could not be sent; the request waits, and `resend` works.
            StoreUnavailable: Nothing is known to have been changed.
        """
        checked_text("reason", reason, REASON_LIMIT)
        with self._transaction() as tx:
            restriction, user = _steps.restriction_and_user(tx, actor, restriction_id)
            self._check_removal(tx, actor, restriction, allow_lockout=allow_lockout)
            if self._needs_number(tx, user.username):
                outcome: Asked | tuple[Applied, Change] = self._ask_to_delete(
                    tx, actor, user, restriction, reason
                )
            else:
                outcome = _steps.remove(tx, actor, user, restriction, Action.DELETE, reason=reason)
        if len(outcome) == 3:
            return self._deliver(actor, *outcome)
        applied, change = outcome
        self._announce(change, actor, user)
        return applied

    def _ask_to_delete(
        self, tx: Transaction, actor: Actor, user: User, restriction: Restriction, reason: str
    ) -> Asked:
        _steps.check_not_pending(tx, user.username, restriction.addresses, restriction.id)
        return self._ask(tx, actor, user, RequestKind.DELETE, restriction, reason)

    def _needs_number(self, tx: Transaction, username: str) -> bool:
        if self.settings.confirm_deletes == "last":
            return len(tx.restrictions(username)) == 1
        return self.settings.confirm_deletes

    def _check_removal(
        self, tx: Transaction, actor: Actor, restriction: Restriction, *, allow_lockout: bool
    ) -> None:
        left = (r for r in tx.restrictions(restriction.username) if r.id != restriction.id)
        _steps.check_lockout(tx, actor, restriction.username, left, allowed=allow_lockout)

    # -- reading ---------------------------------------------------------------------------------

    def overview(
        self, actor: Actor, *, search: str = "", after: str | None = None, limit: int = 50
    ) -> Page[UserOverview]:
        """List the users of the actor's accounts with their restrictions and pending requests.

        Args:
            actor: Who looks.
            search: The start of a username, an account ID or any word of the name; or an address:
                who has a restriction that holds it. Empty: everyone.
            after: The `next` of the page before.
            limit: How many users at the most, 1 to 1,000.

        Raises:
            InvalidValue: The search, `after` or the limit makes no sense.
        """
        checked_text("search", search, _SEARCH_LIMIT)
        if after is not None and not isinstance(after, str):
            raise InvalidValue("after", f"must be text, not {type(after).__name__}")
        return self._store.overview(
            actor.manages,
            search=search.strip(),
            after=after,
            limit=_whole("limit", limit, _PAGE_LIMIT),
        )

    def history(
        self,
        actor: Actor,
        *,
        username: str | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> Page[Change]:
        """List what was done, the newest first.

        A row is seen by who manages the account that the user had at its time.

        Args:
            actor: Who looks.
            username: Only what concerns this user, or None.
            before: The `next` of the page before.
            limit: How many changes at the most, 1 to 1,000.

        Raises:
            InvalidValue: `before` or the limit makes no sense.
            UsernameError: The username has no canonical form.
        """
        return self._store.history(
            actor.manages,
            username=None if username is None else canonical_username(username),
            before=None if before is None else _whole("before", before, _REVISION_LIMIT),
            limit=_whole("limit", limit, _PAGE_LIMIT),
        )


def _whole(name: str, value: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise InvalidValue(name, f"must be a whole number from 1 to {most}")
    return value
