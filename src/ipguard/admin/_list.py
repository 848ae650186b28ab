"""The list: every user of the actor's accounts, with restrictions and pending requests."""

from __future__ import annotations

from typing import Final

from ipguard.admin._http import Response
from ipguard.admin._signing import random_text
from ipguard.admin._visit import Visit
from ipguard.errors import InvalidValue
from ipguard.model import Page, UserOverview, checked_text

_PAGE: Final = 50
_SEARCH: Final = 256
_KEPT: Final = 8 * 3_600


def show(visit: Visit) -> Response:
    """Show a page of the list, or of what a search found."""
    asked = visit.request.asked()
    given = asked.get("search", "")
    kept = visit.recall("search") if given else None
    text = kept["text"] if kept is not None and kept["id"] == given else ""
    after = asked.get("after")
    found = visit.flow.overview(visit.actor, search=text, after=after, limit=_PAGE)
    return visit.page(
        "list.html",
        lines=found.items,
        following=found.next,
        after=after,
        search=text,
        search_id=given if text else "",
        search_lost=bool(given) and not text,
    )


def search(visit: Visit) -> Response:
    """Keep what is searched for in the browser: it may be an address, and URLs are logged."""
    text = visit.field("search").strip()
    if not text:
        return visit.go("")
    try:
        checked_text("search", text, _SEARCH)
    except InvalidValue as wrong:
        nobody: Page[UserOverview] = Page(items=())
        return visit.page(
            "list.html",
            422,
            lines=nobody.items,
            following=None,
            after=None,
            search=text,
            search_id="",
            search_lost=False,
            problems={"search": f"What you search for {wrong.reason}."},
        )
    token = random_text()
    visit.remember("search", {"id": token, "text": text}, _KEPT)
    return visit.go("", search=token)
