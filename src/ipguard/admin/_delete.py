"""Deleting a restriction: first what that means, then the change."""

from __future__ import annotations

from typing import Any, Final

from ipguard.admin import _seen, _texts
from ipguard.admin._add import MAIL_FAILED
from ipguard.admin._confirm import applied_page
from ipguard.admin._form import Form, outcome
from ipguard.admin._http import Response
from ipguard.admin._visit import Visit
from ipguard.errors import (
    DeliveryError,
    DuplicateRestriction,
    IPGuardError,
    LockoutRisk,
    OpeningRisk,
    StoreError,
    UnknownRestriction,
)
from ipguard.model import REASON_LIMIT, Applied, Restriction, UserOverview


def _find(line: UserOverview, restriction_id: str) -> Restriction | None:
    return next((one for one in line.restrictions if one.id == restriction_id), None)


def _values(visit: Visit, line: UserOverview, restriction: Restriction) -> dict[str, Any]:
    found = outcome(line, restriction.id, visit.now)
    return {
        "restriction": restriction,
        "needs_number": visit.flow.settings.deletion_needs_number(last=found["opens"]),
        "reason_limit": REASON_LIMIT,
        **found,
    }


_FORM: Final = Form(
    name="delete",
    field="restriction",
    kept=("open", "reason"),
    find=_find,
    gone=_seen.gone,
    values=_values,
    wanted=lambda restriction: f"delete {restriction.addresses}",
)
show = _FORM.show


def submit(visit: Visit) -> Response:
    """Delete, once it is plain what that means."""
    sent = _FORM.sent(visit)
    if isinstance(sent, Response):
        return sent
    line, restriction = sent
    if len(line.restrictions) == 1 and visit.field("open") != "accept":
        return _FORM.again(
            visit, {"open": "Tick the box if you want this, or keep the restriction."}
        )
    return _delete(visit, line, restriction)


def _delete(visit: Visit, line: UserOverview, restriction: Restriction) -> Response:
    name = line.user.username
    try:
        done = visit.flow.delete(
            visit.actor,
            restriction.id,
            visit.field("reason"),
            allow_lockout=visit.field("lockout") == "accept",
            # Asked for what the actor has seen: it may be the last by the time of this.
            allow_opening=len(line.restrictions) == 1,
        )
    except LockoutRisk as risk:
        return _FORM.locks_out(visit, risk)
    except OpeningRisk:
        return _FORM.changed(visit)
    except DeliveryError as failed:
        return visit.go("confirm", MAIL_FAILED, "problem", user=name, request=failed.request_id)
    except StoreError:
        raise
    except IPGuardError as wrong:
        return _refused(visit, name, restriction, wrong)
    if isinstance(done, Applied):
        return applied_page(visit, line.user, done)
    return visit.go(
        "confirm",
        "This deletion needs a number. You will receive an email with it. Enter it here.",
        user=name,
        request=done.id,
    )


def _refused(
    visit: Visit, username: str, restriction: Restriction, wrong: IPGuardError
) -> Response:
    if isinstance(wrong, UnknownRestriction):
        return _FORM.open(visit)
    if not isinstance(wrong, DuplicateRestriction):
        found = _texts.problem(wrong, visit.now)
        return _FORM.again(visit, {found.field: found.text})
    text = "It has been asked to delete this already. The request waits for its number."
    for request in visit.person(username).pending:
        if request.restriction_id == restriction.id:
            return visit.go("confirm", text, "note", user=username, request=request.id)
    return visit.go("user", text, "note", user=username)
