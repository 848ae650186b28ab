"""The rules about restrictions and requests, as pure functions; `now` is an argument.

The states of a request are one table, `STEPS`:

    pending --confirm--> confirmed
    pending --cancel---> cancelled
    pending --expire---> expired      (at its time; see `state_at`)
    pending --lock-----> locked       (the last wrong guess)
    pending --guess----> pending      (a wrong guess before the last)
    pending --resend---> pending
    pending --approve--> pending

Any other step raises `RequestClosed` and changes nothing.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from hashlib import sha256
from heapq import heappop, heappush
from itertools import pairwise
from types import MappingProxyType
from typing import Final, NamedTuple, get_args
from unicodedata import normalize

import attrs

from ipguard import errors
from ipguard._checks import check_whole
from ipguard.addresses import (
    AddressRange,
    AddressSet,
    canonical_address,
    is_private,
    login_address,
    pack_address,
    parse_address,
    parse_typed,
)
from ipguard.model import (
    Accounts,
    Actor,
    Approval,
    Decision,
    Demand,
    Direction,
    Impact,
    PendingRequest,
    Policy,
    Reason,
    Refusal,
    RequestKind,
    RequestState,
    Restriction,
    Sighting,
    StoredRequest,
    User,
    UserFilter,
)

__all__ = [
    "SEEN_FOR",
    "SIGHTINGS_AT_ONCE",
    "SIGHTINGS_KEPT",
    "STEPS",
    "Additions",
    "Search",
    "Step",
    "UserHeld",
    "UserPlan",
    "UserRecord",
    "UserStep",
    "after",
    "all_expired",
    "approvals_missing",
    "check_approver",
    "check_bulk_options",
    "check_filter",
    "check_lockout",
    "check_revision",
    "check_width",
    "counted_approvals",
    "decide",
    "demanded",
    "duplicate",
    "expiring_until",
    "impact",
    "is_listed",
    "is_unused",
    "is_visible",
    "joined",
    "judge_additions",
    "last_used",
    "lasting",
    "number_expired",
    "plan_users",
    "read_addresses",
    "ready_at",
    "refusal_hint",
    "refusal_notice_due",
    "refusals",
    "search_terms",
    "seen_since",
    "shifted",
    "sightings_kept",
    "sightings_to_record",
    "state_at",
    "still_refused",
    "subject_digest",
    "suggest",
    "summarise",
    "told_until",
    "two_users",
    "wait_left",
    "whereabouts",
    "would_refuse",
]

NO_RESTRICTIONS: Final = "No restrictions"

# Blanks, hyphens, dashes, apostrophes, quotes and other punctuation of names. Normalisation makes
# an acute accent that was typed as an apostrophe a blank and a combining accent.
_BETWEEN_WORDS: Final = re.compile(
    r"""[ \-'"`,.;:()\[\]/\xab\xb7\xbb\u02b9-\u02bc\u2010-\u201f\u2032\u30fb]+[\u0300-\u036f]*"""
)
_LIKE_AN_ADDRESS: Final = re.compile("[0-9A-Fa-f]*[.:]")
SIGHTINGS_KEPT: Final = 32
"""Of how many addresses of a user the sightings are kept."""
SIGHTINGS_AT_ONCE: Final = 1_000
"""How many sightings a store takes in one call."""
SEEN_FOR: Final = timedelta(days=90)
"""How long the sightings of an address are kept after the last one."""
_TOLD_EVERY: Final = timedelta(days=1)
_SHOWN: Final = 20
_EXPIRING_WITHIN: Final = timedelta(days=7)
_TOLD_A_DAY: Final = 10
_SUBSCRIBER: Final = 64  # the prefix length of the network that an IPv6 host is in
_SHARED: Final = tuple(
    AddressRange.parse(each) for each in ("64:ff9b::/96", "64:ff9b:1::/48", "2001::/32")
)
_ANYWHERE: Final = tuple(AddressRange.parse(text) for text in ("0.0.0.0/0", "::/0"))
_FIRST: Final = datetime.min.replace(tzinfo=UTC)
_LAST: Final = datetime.max.replace(tzinfo=UTC)


def decide(
    policy: Policy, address: AddressRange | None, now: datetime, *, deny_unknown: bool = False
) -> Decision:
    """Decide whether a login is allowed; the decision has the policy's revision.

    Of several restrictions that list the address, the decision names the oldest permanent one, else
    the oldest temporary one. A guard decides the same from `ipguard.row`.

    Args:
        policy: The policy of the user.
        address: The client's address; None if the text is not an address.
        now: The store's time, for expiry.
        deny_unknown: Whether to refuse users who are not registered.
    """
    allowed, reason, restriction_id = False, Reason.NOT_LISTED, None
    if address is None:
        reason = Reason.BAD_ADDRESS
    elif deny_unknown and not policy.known:
        reason = Reason.UNKNOWN_USER
    elif not policy.restrictions:
        allowed, reason = True, Reason.UNRESTRICTED
    else:
        # Expiry never lifts a restriction: if all have expired, no address is allowed.
        for restriction in sorted(policy.restrictions, key=lambda r: r.expires_at is not None):
            if address in restriction.addresses and not restriction.expired(now):
                allowed, reason, restriction_id = True, Reason.LISTED, restriction.id
                break
    return Decision(
        allowed=allowed, reason=reason, revision=policy.revision, restriction_id=restriction_id
    )


def lasting(restrictions: Iterable[Restriction]) -> AddressSet:
    """Return the addresses of the permanent restrictions."""
    return AddressSet(r.addresses for r in restrictions if r.expires_at is None)


class Step(StrEnum):
    """A transition of a request."""

    CONFIRM = "confirm"
    CANCEL = "cancel"
    EXPIRE = "expire"
    LOCK = "lock"
    GUESS = "guess"
    RESEND = "resend"
    APPROVE = "approve"


STEPS: Final[Mapping[tuple[RequestState, Step], RequestState]] = MappingProxyType(
    {
        (RequestState.PENDING, Step.CONFIRM): RequestState.CONFIRMED,
        (RequestState.PENDING, Step.CANCEL): RequestState.CANCELLED,
        (RequestState.PENDING, Step.EXPIRE): RequestState.EXPIRED,
        (RequestState.PENDING, Step.LOCK): RequestState.LOCKED,
        (RequestState.PENDING, Step.GUESS): RequestState.PENDING,
        (RequestState.PENDING, Step.RESEND): RequestState.PENDING,
        (RequestState.PENDING, Step.APPROVE): RequestState.PENDING,
    }
)
"""The state after each step from each state."""


def after(state: RequestState, step: Step) -> RequestState:
    """Return the state after a step, or raise RequestClosed if the table has no such step."""
    try:
        return STEPS[state, step]
    except KeyError:
        raise errors.RequestClosed(state) from None


def state_at(request: PendingRequest, now: datetime) -> RequestState:
    """Return the state of a request at a time: a pending request expires."""
    if request.state is RequestState.PENDING and request.expires_at <= now:
        return after(request.state, Step.EXPIRE)
    return request.state


def number_expired(stored: StoredRequest, now: datetime) -> bool:
    """Return whether the number of a request has expired.

    A number from the future was issued by a clock that ran ahead and was corrected. Its age is
    unknown, so it counts as expired.
    """
    ahead = stored.sent_at is not None and stored.sent_at > now
    return ahead or stored.request.number_expires_at <= now


def demanded(
    kind: RequestKind,
    direction: Direction,
    *,
    add: Demand,
    delete: Demand,
    loosens: Demand,
    opens: Demand,
) -> Demand:
    """Return what a request of this kind and direction has to meet, by the settings.

    Replacing is adding and deleting. What opens also loosens, so a more dangerous direction never
    demands less.
    """
    found = Demand()
    if kind is not RequestKind.DELETE:
        found |= add
    if kind is not RequestKind.ADD:
        found |= delete
    if direction >= Direction.LOOSENS:
        found |= loosens
    if direction is Direction.OPENS:
        found |= opens
    return found


def ready_at(request: PendingRequest, demand: Demand) -> datetime:
    """Return when the wait of a request is over, if it has to meet this demand."""
    return shifted(request.requested_at, demand.wait)


def subject_digest(request: PendingRequest) -> str:
    """Return a digest of what a request does, which an approval is bound to."""
    return sha256(repr(request.subject).encode()).hexdigest()


def check_approver(stored: StoredRequest, user: User, actor: Actor, demand: Demand) -> None:
    """Refuse an actor who cannot approve a request; nobody has two roles in it.

    Raises:
        NotAnApprover: The actor made it, or has the e-mail address of somebody in another role, or
            is the user concerned and would be the only one; or no approval is demanded.
    """
    request, email = stored.request, actor.email.casefold()
    others = (each.email for each in request.approvals if each.username != actor.username)
    if not demand.approvals:
        reason = "it needs no approval"
    elif actor.username == request.requested_by:
        reason = "you made it"
    elif email == stored.email.casefold():
        reason = "its requester has your e-mail address"
    elif _concerns(user, actor) and demand.approvals == 1:
        reason = "it concerns you, and needs nobody else's approval"
    elif email in map(str.casefold, others):
        reason = "somebody with your e-mail address has approved it"
    else:
        return
    raise errors.NotAnApprover(reason)


def _concerns(user: User, person: Actor | Approval) -> bool:
    own = user.email is not None and user.email.casefold() == person.email.casefold()
    return own or user.username == person.username


def counted_approvals(stored: StoredRequest, user: User) -> tuple[Approval, ...]:
    """Return the approvals of a request that count; one e-mail address is one person.

    An approval counts only for what was approved, as long as the user is of the account that the
    approver managed, and if it is not the requester's own.
    """
    request, subject = stored.request, subject_digest(stored.request)
    counted = {
        each.email.casefold(): each
        for each in request.approvals
        if each.subject == subject
        and each.account_id in (None, user.account_id)
        and each.username != request.requested_by
        and each.email.casefold() != stored.email.casefold()
    }
    return tuple({each.username: each for each in counted.values()}.values())


def approvals_missing(stored: StoredRequest, user: User, demand: Demand) -> int:
    """Return how many approvals a request still needs, besides those that count."""
    counted = counted_approvals(stored, user)
    alone = bool(demand.approvals) and all(_concerns(user, each) for each in counted)
    return max(demand.approvals - len(counted), int(alone))


def wait_left(times: Iterable[datetime], most: int, period: timedelta, now: datetime) -> timedelta:
    """Return how long to wait until fewer than `most` of `times` are within the last `period`.

    Times in the future come from a clock that ran ahead and was corrected. They are ignored:
    otherwise the wait would last until the clock reaches them again.
    """
    ages = sorted(age for at in times if timedelta(0) <= (age := now - at) < period)
    return timedelta(0) if len(ages) < most else period - ages[most - 1]


def shifted(moment: datetime, by: timedelta) -> datetime:
    """Add a duration to a time in UTC, clamped to the range of datetime."""
    try:
        return moment + by
    except OverflowError:
        return _FIRST if by < timedelta(0) else _LAST


def check_lockout(
    address: AddressRange | None, before: Policy, restrictions: Iterable[Restriction], now: datetime
) -> None:
    """Refuse a change that would lock the actor out.

    Args:
        address: The actor's present address, or None if it is unknown.
        before: The actor's own policy before the change.
        restrictions: The actor's own restrictions after the change.
        now: The store's time.

    Raises:
        LockoutRisk: The address is allowed now, but would not be after the change, or after the
            temporary restrictions expire.
    """
    left = tuple(restrictions)
    if address is None or not left or not decide(before, address, now):
        return
    if address not in lasting(left):
        raise errors.LockoutRisk(str(address))


def read_addresses(text: str, *, widest_ipv4: int, widest_ipv6: int) -> AddressRange:
    """Read a restriction as a person typed it; hint only at text that the settings accept.

    The widths are the shortest prefix lengths. Raises AddressError.
    """
    try:
        return parse_typed(text)
    except errors.AddressError as exc:
        if exc.hint is None:
            raise
        try:
            hint = AddressRange.parse(exc.hint)
            check_width(hint, widest_ipv4=widest_ipv4, widest_ipv6=widest_ipv6)
        except errors.AddressTooBroad as broad:
            reason = f"{exc.reason}; the widest network allowed is a /{broad.widest}"
            raise errors.AddressError(exc.text, reason) from None
        raise


def check_width(addresses: AddressRange, *, widest_ipv4: int, widest_ipv6: int) -> None:
    """Raise AddressTooBroad if a range holds more addresses than the widest prefix does."""
    bits, widest = (32, widest_ipv4) if addresses.version == 4 else (128, widest_ipv6)
    if addresses.size > 1 << (bits - widest):
        raise errors.AddressTooBroad(str(addresses), widest)


_Refused = tuple[Restriction, errors.DuplicateRestriction | errors.TooManyRestrictions]


class Additions(NamedTuple):
    """What becomes of restrictions that are to be added to one user.

    Attributes:
        adds: The restrictions to add, those of `refused` for the limit included.
        kept: Those left out, because the user has their addresses already.
        ends: The present restrictions that end.
        refused: The refused ones with their errors, duplicates first.
    """

    adds: list[Restriction]
    kept: list[Restriction]
    ends: list[Restriction]
    refused: list[_Refused]


def check_bulk_options(*, replace: bool, skip_existing: bool) -> None:
    """Raise InvalidValue if a bulk change is to replace lists and to skip rows."""
    if replace and skip_existing:
        raise errors.InvalidValue("skip_existing", "cannot be combined with replace")


def judge_additions(
    username: str,
    present: Iterable[Restriction],
    wanted: Iterable[Restriction],
    *,
    per_user: int,
    now: datetime,
    replace: bool = False,
    skip_existing: bool = False,
) -> Additions:
    """Judge restrictions to be added to one user in one change.

    An expired restriction to the same addresses ends; a live one makes the new one a duplicate.

    Args:
        username: The user, canonical.
        present: The user's restrictions, expired ones included.
        wanted: The restrictions to add.
        per_user: How many restrictions a user may have, expired ones included.
        now: The store's time.
        replace: Whether `wanted` is the whole list: all other restrictions end. A live one with the
            same addresses, label and expiry is kept.
        skip_existing: Whether to leave duplicates of live restrictions out, whatever their label
            and expiry, instead of refusing them.
    """
    there = list(present)
    held: dict[AddressRange, list[Restriction]] = {}
    for restriction in there:
        held.setdefault(restriction.addresses, []).append(restriction)
    found = Additions([], [], [], [])
    given: set[AddressRange] = set()
    staying: set[str] = set()
    for each in wanted:
        same = held.get(each.addresses, [])
        live = [r for r in same if not r.expired(now)]
        equal = [r.id for r in live if (r.label, r.expires_at) == (each.label, each.expires_at)]
        if each.addresses in given:
            error = errors.DuplicateRestriction(username, str(each.addresses), "row")
            found.refused.append((each, error))
        elif equal if replace else live and skip_existing:
            found.kept.append(each)
            staying.update(equal and [min(equal)])
        elif live and not replace:
            found.refused.append((each, duplicate(live[0], each)))
        else:
            found.adds.append(each)
            found.ends.extend(same)
        given.add(each.addresses)
    if replace:
        found.ends[:] = (each for each in there if each.id not in staying)
    over = len(there) - len(found.ends) + len(found.adds) - per_user
    if over > 0:
        limit = errors.TooManyRestrictions(username, per_user)
        found.refused.extend((each, limit) for each in found.adds[-over:])
    return found


def seen_since(now: datetime) -> datetime:
    """Return the time before which sightings are dropped; a sighting at that time is kept."""
    return shifted(now, -SEEN_FOR)


def told_until(now: datetime) -> datetime:
    """Return since when a user must not have been told about an address, to be told again."""
    return shifted(now, -_TOLD_EVERY)


def sightings_kept(sightings: Iterable[Sighting], now: datetime) -> list[Sighting]:
    """Return the sightings of one user that a store keeps, newest first."""
    found = [each for each in sightings if each.last_at >= seen_since(now)]
    found.sort(key=lambda each: pack_address(each.address) or b"")
    found.sort(key=lambda each: each.last_at, reverse=True)
    return found[:SIGHTINGS_KEPT]


def joined(one: Sighting, other: Sighting) -> Sighting:
    """Return two sightings of one user and address as one."""
    return attrs.evolve(
        one,
        first_at=min(one.first_at, other.first_at),
        last_at=max(one.last_at, other.last_at),
        allowed=one.allowed + other.allowed,
        refused=one.refused + other.refused,
    )


def sightings_to_record(seen: Collection[Sighting], now: datetime) -> list[Sighting]:
    """Return the sightings that a store has to add to those it has, by username and address.

    Times in the future come from a clock that runs ahead, and become `now`: such a sighting would
    be kept for too long. Those that are too old to be kept are left out.

    Args:
        seen: The sightings as a guard gives them.
        now: The store's time.

    Raises:
        InvalidValue: They are more than 1,000, or one has an invalid address or negative counts.
    """
    if len(seen) > SIGHTINGS_AT_ONCE:
        raise errors.InvalidValue("seen", f"must be at most {SIGHTINGS_AT_ONCE:,} sightings")
    found: dict[tuple[str, bytes], Sighting] = {}
    for each in seen:
        address, packed = canonical_address(each.address), pack_address(each.address)
        if not address or packed is None or each.allowed < 0 or each.refused < 0:
            raise errors.InvalidValue("seen", "holds a sighting that is not one")
        if each.last_at < seen_since(now):
            continue
        first, last = min(each.first_at, now), min(each.last_at, now)
        new = attrs.evolve(each, address=address, first_at=min(first, last), last_at=last)
        there = found.get((new.username, packed))
        found[new.username, packed] = new if there is None else joined(there, new)
    return [found[key] for key in sorted(found)]


def last_used(
    restrictions: Iterable[Restriction], sightings: Iterable[Sighting]
) -> dict[str, datetime]:
    """Return when each restriction last let its user in, by id.

    Args:
        restrictions: The restrictions of a user.
        sightings: The sightings of the same user, of which those count that were allowed, and that
            are not older than the restriction. A login after a restriction has expired counts as
            one at its end: it may have been refused, and when the last one was allowed is not kept.
    """
    seen = sorted(
        (*found, each.last_at, each.first_at)
        for each in sightings
        if each.allowed and (found := login_address(each.address)) is not None
    )
    used: dict[str, datetime] = {}
    for restriction in restrictions if seen else ():
        addresses = restriction.addresses
        first = bisect_left(seen, (addresses.version, addresses.first))
        last = bisect_right(seen, (addresses.version, addresses.last, _LAST))
        end = restriction.expires_at
        times = [at for _, _, at, began in seen[first:last] if end is None or began < end]
        at = max(times, default=None)
        if at is not None and at >= restriction.created_at:
            used[restriction.id] = at if end is None else min(at, end)
    return used


def suggest(
    restrictions: Iterable[Restriction],
    sightings: Iterable[Sighting],
    now: datetime,
    *,
    widest_ipv6: int,
) -> tuple[AddressRange, ...]:
    """Return the addresses that a user may want to be restricted to, the most used first.

    They are the `whereabouts` of allowed logins from addresses that no restriction in force
    contains.

    Args:
        restrictions: The user's restrictions, expired ones included.
        sightings: Where the user was seen.
        now: The store's time.
        widest_ipv6: The shortest prefix length of an IPv6 restriction.
    """
    held = AddressSet(each.addresses for each in restrictions if not each.expired(now))
    used: dict[AddressRange, tuple[int, datetime]] = {}
    for each in sightings:
        if not each.allowed or each.address in held:
            continue
        with suppress(errors.AddressError):  # a multicast address cannot be listed
            found = AddressRange.parse(str(whereabouts(each.address, widest_ipv6=widest_ipv6)))
            logins, last_at = used.get(found, (0, each.last_at))
            used[found] = logins + each.allowed, max(last_at, each.last_at)
    ranked = sorted(used, key=lambda found: (found.version, found.first))
    return tuple(sorted(ranked, key=used.__getitem__, reverse=True))


def whereabouts(address: str, *, widest_ipv6: int) -> AddressRange:
    """Return the addresses to list for a client's address: itself, or its IPv6 /64.

    A host changes its IPv6 address within that network (RFC 8981). The network is smaller if the
    settings allow none as wide. An address that a translator or a tunnel made stands for itself:
    its /64 has many subscribers, such as all of IPv4 (RFC 6052, RFC 8215, RFC 4380).

    Args:
        address: The address.
        widest_ipv6: The shortest prefix length of an IPv6 restriction.

    Raises:
        AddressError: It is not an address.
    """
    found = parse_address(address)
    if found.version == 4 or any(found in each for each in _SHARED):
        return found
    host = (1 << (128 - max(_SUBSCRIBER, widest_ipv6))) - 1
    return AddressRange(version=6, first=found.first & ~host, last=found.first | host)


def still_refused(
    restrictions: Iterable[Restriction], sightings: Iterable[Sighting], now: datetime
) -> list[Sighting]:
    """Return the sightings with refused logins from addresses that are not allowed now.

    Args:
        restrictions: The user's restrictions, expired ones included.
        sightings: Where the user was seen.
        now: The store's time.
    """
    policy = Policy(revision=0, restrictions=tuple(restrictions), known=True)
    return [
        each
        for each in sightings
        if each.refused and not decide(policy, parse_address(each.address), now)
    ]


def would_refuse(lost: Iterable[Sighting], sightings: Iterable[Sighting]) -> str:
    """Say in a sentence how many recent logins a change would have refused.

    Args:
        lost: The sightings from addresses that the change takes away: `Impact.seen_lost`.
        sightings: All sightings of the user.

    Returns:
        The sentence; empty if no login was allowed.
    """
    allowed = sum(each.allowed for each in sightings)
    refused = sum(each.allowed for each in lost)
    if not allowed:
        return ""
    what = f"{refused:,}" if refused else "none"
    return f"This would have refused {what} of {allowed:,} recent logins."


def is_unused(restriction: Restriction, last_used: datetime | None, since: datetime) -> bool:
    """Return whether a restriction is older than `since` and has let its user in at no time since.

    Args:
        restriction: The restriction.
        last_used: When it last let the user in, or None.
        since: The time.
    """
    return restriction.created_at <= since and (last_used is None or last_used <= since)


def refusal_notice_due(
    refused: Sighting, sightings: Iterable[Sighting], told_at: datetime | None
) -> bool:
    """Return whether to mail a user about refused logins from one address.

    After notices about ten new addresses within a day there are no more: an intruder with the
    right password and many addresses must not bury other mails under these. But one mail a day is
    due in any case: ten addresses that are seen at once must not prevent all mails.

    Args:
        refused: The sighting from that address.
        sightings: All sightings of the user.
        told_at: When the user was last mailed about refused logins, as far as is known, or None.
    """
    since = told_until(refused.last_at)
    if told_at is None or told_at <= since:
        return True
    others = (each for each in sightings if each.address != refused.address)
    return sum(bool(each.refused) and each.first_at > since for each in others) < _TOLD_A_DAY


def refusals(
    sightings: Iterable[Sighting], restrictions: Collection[Restriction], now: datetime
) -> tuple[Refusal, ...]:
    """Return the refused logins among a user's sightings, in the same order, each with a hint."""
    return tuple(
        Refusal(
            address=each.address,
            last_at=each.last_at,
            times=each.refused,
            hint=refusal_hint(each.address, restrictions, now),
        )
        for each in sightings
        if each.refused
    )


def refusal_hint(address: str, restrictions: Collection[Restriction], now: datetime) -> str:
    """Return in a sentence why restrictions may not fit an address that was refused.

    Returns:
        The sentence; empty if the address is allowed now, or no hint fits.
    """
    client = parse_address(address)
    live = [each.addresses for each in restrictions if not each.expired(now)]
    listed = [each.addresses for each in restrictions]
    if not listed or any(client in each for each in live):
        return ""
    if is_private(client) and not any(map(is_private, listed)):
        return (
            "It is a private address, which the internet never sees: the proxy settings of the"
            " login server may be wrong."
        )
    if any(client in each for each in listed):
        return "A restriction that has expired listed it."
    if all(each.version != client.version for each in live or listed):
        other = 4 if client.version == 6 else 6
        return f"It comes over IPv{client.version}, and only IPv{other} is listed."
    bits = 8 if client.version == 4 else 64
    near = AddressRange(
        version=client.version,
        first=client.first >> bits << bits,
        last=client.first | ((1 << bits) - 1),
    )
    for each in live:
        if each.version == near.version and each.first <= near.last and near.first <= each.last:
            return f"It is in {near}, as is {each}, which is listed."
    return ""


def all_expired(restrictions: Collection[Restriction], now: datetime) -> bool:
    """Return whether all of a user's restrictions have expired, so that no address is allowed."""
    return bool(restrictions) and all(each.expired(now) for each in restrictions)


_Until = tuple[timedelta, int]  # how long before the end of time, and the last address
_Span = tuple[AddressRange, datetime]  # addresses, and when they stop being allowed


def impact(
    before: Iterable[Restriction], afterwards: Iterable[Restriction], now: datetime
) -> Impact:
    """Return what a change of a user's restrictions does, exactly, now and at any later time.

    An address is gained if at some time it is allowed afterwards, and would not have been without
    the change; it is lost if the opposite is so. So a restriction that expires later than the one
    that it replaces loosens. Restrictions that have expired allow nothing, but still restrict.

    Args:
        before: The user's restrictions without the change, expired ones included.
        afterwards: The user's restrictions with it.
        now: The store's time.
    """
    was, will = tuple(before), tuple(afterwards)
    had, has = _spans(was, now), _spans(will, now)
    gained, lost = _beyond(has, had), _beyond(had, has)
    if was and not will:
        direction = Direction.OPENS
    elif gained:
        direction = Direction.LOOSENS
    elif lost or bool(was) != bool(will):
        direction = Direction.TIGHTENS
    else:
        direction = Direction.NEUTRAL
    times = [each.expires_at for each in will if each.expires_at is not None]
    ends = max(times) if times and len(times) == len(will) else None
    found = Impact(direction=direction, gained=gained, lost=lost, ends=ends)
    return attrs.evolve(found, summary=_outlook(was, will, found, now))


def _spans(restrictions: Collection[Restriction], now: datetime) -> set[_Span]:
    if not restrictions:
        return {(addresses, _LAST) for addresses in _ANYWHERE}
    return {(r.addresses, r.expires_at or _LAST) for r in restrictions if not r.expired(now)}


def _beyond(these: set[_Span], those: set[_Span]) -> AddressSet:
    """Return the addresses that at some time are allowed by these and not by those.

    What is allowed only shrinks, so the latest end of each side decides about a run of addresses.
    A sweep over the bounds keeps the ends of both sides in heaps, the latest first.
    """
    found: list[AddressRange] = []
    for version in (4, 6):
        runs = sorted(
            (each.first, each.last, _LAST - until, side)
            for side, spans in enumerate((these, those))
            for each, until in spans
            if each.version == version
        )
        heaps: tuple[list[_Until], list[_Until]] = ([], [])
        at = 0
        for first, end in pairwise(sorted({n for run in runs for n in (run[0], run[1] + 1)})):
            while at < len(runs) and runs[at][0] == first:
                _, last, left, side = runs[at]
                heappush(heaps[side], (left, last))
                at += 1
            for heap in heaps:
                while heap and heap[0][1] < first:
                    heappop(heap)
            ours, theirs = heaps
            if ours and not (theirs and theirs[0][0] <= ours[0][0]):
                found.append(AddressRange(version=version, first=first, last=end - 1))
    return AddressSet(found)


def _outlook(
    was: Collection[Restriction], will: Collection[Restriction], found: Impact, now: datetime
) -> str:
    """Say in a sentence what will hold after a change."""
    if not will:
        return "Then from anywhere: no restriction is left." if was else "From anywhere, as today."
    if all_expired(will, now):
        return "Then from nowhere: every restriction that is left has expired."
    if not was:
        return f"Today from anywhere; then only from {_listed(_until(will, now))}."
    had = AddressSet(addresses for addresses, _ in _spans(was, now))
    has = AddressSet(addresses for addresses, _ in _spans(will, now))
    new, gone = has - had, had - has
    parts = (
        ("then also from", new),
        ("for longer than today from", found.gained - new),
        ("no longer from", gone),
        ("for a shorter time than today from", found.lost - gone),
    )
    told = [f"{words} {_listed(ranges)}" for words, ranges in parts if ranges]
    text = "; ".join(told) or "from the same addresses as today"
    return f"{text[0].upper()}{text[1:]}."


def _until(restrictions: Iterable[Restriction], now: datetime) -> Iterator[str]:
    for each in restrictions:
        if each.expires_at is None:
            yield str(each.addresses)
        elif not each.expired(now):
            yield f"{each.addresses} (until {each.expires_at:%Y-%m-%d %H:%M} UTC)"


def _listed(ranges: Iterable[object]) -> str:
    """Return ranges as text, a few of them and how many others there are."""
    texts = [str(each) for each in ranges]
    more = len(texts) - _SHOWN
    return ", ".join(texts[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def duplicate(
    found: Restriction | PendingRequest, wanted: Restriction
) -> errors.DuplicateRestriction:
    """Return the error for addresses that exist already; it says if label or expiry differ."""
    if isinstance(found, PendingRequest):
        kind, expires_at = "request", found.restriction_expires_at
    else:
        kind, expires_at = "restriction", found.expires_at
    return errors.DuplicateRestriction(
        found.username,
        str(wanted.addresses),
        kind,
        found.label,
        expires_at,
        (found.label, expires_at) != (wanted.label, wanted.expires_at),
    )


def summarise(restrictions: Iterable[Restriction], now: datetime) -> str:
    """Return the text of the page's Restrictions column.

    "No restrictions" means that any address is allowed; if all restrictions have expired, the text
    says that no address is.
    """
    left = tuple(restrictions)
    if all_expired(left, now):
        return "No address allowed (every restriction has expired)"
    return ", ".join(str(r.addresses) for r in left if not r.expired(now)) or NO_RESTRICTIONS


def _folded(text: str) -> str:
    """Fold text for comparison. Two rounds turn any username into its canonical form."""
    if text.isascii():
        return " ".join(text.lower().split())
    once = normalize("NFKC", text).casefold()
    return " ".join(normalize("NFKC", once).casefold().split())


def search_terms(username: str, full_name: str, account_id: str) -> set[str]:
    """Return the terms of a user. A search for a text finds the user if a term begins with it.

    The terms are the username, the account id, and the rest of the full name from each word on.
    """
    name = _folded(full_name)
    starts = {0, *(found.end() for found in _BETWEEN_WORDS.finditer(name))}
    starts.update(at for at, character in enumerate(name, 1) if character == " ")
    return {_folded(username), _folded(account_id), *(name[start:] for start in starts)} - {""}


class Search(NamedTuple):
    """A text that was searched for in the list of users.

    It finds the users with a term that begins with it, and with a term for each of its words; see
    `search_terms`. `ipguard.store.RestrictionStore.overview` says what an address finds.

    Attributes:
        text: The text, folded; empty finds every user.
        words: The words of a text that is more than one word.
        address: The address to look for in restrictions, if the text is one.
        addresses: The restriction to look for, if the text is a network or a range.
    """

    text: str
    words: frozenset[str] = frozenset()
    address: AddressRange | None = None
    addresses: AddressRange | None = None

    @classmethod
    def of(cls, typed: str) -> Search:
        """Read a text as a person typed it."""
        text, plain = _folded(typed), typed.strip(" \t\r\n")
        if _LIKE_AN_ADDRESS.match(plain):
            with suppress(errors.AddressError):
                return cls(text, address=parse_address(plain))
            with suppress(errors.AddressError):
                return cls(text, addresses=AddressRange.parse(plain))
        words = [word for word in _BETWEEN_WORDS.split(text) if word]
        return cls(text, frozenset(words) if len(words) > 1 else frozenset())

    def matches(self, user: User, restrictions: Iterable[Restriction]) -> bool:
        """Return whether this search finds a user with these restrictions."""
        terms = search_terms(user.username, user.full_name, user.account_id)
        begun = [any(term.startswith(word) for term in terms) for word in self.words]
        if any(term.startswith(self.text) for term in terms) or (begun and all(begun)):
            return True
        if self.address is not None:
            return any(self.address in each.addresses for each in restrictions)
        return any(self.addresses == each.addresses for each in restrictions)


def is_visible(accounts: Accounts, account_id: str, *, removed: bool, restricted: bool) -> bool:
    """Return whether the listing shows a user to an actor of these accounts.

    Removed users are shown to actors of every account only, and only with restrictions.
    """
    if removed:
        return accounts is Actor.EVERY_ACCOUNT and restricted
    return account_id in accounts


def check_revision(revision: int, first: int, head: int) -> None:
    """Raise InvalidValue if the record of restrictions does not have a revision.

    Args:
        revision: The revision asked for.
        first: The first one that the record has.
        head: The last one.
    """
    check_whole("revision", revision, 0)
    if revision < first:
        raise errors.InvalidValue("revision", f"the record begins at revision {first}")
    if revision > head:
        raise errors.InvalidValue("revision", f"the store is at revision {head}")


def check_filter(only: str | None) -> None:
    """Raise InvalidValue if the list of users cannot be limited to this."""
    if only is not None and only not in get_args(UserFilter):
        raise errors.InvalidValue("only", f"must be one of {', '.join(get_args(UserFilter))}")


def expiring_until(now: datetime) -> datetime:
    """Return the last expiry that makes a user one of those that are `expiring`."""
    return shifted(now, _EXPIRING_WITHIN)


def is_listed(
    only: UserFilter | None, restrictions: Collection[Restriction], *, pending: bool, now: datetime
) -> bool:
    """Return whether a user is one of those that a list is limited to.

    Args:
        only: The limit, or None.
        restrictions: The user's restrictions, expired ones included.
        pending: Whether the user has a pending request that has not expired.
        now: The store's time.
    """
    if only == "pending":
        return pending
    if only == "expiring":
        ends = (each.expires_at for each in restrictions if each.expires_at is not None)
        return any(now < end <= expiring_until(now) for end in ends)
    return only is None or bool(restrictions) is (only == "restricted")


def two_users(one: User, other: User) -> bool:
    """Return whether two records with one canonical username are about two users."""
    if one.uid is not None and other.uid is not None:
        return one.uid != other.uid
    return one.spelling != other.spelling and one.account_id != other.account_id


class UserRecord(NamedTuple):
    """A user as the host has it now.

    Attributes:
        seq: Its place among the records.
        user: The user.
        renames: The canonical username of the stored user that it is about, if neither its uid nor
            its username says so.
    """

    seq: int
    user: User
    renames: str | None = None


class UserHeld(NamedTuple):
    """What a store has under a username.

    Attributes:
        user: The user, removed or not, or None.
        removed: Whether the user was removed.
        restricted: Whether there are restrictions, expired ones included.
        kept: Whether a record that cannot be read may be about the user.
    """

    user: User | None
    removed: bool = False
    restricted: bool = False
    kept: bool = False


class UserStep(NamedTuple):
    """A change of one user.

    Attributes:
        user: The user as it will be stored.
        before: The user as it is stored, perhaps under another username; None for a new user.
        back: Whether `before` was removed.
        free: Whether the username must have no restrictions of its own when this is applied.
    """

    user: User
    before: User | None
    back: bool
    free: bool

    @property
    def old(self) -> str | None:
        """The username that the user had, if it is another one."""
        if self.before is None or self.before.username == self.user.username:
            return None
        return self.before.username

    @property
    def added(self) -> bool:
        """Whether the user is registered, for the first time or again."""
        return self.before is None or self.back

    @property
    def moved(self) -> bool:
        """Whether a registered user is of another account now."""
        before = self.before
        return before is not None and not self.back and before.account_id != self.user.account_id

    @property
    def changed(self) -> bool:
        """Whether something else has changed."""
        return not (self.added or self.moved or self.old)

    @property
    def entry(self) -> tuple[str, str, str, str] | None:
        """What `ipguard.store.user_entries` takes, for a user that was renamed or moved."""
        if self.before is None or not (self.old or self.moved):
            return None
        account = self.user.account_id
        was = self.before.account_id if self.moved else account
        return self.before.username, self.user.username, was, account


class UserPlan(NamedTuple):
    """What becomes of records: the steps by username, the users to remove, and the refused ones.

    The latter are each the record's `seq` and its error, in order.
    """

    steps: list[UserStep]
    removed: list[User]
    refused: list[tuple[int, errors.UsernameCollision]]


class _Claim(NamedTuple):
    """The user that gets a username; `old` is the stored username, if that is another one."""

    seq: int
    user: User
    old: str | None


def plan_users(
    records: Iterable[UserRecord], held: Mapping[str, UserHeld], *, remove_missing: bool = False
) -> UserPlan:
    """Decide what records change, all at once: a rename to a username that is given up succeeds.

    A record is about the stored user with its uid, else about the one with its username. Of several
    records about one user, the last counts. A username belongs to its stored user, else to the
    first record, and other users are refused. Restrictions follow their user. A removed user keeps
    its username as long as there are restrictions.

    Args:
        records: The records.
        held: What the store has under their usernames, and the users with their uids. With
            `remove_missing`, users in `held` that no record is about are removed.
        remove_missing: Whether to remove users.
    """
    return _Planner(records, held).plan(remove_missing=remove_missing)


class _Planner:
    """The steps of `plan_users`."""

    def __init__(self, records: Iterable[UserRecord], held: Mapping[str, UserHeld]) -> None:
        self._held = held
        self._refused: list[tuple[int, errors.UsernameCollision]] = []
        self._owners = {n: there.user for n, there in held.items() if there.user is not None}
        by_uid = {owner.uid: n for n, owner in self._owners.items() if owner.uid is not None}
        given = sorted(records, key=lambda record: record.seq)
        last = {record.user.uid: record.seq for record in given}
        self._groups: dict[str, list[_Claim]] = {}
        for seq, user, renames in given:
            if user.uid is None or last[user.uid] == seq:
                old = renames or (None if user.uid is None else by_uid.get(user.uid))
                claim = _Claim(seq, user, None if old == user.username else old)
                self._groups.setdefault(user.username, []).append(claim)
        # The usernames that a record gives up, if it is not refused.
        claims = (claim for group in self._groups.values() for claim in group)
        self._left = {claim.old for claim in claims if claim.old is not None}
        self._staying: dict[str, User] = {}  # the owners of all others, unless they are free
        self._claims: dict[str, _Claim] = {}

    def plan(self, *, remove_missing: bool) -> UserPlan:
        removed = list(self._stay(remove_missing=remove_missing))
        gone = {user.username for user in removed}
        for name, group in self._groups.items():
            for claim in group:
                self._judge(claim, name, removed=name in gone)
        self._refuse_followers()
        self._refused.sort(key=lambda each: each[0])
        return UserPlan(list(self._steps()), removed, self._refused)

    def _stay(self, *, remove_missing: bool) -> Iterator[User]:
        """Find the users that keep their usernames; yield those to remove."""
        for name in self._owners.keys() - self._left:
            owner, there, group = self._owners[name], self._held[name], self._groups.get(name, ())
            found = any(not two_users(owner, claim.user) for claim in group)
            missing = remove_missing and not (found or there.removed or there.kept)
            if missing:
                yield owner
            if there.restricted or not (missing or there.removed):
                self._staying[name] = owner

    def _judge(self, claim: _Claim, name: str, *, removed: bool) -> None:
        """Give a username to a claim, or refuse it."""
        there, user = self._held.get(name, UserHeld(None)), claim.user
        had, owner = self._claims.get(name), self._staying.get(name)
        rival = owner if had is None else had.user
        if rival is not None and two_users(rival, user):
            self._refuse(claim, rival, removed=had is None and (there.removed or removed))
        elif owner is not None and claim.old is not None:
            self._refuse(claim, owner, removed=there.removed or removed)
        elif claim.old is not None and there.user is None and there.restricted:
            self._refuse(claim, None, removed=True)
        else:
            if rival is not None and user.uid is None and rival.uid is not None:
                user = attrs.evolve(user, uid=rival.uid)
            old = claim.old if had is None else claim.old or had.old
            self._claims[name] = _Claim(claim.seq, user, old)

    def _refuse_followers(self) -> None:
        """Refuse the claims to usernames whose users cannot leave because they were refused."""
        stuck = list(self._left - {claim.old for claim in self._claims.values()})
        while stuck:
            name = stuck.pop()
            claim = self._claims.pop(name, None)
            if claim is not None:
                self._refuse(claim, self._owners[name], removed=self._held[name].removed)
                stuck += [] if claim.old is None else [claim.old]

    def _steps(self) -> Iterator[UserStep]:
        for name in sorted(self._claims):
            claim = self._claims[name]
            user = claim.user
            before = self._staying.get(name) if claim.old is None else self._owners[claim.old]
            back = before is not None and self._held[before.username].removed
            if back or before != user:
                taken = claim.old is not None or (before is None and name in self._owners)
                yield UserStep(user, before, back, taken and name not in self._left)

    def _refuse(self, claim: _Claim, owner: User | None, *, removed: bool = False) -> None:
        name, user = claim.user.username, claim.user
        spellings = (name if owner is None else owner.spelling, user.spelling)
        accounts = ("" if owner is None else owner.account_id, user.account_id)
        error = errors.UsernameCollision(name, spellings, accounts, removed)
        self._refused.append((claim.seq, error))
