"""The second phase: a number is typed in, and the change holds, or the guess is counted."""

from __future__ import annotations

import logging

import attrs

from ipguard import audit, confirmation, rules
from ipguard.errors import InvalidValue, NumberExpired, TooManyAttempts, WrongNumber
from ipguard.model import (
    Action,
    Actor,
    Applied,
    Change,
    RequestKind,
    RequestState,
    Restriction,
    StoredRequest,
    User,
)
from ipguard.store import Transaction, log_change
from ipguard.workflow import _steps
from ipguard.workflow._base import Base, subject_of

_log = logging.getLogger("ipguard.workflow")


class Confirmations(Base):
    """The call of a workflow that a number is given to."""

    def confirm(
        self,
        actor: Actor,
        request_id: str,
        number: str,
        *,
        allow_lockout: bool = False,
        allow_opening: bool = True,
    ) -> Applied:
        """Let a request hold, given its number.

        Args:
            actor: Who made the request.
            request_id: Its id.
            number: As it was mailed. Spaces, dashes and invisible characters are ignored, and
                decimal digits of any script are read.
            allow_lockout: Accept that the actor itself could not get in any more.
            allow_opening: Accept that a deletion may be of the user's last restriction.

        Returns:
            What holds now, and since which revision.

        Raises:
            UnknownRequest: There is no such request of this actor's own.
            RequestClosed: It was confirmed, cancelled or has expired.
            NumberExpired: The number's time is over; nothing is counted.
            TooManyAttempts: The request is locked, or the actor failed too often.
            NumberFormatError: The text cannot be a number; no attempt is counted.
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
            digits = confirmation.typed(number, self.settings.number_digits)
            if self._keys.matches(stored.key_id, stored.digest, digits, subject_of(stored.request)):
                outcome = self._apply(
                    tx,
                    actor,
                    user,
                    stored,
                    allow_lockout=allow_lockout,
                    allow_opening=allow_opening,
                )
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
        if rules.number_expired(stored, tx.now):
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
            audit.detail(
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
        allow_opening: bool,
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
        _steps.check_removal(tx, actor, restriction, allow_lockout=allow_lockout)
        return _steps.remove(
            tx,
            actor,
            user,
            restriction,
            Action.CONFIRM,
            allow_opening=allow_opening,
            kind=RequestKind.DELETE,
            request=request.id,
            reason=request.reason,
        )
