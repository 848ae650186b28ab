"""Looking without changing: one user, a check of an address, the history."""

from __future__ import annotations

from typing import Final

from ipguard.addresses import parse_address
from ipguard.admin import _texts
from ipguard.admin._http import BadRequest, Response
from ipguard.admin._visit import Draft, Visit
from ipguard.errors import AddressError, InvalidValue, UnknownUser, UsernameError
from ipguard.usernames import canonical_username

_ROWS: Final = 50
_BLANKS: Final = " \t\r\n"


def user(visit: Visit) -> Response:
    """Show one user: what holds, what waits, what can be done."""
    line = visit.person(visit.request.asked().get("user", ""))
    return visit.page("user.html", line=line)


def check(visit: Visit) -> Response:
    """Show what a login would be answered, from the store as it is now; or ask for the address."""
    line = visit.person(visit.request.asked().get("user", ""))
    draft = visit.draft()
    text = draft.values.get("address", "")
    if not text or draft.problems:
        return visit.page(
            "check.html", line=line, address=text, found=None, problems=draft.problems
        )
    found = visit.guard.explain(line.user.username, text)
    return visit.page(
        "check.html", line=line, address=text, found=found, verdict=_texts.verdict(found)
    )


def checked(visit: Visit) -> Response:
    """Go to the answer for an address, or back to the form if it is not an address."""
    line = visit.person(visit.field("user"))
    text = visit.field("address").strip(_BLANKS)
    problems = {}
    try:
        parse_address(text)
    except AddressError as wrong:
        told = _texts.problem(wrong, visit.now).text if text else "Type an IP address."
        problems["address"] = told
    draft = Draft(values={"address": text}, problems=problems)
    return visit.again("check", draft, user=line.user.username)


def history(visit: Visit) -> Response:
    """Show the history, the newest first, of everybody or of one user."""
    draft = visit.draft()
    if draft.problems:
        username = draft.values["user"]
        return visit.page(
            "history.html",
            rows=(),
            following=None,
            username=username,
            before="",
            problems=draft.problems,
        )
    asked = visit.request.asked()
    username, before = asked.get("user", ""), asked.get("before", "")
    try:
        found = visit.flow.history(
            visit.actor,
            username=canonical_username(username) if username else None,
            before=_number(before) if before else None,
            limit=_ROWS,
        )
    except (InvalidValue, UsernameError):
        raise BadRequest(400, "There is no such page of the history.") from None
    return visit.page(
        "history.html",
        rows=found.items,
        following=found.next,
        username=username,
        before=before,
    )


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise BadRequest(400, "There is no such page of the history.")
    return int(text)


def find_history(visit: Visit) -> Response:
    """Go to one user's history: only a name that is known goes into the URL."""
    text = visit.field("user").strip()
    if not text:
        return visit.go("history")
    try:
        return visit.go("history", user=visit.person(text).user.username)
    except UnknownUser:
        pass
    try:
        name = canonical_username(text)
    except UsernameError:
        name = ""
    if name and visit.flow.history(visit.actor, username=name, limit=1).items:
        return visit.go("history", user=name)
    problems = {"user": "There is nothing of such a trader in your history."}
    return visit.again("history", Draft(values={"user": text}, problems=problems))
