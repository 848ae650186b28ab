"""The values that the rooms hand to one another: frozen, keyword-only, checked at construction.

Times are aware datetimes in UTC. Usernames are held in their one canonical form. Text that people
wrote (labels, names) holds no character that could break a line of a log, a mail header or a page.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from enum import Enum, StrEnum
from typing import Any, ClassVar, Final, Generic, Literal, NamedTuple, TypeVar

import attrs

from ipguard.addresses import AddressRange, parse_address
from ipguard.errors import InvalidValue
from ipguard.usernames import canonical_username

T = TypeVar("T")

LABEL_LIMIT: Final = 100
REASON_LIMIT: Final = 500
_NAME_LIMIT: Final = 256
_VIA_LIMIT: Final = 400
_NOT_IN_EMAIL: Final = frozenset(',;:<>()[]\\"')
_EMAIL_LIMIT: Final = 254  # RFC 5321 4.5.3.1.3, less the angle brackets
# Line and paragraph separators break lines; the bidirectional controls can make "allow 1.2.3.4"
# read as something else on a page or in a mail.
_FORBIDDEN_CATEGORIES: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})
_BIDI_CONTROLS: Final = frozenset(
    "\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)


def checked_text(name: str, value: object, limit: int, *, required: bool = False) -> str:
    """Return `value` when it is a line of text that may be stored, mailed and shown.

    Args:
        name: What it is called, for the message.
        value: The text.
        limit: How many characters it may have.
        required: Whether it must hold more than blanks.

    Raises:
        InvalidValue: It is not a str, too long, empty though required, or holds a control
            character.
    """
    if not isinstance(value, str):
        raise InvalidValue(name, f"must be text, not {type(value).__name__}")
    if len(value) > limit:
        raise InvalidValue(name, f"has more than {limit} characters")
    if required and not value.strip():
        raise InvalidValue(name, "must not be empty")
    # In ASCII what is not printable is just what is refused, and that is found out at once.
    plain = value.isascii() and value.isprintable()
    if not plain and any(
        c in _BIDI_CONTROLS or unicodedata.category(c) in _FORBIDDEN_CATEGORIES for c in value
    ):
        raise InvalidValue(name, "must not hold control characters")
    return value


def checked_time(name: str, value: object) -> datetime:
    """Return `value` in UTC.

    Raises:
        InvalidValue: It is not a datetime, or is naive: a naive time means another moment on each
            host.
    """
    if not isinstance(value, datetime):
        raise InvalidValue(name, f"must be a datetime, not {type(value).__name__}")
    if value.utcoffset() is None:
        raise InvalidValue(name, "must be an aware datetime")
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise InvalidValue(name, "is beyond what a time in UTC can be") from None


def _full_name(value: object) -> str:
    return checked_text("full_name", value, _NAME_LIMIT)


def _account_id(value: object) -> str:
    return checked_text("account_id", value, _NAME_LIMIT, required=True)


def _email(value: object) -> str:
    text = checked_text("email", value, _EMAIL_LIMIT, required=True)
    local, _, domain = text.partition("@")
    # Whether a mailbox exists only mail can tell. This keeps out what would become several
    # recipients or another header, and encoded words, which mail programs decode (RFC 2047).
    odd = any(c in _NOT_IN_EMAIL or c.isspace() for c in text) or "=?" in text or "@" in domain
    if odd or not (local and domain):
        raise InvalidValue("email", "is not one e-mail address")
    return text


def _optional_email(value: object) -> str | None:
    return None if value is None else _email(value)


def _via(value: object) -> str:
    return checked_text("via", value, _VIA_LIMIT)


def _optional_address(value: str | None) -> str | None:
    return None if value is None else str(parse_address(value))


@attrs.frozen(kw_only=True)
class User:
    """Someone who logs in.

    Attributes:
        username: In canonical form; `JSmith` given is `jsmith` held.
        full_name: As a person reads it, up to 256 characters.
        account_id: The account that the user belongs to; compared exactly.
        email: Where notices go, or None.
    """

    username: str = attrs.field(converter=canonical_username)
    full_name: str = attrs.field(converter=_full_name)
    account_id: str = attrs.field(converter=_account_id)
    email: str | None = attrs.field(default=None, converter=_optional_email)


class _EveryAccount(Enum):
    """The type of `Actor.EVERY_ACCOUNT`; an enum, so that a pickled copy is the same object."""

    EVERY_ACCOUNT = "every account"

    def __contains__(self, account_id: object) -> Literal[True]:
        return True

    def __repr__(self) -> str:
        return "Actor.EVERY_ACCOUNT"


Accounts = frozenset[str] | _EveryAccount
"""The accounts that an actor manages: their ids, or `Actor.EVERY_ACCOUNT`."""


def _accounts(value: Iterable[str] | _EveryAccount) -> Accounts:
    if isinstance(value, _EveryAccount):
        return value
    # A str is refused because `"U1" in "xU1"` holds: a substring would become a right.
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError("manages must be a set of account ids, or Actor.EVERY_ACCOUNT")
    accounts = frozenset(value)
    if not all(isinstance(account, str) for account in accounts):
        raise TypeError("manages must hold account ids as str")
    return accounts


@attrs.frozen(kw_only=True)
class Actor:
    """Who is acting, as the host authenticated them.

    Attributes:
        username: In canonical form.
        email: Where confirmation numbers go.
        manages: A frozenset of account ids, or `Actor.EVERY_ACCOUNT`.
        address: The address that the actor comes from, for the lock-out check and the audit trail,
            or None.
        via: How the actor reached the workflow, for the audit trail: a command line and who ran it,
            say; up to 400 characters, empty for the host itself.
    """

    EVERY_ACCOUNT: ClassVar[_EveryAccount] = _EveryAccount.EVERY_ACCOUNT

    username: str = attrs.field(converter=canonical_username)
    email: str = attrs.field(converter=_email)
    manages: Accounts = attrs.field(converter=_accounts, repr=False)
    address: str | None = attrs.field(default=None, converter=_optional_address)
    via: str = attrs.field(default="", converter=_via)


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
class StoredUser:
    """A user as a store keeps it.

    Attributes:
        user: The user.
        removed: Whether the host removed it; its restrictions go on holding.
    """

    user: User
    removed: bool = False


@attrs.frozen(kw_only=True)
class Policy:
    """All that decides about one user, from one snapshot of the store.

    Attributes:
        revision: The store's revision in that snapshot.
        restrictions: The user's restrictions, the oldest first. None at all means any address.
        known: Whether the user is registered.
    """

    revision: int
    restrictions: tuple[Restriction, ...]
    known: bool


class Reason(StrEnum):
    """Why a decision came out as it did."""

    UNRESTRICTED = "unrestricted"
    LISTED = "listed"
    NOT_LISTED = "not_listed"
    BAD_ADDRESS = "bad_address"
    BAD_USERNAME = "bad_username"
    UNKNOWN_USER = "unknown_user"
    STORE_UNAVAILABLE = "store_unavailable"


@attrs.frozen(kw_only=True)
class Decision:
    """The answer to one login attempt; falsy when the login is not allowed.

    Attributes:
        allowed: Whether the login may go on.
        reason: Why.
        revision: The revision of the store that the answer rests on, or a later one in which
            nothing that bears on it differs.
        restriction_id: The restriction that lets the address in, where one does.
        stale: Whether the answer was given in the outage grace, past the lease.
    """

    allowed: bool
    reason: Reason
    revision: int
    restriction_id: str | None = None
    stale: bool = False

    def __bool__(self) -> bool:
        return self.allowed


@attrs.frozen(kw_only=True)
class Explanation:
    """What an operator wants to see of one question, read from the store at that moment.

    Attributes:
        username: The canonical username, or the text given where it has none.
        address: The address in canonical text, or None where the text given is none.
        decision: The answer from the store as it is now, `report_only` left aside.
        restrictions: The user's restrictions, expired ones included.
        known: Whether the user is registered.
        at: The store's time.
        summary: The same in a sentence or two.
    """

    username: str
    address: str | None
    decision: Decision
    restrictions: tuple[Restriction, ...]
    known: bool
    at: datetime
    summary: str


class Action(StrEnum):
    """What a change was; named as the call that made it, where one did."""

    REQUEST = "request"
    CONFIRM = "confirm"
    CANCEL = "cancel"
    RESEND = "resend"
    DELETE = "delete"
    IMPOSE = "impose"
    IMPOSE_MANY = "impose_many"
    LIFT = "lift"
    UNLOCK = "unlock"
    PUT_USERS = "put_users"
    REMOVE_USERS = "remove_users"
    WRONG_NUMBER = "wrong_number"
    DELIVERY_FAILED = "delivery_failed"


@attrs.frozen(kw_only=True)
class Change:
    """One row of the audit trail, which is also the feed that guards follow.

    Attributes:
        revision: Its place in the one order of all changes; 1 is the first.
        at: When, by the store's clock.
        actor: The username of who did it, or None for the host itself (users put and removed).
        actor_address: Where the actor came from, if it was told.
        action: What was done.
        username: Whose restrictions it concerns, or None for a bulk change.
        detail: The particulars as `name=value` pairs, values in JSON where they hold blanks.
        account_id: The user's account at that time, which the row's visibility goes by.
    """

    revision: int
    at: datetime
    actor: str | None
    actor_address: str | None
    action: Action
    username: str | None
    detail: str
    account_id: str | None = None


@attrs.frozen(kw_only=True)
class Applied:
    """A change of restrictions that holds.

    Attributes:
        revision: Its revision; pass it to `Guard.wait_for` or `Guard.check(at_least=)`.
        restriction: The restriction added or deleted; None for a bulk change.
        unrestricted: True when the change left the user with no restriction at all: any address.
    """

    revision: int
    restriction: Restriction | None
    unrestricted: bool


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


class Touched(Enum):
    """What `changes_since` and `append` say instead of naming users."""

    EVERYBODY = "everybody"
    RESET = "reset"


EVERYBODY: Final = Touched.EVERYBODY
"""Any user's policy may have changed."""
RESET: Final = Touched.RESET
"""The history asked for is not there: drop everything, take the store's revision."""


class Changes(NamedTuple):
    """The answer of `changes_since`.

    Attributes:
        head: The store's revision.
        token: The random token of the row of that revision.
        usernames: Whose policy changed, or `EVERYBODY`, or `RESET`.
    """

    head: int
    token: str
    usernames: frozenset[str] | Touched
