"""The second phase: the number is typed in, sent anew, or the request is cancelled."""

from __future__ import annotations

from typing import Any, Final

from ipguard.admin import _seen, _texts
from ipguard.admin._add import MAIL_FAILED
from ipguard.admin._form import Form, outcome
from ipguard.admin._http import Response
from ipguard.admin._visit import Visit
from ipguard.errors import (
    DeliveryError,
    IPGuardError,
    LockoutRisk,
    NumberExpired,
    NumberFormatError,
    OpeningRisk,
    RequestClosed,
    StoreError,
    TooManyAttempts,
    TooManyRequests,
    UnknownRequest,
    WrongNumber,
)
from ipguard.model import Applied, PendingRequest, User, UserOverview

_ACTOR_LOCKED: Final = (
    "You have given too many wrong numbers, over all your requests. No number is accepted from you "
    "until an operator allows you new attempts. This one was not judged."
)
_SHOWN: Final = 200
_EXPIRED: Final = "This number has expired. Send a new number; the request still waits."


def _values(visit: Visit, line: UserOverview, request: PendingRequest) -> dict[str, Any]:
    return {
        "pending": request,
        "own": request.requested_by == visit.actor.username,
        "expired": request.number_expires_at <= visit.now,
        **outcome(line, request.restriction_id, visit.now),
    }


_FORM: Final = Form(
    name="confirm",
    field="request",
    kept=(),  # never the number
    find=_seen.pending,
    gone=_seen.closed,
    values=_values,
    wanted=_texts.wanted,
)
show = _FORM.show


def submit(visit: Visit) -> Response:
    """Confirm."""
    sent = _FORM.sent(visit)
    if isinstance(sent, Response):
        return sent
    line, request = sent
    if not visit.field("number").strip():
        return _FORM.again(visit, {"number": "Type the confirmation number from the mail."})
    return _confirm(visit, line, request)


def _confirm(visit: Visit, line: UserOverview, request: PendingRequest) -> Response:
    user = line.user
    try:
        applied = visit.flow.confirm(
            visit.actor,
            request.id,
            visit.field("number"),
            allow_lockout=visit.field("lockout") == "accept",
            allow_opening=outcome(line, request.restriction_id, visit.now)["opens"],
        )
    except LockoutRisk as risk:
        return _FORM.locks_out(visit, risk)
    except OpeningRisk:
        return _FORM.changed(visit)
    except (StoreError, UnknownRequest):
        raise
    except IPGuardError as wrong:
        return _refused(visit, wrong)
    return applied_page(visit, user, applied)


def _refused(visit: Visit, wrong: IPGuardError) -> Response:
    problems = {"number": _EXPIRED}
    if isinstance(wrong, RequestClosed) or (
        isinstance(wrong, WrongNumber) and not wrong.attempts_left
    ):
        return _FORM.open(visit)
    if isinstance(wrong, WrongNumber):
        text = f"This is not the number. {_texts.attempts(wrong.attempts_left)}."
        problems = {"number": text}
    elif isinstance(wrong, NumberFormatError):
        problems = {"number": f"The confirmation number {wrong.reason}. No attempt was counted."}
    elif isinstance(wrong, TooManyAttempts):
        problems = {"number": _ACTOR_LOCKED}
    elif not isinstance(wrong, NumberExpired):
        problems = {"": _texts.problem(wrong, visit.now).text}
    return _FORM.again(visit, problems)


def applied_page(visit: Visit, user: User, applied: Applied) -> Response:
    """Go on to the user's page, which shows what holds now, and say what was done."""
    known = visit.caught_up(applied.revision)
    assert applied.restriction is not None
    line = visit.person(user.username)
    added = any(kept.id == applied.restriction.id for kept in line.restrictions)
    name = user.full_name or user.username
    text = f"{applied.restriction.addresses} {'now holds' if added else 'was deleted'}. "
    if applied.unrestricted:
        text += f"{name} has no restrictions now and can log in from any address."
    elif _texts.shut(line, visit.now):
        text += f"{name} cannot log in from any address: what is left has expired."
    else:
        what = line.summary
        if len(what) > _SHOWN:
            what = f"the {len(line.restrictions)} restrictions listed here"
        text += f"{name} can log in only from: {what}."
    if not known:
        text += " Login servers will know of it within seconds."
    return visit.go("user", text, user=user.username)


def resend(visit: Visit) -> Response:
    """Send a new number."""
    username, request_id = visit.field("user"), visit.field("request")
    if _seen.pending(visit.person(username), request_id) is None:
        return _FORM.open(visit)
    text, level = "A new number was sent by email. The one before it is no longer valid.", True
    try:
        visit.flow.resend(visit.actor, request_id)
    except RequestClosed:
        return _FORM.open(visit)
    except TooManyRequests as wrong:
        text, level = _texts.problem(wrong, visit.now).text, False
        if wrong.retry_after <= visit.flow.settings.resend_interval:
            text = f"A number was sent a moment ago. {_texts.retry(wrong, visit.now)}"
    except DeliveryError:
        text, level = MAIL_FAILED, False
    return visit.go(
        "confirm", text, "done" if level else "problem", user=username, request=request_id
    )


def cancel(visit: Visit) -> Response:
    """Cancel a request."""
    username, request_id = visit.field("user"), visit.field("request")
    if _seen.pending(visit.person(username), request_id) is None:
        return _FORM.open(visit)
    try:
        request = visit.flow.cancel(visit.actor, request_id)
    except RequestClosed:
        return _FORM.open(visit)
    return visit.go(
        "user",
        f"The request to {_texts.wanted(request)} was cancelled.",
        user=request.username,
    )
