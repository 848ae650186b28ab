"""Request restrictions: add some for one trader or several, or change one.

Both are a form, a review of its meaning and effect, and the request.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final

import attrs

from ipguard import errors, rules
from ipguard._checks import check_text
from ipguard.addresses import AddressRange
from ipguard.admin import _http, _messages
from ipguard.admin._changes import (
    check_lockout_accepted,
    show_done,
    show_ended_restriction,
    show_lockout_warning,
)
from ipguard.admin._context import Context, Draft
from ipguard.admin._http import Response
from ipguard.model import (
    LABEL_LIMIT,
    Demand,
    Direction,
    Impact,
    PendingRequest,
    RequestKind,
    RequestState,
    Restriction,
    User,
)

_FIELDS: Final = ("user", "users", "addresses", "label", "expires_at")
_BETWEEN: Final = re.compile(r"[\r\n,;]+")
_AT_MOST: Final = 100  # traders, and addresses, in one form
_NAMED: Final = 5
_EXAMPLE_PREFIX: Final = 29  # of the network that the form gives as an example
_DROP_DOWN_LIMIT: Final = 100
_MATCH_LIMIT: Final = 20
_SUGGESTED: Final = 10
_USE: Final = "use "  # before the address, in the value of a button


@attrs.frozen
class _Wanted:
    """A form that was understood; `replaced` is the restriction to change, if any."""

    users: tuple[User, ...]
    addresses: tuple[AddressRange, ...]
    label: str
    expires_at: datetime | None
    replaced: Restriction | None

    @property
    def replaces(self) -> tuple[str, ...]:
        return () if self.replaced is None else (self.replaced.id,)

    @property
    def canonical(self) -> str:
        return ", ".join(map(str, self.addresses))

    @property
    def action(self) -> str:
        """The change in words."""
        if len(self.users) == 1:
            name = self.users[0].full_name or self.users[0].spelling
        else:
            name = f"{len(self.users)} traders"
        if self.replaced is None:
            return f"add {self.canonical} for {name}"
        return f"replace {self.replaced.addresses} by {self.canonical} for {name}"


@attrs.frozen
class _Review:
    """The effect of a form: the impact on each user, and the demand of the settings."""

    wanted: _Wanted
    impacts: tuple[tuple[User, Impact], ...]
    demand: Demand

    @property
    def groups(self) -> list[tuple[Impact, list[User]]]:
        """The users for whom the same will hold afterwards."""
        found: dict[str, tuple[Impact, list[User]]] = {}
        several = len(self.impacts) > 1
        for user, impact in self.impacts:
            # Each user has logins of its own: see `refused`.
            shown = attrs.evolve(impact, seen_lost=(), seen_summary="") if several else impact
            found.setdefault(impact.summary, (shown, []))[1].append(user)
        return list(found.values())

    @property
    def refused(self) -> list[tuple[User, Impact]]:
        """Of several users, those with recent logins that the change would have refused."""
        return [each for each in self.impacts if len(self.impacts) > 1 and each[1].seen_lost]

    @property
    def digest(self) -> str:
        """The version of this review, which its form carries."""
        wanted = self.wanted
        shown = [(user.username, impact.summary) for user, impact in self.impacts]
        rest = (wanted.canonical, wanted.label, wanted.expires_at, wanted.replaces, self.demand)
        return hashlib.sha256(repr((shown, rest)).encode()).hexdigest()[:32]


def show(context: Context) -> Response:
    """Show the form for new restrictions, its review, or the lockout warning."""
    given = context.request.parse_query().get("user", "")
    if given:
        context.find_user(given)  # raise UnknownUser
    return _show(context, {"user": given}, None)


def show_change(context: Context) -> Response:
    """Show the form for a change of one restriction, its review, or the lockout warning."""
    query = context.request.parse_query()
    username, restriction_id = query.get("user", ""), query.get("restriction", "")
    held = _find_restriction(context, username, restriction_id)
    if held is None:
        return show_ended_restriction(context, username, restriction_id)
    values = {
        "user": held.username,
        "addresses": str(held.addresses),
        "label": held.label,
        "expires_at": _format_expiry(held),
    }
    return _show(context, values, held)


def submit(context: Context) -> Response:
    """Request new restrictions, unless the form has problems or has to be reviewed."""
    return _submit(context, None)


def change(context: Context) -> Response:
    """Request a change of one restriction, as `submit` does."""
    username, restriction_id = context.field("user"), context.field("restriction")
    held = _find_restriction(context, username, restriction_id)
    if held is None:
        return context.redirect("change", user=username, restriction=restriction_id[:64])
    return _submit(context, held)


def _find_restriction(context: Context, username: str, restriction_id: str) -> Restriction | None:
    held = context.find_user(username).restrictions
    return next((each for each in held if each.id == restriction_id), None)


def _where(held: Restriction | None) -> tuple[str, dict[str, str]]:
    """Return the page of the form, and its query."""
    if held is None:
        return "add", {}
    return "change", {"user": held.username, "restriction": held.id}


def _show(context: Context, given: dict[str, str], held: Restriction | None) -> Response:
    draft = context.draft
    page, query = _where(held)
    values = dict.fromkeys(_FIELDS, "") | given | draft.values
    reviewed = draft.step == "review"
    if not (reviewed or values.get("asked")):
        return _show_form(context, values, draft.problems, held)
    wanted, problems = _parse(context, values, held)
    review, more = (None, {}) if wanted is None else _judge(context, wanted)
    if wanted is None or review is None:
        return _show_form(context, values, problems | more, held)
    if values.get("asked"):
        return show_lockout_warning(context, page, wanted.action, **query)
    return context.page(
        "review.html",
        page=page,
        query=query,
        values=values | query,
        wanted=wanted,
        review=review,
        private=_messages.hint_private(wanted.addresses, context.actor),
    )


def _show_form(
    context: Context, values: dict[str, str], problems: dict[str, str], held: Restriction | None
) -> Response:
    page, query = _where(held)
    choices: tuple[User, ...] | None = ()
    if held is None:
        if "user" in problems:
            choices = _match_users(context, values["user"])
        if not choices:
            found = context.flow.overview(context.actor, limit=_DROP_DOWN_LIMIT)
            choices = None  # a text field, to type a name or a search
            if found.next is None:
                choices = tuple(line.user for line in found if not line.removed)
            elif values["user"] and "user" not in problems:
                choices = (context.find_user(values["user"]).user,)
    user = _find_user(context, values["user"] if held is None else held.username)
    used = () if user is None else context.flow.suggest(context.actor, user.username)
    return context.page(
        "add.html",
        page=page,
        query=query,
        values=values,
        problems=problems,
        choices=choices,
        held=held,
        user=user,
        used=used[:_SUGGESTED],
        use=_USE,
        suggested=_suggest(context, values["addresses"]) if "addresses" in problems else None,
        current_address=_propose_current_address(context),
        label_limit=LABEL_LIMIT,
        most=_AT_MOST,
        # The least that any such form demands; the review shows the rest.
        demand=context.flow.demanded(
            RequestKind.ADD if held is None else RequestKind.REPLACE, Direction.NEUTRAL
        ),
        networks=context.flow.settings.widest_ipv4 <= _EXAMPLE_PREFIX,
    )


def _propose_current_address(context: Context) -> str:
    """Return the actor's address, or its IPv6 network; "" if it is unknown."""
    if context.actor.address is None:
        return ""
    widest = context.flow.settings.widest_ipv6
    return str(rules.whereabouts(context.actor.address, widest_ipv6=widest))


def _submit(context: Context, held: Restriction | None) -> Response:
    page, query = _where(held)
    values = {name: context.field(name) for name in _FIELDS}
    do = context.field("do")
    if do == "mine" or do.startswith(_USE):
        chosen = _propose_current_address(context) if do == "mine" else do.removeprefix(_USE)
        typed = [*_split(values["addresses"]), chosen]
        values["addresses"] = "\n".join(dict.fromkeys(filter(None, typed)))
    if do == "fix" and (suggested := _suggest(context, values["addresses"])):
        typed = [
            suggested[1] if each == suggested[0] else each for each in _split(values["addresses"])
        ]
        values["addresses"] = "\n".join(typed)
    if do in ("mine", "fix", "edit") or do.startswith(_USE):
        return context.redirect_to_draft(page, Draft(values=values), **query)
    wanted, problems = _parse(context, values, held)
    review, more = (None, {}) if wanted is None else _judge(context, wanted)
    if wanted is None or review is None:
        draft = Draft(values=values, problems=problems | more)
        return context.redirect_to_draft(page, draft, **query)
    # A number is asked for on a page that shows all of this. A single address in canonical form
    # can only mean itself.
    obvious = values["addresses"].strip() == wanted.canonical and wanted.addresses[0].size == 1
    plain = obvious and not _messages.hint_private(wanted.addresses, context.actor)
    numbered = len(wanted.users) == 1 and review.demand.number
    seen = context.field("seen")
    if not (seen == review.digest or (numbered and (plain or seen == wanted.canonical))):
        return context.redirect_to_draft(page, Draft(values=values, step="review"), **query)
    return _request(context, values, wanted, seen)


def _request(context: Context, values: dict[str, str], wanted: _Wanted, seen: str) -> Response:
    page, query = _where(wanted.replaced)
    names = [user.username for user in wanted.users]
    options: dict[str, Any] = {
        "label": wanted.label,
        "expires_at": wanted.expires_at,
        "allow_lockout": context.field("lockout") == "accept",
    }
    flow, username = context.flow, names[0]
    try:
        if len(names) > 1:
            requests = flow.request_many(context.actor, names, wanted.addresses, **options)
        else:
            options["replaces"] = wanted.replaces
            requests = (flow.request(context.actor, username, wanted.addresses, **options),)
    except errors.LockoutRisk as risk:
        values |= {"seen": seen, "asked": risk.address}
        problems = check_lockout_accepted(context)
    except errors.DeliveryError as error:
        text = _messages.MAIL_FAILED
        return context.redirect("confirm", text, "problem", user=username, request=error.request_id)
    except errors.StoreError:
        raise
    except errors.IPGuardError as error:
        return _refuse_request(context, values, wanted, error)
    else:
        first = requests[0]
        if first.state is RequestState.CONFIRMED:
            revision = requests[-1].revision
            assert revision is not None
            return show_done(context, first.kind, first.adds, first.removed, names, revision)
        text = _messages.describe_demand(first.demand)
        return context.redirect("confirm", text, user=username, request=first.id)
    return context.redirect_to_draft(page, Draft(values=values, problems=problems), **query)


def _refuse_request(
    context: Context, values: dict[str, str], wanted: _Wanted, error: errors.IPGuardError
) -> Response:
    page, query = _where(wanted.replaced)
    if isinstance(error, errors.UnknownRestriction):
        return context.redirect(page, **query)
    pending = _find_own_request(context, error, wanted)
    if pending is not None:
        text = "You have asked for this already."
        if pending.attempts_left:
            text += " Its number was sent to you by email."
        about = {"user": pending.username, "request": pending.id}
        return context.redirect("confirm", text, "note", **about)
    draft = Draft(values=values, problems=_messages.explain(error, context.now))
    return context.redirect_to_draft(page, draft, **query)


def _find_own_request(
    context: Context, error: errors.IPGuardError, wanted: _Wanted
) -> PendingRequest | None:
    """Return the actor's pending request if this form was submitted twice, or None."""
    if isinstance(error, errors.DuplicateRestriction) and not error.differs:
        for request in context.find_user(error.username).pending:
            same = (request.adds, request.removes) == (wanted.addresses, wanted.replaces)
            if same and request.requested_by == context.actor.username:
                return request
    return None


def describe_typed(context: Context) -> Response:
    """Return to the script, as JSON, the ranges that a text means, or the problem."""
    problems: dict[str, str] = {}
    found = _parse_addresses(context, context.field("addresses"), problems)
    answer = {
        "canonical": ", ".join(map(str, found)),
        "understood": _messages.format_ranges(found),
        "hint": _messages.hint_private(found, context.actor),
        "problem": problems.get("addresses", ""),
    }
    return _http.respond(200, json.dumps(answer), kind="application/json")


def _judge(context: Context, wanted: _Wanted) -> tuple[_Review | None, dict[str, str]]:
    """Return the effect of a form, or the problems by field."""
    flow, impacts, demand = context.flow, [], Demand()
    kind = RequestKind.ADD if wanted.replaced is None else RequestKind.REPLACE
    for user in wanted.users:
        change = (user.username, wanted.addresses, wanted.replaces)
        try:
            impact = flow.preview(context.actor, *change, expires_at=wanted.expires_at)
        except errors.StoreError:
            raise
        except errors.IPGuardError as error:
            return None, _messages.explain(error, context.now)
        impacts.append((user, impact))
        demand |= flow.demanded(kind, impact.direction)
    return _Review(wanted, tuple(impacts), demand), {}


def _parse(
    context: Context, values: Mapping[str, str], held: Restriction | None
) -> tuple[_Wanted | None, dict[str, str]]:
    """Return a form as it was understood, or the problems by field."""
    problems: dict[str, str] = {}
    if held is None:
        users = _parse_users(context, values, problems)
    else:
        users = (context.find_user(held.username).user,)
    addresses = _parse_addresses(context, values["addresses"], problems)
    expires_at = _parse_time(values["expires_at"], problems)
    if held is not None and values["expires_at"] == _format_expiry(held):
        expires_at = held.expires_at  # to the microsecond
    label = values["label"]
    try:
        check_text("label", label, LABEL_LIMIT)
    except errors.InvalidValue as error:
        problems |= _messages.explain(error, context.now)
    if held and (addresses, label, expires_at) == ((held.addresses,), held.label, held.expires_at):
        problems.setdefault("", "Nothing is different from the restriction that exists.")
    if problems:
        return None, problems
    return _Wanted(users, addresses, label, expires_at, held), {}


def _split(text: str) -> list[str]:
    return [part.strip() for part in _BETWEEN.split(text) if part.strip()]


def _parse_addresses(
    context: Context, text: str, problems: dict[str, str]
) -> tuple[AddressRange, ...]:
    parts = _split(text)
    if not parts:
        problems["addresses"] = "Type an IP address, a network or a first-last range."
    if len(parts) > _AT_MOST:
        problems["addresses"] = f"One form takes up to {_AT_MOST} addresses."
        return ()
    widest = _widest(context)
    found: dict[AddressRange, None] = {}
    try:
        for part in parts:
            addresses = rules.read_addresses(part, **widest)
            rules.check_width(addresses, **widest)
            found[addresses] = None
    except (errors.AddressError, errors.AddressTooBroad) as error:
        problems |= _messages.explain(error, context.now)
        return ()
    return tuple(found)


def _widest(context: Context) -> dict[str, int]:
    settings = context.flow.settings
    return {"widest_ipv4": settings.widest_ipv4, "widest_ipv6": settings.widest_ipv6}


def _suggest(context: Context, text: str) -> tuple[str, str] | None:
    """Return the first part of a text that is refused, and its likely correction, or None."""
    for part in _split(text):
        try:
            rules.read_addresses(part, **_widest(context))
        except errors.AddressError as error:
            return None if error.hint is None else (part, error.hint)
    return None


def _format_expiry(held: Restriction) -> str:
    """Return the expiry as the field for a time has it; minutes, unless it has seconds."""
    at = held.expires_at
    if at is None:
        return ""
    return f"{at:%Y-%m-%dT%H:%M:%S}" if at.second or at.microsecond else f"{at:%Y-%m-%dT%H:%M}"


def _parse_time(text: str, problems: dict[str, str]) -> datetime | None:
    if not text.strip():
        return None
    try:
        found = datetime.fromisoformat(text.strip())
        return found.replace(tzinfo=UTC) if found.utcoffset() is None else found.astimezone(UTC)
    except (ValueError, OverflowError):
        problems["expires_at"] = "Write the time as 2030-12-31 18:00, in UTC."
        return None


def _parse_users(
    context: Context, values: Mapping[str, str], problems: dict[str, str]
) -> tuple[User, ...]:
    """Return the users of the field for one and of the field for more."""
    text, found = values["user"].strip(), {}
    parts = [part for line in values["users"].splitlines() for part in _names(context, line)]
    if text or not parts:
        user = _find_user(context, text)
        if user is not None:
            found[user.username] = user
        elif not text:
            problems["user"] = "Choose a trader."
        elif _match_users(context, text):
            problems["user"] = "Choose the trader that you mean; or none, to search again."
        else:
            problems["user"] = "There is no such trader among yours."
    if len(parts) > _AT_MOST:
        problems["users"] = f"One form takes up to {_AT_MOST} traders."
        return ()
    unknown = []
    for part in parts:
        user = _find_user(context, part)
        if user is None:
            unknown.append(part)
        else:
            found[user.username] = user
    if unknown:
        shown = ", ".join(unknown[:_NAMED]) + (" and others" if len(unknown) > _NAMED else "")
        problems["users"] = f"There is no such trader among yours: {shown}."
    elif len(found) > _AT_MOST:
        problems["users"] = f"One form takes up to {_AT_MOST} traders."
    return tuple(found.values())


def _names(context: Context, line: str) -> list[str]:
    """Return the usernames in a line; a username may itself hold a comma."""
    parts = _split(line)
    return [line.strip()] if len(parts) > 1 and _find_user(context, line.strip()) else parts


def _find_user(context: Context, text: str) -> User | None:
    with suppress(errors.UnknownUser):
        return context.find_user(text).user
    return None


def _match_users(context: Context, text: str) -> tuple[User, ...]:
    if not text.strip():
        return ()
    try:
        lines = context.flow.overview(context.actor, search=text.strip(), limit=_MATCH_LIMIT)
    except errors.InvalidValue:
        return ()
    return tuple(line.user for line in lines if not line.removed)
