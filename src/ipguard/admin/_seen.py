"""Two people at once: what a form's sender had seen, and what has happened since."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final

from ipguard.admin import _texts
from ipguard.admin._http import Response
from ipguard.admin._visit import Missing, Visit
from ipguard.errors import UsernameError
from ipguard.model import Action, Change, PendingRequest, UserOverview

_ROWS: Final = 200
_CHANGING: Final = frozenset(
    {Action.CONFIRM, Action.DELETE, Action.IMPOSE, Action.IMPOSE_MANY, Action.LIFT}
)


def look(visit: Visit, username: str) -> tuple[UserOverview, str]:
    """Return a user, and what a form about it carries so that changes are noticed later."""
    # The revision first: what is read after it may be newer, and is then told once too often.
    try:
        rows = visit.flow.history(visit.actor, username=username, limit=1).items
    except UsernameError:
        raise Missing from None
    line = visit.person(username)
    return line, f"{rows[0].revision if rows else 0}.{_digest(line)}"


def _digest(line: UserOverview) -> str:
    """Stand for which restrictions a user has."""
    ids = "\n".join(restriction.id for restriction in line.restrictions)
    return hashlib.sha256(ids.encode()).hexdigest()[:32]


def since(visit: Visit, line: UserOverview, seen: str) -> list[str]:
    """Tell what has changed since a form was shown; nothing where it is as it was."""
    revision, _, digest = seen.partition(".")
    if digest == _digest(line):
        return []
    known = int(revision) if revision.isdecimal() and len(revision) < 19 else 0
    rows = visit.flow.history(visit.actor, username=line.user.username, limit=20)
    new = [row for row in rows if row.revision > known and row.action in _CHANGING]
    told = [_texts.told(row, visit.actor.username) for row in reversed(new)]
    return told or ["The restrictions of this trader are not the same any more."]


def gone(visit: Visit, username: str, restriction_id: str) -> Response:
    """Say who deleted a restriction, where this actor may know that there was one.

    Raises:
        Missing: There was none, for this actor.
    """

    def ended(row: Change) -> bool:
        found = row.detail
        if found.get("replaces") == restriction_id:
            return True
        return found.get("restriction") == restriction_id and row.action in _CHANGING

    row = _newest(visit, username, ended)
    text = "This restriction does not hold any more."
    return _over(visit, username, text, row)


def closed(visit: Visit, username: str, request_id: str) -> Response:
    """Say what became of a request that is not pending any more, and who did it.

    Raises:
        Missing: There was none, for this actor.
    """
    row = _newest(visit, username, lambda row: row.detail.get("request") == request_id)
    text = "This request is not pending any more."
    if "locked" in row.detail:
        text = "This request is locked, after too many wrong numbers. Ask again."
    elif row.action not in (Action.CONFIRM, Action.CANCEL):
        # No row names what a request to delete was cancelled by: the restriction's own end.
        text = (
            "This request is over: nobody confirmed it in time, or what it was about has changed. "
            "Look at what holds now, and ask again if you still want it."
        )
    return _over(visit, username, text, row)


def _newest(visit: Visit, username: str, wanted: Callable[[Change], bool]) -> Change:
    for row in visit.flow.history(visit.actor, username=username, limit=_ROWS):
        if wanted(row):
            return row
    raise Missing


def _over(visit: Visit, username: str, text: str, row: Change) -> Response:
    return visit.page(
        "over.html",
        409,
        line=visit.person(username),
        text=text,
        row=_texts.told(row, visit.actor.username),
    )


def pending(line: UserOverview, request_id: str) -> PendingRequest | None:
    """Return a user's request that waits, or None."""
    return next((request for request in line.pending if request.id == request_id), None)
