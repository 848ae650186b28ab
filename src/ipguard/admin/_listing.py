"""The pages that change nothing: the list, one user, the check of an address, the history."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, time, timedelta
from typing import Final

import attrs

from ipguard import rules
from ipguard._checks import check_text
from ipguard.addresses import parse_address
from ipguard.admin import _http, _messages
from ipguard.admin._context import Context, Draft
from ipguard.admin._http import PageError, Response
from ipguard.errors import AddressError, InvalidValue, UnknownUser, UsernameError
from ipguard.model import Action, Change, Page, UserFilter, UserOverview
from ipguard.usernames import canonical_username

_PAGE_SIZE: Final = 50
_READ_SIZE: Final = 1_000  # entries of the audit log that one call reads for a filter
_READS: Final = 10  # calls for one page
_CSV_SIZE: Final = _READ_SIZE * _READS
_ONLY: Final[Mapping[UserFilter, str]] = {
    "restricted": "Restricted",
    "unrestricted": "Unrestricted",
    "pending": "Pending",
    "expiring": "Expiring within 7 days",
}
_DAY: Final = timedelta(days=1)
_SEARCH_LENGTH: Final = 256
_BLANKS: Final = " \t\r\n"


def show_list(context: Context) -> Response:
    """Show a page of the users, or of the users that a search found."""
    query = context.request.parse_query()
    signed, cursor = query.get("search", ""), query.get("after")
    only = next((each for each in _ONLY if each == query.get("only")), None)
    text = context.verify("search", signed, context.actor.username) or ""
    found: Page[UserOverview] = Page(items=())
    if not context.draft.problems:
        found = context.flow.overview(
            context.actor, search=text, after=cursor, limit=_PAGE_SIZE, only=only
        )
    first = not (signed or cursor or only or context.draft.problems)
    waiting = context.flow.waiting(context.actor, limit=_PAGE_SIZE) if first else ()
    told = context.flow.concerning(context.actor) if first else ()
    return context.page(
        "list.html",
        told=told,
        waiting=_messages.group_waiting(waiting, context.actor, context.now),
        lines=found.items,
        only=only or "",
        filters=_ONLY,
        counts=None if text or cursor else context.flow.counts(context.actor),
        following=found.next,
        after=cursor,
        search=context.draft.values.get("search", text),
        signed_search=signed if text else "",
        search_lost=bool(signed) and not text,
    )


def search(context: Context) -> Response:
    """Redirect to the results of a search."""
    text = context.field("search").strip()
    if not text:
        return context.redirect("")
    try:
        check_text("search", text, _SEARCH_LENGTH)
    except InvalidValue as error:
        return context.refuse_field("", "search", text, f"What you search for {error.reason}.")
    return context.redirect("", search=context.sign("search", text, context.actor.username))


def show_user(context: Context) -> Response:
    """Show the restrictions and pending requests of a user, and where it logged in from."""
    line = context.find_user(context.request.parse_query().get("user", ""))
    flow, actor, name = context.flow, context.actor, line.user.username
    widest = flow.settings.widest_ipv6
    refusals = [
        (each, rules.whereabouts(each.address, widest_ipv6=widest))
        for each in flow.refusals(actor, name)
    ]
    return context.page(
        "user.html",
        line=line,
        seen=flow.sightings(actor, name),
        suggested=flow.suggest(actor, name),
        refusals=refusals,
    )


def show_check(context: Context) -> Response:
    """Show the form for an address, or the decision about a login from it, read from the store."""
    line = context.find_user(context.request.parse_query().get("user", ""))
    address, found, verdict = context.draft.values.get("address", ""), None, ""
    if address and not context.draft.problems:
        found = context.guard.explain(line.user.username, address)
        verdict = _messages.explain_decision(found)
    return context.page(
        "check.html",
        line=line,
        address=address,
        found=found,
        verdict=verdict,
    )


def check(context: Context) -> Response:
    """Redirect to the decision about an address, or to the form if it is not an address."""
    line = context.find_user(context.field("user"))
    text = context.field("address").strip(_BLANKS)
    problem = "" if text else "Type an IP address."
    try:
        parse_address(text)
    except AddressError as error:
        problem = problem or _messages.explain(error, context.now)["addresses"]
    return context.refuse_field("check", "address", text, problem, user=line.user.username)


@attrs.frozen
class _Filter:
    """A filter of the history: a user, an action, and days in UTC, both included."""

    user: str
    action: str
    since: str
    until: str

    @classmethod
    def of(cls, fields: Mapping[str, str]) -> _Filter:
        return cls(*(fields.get(each.name, "").strip() for each in attrs.fields(cls)))

    @property
    def times(self) -> tuple[datetime | None, datetime | None]:
        """The first time that it shows, and the first one after those; ValueError for no day."""
        first, last = (date.fromisoformat(day) if day else None for day in (self.since, self.until))
        return (
            None if first is None else datetime.combine(first, time(), UTC),
            None if last is None else datetime.combine(last + _DAY, time(), UTC),
        )


def show_history(context: Context) -> Response:
    """Show a page of the audit log, newest first, as far as a filter admits it."""
    query = context.request.parse_query()
    shown = _Filter.of(query | context.draft.values)
    cursor = query.get("before", "")
    found: Page[Change] = Page(items=())
    if not context.draft.problems:
        found = _read_history(context, shown, cursor, _PAGE_SIZE)
    return context.page(
        "history.html",
        entries=found.items,
        following=found.next,
        filters=attrs.asdict(shown),
        filtered=any(attrs.astuple(shown)),
        actions=list(Action),
        before=cursor,
        most=_CSV_SIZE,
    )


def export_history(context: Context) -> Response:
    """Return the same entries as `show_history` as CSV, up to 10,000."""
    query = context.request.parse_query()
    found = _read_history(context, _Filter.of(query), query.get("before", ""), _CSV_SIZE)
    name = 'attachment; filename="ip-restrictions-history.csv"'
    # With a byte order mark, without which spreadsheets read another encoding.
    text = "\ufeff" + _messages.format_csv(found)
    headers = (("Content-Disposition", name),)
    return _http.respond(200, text, headers, kind="text/csv; charset=utf-8")


def _read_history(context: Context, shown: _Filter, cursor: str, limit: int) -> Page[Change]:
    """Return entries that a filter admits; fewer, with a cursor, if too many had to be read."""
    try:
        since, until = shown.times
        before = int(cursor) if cursor else None
        read = functools.partial(context.flow.history, context.actor, username=shown.user or None)
        if until is not None and before is None:
            before = _find_revision(read, until)
        size = _READ_SIZE if shown.action or since else min(limit, _READ_SIZE)
        entries: list[Change] = []
        for _ in range(_READS):
            page = read(before=before, limit=size)
            for entry in page:
                if since is not None and entry.at < since:
                    return Page(items=tuple(entries))
                if shown.action in ("", entry.action):
                    entries.append(entry)
                if len(entries) == limit:
                    last = entry == page.items[-1] and page.next is None
                    return Page(items=tuple(entries), next=None if last else entry.revision)
            before = page.next
            if before is None:
                break
        return Page(items=tuple(entries), next=before)
    except (ValueError, OverflowError, UsernameError):
        raise PageError(400, "There is no such page of the history.") from None


def _find_revision(read: Callable[..., Page[Change]], until: datetime) -> int:
    """Return the cursor of the entries before a time; times increase with revisions."""
    newest = read(limit=1).items
    low, high = 1, newest[0].revision + 1 if newest else 1
    while low < high:
        middle = (low + high + 1) // 2
        below = read(before=middle, limit=1).items
        if not below or below[0].at < until:
            low = middle
        else:
            high = middle - 1
    return low


def find_history(context: Context) -> Response:
    """Redirect to a filtered history. Only names that have a history go into the URL."""
    given, problems = _Filter.of(context.form), {}
    if given.user:
        name = _find_name(context, given.user)
        if name is None:
            problems["user"] = "There is nothing of such a trader in your history."
        given = attrs.evolve(given, user=name or given.user)
    if given.action not in ("", *Action):
        problems["action"] = "Choose an action of the list."
    for field in ("since", "until"):
        try:
            _ = _Filter("", "", getattr(given, field), getattr(given, field)).times
        except (ValueError, OverflowError):
            problems[field] = "Write the day as 2030-12-31."
    if problems:
        draft = Draft(values=attrs.asdict(given), problems=problems)
        return context.redirect_to_draft("history", draft)
    return context.redirect("history", **attrs.asdict(given))


def _find_name(context: Context, text: str) -> str | None:
    """Return the canonical name of a user who is there or has a history, or None."""
    try:
        return context.find_user(text).user.username
    except UnknownUser:
        pass
    try:
        found = context.flow.history(context.actor, username=text, limit=1).items
    except UsernameError:
        return None
    return canonical_username(text) if found else None
