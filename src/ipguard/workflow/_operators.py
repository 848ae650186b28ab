"""What operators may do at once, without a number: for actors of every account, with a reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime

import attrs

from ipguard import audit, rules
from ipguard._checks import check_text
from ipguard.addresses import AddressRange
from ipguard.errors import (
    InvalidValue,
    IPGuardError,
    UnknownRestriction,
    UnknownUser,
)
from ipguard.model import EVERYBODY, REASON_LIMIT, Action, Actor, Applied, Restriction
from ipguard.store import NAMED_AT_MOST
from ipguard.usernames import canonical_username
from ipguard.workflow import _steps
from ipguard.workflow._base import Base, wanted_restriction
from ipguard.workflow._settings import WorkflowSettings

Row = Sequence[object] | Mapping[str, object]
"""A row of `impose_many`: `(username, addresses[, label[, expires_at]])`, or a mapping of those."""


class Operators(Base):
    """The calls of a workflow that need no number."""

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
        """Let a restriction hold at once.

        For actors of every account; to others no user exists here.

        Args:
            actor: Who imposes it.
            username: Who is restricted.
            addresses: As for `request`.
            reason: Why; required, up to 500 characters.
            label: As for `request`.
            expires_at: As for `request`.

        Returns:
            What holds now.

        Raises:
            IPGuardError: As `request` raises by its rules.
            InvalidValue: Also: there is no reason.
        """
        check_text("reason", reason, REASON_LIMIT, required=True)
        wanted = wanted_restriction(actor, self.settings, username, addresses, label, expires_at)
        _operators_only(actor, UnknownUser(wanted.username))
        with self._transaction() as tx:
            user = _steps.registered_user(tx, actor, wanted.username)
            applied, change = _steps.add(
                tx,
                self.settings,
                actor,
                user,
                attrs.evolve(wanted, created_at=tx.now),
                Action.IMPOSE,
                allow_lockout=True,
                reason=reason,
            )
        self._announce(change, actor, user)
        return applied

    def impose_many(self, actor: Actor, rows: Iterable[Row], *, reason: str) -> Applied:
        """Let any number of restrictions hold, all or none, as one revision.

        The rows are read to the end before the writer's turn is taken. Up to 100 affected users are
        told; beyond that only the actor is.

        Args:
            actor: Who imposes them; of every account.
            rows: Each `(username, addresses)`, and if wanted a label and an expiry after those; or
                a mapping with the keys `username`, `addresses`, `label`, `expires_at`.
            reason: Why; required, up to 500 characters.

        Returns:
            The revision; `restriction` is None.

        Raises:
            IPGuardError: As `request` raises, for the first row that is refused; a note on the
                error says which row. What only the store can tell (an unknown user, a duplicate,
                too many) names the user instead. Nothing is changed.
            InvalidValue: Also: there is no reason, or no row.
        """
        check_text("reason", reason, REASON_LIMIT, required=True)
        _operators_only(actor, UnknownUser("(any)"))
        told: set[str] = set()
        with self._transaction(self._staged(actor, rows, told)) as tx:
            count = tx.add_staged(per_user=self.settings.restrictions_per_user)
            if not count:
                raise InvalidValue("rows", "there is none")
            _steps.cancel_deletions(tx, tx.orphaned_deletions())
            change = tx.append(
                Action.IMPOSE_MANY,
                actor=actor.username,
                actor_address=actor.address,
                detail=audit.detail(restrictions=count, reason=reason, via=actor.via),
                touches=EVERYBODY,
            )
            users = [] if len(told) > NAMED_AT_MOST else [tx.user(name) for name in sorted(told)]
        self._announce(change, actor, None)
        for stored in users:
            if stored is not None and stored.user.email is not None:
                # To the user alone: the actor has had its one notice of the whole.
                self._notify(change, attrs.evolve(actor, email=stored.user.email), stored.user)
        return Applied(revision=change.revision, restriction=None, unrestricted=False)

    def _staged(self, actor: Actor, rows: Iterable[Row], told: set[str]) -> Iterator[Restriction]:
        now, ids = self._store.now(), _steps.increasing_ids()
        for position, row in enumerate(rows, start=1):
            try:
                wanted = wanted_row(actor, row, self.settings, now)
            except IPGuardError as exc:
                exc.add_note(f"row {position}")
                raise
            if len(told) <= NAMED_AT_MOST:
                told.add(wanted.username)
            yield attrs.evolve(wanted, id=next(ids))

    def lift(
        self, actor: Actor, restriction_id: str, *, reason: str, allow_opening: bool = True
    ) -> Applied:
        """End a restriction at once.

        For actors of every account; to others none exists here.

        Args:
            actor: Who lifts it.
            restriction_id: The restriction.
            reason: Why; required, up to 500 characters.
            allow_opening: Accept that it is the user's last.

        Returns:
            What was applied; `unrestricted` tells whether the user may now log in from anywhere.

        Raises:
            UnknownRestriction: There is no such restriction for this actor.
            InvalidValue: There is no reason.
            OpeningRisk: It is the user's last, and `allow_opening` is False.
            StoreUnavailable: Nothing is known to have been changed.
        """
        check_text("reason", reason, REASON_LIMIT, required=True)
        _operators_only(actor, UnknownRestriction(restriction_id))
        with self._transaction() as tx:
            restriction, user = _steps.restriction_and_user(tx, actor, restriction_id)
            applied, change = _steps.remove(
                tx,
                actor,
                user,
                restriction,
                Action.LIFT,
                allow_opening=allow_opening,
                reason=reason,
            )
        self._announce(change, actor, user)
        return applied

    def unlock(self, actor: Actor, username: str, *, reason: str) -> None:
        """Let an actor who gave too many wrong numbers try again.

        For actors of every account.

        Args:
            actor: Who unlocks.
            username: The actor who failed too often; need not be a registered user.
            reason: Why; required, up to 500 characters.

        Raises:
            UnknownUser: The actor is not of every account.
            InvalidValue: There is no reason.
            StoreUnavailable: Nothing is known to have been changed.
        """
        check_text("reason", reason, REASON_LIMIT, required=True)
        name = canonical_username(username)
        _operators_only(actor, UnknownUser(name))
        with self._transaction() as tx:
            stored = tx.user(name)
            user = None if stored is None else stored.user
            failures = tx.failures(name)
            tx.set_failures(name, 0)
            change = _steps.append(
                tx,
                Action.UNLOCK,
                actor,
                user,
                audit.detail(failures=failures, reason=reason),
                username=name,
            )
        self._announce(change, actor, user)


_COLUMNS = ("username", "addresses", "label", "expires_at")


def wanted_row(actor: Actor, row: Row, settings: WorkflowSettings, now: datetime) -> Restriction:
    """Judge a row of `impose_many` by all that can be told without a store.

    Raises:
        IPGuardError: As `impose_many` raises for it.
    """
    wanted = wanted_restriction(actor, settings, *_cells(row))
    rules.check_width(
        wanted.addresses, widest_ipv4=settings.widest_ipv4, widest_ipv6=settings.widest_ipv6
    )
    if wanted.expires_at is not None and wanted.expires_at <= now:
        raise InvalidValue("expires_at", "must be in the future")
    return attrs.evolve(wanted, created_at=now)


def _cells(row: Row) -> tuple[object, ...]:
    if isinstance(row, Mapping):
        unknown = [key for key in row if key not in _COLUMNS]
        if unknown or "username" not in row or "addresses" not in row:
            raise InvalidValue(
                "rows", "a mapping has username and addresses, perhaps label, expires_at"
            )
        label = row.get("label")
        label = "" if label is None else label
        return (row["username"], row["addresses"], label, row.get("expires_at"))
    if isinstance(row, (str, bytes)) or not isinstance(row, Sequence) or not 2 <= len(row) <= 4:
        raise InvalidValue(
            "rows", "a row is (username, addresses), perhaps with label and expires_at"
        )
    return tuple(row)


def _operators_only(actor: Actor, otherwise: IPGuardError) -> None:
    if actor.manages is not Actor.EVERY_ACCOUNT:
        raise otherwise
