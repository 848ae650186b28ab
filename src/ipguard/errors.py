"""Every error that ipguard raises.

All of them are an `IPGuardError`. Each carries its data as attributes, so that no caller has to
parse the message, and survives `pickle`, so that it can cross process boundaries.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, ClassVar, cast

import attrs

__all__ = [
    "AddressError",
    "AddressTooBroad",
    "DeliveryError",
    "DirectionChanged",
    "DuplicateRestriction",
    "IPGuardError",
    "InvalidValue",
    "LockoutRisk",
    "NotAnApprover",
    "NumberExpired",
    "NumberFormatError",
    "OpeningRisk",
    "RequestClosed",
    "SchemaVersionError",
    "StoreConfigError",
    "StoreError",
    "StoreUnavailable",
    "TooManyAttempts",
    "TooManyRequests",
    "TooManyRestrictions",
    "TooSoon",
    "UnknownRequest",
    "UnknownRestriction",
    "UnknownUser",
    "UsernameCollision",
    "UsernameError",
    "WrongNumber",
]

_SHOWN = 60
_EFFECTS = {
    "NEUTRAL": "lets the user in from the same addresses",
    "TIGHTENS": "lets the user in from fewer addresses",
    "LOOSENS": "lets the user in from other addresses too",
    "OPENS": "lets the user in from every address",
}


def shorten(value: object) -> str:
    """Quote a value from outside for a message: one line, at most about 60 characters.

    No method of the value is called: a subclass of str may return anything.
    """
    kind = type(value)
    if not issubclass(kind, str):
        return f"{kind.__name__} object"
    start = str.__getitem__(cast("str", value), slice(_SHOWN + 1))
    return ascii(start[:_SHOWN]) + ("…" if len(start) > _SHOWN else "")


class _Quoted(str):
    """Text that `shorten` returned; unpickling must not quote it again."""

    __slots__ = ()


def _quoted(text: object) -> _Quoted:
    return text if isinstance(text, _Quoted) else _Quoted(shorten(text))


class IPGuardError(Exception):
    """The base of every error of this library."""

    _message: ClassVar[str] = ""  # a format string of the attributes; empty to show the arguments

    def __str__(self) -> str:
        return self._message.format(**vars(self)) or super().__str__()


@attrs.define(slots=False, repr=False)
class AddressError(IPGuardError, ValueError):
    """The text is not an acceptable address, network or range.

    Attributes:
        text: The input, quoted and shortened to about 60 characters.
        reason: The reason, in a few words.
        hint: A likely correction, or None.
    """

    text: str = attrs.field(converter=_quoted)
    reason: str
    hint: str | None = None

    def __str__(self) -> str:
        message = f"{self.text} is not accepted: {self.reason}"
        return message if self.hint is None else f"{message} (did you mean {self.hint}?)"


@attrs.define(slots=False, repr=False)
class UsernameError(IPGuardError, ValueError):
    """The username has no canonical form. `text` is the input, quoted and shortened."""

    text: str = attrs.field(converter=_quoted)
    reason: str

    _message = "{text} is not a username: {reason}"


@attrs.define(slots=False, repr=False)
class InvalidValue(IPGuardError, ValueError):
    """The argument, setting or field `name` has an invalid value."""

    name: str
    reason: str

    _message = "{name}: {reason}"


@attrs.define(slots=False, repr=False)
class NumberFormatError(InvalidValue):
    """The text cannot be a number of `digits` digits. No attempt is counted for a typing error."""

    digits: int
    reason: str
    name: str = attrs.field(default="number", init=False)

    _message = "the confirmation number {reason}; no attempt was counted"


@attrs.define(slots=False, repr=False)
class AddressTooBroad(IPGuardError):
    """The restriction holds more addresses than a prefix of the length `widest` does."""

    addresses: str
    widest: int

    _message = "{addresses} holds more addresses than a /{widest}, the widest allowed"


@attrs.define(slots=False, repr=False)
class LockoutRisk(IPGuardError):
    """After the change, the actor could not log in from `address`, its present address."""

    address: str

    _message = "after this change you could not log in from {address}, where you are now"


@attrs.define(slots=False, repr=False)
class OpeningRisk(IPGuardError):
    """The change would end the last restriction of `username`, which the caller did not allow."""

    username: str

    _message = "after this change {username} could log in from every address"


@attrs.define(slots=False, repr=False)
class DirectionChanged(IPGuardError):
    """A request would now do more to `username` than was requested.

    Attributes:
        requested: The `ipguard.Direction` that was requested.
        now: What it would be now.
        username: The user.
    """

    requested: Any
    now: Any
    username: str

    def __str__(self) -> str:
        return (
            f"the restrictions of {self.username} have changed: this was requested as a change that"
            f" {_EFFECTS[self.requested.name]}, and now it {_EFFECTS[self.now.name]};"
            " withdraw the request and make a new one"
        )


@attrs.define(slots=False, repr=False)
class TooSoon(IPGuardError):
    """The request waits until `ready_at`, in UTC; a number is mailed after that, by `resend`."""

    ready_at: datetime

    _message = "this request has to wait until {ready_at:%Y-%m-%d %H:%M:%S} UTC"


@attrs.define(slots=False, repr=False)
class NotAnApprover(IPGuardError):
    """This actor cannot approve the request; `reason` says why."""

    reason: str

    _message = "you cannot approve this request: {reason}"


@attrs.define(slots=False, repr=False)
class DuplicateRestriction(IPGuardError):
    """The user already has these addresses, or a request for them is pending.

    Nothing was changed, neither the label nor the expiry of the existing one.

    Attributes:
        username: The user, canonical.
        addresses: The range, canonical.
        found: What exists: `restriction`, `request` (pending), `deletion` (a pending request to
            delete it), or `row` (an earlier row of the same import).
        label: Its label.
        expires_at: Its expiry, or None.
        differs: Whether its label or expiry differs from the requested one.
    """

    username: str
    addresses: str
    found: str = "restriction"
    label: str = ""
    expires_at: datetime | None = None
    differs: bool = False

    def __str__(self) -> str:
        if self.found == "deletion":
            return f"a request to delete {self.addresses} of {self.username} is already pending"
        if self.found == "row":
            return f"{self.username} {self.addresses} is there twice"
        shown = f'"{self.label}"' if self.label.isprintable() else shorten(self.label)
        label = f"label {shown}" if self.label else "no label"
        at = self.expires_at
        expiry = "no expiry" if at is None else f"expires {at:%Y-%m-%d %H:%M} UTC"
        which = f"{self.addresses} ({label}, {expiry})"
        if self.found == "request":
            text = f"a request to add {which} for {self.username} is already pending"
            change = "To ask for another label or expiry, cancel that request first"
        else:
            text = f"{self.username} already has {which}"
            change = "To change its label or expiry, replace it"
        return f"{text}; it was not changed. {change}" if self.differs else text


@attrs.define(slots=False, repr=False)
class UnknownUser(IPGuardError):
    """The user does not exist for this actor: not registered, or of another account."""

    username: str

    def __str__(self) -> str:
        return f"no user {shorten(self.username)}"


_LISTED = 5


@attrs.define(slots=False, repr=False)
class UsernameCollision(IPGuardError):
    """Two users would have one canonical username; the second one was refused.

    Attributes:
        username: The canonical username.
        spellings: How it is spelled: by the user who has it, and by the one who was refused.
        accounts: Their accounts, in the same order.
        removed: Whether the first one was removed. Its restrictions are still in force: once they
            are deleted, the username is free.
        refused: Raised by `put_users`: each record that was refused, with its error.
    """

    username: str
    spellings: tuple[str, str]
    accounts: tuple[str, str]
    removed: bool = False
    refused: tuple[tuple[Any, IPGuardError], ...] = ()

    def __str__(self) -> str:
        if len(self.refused) > 1:
            shown = "; ".join(str(error) for _, error in self.refused[:_LISTED])
            more = "; …" if len(self.refused) > _LISTED else ""
            return f"{len(self.refused)} users were refused: {shown}{more}"
        (first, second), (one, other) = map(shorten, self.spellings), map(shorten, self.accounts)
        state = "a removed user whose restrictions are in force" if self.removed else "another user"
        return f"{second} (account {other}) is the username of {state}, {first} (account {one})"


@attrs.define(slots=False, repr=False)
class UnknownRequest(IPGuardError):
    """The request does not exist for this actor."""

    request_id: str

    def __str__(self) -> str:
        return f"no request {shorten(self.request_id)}"


@attrs.define(slots=False, repr=False)
class UnknownRestriction(IPGuardError):
    """The restriction does not exist for this actor."""

    restriction_id: str

    def __str__(self) -> str:
        return f"no restriction {shorten(self.restriction_id)}"


@attrs.define(slots=False, repr=False)
class RequestClosed(IPGuardError):
    """The request is `confirmed`, `cancelled`, `expired` or `locked`."""

    state: str

    _message = "the request is closed: {state}"


class NumberExpired(IPGuardError):
    """The confirmation number has expired; `Workflow.resend` issues a new one."""

    _message = "the confirmation number has expired; ask for a new one"


@attrs.define(slots=False, repr=False)
class WrongNumber(IPGuardError):
    """The number is wrong. At 0 `attempts_left` the request is locked."""

    attempts_left: int

    _message = "wrong confirmation number; attempts left: {attempts_left}"


class TooManyAttempts(IPGuardError):
    """No more guesses are evaluated: the request is locked, or the actor failed too often."""

    _message = "too many wrong confirmation numbers"


@attrs.define(slots=False, repr=False)
class TooManyRequests(IPGuardError):
    """The actor exceeds a rate limit; the same call can succeed after `retry_after`."""

    retry_after: timedelta

    def __str__(self) -> str:
        seconds = max(1, round(self.retry_after.total_seconds()))
        return f"too many requests; try again in {seconds} s"


@attrs.define(slots=False, repr=False)
class TooManyRestrictions(IPGuardError):
    """The user already has `limit` restrictions, as many as the settings allow."""

    username: str
    limit: int

    _message = "{username} already has {limit} restrictions, as many as are allowed"


@attrs.define(slots=False, repr=False)
class DeliveryError(IPGuardError):
    """The mail with the confirmation number could not be sent.

    The request stays pending, and `Workflow.resend` sends a new number.

    Attributes:
        reason: The reason, without the number and without a password.
        request_id: The pending request, to pass to `resend`; None if there is none.
    """

    reason: str
    request_id: str | None = None

    _message = "the mail could not be sent: {reason}"


class StoreError(IPGuardError):
    """The store failed; the base of the three errors below."""


class StoreUnavailable(StoreError):
    """The store does not respond, or the outcome of a commit is unknown. A retry may help."""


class StoreConfigError(StoreError):
    """The store cannot be used as configured: a bad URL, a missing extra, no permission."""


@attrs.define(slots=False, repr=False)
class SchemaVersionError(StoreError):
    """This version of the library may not use the store's schema.

    Attributes:
        found: The schema's version, or None if the store has no schema.
        needed: The version that this library needs, or the oldest library that the schema admits.
    """

    found: int | None
    needed: int

    def __str__(self) -> str:
        if self.found is None:
            return f"the store has no ipguard schema; version {self.needed} is needed"
        return f"the store's schema is version {self.found}; this library needs {self.needed}"
