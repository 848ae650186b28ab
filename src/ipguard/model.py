"""The values of the public API: frozen, keyword-only, checked at construction.

Times are aware datetimes in UTC. Usernames are canonical. Text that people wrote (labels, names)
holds no character that could break a line of a log, a mail header or a page.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from enum import Enum, IntEnum, StrEnum
from typing import Any, ClassVar, Final, Generic, Literal, NamedTuple, TypeVar

import attrs

from ipguard._checks import check_duration, check_switch, check_text, check_whole
from ipguard.addresses import AddressRange, AddressSet, parse_address
from ipguard.errors import InvalidValue, IPGuardError, shorten
from ipguard.usernames import canonical_username

__all__ = [
    "EVERYBODY",
    "RESET",
    "AccessLine",
    "Accounts",
    "Action",
    "Actor",
    "Applied",
    "Approval",
    "BulkCounts",
    "Change",
    "Changes",
    "Damage",
    "Decision",
    "Demand",
    "Direction",
    "Explanation",
    "Impact",
    "Outcome",
    "Page",
    "PendingRequest",
    "Policy",
    "Reason",
    "Refusal",
    "RequestKind",
    "RequestState",
    "Restriction",
    "Sighting",
    "StoredRequest",
    "StoredUser",
    "Touched",
    "User",
    "UserCounts",
    "UserFilter",
    "UserOverview",
    "UserSync",
    "Verification",
]

T = TypeVar("T")

# Limits in characters.
LABEL_LIMIT: Final = 100
REASON_LIMIT: Final = 500
_NAME_LIMIT: Final = 256
_VIA_LIMIT: Final = 400
_UID_LIMIT: Final = 128
_EMAIL_LIMIT: Final = 254  # RFC 5321 4.5.3.1.3, less the angle brackets
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_NOT_IN_EMAIL: Final = re.compile(r"""[,;:<>()\[\]\\"\s]|=\?""")


def micros(moment: datetime) -> int:
    """Return a time in its stored form, microseconds since 1970-01-01 UTC."""
    return (moment - _EPOCH) // _MICROSECOND


def _full_name(value: object) -> str:
    return check_text("full_name", value, _NAME_LIMIT)


def _account_id(value: object) -> str:
    return check_text("account_id", value, _NAME_LIMIT, required=True)


def _spelling(value: str) -> str:
    canonical_username(value)
    # Call no method of a subclass: it may return anything.
    return value if type(value) is str else str.__getitem__(value, slice(None))


def _uid(value: object) -> str | None:
    text = "" if value is None else check_text("uid", value, _UID_LIMIT)
    return text or None


def _email(value: object) -> str:
    text = check_text("email", value, _EMAIL_LIMIT, required=True)
    local, _, domain = text.partition("@")
    # Only a mail can show whether the mailbox exists. This refuses text that would become several
    # recipients or another header, and encoded words, which mail programs decode (RFC 2047).
    if not (local and domain) or "@" in domain or _NOT_IN_EMAIL.search(text):
        raise InvalidValue("email", "is not one e-mail address")
    return text


def _user_email(value: object) -> str | None:
    return None if value is None or value == "" else _email(value)


def _via(value: object) -> str:
    return check_text("via", value, _VIA_LIMIT)


def _optional_address(value: str | None) -> str | None:
    return None if value is None or value == "" else str(parse_address(value))


@attrs.frozen(kw_only=True)
class User:
    """A user who logs in: `User(username, full_name, account_id, email=None, uid=None)`.

    Attributes:
        username: The canonical username; `JSmith` becomes `jsmith`.
        spelling: The username as the host spells it, for people to read.
        full_name: The name for people, up to 256 characters.
        account_id: The user's account; compared exactly.
        email: The address for notices, or None; an empty text becomes None.
        uid: The host's immutable key of the user (a primary key, a UUID), up to 128 characters; or
            None. It identifies the user after a rename. An empty text becomes None.
    """

    spelling: str = attrs.field(alias="username", converter=_spelling)
    username: str = attrs.field(init=False)
    full_name: str = attrs.field(converter=_full_name)
    account_id: str = attrs.field(converter=_account_id)
    email: str | None = attrs.field(default=None, converter=_user_email)
    uid: str | None = attrs.field(default=None, converter=_uid)

    @username.default
    def _canonical(self) -> str:
        return canonical_username(self.spelling)

    @classmethod
    def of(cls, record: User | Mapping[str, Any]) -> User:
        """Return a record of `sync_users` as a user.

        Raises:
            InvalidValue: It is neither a User nor a mapping with the fields of one, or a field is
                invalid.
            UsernameError: The username has no canonical form.
        """
        if isinstance(record, User):
            return record
        if not isinstance(record, Mapping):
            raise InvalidValue("record", "must be a User or a mapping")
        for name in record:
            if name not in _USER_FIELDS:
                raise InvalidValue("record", f"has an unknown field {shorten(name)}")
        for name in _USER_FIELDS[:3]:
            if name not in record:
                raise InvalidValue(name, "is missing")
        return cls(**record)


_USER_FIELDS: Final = ("username", "full_name", "account_id", "email", "uid")


@attrs.frozen(kw_only=True)
class UserSync:
    """The result of `sync_users`; all but the first and the last are numbers of users.

    Attributes:
        revision: The store's revision afterwards.
        added: Registered, again or for the first time.
        changed: Changed in another way than the following.
        renamed: Renamed, with their restrictions.
        moved: Moved to another account.
        removed: Removed, because no record is about them.
        refused: Each record that was refused, as it was given, with the error.
    """

    revision: int
    added: int = 0
    changed: int = 0
    renamed: int = 0
    moved: int = 0
    removed: int = 0
    refused: tuple[tuple[User | Mapping[str, Any], IPGuardError], ...] = ()


@attrs.frozen(kw_only=True)
class StoredUser:
    """A user as a store keeps it. The restrictions of a `removed` user stay in force."""

    user: User
    removed: bool = False


class _EveryAccount(Enum):
    """The type of `Actor.EVERY_ACCOUNT`; an enum, so that a pickled copy is the same object."""

    EVERY_ACCOUNT = "every account"

    def __contains__(self, account_id: object) -> Literal[True]:
        return True

    def __repr__(self) -> str:
        return "Actor.EVERY_ACCOUNT"


Accounts = frozenset[str] | _EveryAccount
"""The accounts that an actor manages: their ids, or `Actor.EVERY_ACCOUNT`."""


def check_accounts(accounts: Iterable[str] | _EveryAccount, name: str = "accounts") -> Accounts:
    """Check the accounts that `overview` and `history` of a store are called with.

    Raises:
        TypeError: It is one str: `"U1" in "xU1"` is true, so a substring would grant access.
    """
    if isinstance(accounts, _EveryAccount):
        return accounts
    if isinstance(accounts, (str, bytes)) or not isinstance(accounts, Iterable):
        raise TypeError(f"{name} must be a set of account ids, or Actor.EVERY_ACCOUNT")
    return frozenset(accounts)


def _accounts(value: Iterable[str] | _EveryAccount) -> Accounts:
    accounts = check_accounts(value, "manages")
    if not isinstance(accounts, _EveryAccount) and not all(isinstance(a, str) for a in accounts):
        raise TypeError("manages must hold account ids as str")
    return accounts


@attrs.frozen(kw_only=True)
class Actor:
    """The person who acts, as authenticated by the host.

    Attributes:
        username: The canonical username.
        email: The address for confirmation numbers.
        manages: A frozenset of account ids, or `Actor.EVERY_ACCOUNT`.
        address: The actor's current address, for the lock-out check and the audit log, or None.
            An empty text (how servers write "unknown") becomes None.
        via: How the actor reached the workflow, for the audit log: for example the command line
            and its OS user. Up to 400 characters; empty for the host itself.
    """

    EVERY_ACCOUNT: ClassVar[_EveryAccount] = _EveryAccount.EVERY_ACCOUNT

    username: str = attrs.field(converter=canonical_username)
    email: str = attrs.field(converter=_email)
    manages: Accounts = attrs.field(converter=_accounts, repr=False)
    address: str | None = attrs.field(default=None, converter=_optional_address)
    via: str = attrs.field(default="", converter=_via)


@attrs.frozen(kw_only=True)
class Restriction:
    """A run of addresses that a user may log in from. Addresses outside every run are refused.

    Attributes:
        id: An opaque text, unique in the store.
        username: The user, canonical.
        addresses: The addresses.
        label: A name for people, up to 100 characters; may be empty.
        created_at: When the restriction came into force.
        created_by: The username of the actor who confirmed or imposed it.
        expires_at: When its addresses stop being allowed, or None. After that it still restricts.
    """

    id: str
    username: str
    addresses: AddressRange
    label: str
    created_at: datetime
    created_by: str
    expires_at: datetime | None = None

    def expired(self, now: datetime) -> bool:
        """Return whether the restriction allows no address any more at `now`."""
        return self.expires_at is not None and self.expires_at <= now


@attrs.frozen(kw_only=True)
class Sighting:
    """How often a user gave the right password from one address.

    Hosts report logins to `Guard.saw`. Of each user the store keeps 32 addresses at most, those
    seen last, for 90 days.

    Attributes:
        username: The user, canonical.
        address: The address, canonical.
        first_at: When the user was first seen there.
        last_at: When the user was last seen there.
        allowed: How many of these logins were allowed.
        refused: How many were refused.
    """

    username: str
    address: str
    first_at: datetime
    last_at: datetime
    allowed: int = 0
    refused: int = 0


@attrs.frozen(kw_only=True)
class Refusal:
    """Recent logins with the right password that were refused, from one address.

    Attributes:
        address: The address, canonical.
        last_at: When the user was last seen there.
        times: How many logins from there were refused.
        hint: Why the user's restrictions may not fit, in a sentence; may be empty.
    """

    address: str
    last_at: datetime
    times: int
    hint: str = ""


class Direction(IntEnum):
    """What a change of a user's restrictions does, in the order of danger.

    Attributes:
        NEUTRAL: The user may log in from the same addresses as before.
        TIGHTENS: From fewer.
        LOOSENS: From addresses that were refused before, perhaps instead of others.
        OPENS: From every address, because no restriction is left.
    """

    NEUTRAL = 0
    TIGHTENS = 1
    LOOSENS = 2
    OPENS = 3


@attrs.frozen(kw_only=True)
class Impact:
    """What a change does to the addresses that a user may log in from; `rules.impact` finds it.

    Attributes:
        direction: The direction.
        gained: The addresses that are allowed afterwards, at some time, and were not before.
        lost: The addresses that were allowed and no longer are, at some time.
        summary: What will hold afterwards, in a sentence; equality ignores it.
        ends: When the last restriction that is left expires, after which no address is allowed;
            None if one is permanent, or none is left. Equality ignores it, and stores do not keep
            it.
        seen_lost: The user's sightings from addresses in `lost`, newest first, which the change
            would have refused. `Workflow.preview` and `preview_request` fill it; equality ignores
            it, and stores do not keep it.
        seen_summary: The meaning of `seen_lost`, in a sentence; empty if no address is lost, or no
            logins of the user are known. Equality ignores it, and stores do not keep it.
    """

    direction: Direction
    gained: AddressSet
    lost: AddressSet
    summary: str = attrs.field(default="", eq=False)
    ends: datetime | None = attrs.field(default=None, eq=False)
    seen_lost: tuple[Sighting, ...] = attrs.field(default=(), eq=False)
    seen_summary: str = attrs.field(default="", eq=False)


def _checked_number(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
    check_switch(attribute.name, value)


def _checked_approvals(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
    check_whole(attribute.name, value, 0, 10)


def _checked_wait(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
    check_duration(attribute.name, value, zero=True)


@attrs.frozen(kw_only=True)
class Demand:
    """What a request has to meet before it applies; an empty one is false.

    Attributes:
        number: Whether the requester has to confirm it with a mailed number.
        approvals: How many other actors have to approve it, at most 10.
        wait: How long it waits before it can be completed.

    Raises:
        InvalidValue: A value is out of its range.
    """

    number: bool = attrs.field(default=False, validator=_checked_number)
    approvals: int = attrs.field(default=0, validator=_checked_approvals)
    wait: timedelta = attrs.field(default=timedelta(0), validator=_checked_wait)

    def __or__(self, other: Demand) -> Demand:
        """Return the stricter of each field."""
        return Demand(
            number=self.number or other.number,
            approvals=max(self.approvals, other.approvals),
            wait=max(self.wait, other.wait),
        )

    def __bool__(self) -> bool:
        return bool(self.number or self.is_told)

    @property
    def is_told(self) -> bool:
        """Whether the user concerned is told of a request at once, and may cancel it."""
        return bool(self.approvals or self.wait)


@attrs.frozen(kw_only=True)
class Approval:
    """An approval of a request.

    Attributes:
        username: The actor who approved, canonical.
        email: The actor's address.
        account_id: The account of the user at that time, which the actor managed; None if the
            actor was of every account.
        subject: The digest of what was approved; see `PendingRequest.subject`.
    """

    username: str
    email: str = attrs.field(repr=False)
    account_id: str | None
    subject: str = attrs.field(repr=False)


class RequestKind(StrEnum):
    """The change that a request makes."""

    ADD = "add"
    DELETE = "delete"
    REPLACE = "replace"


class RequestState(StrEnum):
    """The state of a request; `ipguard.rules` has the table of transitions."""

    PENDING = "pending"
    CONFIRMED = "confirmed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    LOCKED = "locked"


@attrs.frozen(kw_only=True)
class PendingRequest:
    """A request for a change, which holds once it has met what it demands.

    Attributes:
        id: An opaque text, unique in the store.
        username: The user whose restrictions would change, canonical.
        kind: `add`, `delete` or `replace`.
        adds: The addresses to add.
        removes: The ids of the restrictions that end with it.
        removed: The addresses of those, in the same order.
        label: The label of the restrictions to add, or of the first one to delete.
        requested_by: The username of the requester; only the requester may confirm.
        requested_at: The time of the request.
        expires_at: When the request expires.
        number_expires_at: When the latest number expires.
        attempts_left: How many wrong guesses the latest number still allows.
        state: The state of the request.
        restriction_expires_at: When the restrictions to add would expire, or None.
        reason: The reason that the requester gave; may be empty.
        impact: What it does, as of the time of the request; None if an older version of the
            library made it.
        demand: What it has to meet.
        numbered: Whether the requester has given the number.
        approvals: Who has approved it.
        batch: The id of the first of several requests that one number confirms, or None.
        revision: The revision at which it applied, if this call applied it; equality ignores it.
        also_for: The other users whose requests the same number confirms, as the host spells them;
            known to the mail alone, and ignored by equality.
        spelling: The username as the host spells it, for the mail; the canonical one in a request
            that was read from the store. Equality ignores it.
    """

    id: str
    username: str
    kind: RequestKind
    adds: tuple[AddressRange, ...] = ()
    removes: tuple[str, ...] = ()
    removed: tuple[AddressRange, ...] = ()
    label: str
    requested_by: str
    requested_at: datetime
    expires_at: datetime
    number_expires_at: datetime
    attempts_left: int
    state: RequestState
    restriction_expires_at: datetime | None = None
    reason: str = ""
    impact: Impact | None = None
    demand: Demand = Demand(number=True)
    numbered: bool = False
    approvals: tuple[Approval, ...] = ()
    batch: str | None = None
    revision: int | None = attrs.field(default=None, eq=False)
    also_for: tuple[str, ...] = attrs.field(default=(), eq=False)
    spelling: str = attrs.field(eq=False)

    @spelling.default
    def _canonical(self) -> str:
        return self.username

    @property
    def change(self) -> str:
        """The change in words: `add 203.0.113.7`, `delete …`, or `replace … by …`."""
        added, ended = (", ".join(map(str, each)) for each in (self.adds, self.removed))
        return {
            RequestKind.ADD: f"add {added}",
            RequestKind.DELETE: f"delete {ended}",
            RequestKind.REPLACE: f"replace {ended} by {added}",
        }[self.kind]

    @property
    def ready_at(self) -> datetime:
        """When its wait is over."""
        return self.requested_at + self.demand.wait

    @property
    def approved_by(self) -> tuple[str, ...]:
        """The usernames of those who approved it."""
        return tuple(approval.username for approval in self.approvals)

    @property
    def ends_alone(self) -> bool:
        """Whether it does nothing but end one restriction."""
        return len(self.removes) == 1 and not self.adds

    @property
    def subject(self) -> tuple[str, ...]:
        """What a number confirms and an approval approves; any other text of it is another."""
        expires_at = self.restriction_expires_at
        return (
            self.id,
            self.username,
            self.kind,
            ",".join(map(str, self.adds or self.removed)),
            self.label,
            self.requested_by,
            ",".join(self.removes),
            "" if expires_at is None else expires_at.isoformat(),
        )


@attrs.frozen(kw_only=True)
class StoredRequest:
    """A request as a store keeps it, with the fields that no page shows.

    Attributes:
        request: The request.
        email: The address for its numbers: the actor's address at the time of the request.
        key_id: The key of the digest; see `ipguard.confirmation`. Empty before the first number.
        digest: The keyed digest of the latest number, 32 bytes. Empty before the first number.
        resends: How many numbers were sent after the first.
        mails_failed: How many of the latest mails failed in a row.
        sent_at: When the latest number was mailed, or the mail was tried.
    """

    request: PendingRequest
    email: str = attrs.field(repr=False)
    key_id: bytes = attrs.field(default=b"", repr=False)
    digest: bytes = attrs.field(default=b"", repr=False)
    resends: int = 0
    mails_failed: int = 0
    sent_at: datetime | None = None


@attrs.frozen(kw_only=True)
class UserOverview:
    """A user with restrictions and pending requests: one row of the page.

    Attributes:
        user: The user.
        restrictions: The user's restrictions, expired ones included, oldest first.
        pending: The pending requests, oldest first.
        summary: The text of the Restrictions column; "No restrictions" if there are none.
        removed: Whether the host removed the user while restrictions are in force.
        last_used: For each restriction that let the user in within the last 90 days, by id, when
            the user was last seen in its addresses. Equality ignores it.
    """

    user: User
    restrictions: tuple[Restriction, ...]
    pending: tuple[PendingRequest, ...]
    summary: str
    removed: bool = False
    last_used: Mapping[str, datetime] = attrs.field(factory=dict, eq=False)


@attrs.frozen(kw_only=True)
class AccessLine:
    """One line of an access review: a user and one of its restrictions.

    Attributes:
        user: The user.
        removed: Whether the host removed the user while restrictions are in force.
        restriction: The restriction, or None if the user has none and may log in from anywhere.
        last_used: When the restriction last let the user in, within the last 90 days, or None.
        changed: The last audit entry that changed the restrictions of this user by name, or None:
            bulk changes name no user. Its detail has the `direction`.
    """

    user: User
    removed: bool
    restriction: Restriction | None
    last_used: datetime | None
    changed: Change | None


UserFilter = Literal["restricted", "unrestricted", "pending", "expiring"]
"""Which users a list is limited to: with restrictions or without, with pending requests, or with a
restriction that expires within seven days."""


class UserCounts(NamedTuple):
    """How many users there are, and how many of each `UserFilter`.

    Attributes:
        users: All of them.
        restricted: Those with restrictions, expired ones included.
        unrestricted: Those without, who may log in from anywhere.
        pending: Those with pending requests.
        expiring: Those with a restriction that expires within seven days.
        more: The names of the numbers that are lower bounds, because only the first 10,000 users
            were counted.
    """

    users: int
    restricted: int
    unrestricted: int
    pending: int
    expiring: int
    more: frozenset[str] = frozenset()

    def text(self, name: str) -> str:
        """Return a number for people, such as `10,000+` for a lower bound."""
        return f"{getattr(self, name):,}{'+' if name in self.more else ''}"


@attrs.frozen(kw_only=True)
class Page(Generic[T]):
    """One page of a list; iterates over its items.

    Attributes:
        items: The items.
        next: The cursor of the next page: pass it as `after` (overview) or `before` (history).
            None on the last page.
    """

    items: tuple[T, ...]
    next: Any = None

    def __iter__(self) -> Iterator[T]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


@attrs.frozen(kw_only=True)
class Policy:
    """The data that decides about one user, from one snapshot of the store.

    Restrictions are sorted oldest first; without any, every address is allowed. `known` is whether
    the user is registered.
    """

    revision: int
    restrictions: tuple[Restriction, ...]
    known: bool


class Reason(StrEnum):
    """The reason for a decision."""

    UNRESTRICTED = "unrestricted"
    LISTED = "listed"
    NOT_LISTED = "not_listed"
    BAD_ADDRESS = "bad_address"
    BAD_USERNAME = "bad_username"
    UNKNOWN_USER = "unknown_user"
    STORE_UNAVAILABLE = "store_unavailable"


class Outcome(StrEnum):
    """What a host does with a decision; only `ALLOW` is true.

    Attributes:
        ALLOW: Let the user in.
        REFUSE: Do not let the user in, and end sessions that are open.
        RETRY: The store does not answer: neither let the user in nor sign it out. Answer 503.
    """

    ALLOW = "allow"
    REFUSE = "refuse"
    RETRY = "retry"

    def __bool__(self) -> bool:
        return self is Outcome.ALLOW


@attrs.frozen(kw_only=True)
class Decision:
    """The answer to one login attempt; falsy when the login is not allowed.

    Attributes:
        allowed: Whether the login may proceed.
        reason: The reason.
        revision: The store's revision that the answer rests on, or a later one at which the answer
            is the same.
        restriction_id: The restriction that lists the address, if any.
        stale: Whether the lease had expired and `outage_grace` applied.
    """

    allowed: bool
    reason: Reason
    revision: int
    restriction_id: str | None = None
    stale: bool = False

    def __bool__(self) -> bool:
        return self.allowed

    @property
    def outcome(self) -> Outcome:
        """What the host does with this decision."""
        if self.allowed:
            return Outcome.ALLOW
        unknown = self.reason is Reason.STORE_UNAVAILABLE
        return Outcome.RETRY if unknown else Outcome.REFUSE


@attrs.frozen(kw_only=True)
class Explanation:
    """A decision with everything that an operator needs, read from the store.

    Attributes:
        username: The canonical username; the given text if it has no canonical form.
        address: The address in canonical text; None if the given text is not an address.
        decision: The decision by the store's current state; `report_only` does not apply.
        restrictions: The user's restrictions, expired ones included.
        known: Whether the user is registered.
        at: The store's time.
        summary: The explanation in a sentence or two.
        refused: The user's refused logins with the right password of the last 90 days, newest
            first, if the store answers.
    """

    username: str
    address: str | None
    decision: Decision
    restrictions: tuple[Restriction, ...]
    known: bool
    at: datetime
    summary: str
    refused: tuple[Refusal, ...] = ()


class Action(StrEnum):
    """What a change did; named after the call that made it, if there is one."""

    REQUEST = "request"
    CONFIRM = "confirm"
    CANCEL = "cancel"
    RESEND = "resend"
    APPROVE = "approve"
    NUMBER_ACCEPTED = "number_accepted"
    DELETE = "delete"
    IMPOSE = "impose"
    IMPOSE_MANY = "impose_many"
    LIFT = "lift"
    UNLOCK = "unlock"
    PUT_USERS = "put_users"
    REMOVE_USERS = "remove_users"
    RENAME_USER = "rename_user"
    MOVE_USER = "move_user"
    WRONG_NUMBER = "wrong_number"
    DELIVERY_FAILED = "delivery_failed"
    FORGET_SIGHTINGS = "forget_sightings"
    PRUNE = "prune"


def _action(value: str) -> Action | str:
    try:
        return Action(value)
    except ValueError:
        return value


def _copy(detail: Mapping[str, str]) -> Mapping[str, str]:
    return dict(detail)


@attrs.frozen(kw_only=True)
class Change:
    """An entry of the audit log, which is also the feed that guards follow.

    Attributes:
        revision: The position in the total order of changes; the first is 1.
        at: The time, by the store's clock.
        actor: The username of the actor, or None for the host itself (users put and removed).
        actor_address: The actor's address, if known.
        action: An `Action`, or the stored text if a newer version of the library
            wrote an action that this version does not know.
        username: The user concerned, or None for a bulk change.
        detail: The particulars, text by name. A stored detail that this version cannot read is
            under the name "".
        account_id: The user's account at that time, which decides who may see the entry.
    """

    revision: int
    at: datetime
    actor: str | None
    actor_address: str | None = None
    action: Action | str = attrs.field(converter=_action)
    username: str | None = None
    detail: Mapping[str, str] = attrs.field(factory=dict, converter=_copy, hash=False)
    account_id: str | None = None


class BulkCounts(NamedTuple):
    """What became of the rows of a bulk change.

    Attributes:
        added: How many restrictions were added.
        kept: How many rows were left out, because their users have these addresses already.
        ended: How many restrictions ended.
    """

    added: int
    kept: int
    ended: int


@attrs.frozen(kw_only=True)
class Applied:
    """A change of restrictions that is in force; its revision identifies it.

    Attributes:
        revision: Its revision; pass it to `Guard.wait_for` or `Guard.check(at_least=)`.
        restriction: The first restriction added, else the first one that ended; None for a bulk
            change.
        unrestricted: True if the user has no restriction left and may log in from any address.
        added: The restrictions added; of all users, if the change was of several.
        removed: The restrictions that ended.
        impact: What the change did; None for a bulk change. If it was of several users, the
            addresses are of the first one, the direction and the summary of all. Equality ignores
            this, `added`, `removed` and `counts`.
        counts: How many restrictions a bulk change added, kept and ended; None for others.
    """

    revision: int
    restriction: Restriction | None
    unrestricted: bool
    added: tuple[Restriction, ...] = attrs.field(default=(), eq=False)
    removed: tuple[Restriction, ...] = attrs.field(default=(), eq=False)
    impact: Impact | None = attrs.field(default=None, eq=False)
    counts: BulkCounts | None = attrs.field(default=None, eq=False)


class Touched(Enum):
    """Used by `changes_since` and `append` in place of usernames.

    Attributes:
        EVERYBODY: The policy of any user may have changed.
        RESET: The store does not have that history: drop everything and adopt its revision.
    """

    EVERYBODY = "everybody"
    RESET = "reset"


EVERYBODY: Final = Touched.EVERYBODY
RESET: Final = Touched.RESET


class Changes(NamedTuple):
    """The answer of `changes_since`.

    Attributes:
        head: The store's revision.
        token: The token of that revision's entry.
        usernames: The users whose policy changed, or `EVERYBODY`, or `RESET`.
    """

    head: int
    token: str
    usernames: frozenset[str] | Touched


class Damage(NamedTuple):
    """One place where the audit log, or the record of restrictions, was changed from outside.

    Attributes:
        revision: The entry concerned, or None if there is none.
        text: What is wrong, in a sentence.
    """

    revision: int | None
    text: str


@attrs.frozen(kw_only=True)
class Verification:
    """What `ipguard verify` found.

    Attributes:
        first: The first revision that was checked.
        head: The last one.
        token: The token of the head. Note both outside of the database, and pass them as `expect`
            later: only that shows that the whole log was not rewritten, or cut at its end.
        entries: How many entries were checked.
        restrictions: How many restrictions were checked, ended ones included.
        uncovered: How many restrictions no entry covers, because they are older than the record or
            were written by an older version of ipguard.
        damage: What is wrong, the first 100 places; empty if all is well.
    """

    first: int
    head: int
    token: str
    entries: int
    restrictions: int
    uncovered: int
    damage: tuple[Damage, ...] = ()
