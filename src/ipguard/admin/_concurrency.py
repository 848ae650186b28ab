"""Optimistic concurrency: forms carry the version that they showed, and stale ones are not applied.

The version of a user stands for the restrictions that the user has. When it has changed since a
form was opened, the form is shown again with the changes; when its subject no longer exists, a page
says who ended it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

import attrs

from ipguard.admin import _messages
from ipguard.admin._context import Context, Draft
from ipguard.admin._http import NotFound, Response
from ipguard.errors import UsernameError
from ipguard.model import Action, Change, PendingRequest, Restriction, UserOverview

T = TypeVar("T", PendingRequest, Restriction)

_ENTRY_LIMIT: Final = 200
_ID_LENGTH: Final = 64  # longer than every id
_CHANGING: Final = frozenset(
    {Action.CONFIRM, Action.DELETE, Action.IMPOSE, Action.IMPOSE_MANY, Action.LIFT}
)


def find_user_and_version(context: Context, username: str) -> tuple[UserOverview, str]:
    """Return a user and the version that forms about this user carry."""
    # Read the revision first: a concurrent change is then reported twice rather than missed.
    try:
        entries = context.flow.history(context.actor, username=username, limit=1).items
    except UsernameError:
        raise NotFound from None
    line = context.find_user(username)
    return line, f"{entries[0].revision if entries else 0}.{digest_restrictions(line)}"


def digest_restrictions(line: UserOverview) -> str:
    """Return a digest of the restrictions that a user has."""
    ids = "\n".join(restriction.id for restriction in line.restrictions)
    return hashlib.sha256(ids.encode()).hexdigest()[:32]


def describe_changes(context: Context, line: UserOverview, version: str) -> list[str]:
    """Describe how a user's restrictions have changed since a version; empty if they have not."""
    revision, _, digest = version.partition(".")
    if digest == digest_restrictions(line):
        return []
    known = int(revision) if revision.isdecimal() and len(revision) < 19 else 0
    entries = context.flow.history(context.actor, username=line.user.username, limit=20)
    new = [entry for entry in entries if entry.revision > known and entry.action in _CHANGING]
    told = [_messages.describe(entry, context.actor.username) for entry in reversed(new)]
    return told or ["The restrictions of this trader are not the same any more."]


# -- a subject that no longer exists


def show_ended_restriction(context: Context, username: str, restriction_id: str) -> Response:
    """Show who ended a restriction.

    Raises:
        NotFound: This actor had no such restriction.
    """

    def is_end(entry: Change) -> bool:
        if entry.detail.get("replaces") == restriction_id:
            return True
        return entry.detail.get("restriction") == restriction_id and entry.action in _CHANGING

    entry = _find_entry(context, username, is_end)
    return _show_over(context, username, "This restriction does not hold any more.", entry)


def show_closed_request(context: Context, username: str, request_id: str) -> Response:
    """Show who or what closed a request.

    Raises:
        NotFound: This actor had no such request.
    """
    entry = _find_entry(context, username, lambda entry: entry.detail.get("request") == request_id)
    text = "This request is not pending any more."
    if "locked" in entry.detail:
        text = "This request is locked, after too many wrong numbers. Ask again."
    elif entry.action not in (Action.CONFIRM, Action.CANCEL):
        # No entry names a request to delete that was cancelled because its restriction ended.
        text = (
            "This request is over: nobody confirmed it in time, or what it was about has changed. "
            "Look at what holds now, and ask again if you still want it."
        )
    return _show_over(context, username, text, entry)


def _find_entry(context: Context, username: str, matches: Callable[[Change], bool]) -> Change:
    for entry in context.flow.history(context.actor, username=username, limit=_ENTRY_LIMIT):
        if matches(entry):
            return entry
    raise NotFound


def _show_over(context: Context, username: str, text: str, entry: Change) -> Response:
    return context.page(
        "over.html",
        409,
        line=context.find_user(username),
        text=text,
        entry=_messages.describe(entry, context.actor.username),
    )


# -- forms about one subject


@attrs.frozen(kw_only=True)
class Form(Generic[T]):
    """A form about one restriction or one pending request.

    Attributes:
        name: The path of the form and the name of its template.
        field: The field, and the link parameter, that holds the subject's id.
        kept: The other fields that are shown again when the form is refused.
        list_subjects: Returns a user's subjects.
        show_over: Shows what became of a subject, given the username and the id.
        prepare: Returns the values that the template needs in addition to the common ones.
        describe: Returns what the form does to the subject, in words.
    """

    name: str
    field: str
    kept: tuple[str, ...]
    list_subjects: Callable[[UserOverview], tuple[T, ...]]
    show_over: Callable[[Context, str, str], Response]
    prepare: Callable[[Context, UserOverview, T], dict[str, Any]]
    describe: Callable[[T], str]

    def find(self, line: UserOverview, subject_id: str) -> T | None:
        """Return the subject with an id, or None."""
        return next((one for one in self.list_subjects(line) if one.id == subject_id), None)

    def show(self, context: Context) -> Response:
        """Show the form; after a refusal, with the submitted values and the problems."""
        query = context.request.parse_query()
        username, subject_id = query.get("user", ""), query.get(self.field, "")
        draft = context.read_draft()
        line, version = find_user_and_version(context, username)
        subject = self.find(line, subject_id)
        if subject is None:
            return self.show_over(context, username, subject_id)
        if draft.values.get("asked") and not draft.step:
            what = f"{self.describe(subject)} for {line.user.full_name or line.user.username}"
            about = {"user": username, self.field: subject_id}
            return show_lockout_warning(context, self.name, draft, what, **about)
        changes = []
        if draft.step == "changed":
            changes = describe_changes(context, line, draft.values["seen"])
        return context.page(
            f"{self.name}.html",
            line=line,
            seen=version,
            changes=changes,
            problems=draft.problems,
            typed=dict.fromkeys(self.kept, "") | draft.values,
            **self.prepare(context, line, subject),
        )

    def open(self, context: Context, draft: Draft | None = None) -> Response:
        """Redirect to this form about the subject of the submitted one."""
        about = {"user": context.field("user"), self.field: context.field(self.field)[:_ID_LENGTH]}
        if draft is None:
            return context.redirect(self.name, **about)
        return context.redirect_to_draft(self.name, draft, **about)

    def refuse(
        self,
        context: Context,
        problems: dict[str, str] | None = None,
        *,
        asked: str | None = None,
        step: str = "",
    ) -> Response:
        """Redirect to the form with the submitted values and the problems by field.

        `asked` is the actor's address if the change would lock the actor out; `step` is "changed"
        for the form to show concurrent changes.
        """
        values = {name: context.field(name) for name in ("seen", *self.kept)}
        values["asked"] = context.field("asked") if asked is None else asked
        return self.open(context, Draft(values=values, problems=problems or {}, step=step))

    def warn_of_lockout(self, context: Context, address: str) -> Response:
        """Redirect to the warning that the actor would be locked out."""
        return self.refuse(context, check_lockout_accepted(context), asked=address)

    def check_version(self, context: Context) -> tuple[UserOverview, T] | Response:
        """Return the user and the subject of the submitted form, or the response if it is stale."""
        line = context.find_user(context.field("user"))
        subject = self.find(line, context.field(self.field))
        if subject is None:
            return self.open(context)
        if describe_changes(context, line, context.field("seen")):
            return self.refuse(context, step="changed")
        return line, subject


def check_lockout_accepted(context: Context) -> dict[str, str]:
    """Return the problem of a lockout warning that was submitted without its box ticked, if any."""
    if not context.field("asked"):
        return {}
    return {"lockout": "Tick the box if you want this, or go back."}


def show_lockout_warning(
    context: Context, action: str, draft: Draft, what: str, **about: str
) -> Response:
    """Show the warning that the actor would be locked out; its form repeats the refused one."""
    return context.page(
        "lockout.html",
        action=action,
        fields=draft.values | about,
        what=what,
        back=about,
        problems=draft.problems,
    )
