"""The pages that change nothing: the list, one user, the check of an address, the history."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from ipguard._checks import check_text
from ipguard.addresses import parse_address
from ipguard.admin import _messages
from ipguard.admin._context import Context
from ipguard.admin._http import PageError, Response
from ipguard.errors import AddressError, InvalidValue, UnknownUser, UsernameError
from ipguard.model import Change, Page, UserOverview
from ipguard.usernames import canonical_username

_PAGE_SIZE: Final = 50
_SEARCH_LENGTH: Final = 256
_BLANKS: Final = " \t\r\n"


def show_list(context: Context) -> Response:
    """Show a page of the users, or of the users that a search found."""
    query = context.request.parse_query()
    signed, cursor = query.get("search", ""), query.get("after")
    text = context.verify("search", signed, context.actor.username) or ""
    found: Page[UserOverview] = Page(items=())
    if not context.draft.problems:
        found = context.flow.overview(context.actor, search=text, after=cursor, limit=_PAGE_SIZE)
    return context.page(
        "list.html",
        lines=found.items,
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
    """Show the restrictions and pending requests of a user."""
    line = context.find_user(context.request.parse_query().get("user", ""))
    return context.page("user.html", line=line)


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


def show_history(context: Context) -> Response:
    """Show a page of the audit log, of all users or of one, newest first."""
    query = context.request.parse_query()
    username = context.draft.values.get("user", query.get("user", ""))
    cursor = query.get("before", "")
    found: Page[Change] = Page(items=())
    if not context.draft.problems:
        try:
            found = context.flow.history(
                context.actor,
                username=username or None,
                before=int(cursor) if cursor else None,
                limit=_PAGE_SIZE,
            )
        except (ValueError, UsernameError):
            raise PageError(400, "There is no such page of the history.") from None
    return context.page(
        "history.html",
        entries=found.items,
        following=found.next,
        username=username,
        before=cursor,
    )


def find_history(context: Context) -> Response:
    """Redirect to the history of a user. Only names that have a history go into the URL."""
    text = context.field("user").strip()
    if not text:
        return context.redirect("history")
    with suppress(UnknownUser):
        return context.redirect("history", user=context.find_user(text).user.username)
    with suppress(UsernameError):
        if context.flow.history(context.actor, username=text, limit=1).items:
            return context.redirect("history", user=canonical_username(text))
    problem = "There is nothing of such a trader in your history."
    return context.refuse_field("history", "user", text, problem)
