"""The rules, pure: what they judge comes in as arguments, the time of day included.

A request's life is one table, `STEPS`:

    pending --confirm--> confirmed
    pending --cancel---> cancelled
    pending --expire---> expired      (by time; see `state_at`)
    pending --lock-----> locked       (the last wrong guess)
    pending --guess----> pending      (a wrong guess before the last)
    pending --resend---> pending

There is no other step. One that is not in the table raises `RequestClosed` and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from types import MappingProxyType
from typing import Final, NamedTuple

from ipguard.addresses import AddressRange, AddressSet, parse_typed
from ipguard.errors import (
    AddressError,
    AddressTooBroad,
    DuplicateRestriction,
    LockoutRisk,
    RequestClosed,
    TooManyRestrictions,
)
from ipguard.model import (
    Decision,
    PendingRequest,
    Policy,
    Reason,
    RequestState,
    Restriction,
    StoredRequest,
)

NO_RESTRICTIONS: Final = "No restrictions"

_FIRST: Final = datetime.min.replace(tzinfo=UTC)
_LAST: Final = datetime.max.replace(tzinfo=UTC)


def decide(
    policy: Policy, address: AddressRange | None, now: datetime, *, deny_unknown: bool = False
) -> Decision:
    """Decide whether a login may go on.

    Args:
        policy: All that is known of the user.
        address: The client's address as `parse_address` returns it, or None where it is not one.
        now: The store's time, which expiry is judged by.
        deny_unknown: Whether a user that is not registered is refused.

    Returns:
        The decision; `revision` is the policy's.
    """
    allowed, reason, restriction_id = False, Reason.NOT_LISTED, None
    if address is None:
        reason = Reason.BAD_ADDRESS
    elif deny_unknown and not policy.known:
        reason = Reason.UNKNOWN_USER
    elif not policy.restrictions:
        allowed, reason = True, Reason.UNRESTRICTED
    else:
        # A user whose restrictions have all expired stays restricted, to nothing: time never opens
        # a door, only a person does.
        for restriction in policy.restrictions:
            if address in restriction.addresses and not restriction.expired(now):
                allowed, reason, restriction_id = True, Reason.LISTED, restriction.id
                break
    return Decision(
        allowed=allowed, reason=reason, revision=policy.revision, restriction_id=restriction_id
    )


def lasting(restrictions: Iterable[Restriction]) -> AddressSet:
    """Return the addresses let in whatever the time: temporary restrictions are left out."""
    return AddressSet(r.addresses for r in restrictions if r.expires_at is None)


class Step(StrEnum):
    """What can happen to a request."""

    CONFIRM = "confirm"
    CANCEL = "cancel"
    EXPIRE = "expire"
    LOCK = "lock"
    GUESS = "guess"
    RESEND = "resend"


STEPS: Final[Mapping[tuple[RequestState, Step], RequestState]] = MappingProxyType(
    {
        (RequestState.PENDING, Step.CONFIRM): RequestState.CONFIRMED,
        (RequestState.PENDING, Step.CANCEL): RequestState.CANCELLED,
        (RequestState.PENDING, Step.EXPIRE): RequestState.EXPIRED,
        (RequestState.PENDING, Step.LOCK): RequestState.LOCKED,
        (RequestState.PENDING, Step.GUESS): RequestState.PENDING,
        (RequestState.PENDING, Step.RESEND): RequestState.PENDING,
    }
)
"""From a state, by a step, to a state."""


def after(state: RequestState, step: Step) -> RequestState:
    """Return the state that a step leads to.

    Raises:
        RequestClosed: The table has no such step; it carries the state.
    """
    try:
        return STEPS[state, step]
    except KeyError:
        raise RequestClosed(state) from None


def state_at(request: PendingRequest, now: datetime) -> RequestState:
    """Return a request's state at a time: one that is pending expires by itself."""
    if request.state is RequestState.PENDING and request.expires_at <= now:
        return after(request.state, Step.EXPIRE)
    return request.state


def number_expired(stored: StoredRequest, now: datetime) -> bool:
    """Return whether a request's number can no longer be confirmed.

    A number issued in the future was issued by a clock that ran ahead and has been set right: how
    old it is cannot be known, so it counts as expired.
    """
    ahead = stored.sent_at is not None and stored.sent_at > now
    return ahead or stored.request.number_expires_at <= now


def wait_left(times: Iterable[datetime], most: int, period: timedelta, now: datetime) -> timedelta:
    """Return how long to wait until fewer than `most` of some times lie within a period.

    Times in the future come from a clock that ran ahead and has been set right. They are not
    counted: otherwise the wait would last until the clock reaches them again.

    Args:
        times: When something was done, in any order.
        most: How often it may be done within the period; at least 1.
        period: The period, which ends now.
        now: The store's time.

    Returns:
        The wait; zero if it may be done now.
    """
    ages = sorted(age for at in times if timedelta(0) <= (age := now - at) < period)
    return timedelta(0) if len(ages) < most else period - ages[most - 1]


def shifted(moment: datetime, by: timedelta) -> datetime:
    """Add a duration to a time in UTC, ending at the first or the last time that there is."""
    try:
        return moment + by
    except OverflowError:
        return _FIRST if by < timedelta(0) else _LAST


def check_lockout(
    address: AddressRange | None,
    before: Policy,
    restrictions: Iterable[Restriction],
    now: datetime,
) -> None:
    """Refuse a change by which acting users would keep themselves out.

    Args:
        address: Where the actor comes from, or None where that is not known.
        before: The actor's own policy as it is.
        restrictions: The actor's own restrictions as the change would leave them.
        now: The store's time.

    Raises:
        LockoutRisk: The address gets in now, and after the change would not, or not once the
            temporary restrictions end.
    """
    left = tuple(restrictions)
    if address is None or not left or not decide(before, address, now):
        return
    if address not in lasting(left):
        raise LockoutRisk(str(address))


def read_addresses(text: str, *, widest_ipv4: int, widest_ipv6: int) -> AddressRange:
    """Read a restriction as a person typed it, and propose only what the settings accept.

    Args:
        text: What was typed.
        widest_ipv4: The shortest prefix length for IPv4, 0 to 32.
        widest_ipv6: The shortest prefix length for IPv6, 0 to 128.

    Raises:
        AddressError: It is not acceptable text. Its hint is not wider than the settings allow.
    """
    try:
        return parse_typed(text)
    except AddressError as exc:
        if exc.hint is None:
            raise
        try:
            hint = AddressRange.parse(exc.hint)
            check_width(hint, widest_ipv4=widest_ipv4, widest_ipv6=widest_ipv6)
        except AddressTooBroad as broad:
            reason = f"{exc.reason}; the widest network allowed is a /{broad.widest}"
            raise AddressError(exc.text, reason) from None
        raise


def check_width(addresses: AddressRange, *, widest_ipv4: int, widest_ipv6: int) -> None:
    """Refuse a restriction that lets in more addresses than a prefix of the widest length holds.

    Args:
        addresses: What the restriction would let in.
        widest_ipv4: The shortest prefix length for IPv4, 0 to 32.
        widest_ipv6: The shortest prefix length for IPv6, 0 to 128.

    Raises:
        AddressTooBroad: It holds more.
    """
    bits, widest = (32, widest_ipv4) if addresses.version == 4 else (128, widest_ipv6)
    if addresses.size > 1 << (bits - widest):
        raise AddressTooBroad(str(addresses), widest)


_Refused = tuple[Restriction, DuplicateRestriction | TooManyRestrictions]


def judge_additions(
    username: str,
    present: Iterable[Restriction],
    wanted: Iterable[Restriction],
    *,
    per_user: int,
    now: datetime,
) -> tuple[list[Restriction], list[_Refused]]:
    """Judge restrictions that would be added to one user in one change.

    An expired restriction to the same addresses is replaced; one that still lets them in is not.

    Args:
        username: The user, in canonical form.
        present: The user's restrictions, expired ones included.
        wanted: The restrictions to add.
        per_user: How many restrictions a user may have, expired ones included.
        now: The store's time.

    Returns:
        The restrictions that would be replaced; and the refused ones, each with its error:
        duplicates first, then those beyond the limit.
    """
    held: dict[AddressRange, list[Restriction]] = {}
    for restriction in present:
        held.setdefault(restriction.addresses, []).append(restriction)
    count = sum(map(len, held.values()))
    accepted: list[Restriction] = []
    replaced: list[Restriction] = []
    refused: list[_Refused] = []
    given: set[AddressRange] = set()
    for each in wanted:
        same = held.get(each.addresses, [])
        live = next((r for r in same if not r.expired(now)), None)
        if each.addresses in given:
            error = DuplicateRestriction(username, str(each.addresses), "row")
            refused.append((each, error))
        elif live is not None:
            refused.append((each, duplicate(live, each)))
        else:
            accepted.append(each)
            replaced += same
        given.add(each.addresses)
    over = count - len(replaced) + len(accepted) - per_user
    if over > 0:
        refused += ((each, TooManyRestrictions(username, per_user)) for each in accepted[-over:])
    return replaced, refused


class Remainder(NamedTuple):
    """What a deletion leaves to a user.

    Attributes:
        left: The other restrictions, expired ones included.
        opens: None is left, so that the user may log in from any address.
        shuts: All that are left have expired, so that the user may not log in from any address.
        ends: When the last of those that are left expires, or None if one is permanent.
    """

    left: tuple[Restriction, ...]
    opens: bool
    shuts: bool
    ends: datetime | None


def without(restrictions: Iterable[Restriction], deleted: str, now: datetime) -> Remainder:
    """Return what the deletion of one restriction would leave to its user.

    Args:
        restrictions: The user's restrictions, expired ones included.
        deleted: The id of the restriction to delete.
        now: The store's time.
    """
    left = tuple(r for r in restrictions if r.id != deleted)
    ends = [r.expires_at for r in left if r.expires_at is not None]
    last = max(ends) if ends and len(ends) == len(left) else None
    return Remainder(left, not left, last is not None and last <= now, last)


def duplicate(found: Restriction | PendingRequest, wanted: Restriction) -> DuplicateRestriction:
    """Return the error for addresses that exist already: it says whether anything else differs."""
    if isinstance(found, PendingRequest):
        kind, expires_at = "request", found.restriction_expires_at
    else:
        kind, expires_at = "restriction", found.expires_at
    return DuplicateRestriction(
        found.username,
        str(found.addresses),
        kind,
        found.label,
        expires_at,
        (found.label, expires_at) != (wanted.label, wanted.expires_at),
    )


def summarise(restrictions: Iterable[Restriction], now: datetime) -> str:
    """Return the text of the page's Restrictions column.

    "No restrictions" is said only where there is none: a user left with expired ones can log in
    from nowhere, which the text says.
    """
    left = tuple(restrictions)
    if not left:
        return NO_RESTRICTIONS
    live = [str(r.addresses) for r in left if not r.expired(now)]
    return ", ".join(live) if live else "No address allowed (every restriction has expired)"
