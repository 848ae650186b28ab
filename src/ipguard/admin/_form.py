"""A form about one thing of a user's, which may have changed by the time the form is sent."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, Generic, TypeVar

import attrs

from ipguard import rules
from ipguard.admin import _seen
from ipguard.admin._http import Response
from ipguard.admin._visit import Draft, Visit
from ipguard.errors import LockoutRisk
from ipguard.model import UserOverview

T = TypeVar("T")


@attrs.frozen(kw_only=True)
class Form(Generic[T]):
    """One form.

    Attributes:
        name: Its path, and the name of its template.
        field: The field, and in links the name, of the thing's id.
        kept: The other fields that are shown again when the form is refused.
        find: Finds the thing among what a user has, or returns None.
        gone: Says what became of it; called with the username and the id.
        values: What the template needs beside what all such forms have.
        wanted: What the form does to the thing, in words.
    """

    name: str
    field: str
    kept: tuple[str, ...]
    find: Callable[[UserOverview, str], T | None]
    gone: Callable[[Visit, str, str], Response]
    values: Callable[[Visit, UserOverview, T], dict[str, Any]]
    wanted: Callable[[T], str]

    def show(self, visit: Visit) -> Response:
        """Show the form, with what was typed if it was sent and refused."""
        asked = visit.request.asked()
        username, thing_id = asked.get("user", ""), asked.get(self.field, "")
        draft = visit.draft()
        line, seen = _seen.look(visit, username)
        thing = self.find(line, thing_id)
        if thing is None:
            return self.gone(visit, username, thing_id)
        if draft.values.get("asked"):
            what = f"{self.wanted(thing)} for {line.user.full_name or line.user.username}"
            return lockout_page(visit, self.name, draft, what, **self._about(username, thing_id))
        changes = []
        if draft.step == "changed":
            changes = _seen.since(visit, line, draft.values["seen"])
        return visit.page(
            f"{self.name}.html",
            line=line,
            seen=seen,
            changes=changes,
            problems=draft.problems,
            typed=dict.fromkeys(self.kept, "") | draft.values,
            **self.values(visit, line, thing),
        )

    def _about(self, username: str, thing_id: str) -> dict[str, str]:
        return {"user": username, self.field: thing_id}

    def open(self, visit: Visit, draft: Draft | None = None) -> Response:
        """Send the browser on to the form about the thing that a form was sent about."""
        about = self._about(visit.field("user"), visit.id_field(self.field))
        return (
            visit.go(self.name, **about)
            if draft is None
            else visit.again(self.name, draft, **about)
        )

    def again(self, visit: Visit, problems: dict[str, str], asked: str | None = None) -> Response:
        """Send the browser back to the form, with what is wrong.

        Args:
            visit: The request.
            problems: What is wrong, by field.
            asked: The address that would be locked out, which has to be accepted.
        """
        values = {name: visit.field(name) for name in ("seen", *self.kept)}
        values["asked"] = visit.field("asked") if asked is None else asked
        return self.open(visit, Draft(values=values, problems=problems))

    def locks_out(self, visit: Visit, risk: LockoutRisk) -> Response:
        """Send the browser on to the warning that the actor would be locked out."""
        return self.again(visit, accept_lockout(visit), risk.address)

    def changed(self, visit: Visit) -> Response:
        """Send the browser back to the form, with what others changed since it was opened."""
        values = {name: visit.field(name) for name in ("seen", *self.kept)}
        return self.open(visit, Draft(values=values, step="changed"))

    def sent(self, visit: Visit) -> tuple[UserOverview, T] | Response:
        """Return whom and what the form is about; or the answer if that is not as it was."""
        line = visit.person(visit.field("user"))
        thing = self.find(line, visit.field(self.field))
        if thing is None:
            return self.open(visit)
        changes = _seen.since(visit, line, visit.field("seen"))
        return self.changed(visit) if changes else (line, thing)


def accept_lockout(visit: Visit) -> dict[str, str]:
    """Return the problem of a warning that was sent again without being accepted."""
    return {"lockout": "Tick the box if you want this, or go back."} if visit.field("asked") else {}


def lockout_page(visit: Visit, action: str, draft: Draft, what: str, **about: str) -> Response:
    """Show the warning that the actor would be locked out; its form repeats the refused one."""
    return visit.page(
        "lockout.html",
        action=action,
        fields=draft.values | about,
        what=what,
        back=about,
        problems=draft.problems,
    )


def outcome(line: UserOverview, deleted: str | None, now: datetime) -> dict[str, Any]:
    """Tell what is left to a user once a restriction is deleted; None is for none being deleted.

    Returns:
        `left`; whether that `opens` the user to every address, or `shuts` out all; and when the
        last of what is left `ends`, or None where one lasts.
    """
    if deleted is None:
        return {"left": line.restrictions, "opens": False, "shuts": False, "ends": None}
    return rules.without(line.restrictions, deleted, now)._asdict()
