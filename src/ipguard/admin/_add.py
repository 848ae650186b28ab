"""Request a restriction: the form, the review of a range, and the request."""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final

from ipguard import errors, rules
from ipguard._checks import check_text
from ipguard.addresses import AddressRange, parse_address
from ipguard.admin import _http, _messages
from ipguard.admin._changes import check_lockout_accepted, show_lockout_warning
from ipguard.admin._context import Context, Draft
from ipguard.admin._http import Response
from ipguard.model import LABEL_LIMIT, User

_FIELDS: Final = ("user", "addresses", "label", "expires_at")
_EXAMPLE_PREFIX: Final = 29  # of the network that the form gives as an example
_DROP_DOWN_LIMIT: Final = 100
_MATCH_LIMIT: Final = 20
_SUBSCRIBER_PREFIX: Final = 64  # IPv6 privacy addresses change within this network


def show(context: Context) -> Response:
    """Show the form, the review of its range, or the lockout warning."""
    given = context.request.parse_query().get("user", "")
    if given:
        context.find_user(given)  # raise UnknownUser
    draft = context.draft
    values = dict.fromkeys(_FIELDS, "") | {"user": given} | draft.values
    if draft.step != "review" and not values.get("asked"):
        return _show_form(context, values, draft.problems)
    parsed = _parse(context, values)
    if isinstance(parsed, dict):
        return _show_form(context, values, parsed)
    user, addresses, expires_at = parsed
    if values.get("asked"):
        what = f"add {addresses} for {user.full_name or user.spelling}"
        return show_lockout_warning(context, "add", what, user=user.username)
    return context.page(
        "review.html", values=values, user=user, addresses=addresses, expires_at=expires_at
    )


def _show_form(context: Context, values: dict[str, str], problems: dict[str, str]) -> Response:
    choices: tuple[User, ...] | None = ()
    if "user" in problems:
        choices = _match_users(context, values["user"])
    if not choices:
        found = context.flow.overview(context.actor, limit=_DROP_DOWN_LIMIT)
        choices = None  # a text field, to type a name or a search
        if found.next is None:
            choices = tuple(line.user for line in found if not line.removed)
        elif values["user"] and "user" not in problems:
            choices = (context.find_user(values["user"]).user,)
    return context.page(
        "add.html",
        values=values,
        problems=problems,
        choices=choices,
        current_address=_propose_current_address(context),
        label_limit=LABEL_LIMIT,
        networks=context.flow.settings.widest_ipv4 <= _EXAMPLE_PREFIX,
    )


def _propose_current_address(context: Context) -> str:
    """Return the actor's address, or its IPv6 network; "" if it is unknown."""
    if context.actor.address is None:
        return ""
    here = parse_address(context.actor.address)
    if here.version == 4:
        return str(here)
    size = 1 << (128 - max(_SUBSCRIBER_PREFIX, context.flow.settings.widest_ipv6))
    first = here.first // size * size
    return str(AddressRange(version=6, first=first, last=first + size - 1))


def submit(context: Context) -> Response:
    """Request the restriction, unless the form has problems or its range needs a review."""
    values = {name: context.field(name) for name in _FIELDS}
    if context.field("do") == "mine":
        values["addresses"] = _propose_current_address(context)
    if context.field("do") in ("mine", "edit"):
        return context.redirect_to_draft("add", Draft(values=values))
    parsed = _parse(context, values)
    if isinstance(parsed, dict):
        return context.redirect_to_draft("add", Draft(values=values, problems=parsed))
    user, addresses, expires_at = parsed
    # A single address in canonical form can only mean itself.
    obvious = addresses.size == 1 and values["addresses"].strip() == str(addresses)
    if not (obvious or context.field("seen") == str(addresses)):
        return context.redirect_to_draft("add", Draft(values=values, step="review"))
    return _request(context, values, user, addresses, expires_at)


def _request(
    context: Context,
    values: dict[str, str],
    user: User,
    addresses: AddressRange,
    expires_at: datetime | None,
) -> Response:
    try:
        request_id = context.flow.request(
            context.actor,
            user.username,
            addresses,
            label=values["label"],
            expires_at=expires_at,
            allow_lockout=context.field("lockout") == "accept",
        ).id
        text = "You will receive an email with a confirmation number. Enter it here."
        return context.redirect("confirm", text, user=user.username, request=request_id)
    except errors.LockoutRisk as risk:
        values |= {"seen": str(addresses), "asked": risk.address}
        problems = check_lockout_accepted(context)
    except errors.DeliveryError as error:
        text = _messages.MAIL_FAILED
        return context.redirect(
            "confirm", text, "problem", user=user.username, request=error.request_id
        )
    except errors.StoreError:
        raise
    except errors.IPGuardError as error:
        pending = _find_own_request(context, error, addresses)
        if pending is not None:
            text = "You have asked for this already. Its number was sent to you by email."
            return context.redirect("confirm", text, "note", user=user.username, request=pending)
        problems = _messages.explain(error, context.now)
    return context.redirect_to_draft("add", Draft(values=values, problems=problems))


def _find_own_request(
    context: Context, error: errors.IPGuardError, addresses: AddressRange
) -> str | None:
    """Return the id of the actor's pending request if this form was submitted twice, or None."""
    if isinstance(error, errors.DuplicateRestriction) and not error.differs:
        for request in context.find_user(error.username).pending:
            if request.adds == (addresses,) and request.requested_by == context.actor.username:
                return request.id
    return None


def describe_typed(context: Context) -> Response:
    """Return to the script, as JSON, the range that a text means, or the problem."""
    problems: dict[str, str] = {}
    addresses = _parse_addresses(context, context.field("addresses"), problems)
    answer = {
        "canonical": "" if addresses is None else str(addresses),
        "understood": "" if addresses is None else _messages.format_range(addresses),
        "problem": problems.get("addresses", ""),
    }
    return _http.respond(200, json.dumps(answer), kind="application/json")


def _parse(
    context: Context, values: dict[str, str]
) -> tuple[User, AddressRange, datetime | None] | dict[str, str]:
    """Return the user, the addresses and the expiry; or the problems by field."""
    problems: dict[str, str] = {}
    user = _parse_user(context, values["user"], problems)
    addresses = _parse_addresses(context, values["addresses"], problems)
    expires_at = _parse_time(values["expires_at"], problems)
    try:
        check_text("label", values["label"], LABEL_LIMIT)
    except errors.InvalidValue as error:
        problems |= _messages.explain(error, context.now)
    if problems or user is None or addresses is None:
        return problems
    return user, addresses, expires_at


def _parse_addresses(context: Context, text: str, problems: dict[str, str]) -> AddressRange | None:
    if not text.strip():
        problems["addresses"] = "Type an IP address, a network or a first-last range."
        return None
    settings = context.flow.settings
    widest = {"widest_ipv4": settings.widest_ipv4, "widest_ipv6": settings.widest_ipv6}
    try:
        addresses = rules.read_addresses(text, **widest)
        rules.check_width(addresses, **widest)
    except (errors.AddressError, errors.AddressTooBroad) as error:
        problems |= _messages.explain(error, context.now)
        return None
    return addresses


def _parse_time(text: str, problems: dict[str, str]) -> datetime | None:
    if not text.strip():
        return None
    try:
        found = datetime.fromisoformat(text.strip())
        return found.replace(tzinfo=UTC) if found.utcoffset() is None else found.astimezone(UTC)
    except (ValueError, OverflowError):
        problems["expires_at"] = "Write the time as 2030-12-31 18:00, in UTC."
        return None


def _parse_user(context: Context, text: str, problems: dict[str, str]) -> User | None:
    with suppress(errors.UnknownUser):
        return context.find_user(text.strip()).user
    if not text.strip():
        problems["user"] = "Choose a trader."
    elif _match_users(context, text):
        problems["user"] = "Choose the trader that you mean; or none, to search again."
    else:
        problems["user"] = "There is no such trader among yours."
    return None


def _match_users(context: Context, text: str) -> tuple[User, ...]:
    if not text.strip():
        return ()
    try:
        lines = context.flow.overview(context.actor, search=text.strip(), limit=_MATCH_LIMIT)
    except errors.InvalidValue:
        return ()
    return tuple(line.user for line in lines if not line.removed)
