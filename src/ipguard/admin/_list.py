"""The list: every user of the actor's accounts, with restrictions and pending requests."""

from __future__ import annotations

from typing import Final

from ipguard._checks import check_text
from ipguard.admin._http import Response
from ipguard.admin._visit import Draft, Visit
from ipguard.errors import InvalidValue
from ipguard.model import Page, UserOverview

_PAGE: Final = 50
_SEARCH: Final = 256


def show(visit: Visit) -> Response:
    """Show a page of the list, or of what a search found."""
    draft = visit.draft()
    asked = visit.request.asked()
    given, after = asked.get("search", ""), asked.get("after")
    text = visit.unseal_search(given)
    found: Page[UserOverview] = Page(items=())
    if not draft.problems:
        found = visit.flow.overview(visit.actor, search=text, after=after, limit=_PAGE)
    return visit.page(
        "list.html",
        lines=found.items,
        following=found.next,
        after=after,
        search=draft.values.get("search", text),
        search_id=given if text else "",
        search_lost=bool(given) and not text,
        problems=draft.problems,
    )


def search(visit: Visit) -> Response:
    """Go to the page of a search. It may be for an address, so the URL holds it sealed."""
    text = visit.field("search").strip()
    if not text:
        return visit.go("")
    try:
        check_text("search", text, _SEARCH)
    except InvalidValue as wrong:
        problems = {"search": f"What you search for {wrong.reason}."}
        return visit.again("", Draft(values={"search": text}, problems=problems))
    return visit.go("", search=visit.seal_search(text))
