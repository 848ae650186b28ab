"""Confirm, approve, resend and cancel a request; delete a restriction.

Optimistic concurrency: forms carry the version of the user that they showed, which stands for the
user's restrictions. When it has changed since a form was opened, the form is shown again with the
changes; when its subject no longer exists, a page says who ended it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from typing import Any, Final, Generic, TypeVar

import attrs

from ipguard import errors, rules
from ipguard.addresses import AddressRange
from ipguard.admin import _messages
from ipguard.admin._context import Context, Draft, Level
from ipguard.admin._http import NotFound, Response
from ipguard.model import (
    REASON_LIMIT,
    Action,
    Applied,
    Change,
    Direction,
    Impact,
    PendingRequest,
    RequestKind,
    Restriction,
    UserOverview,
)

T = TypeVar("T", PendingRequest, Restriction)

_ENTRY_LIMIT: Final = 200
_ID_LENGTH: Final = 64  # longer than every id
_CHANGING: Final = frozenset(
    {Action.CONFIRM, Action.DELETE, Action.IMPOSE, Action.IMPOSE_MANY, Action.LIFT}
)
_ACTOR_LOCKED: Final = (
    "You have given too many wrong numbers, over all your requests. No number is accepted from you "
    "until an operator allows you new attempts. This one was not judged."
)
_SAME_BATCH: Final = 1_000  # requests among which those of one number are looked for
_SUMMARY_LENGTH: Final = 200
_CATCH_UP_SECONDS: Final = 2.0


# -- versions


def find_user_and_version(context: Context, username: str) -> tuple[UserOverview, str]:
    """Return a user and the version that forms about this user carry."""
    # Read the revision first: a concurrent change is then reported twice rather than missed.
    entries = context.flow.history(context.actor, username=username, limit=1).items
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
    """Show who ended a restriction; raise NotFound if this actor had no such restriction."""

    def is_end(entry: Change) -> bool:
        ended = f"{entry.detail.get('replaces', '')}, {entry.detail.get('restriction', '')}"
        return restriction_id in ended.split(", ") and entry.action in _CHANGING

    entry = _find_entry(context, username, is_end)
    return _show_over(context, username, "This restriction does not hold any more.", entry)


def show_closed_request(context: Context, username: str, request_id: str) -> Response:
    """Show who or what closed a request; raise NotFound if this actor had no such request."""
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
        problems={},  # of a form that makes no sense any more
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
        action: The path that a warning of a lockout is submitted to.
        field: The field, and the link parameter, that holds the subject's id.
        kept: The other fields that are shown again when the form is refused.
        list_subjects: Returns a user's subjects.
        show_over: Shows what became of a subject, given the username and the id.
        prepare: Returns the values that the template needs in addition to the common ones.
        describe: Returns what the form does to the subject, in words.
    """

    name: str
    action: str
    field: str
    kept: tuple[str, ...]
    list_subjects: Callable[[UserOverview], tuple[T, ...]]
    show_over: Callable[[Context, str, str], Response]
    prepare: Callable[[Context, UserOverview, T], dict[str, Any]]
    describe: Callable[[T], str]

    def find(self, line: UserOverview, subject_id: str) -> T | None:
        return next((one for one in self.list_subjects(line) if one.id == subject_id), None)

    def show(self, context: Context) -> Response:
        """Show the form; after a refusal, with the submitted values and the problems."""
        query = context.request.parse_query()
        username, subject_id = query.get("user", ""), query.get(self.field, "")
        draft = context.draft
        line, version = find_user_and_version(context, username)
        subject = self.find(line, subject_id)
        if subject is None:
            return self.show_over(context, username, subject_id)
        if draft.values.get("asked") and not draft.step:
            what = f"{self.describe(subject)} for {line.user.full_name or line.user.spelling}"
            about = {"user": username, self.field: subject_id}
            return show_lockout_warning(context, self.name, what, **about)
        changes = []
        if draft.step == "changed":
            changes = describe_changes(context, line, draft.values["seen"])
        return context.page(
            f"{self.name}.html",
            line=line,
            seen=version,
            changes=changes,
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

        `asked` is the actor's address if the change would lock the actor out.
        """
        values = {name: context.field(name) for name in ("seen", *self.kept)}
        values["asked"] = context.field("asked") if asked is None else asked
        values["action"] = self.action
        return self.open(context, Draft(values=values, problems=problems or {}, step=step))

    def warn_of_lockout(self, context: Context, address: str) -> Response:
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


def show_lockout_warning(context: Context, back: str, what: str, **about: str) -> Response:
    """Show the warning that the actor would be locked out; its form repeats the refused one."""
    fields = context.draft.values | about
    action = fields.get("action", back)
    numbered = action == "confirm" and bool(fields.get("numbered"))
    return context.page(
        "lockout.html",
        action=action,
        fields=fields,
        what=what,
        back=back,
        query=about,
        numbered=numbered,
    )


# -- requests


def _prepare_confirm(context: Context, _: UserOverview, request: PendingRequest) -> dict[str, Any]:
    actor = context.actor.username
    own = request.requested_by == actor
    if own:  # with what the others of its batch demand
        demand = context.flow.own_request(context.actor, request.id).demand
    else:
        demand = context.flow.demand_of(request)
    impact, obstacle = None, ""
    try:
        impact = context.flow.preview_request(context.actor, request.id)
    except (errors.StoreError, errors.UnknownRequest):
        raise
    except errors.IPGuardError as error:
        (obstacle,) = _messages.explain(error, context.now).values()
    batch: tuple[str, ...] = ()
    if request.batch is not None:
        waiting = context.flow.waiting(context.actor, limit=_SAME_BATCH)
        others = (each for each in waiting if each.batch == request.batch)
        batch = tuple(sorted(each.spelling for each in others if each.id != request.id))
    ready_at = rules.ready_at(request, demand)
    return {
        "pending": request,
        "own": own,
        "demand": demand,
        "impact": impact,
        "obstacle": obstacle,
        "batch": batch,
        "opens": impact is not None and impact.direction is Direction.OPENS,
        "private": _messages.hint_private(request.adds, context.actor),
        "waits": context.now < ready_at,
        "ready_at": ready_at,
        "needs_number": demand.number and not request.numbered,
        "sent": request.attempts_left > 0,
        "expired": request.number_expires_at <= context.now,
        "mailbox": _messages.mask_email(context.actor.email),
        "missing": max(0, demand.approvals - len(request.approvals)),
        "approved": actor in request.approved_by,
    }


_CONFIRM: Final = Form[PendingRequest](
    name="confirm",
    action="confirm",
    field="request",
    kept=("numbered",),  # never the number
    list_subjects=lambda line: line.pending,
    show_over=show_closed_request,
    prepare=_prepare_confirm,
    describe=lambda request: request.change,
)
_APPROVE: Final = attrs.evolve(_CONFIRM, action="approve")
show_confirm = _CONFIRM.show


def confirm(context: Context) -> Response:
    checked = _CONFIRM.check_version(context)
    if isinstance(checked, Response):
        return checked
    _, request = checked
    number = context.field("number")
    if context.field("numbered") and not number.strip():
        problem = "Type the confirmation number from the mail."
        return _CONFIRM.refuse(context, {"number": problem})
    try:
        result = context.flow.confirm(
            context.actor,
            request.id,
            number,
            allow_lockout=context.field("lockout") == "accept",
        )
    except errors.LockoutRisk as risk:
        return _CONFIRM.warn_of_lockout(context, risk.address)
    except (errors.StoreError, errors.UnknownRequest):
        raise
    except errors.IPGuardError as error:
        return _refuse_number(context, error)
    return _show_result(context, request, result, "You have confirmed the request.")


def approve(context: Context) -> Response:
    checked = _APPROVE.check_version(context)
    if isinstance(checked, Response):
        return checked
    _, request = checked
    try:
        result = context.flow.approve(
            context.actor, request.id, allow_lockout=context.field("lockout") == "accept"
        )
    except errors.LockoutRisk as risk:
        return _APPROVE.warn_of_lockout(context, risk.address)
    except errors.RequestClosed:
        return _APPROVE.open(context)
    except (errors.StoreError, errors.UnknownRequest):
        raise
    except errors.IPGuardError as error:
        return _APPROVE.refuse(context, _messages.explain(error, context.now))
    return _show_result(context, request, result, "You have approved the request.")


def _show_result(
    context: Context, request: PendingRequest, result: Applied | PendingRequest, done: str
) -> Response:
    if isinstance(result, PendingRequest):
        text = f"{done} It does not hold yet: see what it still needs."
        return context.redirect("confirm", text, user=request.username, request=request.id)
    users = {each.username for each in (*result.added, *result.removed)} or {request.username}
    return show_done(context, request.kind, request.adds, request.removed, users, result.revision)


def _refuse_number(context: Context, error: errors.IPGuardError) -> Response:
    match error:
        case errors.RequestClosed() | errors.WrongNumber(attempts_left=0):
            return _CONFIRM.open(context)
        case errors.WrongNumber():
            text = f"This is not the number. {_messages.format_attempts(error.attempts_left)}."
        case errors.NumberFormatError():
            text = f"The confirmation number {error.reason}. No attempt was counted."
        case errors.TooManyAttempts():
            text = _ACTOR_LOCKED
        case errors.NumberExpired():
            text = "This number has expired. Send a new number; the request still waits."
        case _:
            return _CONFIRM.refuse(context, _messages.explain(error, context.now))
    return _CONFIRM.refuse(context, {"number": text})


def resend(context: Context) -> Response:
    text = "A new number was sent by email. The one before it is no longer valid."
    level: Level = "problem"
    username, request_id = context.field("user"), context.field("request")
    request = _CONFIRM.find(context.find_user(username), request_id)
    if request is None:
        return _CONFIRM.open(context)
    if not request.attempts_left:
        text = _messages.ENTER_IT
    try:
        context.flow.resend(context.actor, request_id)
        level = "done"
    except errors.RequestClosed:
        return _CONFIRM.open(context)
    except errors.TooManyRequests as error:
        text = _messages.explain(error, context.now)[""]
        if error.retry_after <= context.flow.settings.resend_interval:
            text = f"A number was sent a moment ago. {_messages.format_retry(error, context.now)}"
    except errors.TooSoon as error:
        text = _messages.explain(error, context.now)[""]
    except errors.DeliveryError:
        text = _messages.MAIL_FAILED
    return context.redirect("confirm", text, level, user=username, request=request_id)


def cancel(context: Context) -> Response:
    username, request_id = context.field("user"), context.field("request")
    # The user concerned may not manage its own account.
    told = request_id in [each.id for each in context.flow.concerning(context.actor)]
    if not told and _CONFIRM.find(context.find_user(username), request_id) is None:
        return _CONFIRM.open(context)
    try:
        request = context.flow.cancel(context.actor, request_id)
    except errors.RequestClosed:
        return _CONFIRM.open(context)
    text = f"The request to {request.change} was cancelled. Nothing else has changed."
    if told:
        return context.redirect("", text)
    return context.redirect("user", text, user=request.username)


def show_done(
    context: Context,
    kind: RequestKind,
    adds: Collection[AddressRange],
    removed: Collection[AddressRange],
    users: Collection[str],
    revision: int,
) -> Response:
    """Redirect to the user's page, or after a change of several to the list, with a message."""
    known = context.guard.wait_for(revision, _CATCH_UP_SECONDS)
    text = _messages.describe_done(kind, adds, removed)
    username, page = next(iter(users)), "user"
    if len(users) > 1:
        text, username, page = f"{text} This was done for {len(users)} traders.", "", ""
    else:
        line = context.find_user(username)
        name = line.user.full_name or line.user.spelling
        if not line.restrictions:
            text += f" {name} has no restrictions now and can log in from any address."
        elif rules.all_expired(line.restrictions, context.now):
            text += f" {name} cannot log in from any address: what is left has expired."
        else:
            what = line.summary
            if len(what) > _SUMMARY_LENGTH:
                what = f"the {len(line.restrictions)} restrictions listed here"
            text += f" {name} can log in only from: {what}."
    if not known:
        text += " Login servers will know of it within seconds."
    return context.redirect(page, text, user=username)


# -- deletions


def _prepare_delete(
    context: Context, line: UserOverview, restriction: Restriction
) -> dict[str, Any]:
    impact = _judge_deletion(context, line, restriction)
    return {
        "restriction": restriction,
        "impact": impact,
        "opens": impact.direction is Direction.OPENS,
        "demand": context.flow.demanded(RequestKind.DELETE, impact.direction),
        "reason_limit": REASON_LIMIT,
    }


def _judge_deletion(context: Context, line: UserOverview, restriction: Restriction) -> Impact:
    return context.flow.preview(context.actor, line.user.username, None, [restriction.id])


_DELETE: Final = Form[Restriction](
    name="delete",
    action="delete",
    field="restriction",
    kept=("open", "reason"),
    list_subjects=lambda line: line.restrictions,
    show_over=show_ended_restriction,
    prepare=_prepare_delete,
    describe=lambda restriction: f"delete {restriction.addresses}",
)
show_delete = _DELETE.show


def delete(context: Context) -> Response:
    checked = _DELETE.check_version(context)
    if isinstance(checked, Response):
        return checked
    line, restriction = checked
    name = line.user.username
    try:
        impact = _judge_deletion(context, line, restriction)
    except errors.UnknownRestriction:
        return _DELETE.open(context)
    last = impact.direction is Direction.OPENS
    if last and context.field("open") != "accept":
        problem = "Tick the box if you want this, or keep the restriction."
        return _DELETE.refuse(context, {"open": problem})
    try:
        applied = context.flow.delete(
            context.actor,
            restriction.id,
            context.field("reason"),
            allow_lockout=context.field("lockout") == "accept",
            # Use what the form showed; since then this may have become the last restriction.
            allow_opening=last,
        )
    except errors.StoreError:
        raise
    except errors.IPGuardError as error:
        return _refuse_deletion(context, name, restriction, error)
    if isinstance(applied, Applied):
        gone = (restriction.addresses,)
        return show_done(context, RequestKind.DELETE, (), gone, {name}, applied.revision)
    text = _messages.describe_demand(applied.demand)
    return context.redirect("confirm", text, user=name, request=applied.id)


def _refuse_deletion(
    context: Context, username: str, restriction: Restriction, error: errors.IPGuardError
) -> Response:
    if isinstance(error, errors.LockoutRisk):
        return _DELETE.warn_of_lockout(context, error.address)
    if isinstance(error, errors.OpeningRisk):
        return _DELETE.refuse(context, step="changed")
    if isinstance(error, errors.UnknownRestriction):
        return _DELETE.open(context)
    if isinstance(error, errors.DeliveryError):
        text, request_id = _messages.MAIL_FAILED, error.request_id
        return context.redirect("confirm", text, "problem", user=username, request=request_id)
    if isinstance(error, errors.DuplicateRestriction):
        return _open_pending_deletion(context, username, restriction)
    return _DELETE.refuse(context, _messages.explain(error, context.now))


def _open_pending_deletion(context: Context, username: str, restriction: Restriction) -> Response:
    text = "It has been asked to delete this already. The request is pending."
    for request in context.find_user(username).pending:
        if restriction.id in request.removes:
            return context.redirect("confirm", text, "note", user=username, request=request.id)
    return context.redirect("user", text, "note", user=username)
