"""Who logs in, and who acts."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import ClassVar, Final, Literal

import attrs

from ipguard.addresses import parse_address
from ipguard.errors import InvalidValue
from ipguard.model._checks import checked_text
from ipguard.usernames import canonical_username

_NAME_LIMIT: Final = 256
_VIA_LIMIT: Final = 400
_NOT_IN_EMAIL: Final = frozenset(',;:<>()[]\\"')
_EMAIL_LIMIT: Final = 254  # RFC 5321 4.5.3.1.3, less the angle brackets


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
    return None if value is None or value == "" else str(parse_address(value))


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


@attrs.frozen(kw_only=True)
class StoredUser:
    """A user as a store keeps it.

    Attributes:
        user: The user.
        removed: Whether the host removed it; its restrictions go on holding.
    """

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
            or None. Empty text, a server's word for "not known", is None.
        via: How the actor reached the workflow, for the audit trail: a command line and who ran it,
            say; up to 400 characters, empty for the host itself.
    """

    EVERY_ACCOUNT: ClassVar[_EveryAccount] = _EveryAccount.EVERY_ACCOUNT

    username: str = attrs.field(converter=canonical_username)
    email: str = attrs.field(converter=_email)
    manages: Accounts = attrs.field(converter=_accounts, repr=False)
    address: str | None = attrs.field(default=None, converter=_optional_address)
    via: str = attrs.field(default="", converter=_via)
