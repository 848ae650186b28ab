"""Who may come from where, what is asked for, and how the two are listed."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from enum import StrEnum
from typing import Any, Generic, TypeVar

import attrs

from ipguard.addresses import AddressRange
from ipguard.model._people import User

T = TypeVar("T")


@attrs.frozen(kw_only=True)
class Restriction:
    """A run of addresses from which a user may log in. One that holds keeps all others out.

    Attributes:
        id: An opaque text, unique in the store.
        username: The user, in canonical form.
        addresses: The addresses.
        label: What a person called it, up to 100 characters, perhaps empty.
        created_at: When it came to hold.
        created_by: The username of the actor who confirmed or imposed it.
        expires_at: When it stops letting addresses in, or None. It goes on restricting after that.
    """

    id: str
    username: str
    addresses: AddressRange
    label: str
    created_at: datetime
    created_by: str
    expires_at: datetime | None = None

    def expired(self, now: datetime) -> bool:
        """Tell whether the restriction no longer lets its addresses in at `now`."""
        return self.expires_at is not None and self.expires_at <= now


class RequestKind(StrEnum):
    """What a request asks for."""

    ADD = "add"
    DELETE = "delete"


class RequestState(StrEnum):
    """Where a request stands; `ipguard.rules` has the table of the steps between them."""

    PENDING = "pending"
    CONFIRMED = "confirmed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    LOCKED = "locked"


@attrs.frozen(kw_only=True)
class PendingRequest:
    """A change that waits for its confirmation number.

    Attributes:
        id: An opaque text, unique in the store.
        username: The user whose restrictions would change, in canonical form.
        kind: `add` or `delete`.
        addresses: What would be added or deleted.
        label: The label of the restriction.
        requested_by: The username of the actor who asked, and who alone may confirm.
        requested_at: When.
        expires_at: When the request is given up.
        number_expires_at: When the number last issued stops being valid.
        attempts_left: How many guesses the number last issued still allows.
        state: Where the request stands.
        restriction_id: The restriction to delete; None for `add`.
        restriction_expires_at: When the restriction to be added would expire, or None.
        reason: Why, as the actor put it, perhaps empty.
    """

    id: str
    username: str
    kind: RequestKind
    addresses: AddressRange
    label: str
    requested_by: str
    requested_at: datetime
    expires_at: datetime
    number_expires_at: datetime
    attempts_left: int
    state: RequestState
    restriction_id: str | None = None
    restriction_expires_at: datetime | None = None
    reason: str = ""


@attrs.frozen(kw_only=True)
class StoredRequest:
    """A request as a store keeps it: with what no page shows.

    Attributes:
        request: The request itself.
        email: Where its numbers go: the actor's address when it asked.
        key_id: Which key made the digest; see `ipguard.confirmation`.
        digest: The keyed digest of the number last issued, 32 bytes.
        resends: How many numbers were sent after the first.
        mails_failed: How many mails in a row could not be sent, up to the last one.
        sent_at: When the last number was mailed, or that was tried.
    """

    request: PendingRequest
    email: str = attrs.field(repr=False)
    key_id: bytes = attrs.field(repr=False)
    digest: bytes = attrs.field(repr=False)
    resends: int = 0
    mails_failed: int = 0
    sent_at: datetime | None = None


@attrs.frozen(kw_only=True)
class UserOverview:
    """One line of the page.

    Attributes:
        user: The user.
        restrictions: The restrictions that hold, expired ones included, the oldest first.
        pending: The requests that wait for their number, the oldest first.
        summary: The text of the Restrictions column; "No restrictions" where there are none.
        removed: Whether the host removed the user while restrictions hold.
    """

    user: User
    restrictions: tuple[Restriction, ...]
    pending: tuple[PendingRequest, ...]
    summary: str
    removed: bool = False


@attrs.frozen(kw_only=True)
class Page(Generic[T]):
    """A stretch of a list; iterates over its items.

    Attributes:
        items: The items.
        next: What to pass as `after` (overview) or `before` (history) for the next page, or None at
            the end.
    """

    items: tuple[T, ...]
    next: Any = None

    def __iter__(self) -> Iterator[T]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)
