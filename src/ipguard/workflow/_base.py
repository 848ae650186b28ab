"""What every call of the workflow shares: making a number, mailing it, telling people."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from typing import cast

import attrs

from ipguard import audit, confirmation, rules
from ipguard._checks import check_text, check_time
from ipguard.addresses import AddressRange
from ipguard.errors import (
    DeliveryError,
    InvalidValue,
    IPGuardError,
)
from ipguard.model import (
    LABEL_LIMIT,
    Action,
    Actor,
    Change,
    PendingRequest,
    RequestKind,
    RequestState,
    Restriction,
    StoredRequest,
    User,
)
from ipguard.notify import Notifier
from ipguard.store import Closing, RestrictionStore, Transaction, log_change
from ipguard.usernames import canonical_username
from ipguard.workflow import _steps
from ipguard.workflow._settings import WorkflowSettings

_log = logging.getLogger("ipguard.workflow")

Asked = tuple[StoredRequest, str, Change]
"""A request saved, its number, and the change."""

_UNSET = datetime.min.replace(tzinfo=UTC)


class Base(Closing):
    """The store, the notifier and the keys of a workflow, and what its calls do with them."""

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
            raise InvalidValue(
                "settings", f"must be WorkflowSettings, not {type(settings).__name__}"
            )
        self.notices_failed = 0
        if not hasattr(store, "transaction"):
            raise InvalidValue("store", "is no restriction store; open_store opens one")
        if not hasattr(notifier, "number_issued"):
            raise InvalidValue("notifier", "is no notifier")
        self._store = store
        self._notifier = notifier
        self._keys = confirmation.Keyring(key)

    def now(self) -> datetime:
        """Return the store's time, by which all that ends is judged; without I/O."""
        return self._store.now()

    def _derived_keys(self, purpose: str) -> tuple[bytes, ...]:
        """Make keys for another purpose of those that the numbers have, for a page's forms, say.

        All servers that share this workflow's keys make the same ones.

        Args:
            purpose: What they are for; another purpose has other keys.

        Returns:
            Keys of 32 bytes each, the newest first: sign with the first, accept what any signed.
        """
        return self._keys.derive(purpose)

    def _transaction(
        self, staged: Iterable[Restriction] | None = None
    ) -> AbstractContextManager[Transaction, None]:
        """Take the writer's turn; what the block raises is never swallowed, as the type says."""
        return cast(
            "AbstractContextManager[Transaction, None]", self._store.transaction(staged=staged)
        )

    def _ask(
        self,
        tx: Transaction,
        actor: Actor,
        user: User,
        kind: RequestKind,
        wanted: Restriction,
        reason: str = "",
    ) -> Asked:
        """Save a request with a new number."""
        _steps.check_pace(tx, actor, self.settings)
        request = PendingRequest(
            id=_steps.new_id(),
            username=user.username,
            kind=kind,
            addresses=wanted.addresses,
            label=wanted.label,
            requested_by=actor.username,
            requested_at=tx.now,
            expires_at=rules.shifted(tx.now, self.settings.request_lifetime),
            number_expires_at=tx.now,
            attempts_left=0,
            state=RequestState.PENDING,
            restriction_id=wanted.id if kind is RequestKind.DELETE else None,
            restriction_expires_at=wanted.expires_at,
            reason=reason,
        )
        stored, number = self._numbered(request, actor.email, tx.now)
        tx.save_request(stored)
        change = _steps.append(
            tx,
            Action.REQUEST,
            actor,
            user,
            audit.detail(
                kind=kind,
                addresses=request.addresses,
                label=request.label,
                expires_at=request.restriction_expires_at,
                request=request.id,
                reason=reason,
            ),
        )
        return stored, number, change

    def _numbered(
        self, request: PendingRequest, email: str, now: datetime, resends: int = 0
    ) -> tuple[StoredRequest, str]:
        """Give a request a new number: the old one is dead, the attempts are restored."""
        number = confirmation.mint(self.settings.number_digits)
        request = attrs.evolve(
            request,
            number_expires_at=min(
                rules.shifted(now, self.settings.number_lifetime), request.expires_at
            ),
            attempts_left=self.settings.attempts_per_number,
        )
        stored = StoredRequest(
            request=request,
            email=email,
            key_id=self._keys.minting,
            digest=self._keys.digest(self._keys.minting, number, subject_of(request)),
            resends=resends,
            sent_at=now,
        )
        return stored, number

    def _deliver(
        self, actor: Actor, stored: StoredRequest, number: str, change: Change, failed: int = 0
    ) -> PendingRequest:
        """Mail the number, to the address recorded at the request; `failed` mails went before."""
        log_change(change)
        try:
            self._notifier.number_issued(
                stored.request,
                confirmation.spaced(number),
                attrs.evolve(actor, email=stored.email),
            )
        except Exception as exc:
            with suppress(IPGuardError):  # the failure to be told of is the mail's
                self._uncount(stored, actor, failed + 1)
            # A notifier's own words may hold anything, the number too; only its DeliveryError is
            # made to be shown. Any other stays out of the tracebacks that a host logs.
            shown = exc if isinstance(exc, DeliveryError) else None
            reason = shown.reason if shown else type(exc).__name__
            raise DeliveryError(reason, stored.request.id) from shown
        return stored.request

    def _uncount(self, sent: StoredRequest, actor: Actor, failed: int) -> None:
        """Take back that a mail was sent, so that `resend` works at once and loses nothing."""
        with self._transaction() as tx:
            stored, user = _steps.request_and_user(tx, actor, sent.request.id, own=True)
            if stored.digest != sent.digest:
                return
            tx.save_request(attrs.evolve(stored, mails_failed=failed))
            change = _steps.append(
                tx,
                Action.DELIVERY_FAILED,
                actor,
                user,
                audit.detail(addresses=stored.request.addresses, request=stored.request.id),
            )
        log_change(change)

    def _announce(self, change: Change, actor: Actor, user: User | None) -> None:
        log_change(change)
        self._notify(change, actor, user)

    def _notify(self, change: Change, actor: Actor, user: User | None) -> None:
        try:
            self._notifier.change_applied(change, actor, user)
        except Exception:
            # The change holds, whoever has heard of it.
            self.notices_failed += 1
            _log.exception("the notice of revision %d could not be sent", change.revision)

    def close(self) -> None:
        """Do nothing: a workflow holds nothing of its own. The store is the host's to close."""


def wanted_restriction(
    actor: Actor,
    settings: WorkflowSettings,
    username: object,
    addresses: object,
    label: object = "",
    expires_at: object = None,
) -> Restriction:
    """Check what a person asks for, as far as that needs no store; `created_at` comes later."""
    return Restriction(
        id=_steps.new_id(),
        username=canonical_username(username),  # type: ignore[arg-type]
        # A range that was made, not parsed, goes through the same refusals as its text.
        addresses=rules.read_addresses(
            str(addresses) if isinstance(addresses, AddressRange) else addresses,  # type: ignore[arg-type]
            widest_ipv4=settings.widest_ipv4,
            widest_ipv6=settings.widest_ipv6,
        ),
        label=check_text("label", label, LABEL_LIMIT),
        created_at=_UNSET,
        created_by=actor.username,
        expires_at=None if expires_at is None else check_time("expires_at", expires_at),
    )


def subject_of(request: PendingRequest) -> tuple[str, ...]:
    """What a number confirms: change any of it, and the number is another's."""
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
