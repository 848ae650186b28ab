"""Asking for a restriction: the form, what its text was understood as, the request."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Final

from ipguard import rules
from ipguard._checks import check_text
from ipguard.addresses import AddressRange, parse_address
from ipguard.admin import _texts
from ipguard.admin._form import accept_lockout, lockout_page
from ipguard.admin._http import SAFE_HEADERS, Response
from ipguard.admin._visit import Draft, Visit
from ipguard.errors import (
    AddressError,
    AddressTooBroad,
    DeliveryError,
    DuplicateRestriction,
    InvalidValue,
    IPGuardError,
    LockoutRisk,
    StoreError,
    UnknownUser,
)
from ipguard.model import LABEL_LIMIT, PendingRequest, User

_FIELDS: Final = ("user", "addresses", "label", "expires_at")
_EXAMPLE: Final = 29  # the prefix of the network that the form names as an example
_DROP_DOWN: Final = 100
_MATCHES: Final = 20
_NETWORK: Final = 64  # of one IPv6 subscriber: privacy addresses change inside it

MAIL_FAILED: Final = (
    "The mail with the confirmation number could not be sent. The request waits; send a new number."
)


def mine(address: str | None, widest_ipv6: int) -> str:
    """Propose a restriction for where the actor is: the address, or its IPv6 network.

    Args:
        address: Where the actor is, if that is known.
        widest_ipv6: The widest prefix that the settings accept, in bits.
    """
    if address is None:
        return ""
    here = parse_address(address)
    if here.version == 4:
        return str(here)
    size = 1 << (128 - max(_NETWORK, widest_ipv6))
    first = here.first // size * size
    return str(AddressRange(version=6, first=first, last=first + size - 1))


def show(visit: Visit) -> Response:
    """Show the form, for a user if one is given; or what comes next for one that was sent."""
    given = visit.request.asked().get("user", "")
    if given:
        visit.person(given)  # so that what is not there is no page
    draft = visit.draft()
    values = dict.fromkeys(_FIELDS, "") | {"user": given} | draft.values
    if draft.step != "review" and not values.get("asked"):
        return _form(visit, values, draft.problems)
    found = _understand(visit, values)
    if isinstance(found, dict):
        return _form(visit, values, found)
    user, addresses, expires_at = found
    if values.get("asked"):
        what = f"add {addresses} for {user.full_name or user.username}"
        return lockout_page(visit, "add", draft, what, user=user.username)
    return visit.page(
        "review.html", values=values, user=user, addresses=addresses, expires_at=expires_at
    )


def _form(visit: Visit, values: dict[str, str], problems: dict[str, str]) -> Response:
    everyone = _matches(visit, values["user"]) if "user" in problems else ()
    if not everyone:
        found = visit.flow.overview(visit.actor, limit=_DROP_DOWN)
        if found.next is None:
            everyone = tuple(line.user for line in found if not line.removed)
        elif values["user"] and "user" not in problems:
            everyone = (visit.person(values["user"]).user,)
        else:
            everyone = None
    return visit.page(
        "add.html",
        values=values,
        problems=problems,
        everyone=everyone,
        mine=mine(visit.actor.address, visit.flow.settings.widest_ipv6),
        label_limit=LABEL_LIMIT,
        networks=visit.flow.settings.widest_ipv4 <= _EXAMPLE,
    )


def submit(visit: Visit) -> Response:
    """Ask for the restriction, once what was typed is right, understood and accepted."""
    values = {name: visit.field(name) for name in _FIELDS}
    if visit.field("do") == "mine":
        here = mine(visit.actor.address, visit.flow.settings.widest_ipv6)
        return visit.again("add", Draft(values=values | {"addresses": here}))
    if visit.field("do") == "edit":
        return visit.again("add", Draft(values=values))
    found = _understand(visit, values)
    if isinstance(found, dict):
        return visit.again("add", Draft(values=values, problems=found))
    user, addresses, expires_at = found
    if not (_plain(values["addresses"], addresses) or visit.field("seen") == str(addresses)):
        return visit.again("add", Draft(values=values, step="review"))
    return _ask(visit, values, user, addresses, expires_at)


def _understand(
    visit: Visit, values: dict[str, str]
) -> tuple[User, AddressRange, datetime | None] | dict[str, str]:
    """Return what the fields mean, or what is wrong with them."""
    problems: dict[str, str] = {}
    user = _trader(visit, values["user"], problems)
    addresses = _addresses(visit, values["addresses"], problems)
    expires_at = _time(values["expires_at"], problems)
    try:
        check_text("label", values["label"], LABEL_LIMIT)
    except InvalidValue as wrong:
        problems["label"] = _texts.problem(wrong, visit.now).text
    if problems or user is None or addresses is None:
        return problems
    return user, addresses, expires_at


def _ask(
    visit: Visit,
    values: dict[str, str],
    user: User,
    addresses: AddressRange,
    expires_at: datetime | None,
) -> Response:
    try:
        request = visit.flow.request(
            visit.actor,
            user.username,
            addresses,
            label=values["label"],
            expires_at=expires_at,
            allow_lockout=visit.field("lockout") == "accept",
        )
    except LockoutRisk as risk:
        more = {"seen": str(addresses), "asked": risk.address}
        return visit.again("add", Draft(values=values | more, problems=accept_lockout(visit)))
    except DeliveryError as failed:
        return visit.go(
            "confirm", MAIL_FAILED, "problem", user=user.username, request=failed.request_id
        )
    except DuplicateRestriction as wrong:
        waiting = _waiting(visit, user.username, addresses)
        if waiting is None or wrong.differs:
            problems = {"addresses": _texts.problem(wrong, visit.now).text}
            return visit.again("add", Draft(values=values, problems=problems))
        return visit.go(
            "confirm",
            "You have asked for this already. Its number was sent to you by email.",
            "note",
            user=user.username,
            request=waiting.id,
        )
    except StoreError:
        raise
    except IPGuardError as wrong:
        found = _texts.problem(wrong, visit.now)
        return visit.again("add", Draft(values=values, problems={found.field: found.text}))
    return visit.go(
        "confirm",
        "You will receive an email with a confirmation number. Enter it here.",
        user=user.username,
        request=request.id,
    )


def _waiting(visit: Visit, username: str, addresses: AddressRange) -> PendingRequest | None:
    """Find the actor's own request for the same: a form that was sent twice."""
    for request in visit.person(username).pending:
        same = request.addresses == addresses and request.restriction_id is None
        if same and request.requested_by == visit.actor.username:
            return request
    return None


def understood(visit: Visit) -> Response:
    """Tell the script what a text is understood as, or what is wrong with it."""
    problems: dict[str, str] = {}
    addresses = _addresses(visit, visit.field("addresses"), problems)
    answer = {
        "canonical": "" if addresses is None else str(addresses),
        "understood": "" if addresses is None else _texts.understood(addresses),
        "problem": problems.get("addresses", ""),
    }
    return Response(
        status=200,
        headers=(
            ("Content-Type", "application/json"),
            ("Cache-Control", "no-store"),
            *SAFE_HEADERS,
        ),
        body=json.dumps(answer).encode(),
    )


def _plain(text: str, addresses: AddressRange) -> bool:
    """Tell whether a text is one address and can only mean what it says."""
    return addresses.size == 1 and text.strip() == str(addresses)


def _addresses(visit: Visit, text: str, problems: dict[str, str]) -> AddressRange | None:
    if not text.strip():
        problems["addresses"] = "Type an IP address, a network or a first-last range."
        return None
    settings = visit.flow.settings
    widest = {"widest_ipv4": settings.widest_ipv4, "widest_ipv6": settings.widest_ipv6}
    try:
        found = rules.read_addresses(text, **widest)
        rules.check_width(found, **widest)
    except (AddressError, AddressTooBroad) as wrong:
        problems["addresses"] = _texts.problem(wrong, visit.now).text
        return None
    return found


def _time(text: str, problems: dict[str, str]) -> datetime | None:
    if not text.strip():
        return None
    try:
        found = datetime.fromisoformat(text.strip())
        return found.replace(tzinfo=UTC) if found.utcoffset() is None else found.astimezone(UTC)
    except (ValueError, OverflowError):
        problems["expires_at"] = "Write the time as 2030-12-31 18:00, in UTC."
        return None


def _trader(visit: Visit, text: str, problems: dict[str, str]) -> User | None:
    """Find the user that was chosen, or say what is wrong with the choice."""
    try:
        return visit.person(text.strip()).user
    except UnknownUser:
        pass
    if not text.strip():
        problems["user"] = "Choose a trader."
    elif _matches(visit, text):
        problems["user"] = "Choose the trader that you mean; or none, to search again."
    else:
        problems["user"] = "There is no such trader among yours."
    return None


def _matches(visit: Visit, text: str) -> tuple[User, ...] | None:
    """Return the users that a text may mean; None if there are none."""
    if not text.strip():
        return None
    try:
        lines = visit.flow.overview(visit.actor, search=text.strip(), limit=_MATCHES)
    except InvalidValue:
        return None
    return tuple(line.user for line in lines if not line.removed) or None
