"""What was changed: the audit trail, which is also the feed that guards follow."""

from __future__ import annotations

from datetime import datetime
from enum import Enum, StrEnum
from typing import Final, NamedTuple

import attrs

from ipguard.model._restrictions import Restriction


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


class Touched(Enum):
    """What `changes_since` and `append` say instead of naming users.

    Attributes:
        EVERYBODY: Any user's policy may have changed.
        RESET: The history asked for is not there: drop everything, take the store's revision.
    """

    EVERYBODY = "everybody"
    RESET = "reset"


EVERYBODY: Final = Touched.EVERYBODY
RESET: Final = Touched.RESET


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
