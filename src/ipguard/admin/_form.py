"""A form about one thing of a user's, which may have changed by the time the form is sent."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, Generic, TypeVar

import attrs

from ipguard.admin import _seen
from ipguard.admin._http import Response
from ipguard.admin._visit import Visit
from ipguard.model import UserOverview

T = TypeVar("T")


@attrs.frozen(kw_only=True)
class Form(Generic[T]):
    """One form.

    Attributes:
        field: The field, and in links the name, of the thing's id.
        template: Its template.
        find: Finds the thing among what a user has, or returns None.
        gone: Says what became of it; called with the username and the id.
        values: What the template needs beside what all such forms have.
    """

    field: str
    template: str
    find: Callable[[UserOverview, str], T | None]
    gone: Callable[[Visit, str, str], Response]
    values: Callable[[Visit, UserOverview, T], dict[str, Any]]

    def show(self, visit: Visit) -> Response:
        """Show the form that a link leads to."""
        asked = visit.request.asked()
        return self._page(visit, asked.get("user", ""), asked.get(self.field, ""), {}, [])

    def again(
        self,
        visit: Visit,
        problems: dict[str, str] | None = None,
        changes: list[str] | None = None,
    ) -> Response:
        """Show the form that was sent once more: with what is wrong, or what has changed."""
        username, thing_id = visit.field("user"), visit.field(self.field)
        return self._page(visit, username, thing_id, problems or {}, changes or [])

    def changed(self, visit: Visit) -> Response:
        """Show the form that was sent once more, as something has changed at this moment."""
        line = visit.person(visit.field("user"))
        return self.again(visit, changes=_seen.since(visit, line, visit.field("seen")))

    def _page(
        self,
        visit: Visit,
        username: str,
        thing_id: str,
        problems: dict[str, str],
        changes: list[str],
    ) -> Response:
        line, seen = _seen.look(visit, username)
        thing = self.find(line, thing_id)
        if thing is None:
            return self.gone(visit, username, thing_id)
        return visit.page(
            self.template,
            422 if problems else 409 if changes else 200,
            line=line,
            seen=seen,
            changes=changes,
            problems=problems,
            **self.values(visit, line, thing),
        )

    def sent(self, visit: Visit) -> tuple[UserOverview, T] | Response:
        """Return whom and what the form is about; or the answer, where that is not as it was."""
        line = visit.person(visit.field("user"))
        thing = self.find(line, visit.field(self.field))
        if thing is None:
            return self.gone(visit, visit.field("user"), visit.field(self.field))
        changes = _seen.since(visit, line, visit.field("seen"))
        return self.again(visit, changes=changes) if changes else (line, thing)


def outcome(line: UserOverview, deleted: str | None, now: datetime) -> dict[str, Any]:
    """Tell what is left to a user once a restriction is deleted; None is for none being deleted.

    Returns:
        `left`; whether that `opens` the user to every address, or `shuts` out all; and when the
        last of what is left `ends`, or None where one lasts.
    """
    left = [other for other in line.restrictions if other.id != deleted]
    ends = [other.expires_at for other in left if other.expires_at is not None]
    temporary = deleted is not None and bool(left) and len(ends) == len(left)
    return {
        "left": left,
        "opens": deleted is not None and not left,
        "shuts": temporary and max(ends) <= now,
        "ends": max(ends) if temporary else None,
    }
