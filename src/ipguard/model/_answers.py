"""What decides about a user, and what was decided."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

import attrs

from ipguard.model._restrictions import Restriction


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
