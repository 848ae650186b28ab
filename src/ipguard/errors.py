"""Every error that ipguard raises.

All of them are an `IPGuardError`, and each carries what a caller needs to act on it as attributes,
so that no caller has to read the message. Their positional arguments are all there is to them:
they survive `pickle` and so cross process boundaries.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import cast

_SHOWN = 60


def shorten(value: object) -> str:
    """Quote a value from outside for a message: one line, at most about 60 characters.

    Nothing of the value's own is called: a class may claim to be str and do anything.
    """
    kind = type(value)
    if not issubclass(kind, str):
        return f"{kind.__name__} object"
    start = str.__getitem__(cast("str", value), slice(_SHOWN + 1))
    return ascii(start[:_SHOWN]) + ("…" if len(start) > _SHOWN else "")


class IPGuardError(Exception):
    """The base of every error of this library."""


class AddressError(IPGuardError, ValueError):
    """Text that is not an address, a network or a range as ipguard accepts them.

    Attributes:
        text: The input, quoted and shortened; never more than about 60 characters of it.
        reason: What is wrong with it, in a few words.
        hint: What was perhaps meant, or None.
    """

    def __init__(self, text: object, reason: str, hint: str | None = None) -> None:
        self.text = text if isinstance(text, _Quoted) else _Quoted(shorten(text))
        self.reason = reason
        self.hint = hint
        super().__init__(self.text, reason, hint)

    def __str__(self) -> str:
        message = f"{self.text} is not accepted: {self.reason}"
        return message if self.hint is None else f"{message} (did you mean {self.hint}?)"


class _Quoted(str):
    """Text that `shorten` has been through already; unpickling must not quote it again."""

    __slots__ = ()


class UsernameError(IPGuardError, ValueError):
    """A username that has no canonical form.

    Attributes:
        text: The input, quoted and shortened.
        reason: What is wrong with it, in a few words.
    """

    def __init__(self, text: object, reason: str) -> None:
        self.text = text if isinstance(text, _Quoted) else _Quoted(shorten(text))
        self.reason = reason
        super().__init__(self.text, reason)

    def __str__(self) -> str:
        return f"{self.text} is not a username: {self.reason}"


class InvalidValue(IPGuardError, ValueError):
    """A value that makes no sense where it was given: a label, a reason, a time, a setting.

    Attributes:
        name: The argument or field.
        reason: What is wrong with it, in a few words.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class NumberFormatError(InvalidValue):
    """Text that cannot be a confirmation number. It is a typing error: no attempt is counted.

    Attributes:
        digits: How many digits a number has.
        reason: What is wrong with the text, in a few words.
    """

    def __init__(self, digits: int, reason: str) -> None:
        super().__init__("number", reason)
        self.args = (digits, reason)
        self.digits = digits

    def __str__(self) -> str:
        return f"the confirmation number {self.reason}; no attempt was counted"


class AddressTooBroad(IPGuardError):
    """A restriction that would hold more addresses than the settings allow.

    Attributes:
        addresses: The range in its canonical text.
        widest: The shortest prefix length that the settings allow for its version.
    """

    def __init__(self, addresses: str, widest: int) -> None:
        super().__init__(addresses, widest)
        self.addresses = addresses
        self.widest = widest

    def __str__(self) -> str:
        return f"{self.addresses} holds more addresses than a /{self.widest}, the widest allowed"


class LockoutRisk(IPGuardError):
    """The change would keep the acting user itself out.

    Attributes:
        address: The actor's address, which would no longer get in.
    """

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.address = address

    def __str__(self) -> str:
        return f"after this change you could not log in from {self.address}, where you are now"


class OpeningRisk(IPGuardError):
    """The change would end a user's last restriction, and the caller had not accepted that.

    Attributes:
        username: The user, in canonical form, who could log in from every address.
    """

    def __init__(self, username: str) -> None:
        super().__init__(username)
        self.username = username

    def __str__(self) -> str:
        return f"after this change {self.username} could log in from every address"


class DuplicateRestriction(IPGuardError):
    """The user already has these addresses, or a request for them is pending.

    Nothing was changed, neither the label nor the expiry of what exists.

    Attributes:
        username: The user, in canonical form.
        addresses: The range in its canonical text.
        found: What exists: `restriction`, `request` (pending), `deletion` (a pending request to
            delete it), or `row` (an earlier row of the same import).
        label: The label that it has.
        expires_at: When it expires, or None.
        differs: Whether its label or expiry is not the one asked for.
    """

    def __init__(
        self,
        username: str,
        addresses: str,
        found: str = "restriction",
        label: str = "",
        expires_at: datetime | None = None,
        differs: bool = False,  # noqa: FBT001, FBT002 - positional, for pickle
    ) -> None:
        super().__init__(username, addresses, found, label, expires_at, differs)
        self.username = username
        self.addresses = addresses
        self.found = found
        self.label = label
        self.expires_at = expires_at
        self.differs = differs

    def __str__(self) -> str:
        if self.found == "deletion":
            return f"a request to delete {self.addresses} of {self.username} is already pending"
        if self.found == "row":
            return f"{self.username} {self.addresses} is there twice"
        shown = f'"{self.label}"' if self.label.isprintable() else shorten(self.label)
        label = f"label {shown}" if self.label else "no label"
        expiry = (
            "no expiry"
            if self.expires_at is None
            else f"expires {self.expires_at:%Y-%m-%d %H:%M} UTC"
        )
        which = f"{self.addresses} ({label}, {expiry})"
        if self.found == "request":
            text = f"a request to add {which} for {self.username} is already pending"
            change = "To ask for another label or expiry, cancel that request first"
        else:
            text = f"{self.username} already has {which}"
            change = "To change its label or expiry, delete it and add it again"
        return f"{text}; it was not changed. {change}" if self.differs else text


class UnknownUser(IPGuardError):
    """No such user for this actor: not registered, or of an account it does not manage.

    Attributes:
        username: The username asked for.
    """

    def __init__(self, username: str) -> None:
        super().__init__(username)
        self.username = username

    def __str__(self) -> str:
        return f"no user {shorten(self.username)}"


class UnknownRequest(IPGuardError):
    """No such request for this actor.

    Attributes:
        request_id: The id asked for.
    """

    def __init__(self, request_id: str) -> None:
        super().__init__(request_id)
        self.request_id = request_id

    def __str__(self) -> str:
        return f"no request {shorten(self.request_id)}"


class UnknownRestriction(IPGuardError):
    """No such restriction for this actor.

    Attributes:
        restriction_id: The id asked for.
    """

    def __init__(self, restriction_id: str) -> None:
        super().__init__(restriction_id)
        self.restriction_id = restriction_id

    def __str__(self) -> str:
        return f"no restriction {shorten(self.restriction_id)}"


class RequestClosed(IPGuardError):
    """The request can no longer be changed.

    Attributes:
        state: What became of it: `confirmed`, `cancelled`, `expired` or `locked`.
    """

    def __init__(self, state: str) -> None:
        super().__init__(state)
        self.state = state

    def __str__(self) -> str:
        return f"the request is closed: {self.state}"


class NumberExpired(IPGuardError):
    """The confirmation number is no longer valid; `resend` issues a new one."""

    def __str__(self) -> str:
        return "the confirmation number has expired; ask for a new one"


class WrongNumber(IPGuardError):
    """The confirmation number is not the one that was sent.

    Attributes:
        attempts_left: How many more guesses this number allows; 0 means the request is locked.
    """

    def __init__(self, attempts_left: int) -> None:
        super().__init__(attempts_left)
        self.attempts_left = attempts_left

    def __str__(self) -> str:
        return f"wrong confirmation number; attempts left: {self.attempts_left}"


class TooManyAttempts(IPGuardError):
    """No further guess is evaluated: the request is locked, or the actor failed too often."""

    def __str__(self) -> str:
        return "too many wrong confirmation numbers"


class TooManyRequests(IPGuardError):
    """The actor asks more often than the settings allow.

    Attributes:
        retry_after: How long to wait before the same call can succeed.
    """

    def __init__(self, retry_after: timedelta) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after

    def __str__(self) -> str:
        return (
            f"too many requests; try again in {max(1, round(self.retry_after.total_seconds()))} s"
        )


class TooManyRestrictions(IPGuardError):
    """The user has as many restrictions as the settings allow.

    Attributes:
        username: The user, in canonical form.
        limit: How many restrictions a user may have.
    """

    def __init__(self, username: str, limit: int) -> None:
        super().__init__(username, limit)
        self.username = username
        self.limit = limit

    def __str__(self) -> str:
        return f"{self.username} already has {self.limit} restrictions, as many as are allowed"


class DeliveryError(IPGuardError):
    """The mail with the confirmation number could not be sent.

    The request stays pending, and `Workflow.resend` sends a new number.

    Attributes:
        reason: What went wrong, without the number and without a password.
        request_id: The request that waits for its number, where one does; pass it to `resend`.
    """

    def __init__(self, reason: str, request_id: str | None = None) -> None:
        super().__init__(reason, request_id)
        self.reason = reason
        self.request_id = request_id

    def __str__(self) -> str:
        return f"the mail could not be sent: {self.reason}"


class StoreError(IPGuardError):
    """Something is wrong with the store; the base of the three below."""


class StoreUnavailable(StoreError):
    """The store does not answer now, or the outcome of a commit is lost. Trying again may help."""


class StoreConfigError(StoreError):
    """The store cannot be used as it was asked for: a bad URL, a missing extra, no permission."""


class SchemaVersionError(StoreError):
    """The store's schema may not be used by this version of the library.

    Attributes:
        found: The schema's version, or None where there is no schema.
        needed: The version that this library needs, or the oldest library that the schema admits.
    """

    def __init__(self, found: int | None, needed: int) -> None:
        super().__init__(found, needed)
        self.found = found
        self.needed = needed

    def __str__(self) -> str:
        if self.found is None:
            return f"the store has no ipguard schema; version {self.needed} is needed"
        return f"the store's schema is version {self.found}; this library needs {self.needed}"
