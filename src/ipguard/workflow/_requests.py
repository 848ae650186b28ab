"""The first phase: a change is asked for and its number mailed, mailed anew, or withdrawn."""

from __future__ import annotations

from datetime import datetime

import attrs

from ipguard import audit, rules
from ipguard._checks import check_text
from ipguard.addresses import AddressRange
from ipguard.errors import TooManyRequests
from ipguard.model import (
    REASON_LIMIT,
    Action,
    Actor,
    Applied,
    Change,
    PendingRequest,
    RequestKind,
    Restriction,
    User,
)
from ipguard.store import Transaction, log_change
from ipguard.workflow import _steps
from ipguard.workflow._base import Asked, Base, wanted_restriction


class Requests(Base):
    """The calls of a workflow that make requests, and those that change a request."""

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
            DuplicateRestriction: The user has these addresses, or a request for them is pending,
                whatever the label and the expiry: the error says what exists and how it differs.
            TooManyRestrictions: The user has as many as are allowed.
            LockoutRisk: The actor could not get in from where it is.
            TooManyRequests: The actor made too many requests within the hour.
            DeliveryError: The mail could not be sent; the request waits, and `resend` works.
            StoreUnavailable: Nothing is known to have been changed.
        """
        wanted = wanted_restriction(actor, self.settings, username, addresses, label, expires_at)
        with self._transaction() as tx:
            wanted = attrs.evolve(wanted, created_at=tx.now)
            user = _steps.registered_user(tx, actor, wanted.username)
            left, _ = _steps.with_added(tx, self.settings, wanted)
            _steps.check_not_pending(tx, wanted)
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
                raise TooManyRequests(
                    min(stored.request.expires_at - tx.now, self.settings.request_lifetime)
                )
            at_once = 0 < stored.mails_failed <= max(1, limit)
            if not at_once and stored.sent_at is not None:
                interval = self.settings.resend_interval
                wait = rules.wait_left([stored.sent_at], 1, interval, tx.now)
                if wait:
                    raise TooManyRequests(wait)
            failed, request = stored.mails_failed, stored.request
            if request.requested_at > tx.now:  # by a clock that ran ahead
                expires_at = rules.shifted(tx.now, self.settings.request_lifetime)
                request = attrs.evolve(request, requested_at=tx.now, expires_at=expires_at)
            stored, number = self._numbered(request, stored.email, tx.now, resends)
            tx.save_request(stored)
            change = _steps.append(
                tx,
                Action.RESEND,
                actor,
                user,
                audit.detail(addresses=stored.request.addresses, request=request_id),
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
                audit.detail(
                    kind=stored.request.kind, addresses=stored.request.addresses, request=request_id
                ),
            )
        log_change(change)
        return stored.request

    def delete(
        self,
        actor: Actor,
        restriction_id: str,
        reason: str = "",
        *,
        allow_lockout: bool = False,
        allow_opening: bool = True,
    ) -> Applied | PendingRequest:
        """End a restriction: at once, or by a number where `confirm_deletes` asks for one.

        Deleting the last restriction opens the user to every address; `Applied.unrestricted` says
        so. Who asks people before that passes `allow_opening=False` where they were not asked: what
        was one of two when they looked may be the last by now.

        Args:
            actor: Who deletes.
            restriction_id: The restriction.
            reason: Why, up to 500 characters.
            allow_lockout: Accept that the actor itself could not get in any more.
            allow_opening: Accept that it is the user's last.

        Returns:
            What was applied; or the request that waits for its number.

        Raises:
            UnknownRestriction: There is no such restriction for this actor.
            InvalidValue: The reason makes no sense.
            LockoutRisk: The actor could not get in from where it is.
            OpeningRisk: It would end the user's last at once, and `allow_opening` is False.
            DuplicateRestriction: Its deletion is asked for already.
            TooManyRequests: The actor made too many requests within the hour.
            DeliveryError: The mail could not be sent; the request waits, and `resend` works.
            StoreUnavailable: Nothing is known to have been changed.
        """
        check_text("reason", reason, REASON_LIMIT)
        with self._transaction() as tx:
            restriction, user = _steps.restriction_and_user(tx, actor, restriction_id)
            _steps.check_removal(tx, actor, restriction, allow_lockout=allow_lockout)
            if self._needs_number(tx, user.username):
                outcome: Asked | tuple[Applied, Change] = self._ask_to_delete(
                    tx, actor, user, restriction, reason
                )
            else:
                outcome = _steps.remove(
                    tx,
                    actor,
                    user,
                    restriction,
                    Action.DELETE,
                    allow_opening=allow_opening,
                    reason=reason,
                )
        if len(outcome) == 3:
            return self._deliver(actor, *outcome)
        applied, change = outcome
        self._announce(change, actor, user)
        return applied

    def _ask_to_delete(
        self, tx: Transaction, actor: Actor, user: User, restriction: Restriction, reason: str
    ) -> Asked:
        _steps.check_not_pending(tx, restriction, deletes=restriction.id)
        return self._ask(tx, actor, user, RequestKind.DELETE, restriction, reason)

    def _needs_number(self, tx: Transaction, username: str) -> bool:
        if self.settings.confirm_deletes == "last":
            return len(tx.restrictions(username)) == 1
        return self.settings.confirm_deletes
