"""Confirm, resend and cancel a request; delete a restriction."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from ipguard import errors, rules
from ipguard.admin import _messages
from ipguard.admin._concurrency import Form, show_closed_request, show_ended_restriction
from ipguard.admin._context import Context, Level
from ipguard.admin._http import Response
from ipguard.model import REASON_LIMIT, Applied, PendingRequest, Restriction, User, UserOverview

_ACTOR_LOCKED: Final = (
    "You have given too many wrong numbers, over all your requests. No number is accepted from you "
    "until an operator allows you new attempts. This one was not judged."
)
_SUMMARY_LENGTH: Final = 200
_CATCH_UP_SECONDS: Final = 2.0


def preview_removal(
    line: UserOverview, restriction_id: str | None, now: datetime
) -> dict[str, Any]:
    """Return, for a template, what the deletion of a restriction would leave; None deletes none."""
    if restriction_id is None:
        return {"left": line.restrictions, "opens": False, "shuts": False, "ends": None}
    return rules.without(line.restrictions, restriction_id, now)._asdict()


# -- requests


def _prepare_confirm(
    context: Context, line: UserOverview, request: PendingRequest
) -> dict[str, Any]:
    return {
        "pending": request,
        "own": request.requested_by == context.actor.username,
        "expired": request.number_expires_at <= context.now,
        **preview_removal(line, request.restriction_id, context.now),
    }


_CONFIRM: Final = Form[PendingRequest](
    name="confirm",
    field="request",
    kept=(),  # never the number
    list_subjects=lambda line: line.pending,
    show_over=show_closed_request,
    prepare=_prepare_confirm,
    describe=_messages.describe_request,
)
show_confirm = _CONFIRM.show


def confirm(context: Context) -> Response:
    """Confirm a request with its number."""
    checked = _CONFIRM.check_version(context)
    if isinstance(checked, Response):
        return checked
    line, request = checked
    number = context.field("number")
    if not number.strip():
        problem = "Type the confirmation number from the mail."
        return _CONFIRM.refuse(context, {"number": problem})
    try:
        applied = context.flow.confirm(
            context.actor,
            request.id,
            number,
            allow_lockout=context.field("lockout") == "accept",
            allow_opening=preview_removal(line, request.restriction_id, context.now)["opens"],
        )
    except errors.LockoutRisk as risk:
        return _CONFIRM.warn_of_lockout(context, risk.address)
    except errors.OpeningRisk:
        return _CONFIRM.refuse(context, step="changed")
    except (errors.StoreError, errors.UnknownRequest):
        raise
    except errors.IPGuardError as error:
        return _refuse_number(context, error)
    return show_applied(context, line.user, applied)


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
    """Send a new number."""
    text = "A new number was sent by email. The one before it is no longer valid."
    level: Level = "problem"
    username, request_id = context.field("user"), context.field("request")
    if _CONFIRM.find(context.find_user(username), request_id) is None:
        return _CONFIRM.open(context)
    try:
        context.flow.resend(context.actor, request_id)
        level = "done"
    except errors.RequestClosed:
        return _CONFIRM.open(context)
    except errors.TooManyRequests as error:
        text = _messages.explain(error, context.now)[""]
        if error.retry_after <= context.flow.settings.resend_interval:
            text = f"A number was sent a moment ago. {_messages.format_retry(error, context.now)}"
    except errors.DeliveryError:
        text = _messages.MAIL_FAILED
    return context.redirect("confirm", text, level, user=username, request=request_id)


def cancel(context: Context) -> Response:
    """Cancel a request."""
    username, request_id = context.field("user"), context.field("request")
    if _CONFIRM.find(context.find_user(username), request_id) is None:
        return _CONFIRM.open(context)
    try:
        request = context.flow.cancel(context.actor, request_id)
    except errors.RequestClosed:
        return _CONFIRM.open(context)
    text = f"The request to {_messages.describe_request(request)} was cancelled."
    return context.redirect("user", text, user=request.username)


def show_applied(context: Context, user: User, applied: Applied) -> Response:
    """Redirect to the user's page, with a message about the change and its effect."""
    known = context.guard.wait_for(applied.revision, _CATCH_UP_SECONDS)
    assert applied.restriction is not None
    line = context.find_user(user.username)
    added = any(held.id == applied.restriction.id for held in line.restrictions)
    name = user.full_name or user.username
    text = f"{applied.restriction.addresses} {'now holds' if added else 'was deleted'}. "
    if applied.unrestricted:
        text += f"{name} has no restrictions now and can log in from any address."
    elif rules.all_expired(line.restrictions, context.now):
        text += f"{name} cannot log in from any address: what is left has expired."
    else:
        what = line.summary
        if len(what) > _SUMMARY_LENGTH:
            what = f"the {len(line.restrictions)} restrictions listed here"
        text += f"{name} can log in only from: {what}."
    if not known:
        text += " Login servers will know of it within seconds."
    return context.redirect("user", text, user=user.username)


# -- deletions


def _prepare_delete(
    context: Context, line: UserOverview, restriction: Restriction
) -> dict[str, Any]:
    preview = preview_removal(line, restriction.id, context.now)
    return {
        "restriction": restriction,
        "needs_number": context.flow.settings.deletion_needs_number(last=preview["opens"]),
        "reason_limit": REASON_LIMIT,
        **preview,
    }


_DELETE: Final = Form[Restriction](
    name="delete",
    field="restriction",
    kept=("open", "reason"),
    list_subjects=lambda line: line.restrictions,
    show_over=show_ended_restriction,
    prepare=_prepare_delete,
    describe=lambda restriction: f"delete {restriction.addresses}",
)
show_delete = _DELETE.show


def delete(context: Context) -> Response:
    """Delete a restriction, or request its deletion."""
    checked = _DELETE.check_version(context)
    if isinstance(checked, Response):
        return checked
    line, restriction = checked
    name = line.user.username
    last = rules.without(line.restrictions, restriction.id, context.now).opens
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
        return show_applied(context, line.user, applied)
    text = "This deletion needs a number. You will receive an email with it. Enter it here."
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
    text = "It has been asked to delete this already. The request waits for its number."
    for request in context.find_user(username).pending:
        if request.restriction_id == restriction.id:
            return context.redirect("confirm", text, "note", user=username, request=request.id)
    return context.redirect("user", text, "note", user=username)
